"""The published CvT checkpoints, as data.

Names and resolutions: github.com/microsoft/CvT, README. Hub ids: the `microsoft` organisation on
the Hugging Face hub. Top-1 in percent, ImageNet-1k validation: table 2 of the paper.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published checkpoint: 1000 ImageNet-1k classes, trained with QuickGELU."""

    name: str
    authors_file: str
    variant: str
    image_size: int
    pretraining: str
    top1: float

    @property
    def hub_id(self) -> str:
        """Its repository on the hub."""
        return f"microsoft/{self.name}"


PUBLISHED = {
    name: Published(name, f"CvT-{file}.pth", variant, size, pretraining, top1)
    for name, file, variant, size, pretraining, top1 in (
        ("cvt-13", "13-224x224-IN-1k", "cvt-13", 224, "ImageNet-1k", 81.6),
        ("cvt-13-384", "13-384x384-IN-1k", "cvt-13", 384, "ImageNet-1k", 83.0),
        ("cvt-13-384-22k", "13-384x384-IN-22k", "cvt-13", 384, "ImageNet-22k", 83.3),
        ("cvt-21", "21-224x224-IN-1k", "cvt-21", 224, "ImageNet-1k", 82.5),
        ("cvt-21-384", "21-384x384-IN-1k", "cvt-21", 384, "ImageNet-1k", 83.3),
        ("cvt-21-384-22k", "21-384x384-IN-22k", "cvt-21", 384, "ImageNet-22k", 84.9),
        ("cvt-w24-384-22k", "w24-384x384-IN-22k", "cvt-w24", 384, "ImageNet-22k", 87.7),
    )
}
