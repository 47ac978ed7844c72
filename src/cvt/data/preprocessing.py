"""Preprocessing as the released models were evaluated, by transformers' image processors."""

import logging
import operator
import os
import re
from collections.abc import Iterable, Mapping
from math import ceil
from numbers import Real
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

from PIL import Image

from cvt import hub
from cvt.hub import PUBLISHED

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from cvt.configuration import CvtConfig

logger = logging.getLogger(__name__)

REDUCED = 1.5  # times the pixels that preprocessing resizes to, a JPEG decoded smaller must keep

FILES = ("config.json", "preprocessor_config.json", "processor_config.json")  # that are read
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
IMAGE_SIZE = 224  # where neither the caller nor the source gives one
CONVNEXT = "ConvNextImageProcessor"  # of transformers, which CvT's own is
LARGEST = 20.0  # normalised pixels lie between -3 and 3; those of 0 to 255 pass this in any photo
CVT_PREPROCESSING = {
    "crop_pct": 0.875,  # of the resized image's short side; not used from 384 pixels up
    "resample": Image.Resampling.BICUBIC,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
}


def image_processor(
    source: "str | os.PathLike | CvtConfig",
    image_size: int | None = None,
    crop_pct: float | None = None,
    backend: str | None = None,
    **kwargs: Any,
) -> "BaseImageProcessor":
    """The image processor of transformers, set right for a CvT.

    Below 384 pixels it resizes the short side to `int(image_size / crop_pct)` and crops the centre;
    from 384 pixels up it squashes the image to a square. Bicubic, ImageNet's mean and deviation.

    Args:
        source: a published checkpoint (short name or hub id; needs no network), USER/NAME or
            USER/NAME@REVISION of the hub, a model folder or a `CvtConfig`.
        image_size: height and width of the result, in pixels. By default what the checkpoint was
            published with, or that of the folder, else 224.
        crop_pct: share of the resized short side that is kept, above 0 and at most 1. By default
            that of the folder, else 0.875.
        backend: `torchvision` or `pil`; by default torchvision where it is installed, else PIL.
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
    changes = {**_checked_changes(image_size, crop_pct), **kwargs}
    if isinstance(source, str | os.PathLike) and not hub.published(source):
        source = hub.snapshot(source, FILES) if hub.repository(source) else source
    config, default_size = _model(source)
    if config is not None and config.num_channels != 3:
        raise ValueError(
            f"num_channels = {config.num_channels}: images are decoded to RGB, so only models of 3 "
            "channels have an image processor"
        )

    if default_size is None:
        processor = _saved_processor(os.fspath(cast(str, source)), backend, changes)
        described = f"{source}: its {type(processor).__name__}"
    else:
        settings = CVT_PREPROCESSING | {"size": {"shortest_edge": default_size}}
        chosen = _processor_class(CONVNEXT, backend)
        processor, described = chosen.from_dict(settings, **changes), chosen.__name__
    if unknown := sorted(changes.keys() - type(processor).valid_kwargs.__annotations__.keys()):
        raise ValueError(f"{described} has no setting {', '.join(unknown)}")
    size = getattr(getattr(processor, "size", None), "shortest_edge", None)
    if config is not None and size is not None and size < config.minimum_image_size:
        raise ValueError(
            f"image_size = {size}: this model needs at least {config.minimum_image_size} pixels"
        )
    return processor


def normalisation(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, as an image processor applies them to pixels in 0–1."""
    white = 255 * _scale(processor)
    mean, std = (0.0,) * 3, (1.0,) * 3
    if getattr(processor, "do_normalize", False):
        mean, std = (
            tuple(value) if isinstance(value, Iterable) else (value,) * 3
            for value in (processor.image_mean, processor.image_std)
        )
    return tuple(value / white for value in mean), tuple(value / white for value in std)


def _scale(processor: Any) -> float:
    """What an image processor multiplies pixels of 0 to 255 by."""
    is_scaled = getattr(processor, "do_rescale", True)
    return getattr(processor, "rescale_factor", 1 / 255) if is_scaled else 1.0


def check_range(processor: Any) -> None:
    """Make sure that an image processor is for decoded images, whose pixels are 0 to 255.

    Raises:
        ValueError: it is for others; names the setting.
    """
    mean, std = normalisation(processor)
    if min(std) <= 0:
        shown = processor.image_std
        shown = list(shown) if isinstance(shown, Iterable) else shown
        raise ValueError(f"the image processor has image_std = {shown}: must be above 0")
    reach = max(abs(v - m) / s for v in (0, 1) for m, s in zip(mean, std, strict=True))
    scale = _scale(processor)
    if 255 * scale > LARGEST and reach > LARGEST:
        setting = f"rescale_factor = {scale:g}" if processor.do_rescale else "do_rescale = False"
        raise ValueError(
            f"the image processor has {setting}, as for pixels that are 0 to 1 already; those of "
            "decoded images are 0 to 255: set do_rescale to true and rescale_factor to 1/255 in "
            "preprocessor_config.json"
        )


def pixels_needed(processor: Any) -> int | None:
    """The `least` of `decode` for an image processor; None where images must be decoded whole."""
    from transformers import ConvNextImageProcessor, ConvNextImageProcessorPil

    known = isinstance(processor, ConvNextImageProcessor | ConvNextImageProcessorPil)
    if not known or not processor.do_resize or processor.resample != Image.Resampling.BICUBIC:
        return None
    side = processor.size.shortest_edge
    if side is None:  # the processor will raise the error
        return None
    return ceil(REDUCED * (side if side >= 384 else int(side / processor.crop_pct)))


def visible_box(processor: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of an image that an image processor keeps: left, top, right, bottom.

    It is measured on the processed pixels of a picture of slopes, so that it is right for every
    processor that resizes and crops, to a thousandth.

    Args:
        processor: the image processor.
        size: width and height of the decoded image, in pixels.

    Returns:
        Shares of the width and of the height; below 0 or above 1 where the processor pads.
    """
    import numpy as np

    x, y = ((np.arange(side, dtype=np.float32) + 0.5) / side for side in size)
    # Slopes in both directions: along one, whole rows would have the same error of rounding.
    slopes = (2 * x + y[:, None]) / 3, (x + 2 * y[:, None]) / 3
    picture = np.stack([*slopes, slopes[0]], axis=2)  # (H, W, 3)
    image = Image.fromarray(np.rint(255 * picture).astype(np.uint8))
    mean, std = normalisation(processor)
    first, second = processor(image, return_tensors="np")["pixel_values"][0][:2]  # (H, W) each
    first, second = (v * s + m for v, s, m in zip((first, second), std, mean, strict=False))
    bounds = []
    for place, axis in ((2 * first - second, 0), (2 * second - first, 1)):
        values = place.mean(axis=axis)
        cut = len(values) // 10  # resizing bends the ends
        centres = np.arange(len(values)) + 0.5
        slope, start = np.polyfit(centres[cut : -cut or None], values[cut : -cut or None], 1)
        bounds.append((float(start), float(start + slope * len(values))))
    (left, right), (top, bottom) = bounds
    return left, top, right, bottom


def _processor_class(name: str, backend: str | None) -> Any:
    """The class of transformers, by its name without the backend; None if there is no such."""
    import transformers
    from transformers.utils import is_torchvision_available

    with_torchvision = backend != "pil" and is_torchvision_available()
    return getattr(transformers, name if with_torchvision else f"{name}Pil", None)


def _saved_processor(
    folder: str, backend: str | None, changes: dict[str, Any]
) -> "BaseImageProcessor":
    """The image processor whose settings a folder has, as any version of transformers wrote them.

    Raises:
        ValueError: no image processor has these settings; names the one that is wrong.
    """
    from transformers import ImageProcessingMixin

    settings, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    return processor_of(settings, folder, backend, changes)


def processor_of(
    settings: Mapping[str, Any],
    source: str,
    backend: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> "BaseImageProcessor":
    """The image processor of such settings, as `to_dict` of any version of transformers gives them.

    Args:
        settings: of a preprocessor_config.json.
        source: how errors call where they are from.
        backend: as in `image_processor`.
        changes: settings that win.

    Raises:
        ValueError: no image processor has these settings; names the one that is wrong.
    """
    changes = changes or {}
    keys = ("image_processor_type", "feature_extractor_type")
    key = next((key for key in keys if settings.get(key)), keys[0])
    saved = str(settings.get(key) or CONVNEXT)
    name = re.sub("(Fast|Pil)$", "", saved).replace("FeatureExtractor", "ImageProcessor")
    chosen = _processor_class(name, backend) if name.endswith("ImageProcessor") else None
    if chosen is None:
        raise ValueError(
            f"{source}: {key} = {saved!r}: transformers has no such image processor, and code "
            f"in a folder is not run; that of a CvT is {CONVNEXT}"
        )
    # A null was written for the class's own default.
    settings = {n: value for n, value in settings.items() if value is not None and n not in keys}
    if name == CONVNEXT and "size" not in changes and "size" in settings:
        settings["size"] = {"shortest_edge": _square(settings["size"], source)}
    return chosen.from_dict(settings, **changes)


def _square(size: Any, folder: str) -> int:
    """Height and width, in pixels, of a ConvNext processor's images, as any version wrote them."""
    if isinstance(size, Mapping):
        given = {name: value for name, value in size.items() if value is not None}
        sides = set(given.values())
        known = given.keys() in ({"shortest_edge"}, {"height", "width"})
        size = sides.pop() if known and len(sides) == 1 else given
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"{folder}: size = {size!r}: a {CONVNEXT} returns squares, so it must be one integer, "
            "shortest_edge, or height and width that are equal"
        )
    return size


def _checked_changes(image_size: int | None, crop_pct: float | None) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if image_size is not None:
        whole = isinstance(image_size, SupportsIndex) and not isinstance(image_size, bool)
        if not whole or operator.index(image_size) < 1:
            raise ValueError(f"image_size = {image_size!r}: must be an integer of at least 1")
        changes["size"] = {"shortest_edge": operator.index(image_size)}
    if crop_pct is not None:
        if not isinstance(crop_pct, Real) or not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct = {crop_pct!r}: must be a number above 0 and at most 1")
        changes["crop_pct"] = float(crop_pct)
    return changes


def _model(source: "str | os.PathLike | CvtConfig") -> "tuple[CvtConfig | None, int | None]":
    """Its configuration, where it has one, and its image size, where no file of its own has one."""
    from transformers import PreTrainedConfig

    from cvt.configuration import CvtConfig

    if isinstance(source, CvtConfig):
        return source, IMAGE_SIZE
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            "source is a published name, a model folder or a cvt.CvtConfig, "
            f"not {type(source).__module__}.{type(source).__qualname__}"
        )
    if checkpoint := hub.published(source):
        return CvtConfig.from_variant(checkpoint.variant), checkpoint.image_size
    if not os.path.isdir(source):
        raise OSError(
            f"{source}: is neither a model folder nor a published checkpoint; "
            f"those are {', '.join(PUBLISHED)}"
        )
    config = None
    if os.path.isfile(os.path.join(source, "config.json")):
        fields, _ = PreTrainedConfig.get_config_dict(source)
        if fields.get("model_type") == CvtConfig.model_type:
            config = CvtConfig.from_dict(fields)
    if any(os.path.isfile(os.path.join(source, file)) for file in FILES[1:]):
        return config, None
    logger.warning(
        "%s has no %s: CvT's own preprocessing is assumed, at %d pixels unless image_size is given",
        source,
        FILES[1],
        IMAGE_SIZE,
    )
    return config, IMAGE_SIZE
