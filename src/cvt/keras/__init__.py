"""CvT in Keras 3, on TensorFlow, JAX or PyTorch."""

from cvt.keras import requirements as requirements
from cvt.keras.losses import Accuracy, ClassificationLoss
from cvt.keras.modeling import (
    TFCvtForImageClassification,
    TFCvtModel,
    TFCvtModelOutput,
    TFImageClassifierOutput,
)

__all__ = [
    "Accuracy",
    "ClassificationLoss",
    "TFCvtForImageClassification",
    "TFCvtModel",
    "TFCvtModelOutput",
    "TFImageClassifierOutput",
]
