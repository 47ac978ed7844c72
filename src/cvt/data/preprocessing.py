"""Images to pixels as the released models were evaluated, in Pillow and numpy.

Every path uses it: models and exports, training's evaluation, calibration, explanations. Its pixels
are those of transformers' `ConvNextImageProcessorPil`, bit for bit; it imports no transformers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from math import ceil
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image

REDUCED = 1.5  # times the pixels that preprocessing resizes to, a JPEG decoded smaller must keep

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
SQUASHED = 384  # height and width, in pixels, from which on nothing is cropped
CONVNEXT = "ConvNextImageProcessor"  # of transformers, which CvT's own is
LARGEST = 20.0  # normalised pixels lie between -3 and 3; those of 0 to 255 pass this in any photo
# Settings of transformers' processors that change no pixels of a list of decoded images.
WITHOUT_EFFECT = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "return_tensors"),
    *("do_convert_rgb", "data_format", "input_data_format", "device", "default_to_square"),
    *("disable_grouping", "image_seq_length"),
}


@dataclass(frozen=True)
class Preprocessing:
    """Resizes, crops and normalises decoded images.

    The settings are transformers' of the same names; the defaults are those of its
    `ConvNextImageProcessor`.

    Attributes:
        image_size: height and width of the result, in pixels; `size` in transformers.
        crop_pct: the share of the resized short side that is kept, below 384 pixels.
    """

    image_size: int = 384
    crop_pct: float = 224 / 256
    resample: int = Image.Resampling.BICUBIC
    do_resize: bool = True
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: float | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: float | tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def takes(cls, settings: Mapping[str, Any]) -> bool:
        """Whether these settings of a `ConvNextImageProcessor` are all known here."""
        known = {each.name for each in fields(cls)} | {"size"} | WITHOUT_EFFECT
        return not any(value for name, value in settings.items() if name not in known)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], source: str) -> "Preprocessing":
        """The preprocessing of the settings of a `ConvNextImageProcessor`.

        Args:
            settings: as in a preprocessor_config.json; null is the default.
            source: how errors call where they are from.

        Raises:
            ValueError: a setting is illegal; names it.
        """
        names = {each.name for each in fields(cls)}
        given = {n: v for n, v in settings.items() if n in names and v is not None}
        for name, value in given.items():
            wanted, fits = _kind(name, value)
            if not fits:
                raise ValueError(f"{source}: {name} = {value!r}: must be {wanted}")
            given[name] = tuple(value) if isinstance(value, list) else value
        if settings.get("size") is not None:
            given["image_size"] = square(settings["size"], source)
        return cls(**given)

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """The pixels of RGB images, (B, 3, H, W) in float32."""
        return self.normalise(self.resize(images))

    def resize(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Resized and cropped RGB images, (B, H, W, 3) of 0 to 255."""
        return np.stack([np.asarray(self._resized(image)) for image in images])

    def _resized(self, image: Image.Image) -> Image.Image:
        if not self.do_resize:
            return image
        side = self.image_size
        if side >= SQUASHED:
            return image.resize((side, side), self.resample)
        resized = self._uncropped(image)
        left, top = ((each - side) // 2 for each in resized.size)
        return resized.crop((left, top, left + side, top + side))

    def _uncropped(self, image: Image.Image) -> Image.Image:
        """Resized to be cropped, below `SQUASHED` pixels."""
        width, height = image.size
        short, shorter = int(self.image_size / self.crop_pct), min(width, height)
        return image.resize((short * width // shorter, short * height // shorter), self.resample)

    @property
    def unresized(self) -> "Preprocessing":
        """The same for images that have their size."""
        return replace(self, do_resize=False)

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """What `resize` returns as the pixels of a model, (B, 3, H, W) in float32."""
        B, H, W, C = images.shape
        pixels = np.empty((B, C, H, W), np.float32)
        for channel, values in enumerate(self._values):
            np.take(values, images[..., channel], out=pixels[:, channel], mode="clip")
        return pixels

    @cached_property
    def _values(self) -> np.ndarray:
        """The pixel values of 0 to 255 in each channel, (3, 256), rounded as transformers does."""
        values = np.arange(256, dtype=np.float64)
        if self.do_rescale:
            values *= self.rescale_factor
        table = np.broadcast_to(values.astype(np.float32), (3, 256))
        if self.do_normalize:
            mean, std = (
                np.broadcast_to(np.asarray(each, np.float32), 3)[:, None]
                for each in (self.image_mean, self.image_std)
            )
            table = (table - mean) / std
        return np.ascontiguousarray(table)

    @property
    def pixels_needed(self) -> int | None:
        """The `least` of `decode`; None where images must be decoded whole."""
        if not self.do_resize or self.resample != Image.Resampling.BICUBIC:
            return None
        side = self.image_size
        return ceil(REDUCED * (side if side >= SQUASHED else int(side / self.crop_pct)))


class FiveCrops(Preprocessing):
    """The same, but for the crops: the centre, as before, and the corners of the resized image."""

    @classmethod
    def of(cls, preprocessing: "AnyPreprocessing") -> "FiveCrops":
        """The five crops of a preprocessing.

        Raises:
            ValueError: it crops nothing.
        """
        if not isinstance(preprocessing, Preprocessing) or not preprocessing.do_resize:
            raise ValueError("five-crop: the model's image processor does not crop; take flip")
        if preprocessing.image_size >= SQUASHED:
            raise ValueError(
                f"five-crop: from {SQUASHED} pixels on, images are resized and not cropped; take "
                "flip"
            )
        return cls(**{each.name: getattr(preprocessing, each.name) for each in fields(cls)})

    def resize(self, images: Sequence[Image.Image]) -> np.ndarray:
        """The crops of RGB images, (5·B, H, W, 3) of 0 to 255: all centres first."""
        side = self.image_size
        corners: list[list[np.ndarray]] = [[], [], [], []]
        for image in images:
            resized = self._uncropped(image)
            right, bottom = (each - side for each in resized.size)
            places = ((0, 0), (right, 0), (0, bottom), (right, bottom))
            for crops, (left, top) in zip(corners, places, strict=True):
                crops.append(np.asarray(resized.crop((left, top, left + side, top + side))))
        return np.concatenate([super().resize(images), *corners])


def _kind(name: str, value: Any) -> tuple[str, bool]:
    """What a setting has to be, and whether this value is that."""

    def is_number(value: Any) -> bool:
        return isinstance(value, Real) and not isinstance(value, bool)

    if name.startswith("do_"):
        return "true or false", value in (0, 1)
    if name in ("image_mean", "image_std"):
        several = isinstance(value, list | tuple) and len(value) == 3
        return "a number or three", is_number(value) or (several and all(map(is_number, value)))
    if name == "resample":
        return "0 to 5, a filter of Pillow", value in list(Image.Resampling)
    return "a number above 0", is_number(value) and value > 0


def square(size: Any, source: str) -> int:
    """Height and width, in pixels, of a ConvNext processor's images, as any version wrote them."""
    if isinstance(size, Mapping):
        given = {name: value for name, value in size.items() if value is not None}
        sides = set(given.values())
        known = given.keys() in ({"shortest_edge"}, {"height", "width"})
        size = sides.pop() if known and len(sides) == 1 else given
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"{source}: size = {size!r}: a {CONVNEXT} returns squares, so it must be one integer, "
            "shortest_edge, or height and width that are equal"
        )
    return size


class OtherPreprocessing:
    """What another image processor than CvT's computes, or any function that is called like one.

    Args:
        processor: takes a list of PIL images and `return_tensors`, gives `pixel_values`.
    """

    pixels_needed = None

    def __init__(self, processor: Callable) -> None:
        self.processor = processor
        self.do_resize = bool(getattr(processor, "do_resize", True))

    def __getattr__(self, name: str) -> Any:
        if name == "processor":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.processor, name)

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """The pixels of RGB images, (B, 3, H, W) in float32."""
        return self.resize(images)

    def resize(self, images: Sequence[Image.Image]) -> np.ndarray:
        """All that the processor does, (B, 3, H, W)."""
        pixels = self.processor(list(images), return_tensors="np")["pixel_values"]
        return np.asarray(pixels, np.float32)

    @property
    def unresized(self) -> "OtherPreprocessing":
        """The same for images that have their size."""
        return OtherPreprocessing(partial(self.processor, do_resize=False))

    def normalise(self, images: np.ndarray) -> np.ndarray:
        """The same."""
        return images


AnyPreprocessing = Preprocessing | OtherPreprocessing


def preprocessing_of(processor: Any) -> AnyPreprocessing:
    """The preprocessing that an image processor stands for.

    That of a `ConvNextImageProcessor` of either backend is computed here, in Pillow and numpy; any
    other processor is called.

    Raises:
        ValueError: a setting is illegal; names it.
    """
    if isinstance(processor, AnyPreprocessing):
        return processor
    kind = type(processor)
    if (
        kind.__module__.startswith("transformers.")
        and kind.__name__.removesuffix("Pil") == CONVNEXT
    ):
        settings = processor.to_dict()
        if Preprocessing.takes(settings):
            return Preprocessing.from_settings(settings, "the image processor")
    return OtherPreprocessing(processor)


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
    x, y = ((np.arange(side, dtype=np.float32) + 0.5) / side for side in size)
    # Slopes in both directions: along one, whole rows would have the same error of rounding.
    slopes = (2 * x + y[:, None]) / 3, (x + 2 * y[:, None]) / 3
    picture = np.stack([*slopes, slopes[0]], axis=2)  # (H, W, 3)
    image = Image.fromarray(np.rint(255 * picture).astype(np.uint8))
    mean, std = normalisation(processor)
    first, second = preprocessing_of(processor)([image])[0, :2]  # (H, W) each
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
