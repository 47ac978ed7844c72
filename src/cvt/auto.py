"""This package's classes behind transformers' Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    ConvNextImageProcessorPil,
)

from cvt.backbone import CvtBackbone
from cvt.configuration import CvtConfig
from cvt.modeling import CvtForImageClassification, CvtModel


def register_auto_classes() -> None:
    """Make transformers' Auto classes and `pipeline` give this package's CvT, not their own.

    Example:
        >>> import cvt
        >>> from transformers import AutoModelForImageClassification
        >>> cvt.register_auto_classes()
        >>> config = cvt.CvtConfig.from_variant("cvt-digits")
        >>> type(AutoModelForImageClassification.from_config(config)).__module__
        'cvt.modeling'
    """
    AutoConfig.register("cvt", CvtConfig, exist_ok=True)
    AutoModel.register(CvtConfig, CvtModel, exist_ok=True)
    AutoModelForImageClassification.register(CvtConfig, CvtForImageClassification, exist_ok=True)
    AutoBackbone.register(CvtConfig, CvtBackbone, exist_ok=True)
    processors: dict[str, type] = {
        "torchvision": ConvNextImageProcessor,
        "pil": ConvNextImageProcessorPil,
    }
    AutoImageProcessor.register(CvtConfig, image_processor_classes=processors, exist_ok=True)
