"""CvT, the Convolutional vision Transformer: exact, strict, with transformers' API and weights.

Names load on first use: importing `cvt` imports neither torch, transformers nor Keras.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in _HOME and _MODULES, for mypy, pyright and editors
    from cvt import checkpoints as checkpoints
    from cvt.auto import register_auto_classes as register_auto_classes
    from cvt.backbone import CvtBackbone as CvtBackbone
    from cvt.configuration import CvtConfig as CvtConfig
    from cvt.data.image_processor import image_processor as image_processor
    from cvt.inference.classifier import Classifier as Classifier
    from cvt.inference.explain import Explainer as Explainer
    from cvt.inference.explain import explain as explain
    from cvt.inference.explanation import Explanation as Explanation
    from cvt.inference.label_errors import find_label_errors as find_label_errors
    from cvt.inference.probe import probe as probe
    from cvt.keras import TFCvtForImageClassification as TFCvtForImageClassification
    from cvt.keras import TFCvtModel as TFCvtModel
    from cvt.modeling import CvtForImageClassification as CvtForImageClassification
    from cvt.modeling import CvtModel as CvtModel
    from cvt.runtime.base import PixelError as PixelError
    from cvt.runtime.fused import fuse as fuse

__version__ = "0.2.0"

_HOME = {
    "CvtConfig": "configuration",
    "CvtModel": "modeling",
    "CvtForImageClassification": "modeling",
    "CvtBackbone": "backbone",
    "TFCvtModel": "keras",
    "TFCvtForImageClassification": "keras",
    "register_auto_classes": "auto",
    "fuse": "runtime.fused",
    "image_processor": "data.image_processor",
    "Classifier": "inference.classifier",
    "explain": "inference.explain",
    "Explainer": "inference.explain",
    "Explanation": "inference.explanation",
    "find_label_errors": "inference.label_errors",
    "probe": "inference.probe",
    "PixelError": "runtime.base",
}
_MODULES = ("checkpoints",)
__all__ = ["__version__", *_HOME, *_MODULES]

import_module("cvt.keras_names").register_with_keras()


if not TYPE_CHECKING:  # or type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if "tensorflow" in sys.modules:  # else what follows might end the process
            import_module("cvt.libraries").keep_triton_apart()
        if name in _HOME:
            return getattr(import_module(f"cvt.{_HOME[name]}"), name)
        if name in _MODULES:
            return import_module(f"cvt.{name}")
        raise AttributeError(f"module 'cvt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
