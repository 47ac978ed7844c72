"""The published CvT checkpoints, as data.

Names and resolutions: github.com/microsoft/CvT, README; hub ids: the `microsoft` organisation on the Hugging Face
hub; top-1: ImageNet-1k validation, table 2 of the paper.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published checkpoint: 1000 ImageNet-1k classes, trained with QuickGELU."""

    name: str
    hub_id: str
    authors_file: str
    variant: str
    image_size: int
    pretraining: str
    top1: float


PUBLISHED = {
    published.name: published
    for published in (
        Published("cvt-13", "microsoft/cvt-13", "CvT-13-224x224-IN-1k.pth", "cvt-13", 224, "ImageNet-1k", 81.6),
        Published("cvt-13-384", "microsoft/cvt-13-384", "CvT-13-384x384-IN-1k.pth", "cvt-13", 384, "ImageNet-1k", 83.0),
        Published("cvt-13-384-22k", "microsoft/cvt-13-384-22k", "CvT-13-384x384-IN-22k.pth", "cvt-13", 384, "ImageNet-22k", 83.3),
        Published("cvt-21", "microsoft/cvt-21", "CvT-21-224x224-IN-1k.pth", "cvt-21", 224, "ImageNet-1k", 82.5),
        Published("cvt-21-384", "microsoft/cvt-21-384", "CvT-21-384x384-IN-1k.pth", "cvt-21", 384, "ImageNet-1k", 83.3),
        Published("cvt-21-384-22k", "microsoft/cvt-21-384-22k", "CvT-21-384x384-IN-22k.pth", "cvt-21", 384, "ImageNet-22k", 84.9),
        Published("cvt-w24-384-22k", "microsoft/cvt-w24-384-22k", "CvT-w24-384x384-IN-22k.pth", "cvt-w24", 384, "ImageNet-22k", 87.7),
    )
}  # fmt: skip
