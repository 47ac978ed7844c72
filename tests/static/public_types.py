"""The types of the public names, for mypy in `make lint` and in `make test-wheel`; it never runs.

The expected classes come from their own modules: `cvt.Classifier` might be Any.
"""

from collections.abc import Callable, Iterator
from typing import Any, assert_type

from transformers.image_processing_utils import BaseImageProcessor

import cvt
import cvt.train
from cvt.backbone import CvtBackbone
from cvt.configuration import CvtConfig
from cvt.inference.classifier import Classifier
from cvt.keras.modeling import TFCvtForImageClassification, TFCvtModel
from cvt.modeling import CvtForImageClassification, CvtModel
from cvt.runtime.base import PixelError
from cvt.runtime.fused import FusedCvt
from cvt.train.progress import Row

assert_type(cvt.__version__, str)
assert_type(cvt.CvtConfig.from_variant("cvt-13", num_labels=10), CvtConfig)
assert_type(cvt.CvtModel.from_pretrained("cvt-13"), CvtModel)
model = cvt.CvtForImageClassification.from_pretrained("cvt-13", num_labels=10)
assert_type(model, CvtForImageClassification)
assert_type(model.config, CvtConfig)
assert_type(cvt.CvtBackbone.from_pretrained("cvt-13"), CvtBackbone)
assert_type(cvt.TFCvtModel.from_pretrained("cvt-13"), TFCvtModel)
assert_type(cvt.TFCvtForImageClassification.from_pretrained("cvt-13"), TFCvtForImageClassification)
assert_type(cvt.fuse(model), FusedCvt)
assert_type(cvt.image_processor("cvt-13"), BaseImageProcessor)
assert_type(cvt.Classifier("cvt-13"), Classifier)
assert_type(cvt.Classifier("cvt-13").stream("photos"), Iterator[dict[str, Any]])
assert_type(cvt.PixelError("names what is wrong"), PixelError)
assert_type(cvt.register_auto_classes, Callable[[], None])
assert_type(cvt.checkpoints.load_classifier("cvt-13"), CvtForImageClassification)
assert_type(cvt.checkpoints.load_config("cvt-13"), CvtConfig)
assert_type(cvt.train.train(cvt.train.load_recipe("photos"), "runs/photos"), Row)

# A name that does not exist is an error, whose absence mypy reports as an unused "type: ignore".
print(cvt.Clasifier)  # type: ignore[attr-defined]
print(cvt.checkpoints.load_clasifier)  # type: ignore[attr-defined]
print(cvt.train.tran)  # type: ignore[attr-defined]
