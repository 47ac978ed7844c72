"""transformers' image processors, set right for a CvT."""

import os
from typing import TYPE_CHECKING, Any

from cvt.architecture import Architecture
from cvt.data.preprocessing import (
    CONVNEXT,
    AnyPreprocessing,
    OtherPreprocessing,
    Preprocessing,
)
from cvt.data.processor_settings import ProcessorSettings, processor_settings
from cvt.libraries import require

if TYPE_CHECKING:
    from transformers import BaseImageProcessor


def image_processor(
    source: str | os.PathLike | Architecture,
    image_size: int | None = None,
    crop_pct: float | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> "BaseImageProcessor":
    """The image processor of transformers, set right for a CvT.

    Below 384 pixels it resizes the short side to `int(image_size / crop_pct)` and crops the centre;
    from 384 pixels up it squashes the image to a square. Bicubic, ImageNet's mean and deviation.
    By Pillow, its pixels are those that this package computes everywhere, bit for bit; by
    torchvision they differ by up to two levels of 255.

    Args:
        source: a published checkpoint (short name or hub id; needs no network), USER/NAME or
            USER/NAME@REVISION of the hub, a model folder or a `CvtConfig`.
        image_size: height and width of the result, in pixels. By default what the checkpoint was
            published with, or that of the folder, else 224.
        crop_pct: share of the resized short side that is kept, above 0 and at most 1. By default
            that of the folder, else 0.875.
        backend: `pil`, the default, or `torchvision`.
        kwargs: other settings of the processor, as `do_normalize=False`.

    Returns:
        A `ConvNextImageProcessor[Pil]`, or the class that the folder names; it gives
        `pixel_values`, (batch, 3, image_size, image_size).

    Raises:
        OSError: `source` is neither a model on the hub nor a folder, or its files cannot be read.
        TypeError: `source` is of another type.
        ValueError: a setting is illegal, or does not fit the model.

    Example:
        >>> import cvt
        >>> from PIL import Image
        >>> processor = cvt.image_processor("cvt-13")  # needs no network
        >>> processor(Image.new("RGB", (640, 480)), return_tensors="pt").pixel_values.shape
        torch.Size([1, 3, 224, 224])
    """
    if backend not in (None, "torchvision", "pil"):
        raise ValueError(f"backend = {backend!r}: must be torchvision or pil")
    settings = processor_settings(source, image_size, crop_pct, **kwargs)
    return build_processor(settings, backend or "pil")


def build_processor(settings: ProcessorSettings, backend: str = "pil") -> "BaseImageProcessor":
    """The image processor of transformers of such settings.

    Raises:
        ValueError: no image processor has these settings; names the one that is wrong.
    """
    chosen = _processor_class(settings.kind, backend)
    if chosen is None:
        raise ValueError(
            f"{settings.source}: {settings.named}: transformers has no such image processor, and "
            f"code in a folder is not run; that of a CvT is {CONVNEXT}"
        )
    processor = chosen.from_dict(settings.values)
    if unknown := sorted(settings.changes - chosen.valid_kwargs.__annotations__.keys()):
        described = (
            f"{settings.source}: its {chosen.__name__}" if settings.named else chosen.__name__
        )
        raise ValueError(f"{described} has no setting {', '.join(unknown)}")
    size = getattr(getattr(processor, "size", None), "shortest_edge", None)
    if size is not None:
        settings.check_size(size)
    return processor


def build_preprocessing(settings: ProcessorSettings) -> AnyPreprocessing:
    """The preprocessing of such settings, without transformers where they are CvT's.

    Raises:
        ImportError: they are for another image processor, and transformers is not installed.
        ValueError: a setting is illegal; names it.
    """
    if settings.kind == CONVNEXT and Preprocessing.takes(settings.values):
        return Preprocessing.from_settings(settings.values, settings.source)
    require(f"{settings.source}: {settings.named or settings.kind}", "transformers", extra="train")
    return OtherPreprocessing(build_processor(settings))


def _processor_class(kind: str, backend: str) -> Any:
    """The class of transformers, by its name without the backend; None if there is no such."""
    import transformers

    if not kind.endswith("ImageProcessor"):
        return None
    by_torchvision = getattr(transformers, kind, None)
    return (
        by_torchvision
        if backend == "torchvision"
        else getattr(transformers, f"{kind}Pil", by_torchvision)
    )
