"""Pixels in, logits and features out: what every runtime promises, and pixels that none takes."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cvt.architecture import Architecture
from cvt.data.preprocessing import LARGEST
from cvt.runtime.features import FEATURES, LOGITS, FeatureSettings, output_names

if TYPE_CHECKING:
    from torch import Tensor

Pixels = TypeVar("Pixels", bound="np.ndarray | Tensor")


class PixelError(ValueError):
    """Pixels that a runtime does not take; the message names what was expected.

    Example:
        >>> import cvt, torch
        >>> from cvt.runtime import open_runtime
        >>> config = cvt.CvtConfig.from_variant("cvt-digits")
        >>> runtime = open_runtime(cvt.CvtForImageClassification(config), "torch")
        >>> runtime(torch.zeros(3, 32, 32))
        Traceback (most recent call last):
            ...
        cvt.runtime.base.PixelError: pixels have shape (3, 32, 32): expected (batch, 3, ...
    """


class Runtime(ABC):
    """A classifier, ready to be called. Several threads may call it, and get the serial answers.

    Attributes:
        name: of what computes: `torch`, `fused`, `compiled`, `onnxruntime`, `openvino`,
            `tensorflow` or `litert`.
        config: the classifier's; of an export, whose libraries are few, a `ClassifierConfig`.
        precision: `fp32`, `bf16`, `fp16` or `int8`.
        device: `cpu`, or a device's name in torch.
        threads: that compute; None where that is left to the library.
        image_size: the one height and width that it takes, in pixels; None if any.
        single: whether what it runs takes one image at a time; callers need not mind.
        feature_settings: which features it computes beside or in place of the logits; None if it
            computes none.
        outputs: what it computes: `logits`, `features` or both.
    """

    name: str

    def __init__(
        self,
        config: Architecture,
        precision: str,
        device: str = "cpu",
        threads: int | None = None,
        image_size: tuple[int, int] | None = None,
        single: bool = False,
        features: FeatureSettings | None = None,
    ) -> None:
        self.config = config
        self.minimum_image_size = config.minimum_image_size
        self.precision = precision
        self.device = device
        self.threads = threads
        self.image_size = image_size
        self.single = single
        self.feature_settings = features.of(config) if features else None
        self.outputs = output_names(config, self.feature_settings)

    @property
    def describe(self) -> str:
        """Name, precision, device and threads as a text."""
        unit = "thread" if self.threads == 1 else "threads"
        threads = f", {self.threads} {unit}" if self.threads else ""
        return f"{self.name} {self.precision} on {self.device}{threads}"

    def __call__(self, pixels: Pixels, preprocessed: bool = False) -> Pixels:
        """The logits, (B, K) in float32, of pixels, (B, C, H, W).

        Args:
            pixels: an array or a tensor of floats of any precision on any device, normalised as the
                image processor does. The logits of a tensor are a tensor on the CPU.
            preprocessed: they come from the model's image processor, whatever their range is.

        Raises:
            PixelError: they are something else; names what was expected.
            ValueError: the model has another number of classes than its configuration, or the
                runtime computes the features of an earlier stage alone.
        """
        return self.run(pixels, preprocessed, LOGITS)[LOGITS]

    def features(self, pixels: Pixels, preprocessed: bool = False) -> Pixels:
        """The features, (B, C) in float32, of pixels; arguments and errors as in `__call__`.

        Raises:
            ValueError: it was opened without features, or is of an export that has none.
        """
        return self.run(pixels, preprocessed, FEATURES)[FEATURES]

    def run(self, pixels: Pixels, preprocessed: bool = False, *needed: str) -> dict[str, Pixels]:
        """All that it computes of pixels in one pass, by the names in `outputs`.

        Args:
            pixels: as in `__call__`.
            preprocessed: likewise.
            needed: outputs that there must be.

        Raises:
            ValueError: there is no such output; else as in `__call__`.
        """
        for name in needed:
            if name not in self.outputs:
                raise ValueError(
                    "the runtime computes no features: it was opened without `features`"
                    if name == FEATURES
                    else "the runtime computes the features of an earlier stage alone, no logits"
                )
        array = self.checked(pixels, preprocessed)
        images = 1 if self.single else self.images_at_once(array)
        whole = len(array) // images * images
        bounds = [*range(0, whole, images), *range(whole, len(array) + 1)]
        parts = [self._run(array[i:j]) for i, j in pairwise(bounds)]
        columns = map(np.concatenate, zip(*parts, strict=True))
        found: dict[str, Any] = dict(zip(self.outputs, columns, strict=True))
        classes = self.config.num_labels
        if LOGITS in found and classes and found[LOGITS].shape[1] != classes:
            raise ValueError(
                f"the model has {found[LOGITS].shape[1]} classes, and its configuration has "
                f"{classes}"
            )
        if isinstance(pixels, np.ndarray):
            return found
        to_tensor = sys.modules["torch"].from_numpy  # whoever has a tensor has imported it
        return {name: to_tensor(values) for name, values in found.items()}

    @abstractmethod
    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        """The `outputs`, (B, …) each in float32, of checked pixels in float32, contiguous."""

    def check_graph(self, path: Path, shape: Sequence[int | None]) -> None:
        """Make sure that an exported graph takes the pixels that export.json and config.json list.

        Args:
            path: of the graph.
            shape: of the pixels that it takes, (B, C, H, W); None where it may differ.

        Raises:
            ValueError: it takes others.
        """
        listed = [1 if self.single else None, self.config.num_channels]
        listed += self.image_size or (None, None)
        if list(shape) != listed:
            shapes = " and ".join(
                str(tuple(each)).replace("None", "any") for each in (shape, listed)
            )
            raise ValueError(
                f"{path}: its pixels and those of export.json and config.json differ: "
                f"{shapes} for (batch, channels, height, width)"
            )

    def images_at_once(self, pixels: np.ndarray) -> int:
        """How many of these images a call of `_run` takes; the rest are run one by one."""
        return len(pixels)

    def checked(self, pixels: Any, preprocessed: bool = False) -> np.ndarray:
        """The pixels as an array in float32, contiguous; arguments as in `__call__`.

        Raises:
            PixelError: see `__call__`.
        """
        array = _floats(pixels)
        if array is None:
            found = getattr(pixels, "dtype", None) or type(pixels).__name__
            raise PixelError(
                f"pixels are of type {found}: expected a tensor or an array of floats, normalised "
                "as the model's image processor does"
            )
        channels, shape = self.config.num_channels, array.shape
        if len(shape) != 4 or shape[1] != channels:
            raise PixelError(
                f"pixels have shape {shape}: expected (batch, {channels}, height, width)"
            )
        if not len(array):
            raise PixelError("pixels hold no image: expected a batch of at least one")
        size, least = shape[2:], self.minimum_image_size
        if self.image_size is not None and size != self.image_size:
            raise PixelError(
                f"images are {size[0]} x {size[1]} pixels: this export takes "
                f"{self.image_size[0]} x {self.image_size[1]} only; `cvt export --dynamic "
                "batch,size` writes one for any size"
            )
        if min(size) < least:
            raise PixelError(
                f"images are {size[0]} x {size[1]} pixels: this model needs at least "
                f"{least} x {least}"
            )
        low, high = float(array.min()), float(array.max())
        if not (-float("inf") < low and high < float("inf")):  # a NaN is neither
            raise PixelError("pixels hold NaN or infinite values: expected finite ones")
        if not preprocessed and (low < -LARGEST or high > LARGEST):
            raise PixelError(
                f"pixels range from {low:g} to {high:g}: expected normalised ones, within "
                f"{LARGEST:g} of 0; use the model's image processor, which divides by 255, "
                "subtracts the mean and divides by the standard deviation"
            )
        return array


def _floats(pixels: Any) -> np.ndarray | None:
    """Floats as an array in float32, contiguous and writable, as torch wants it; else None."""
    if isinstance(pixels, np.ndarray):
        return np.require(pixels, np.float32, ["C", "W"]) if pixels.dtype.kind == "f" else None
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(pixels, torch.Tensor) or not pixels.is_floating_point():
        return None
    return np.ascontiguousarray(pixels.detach().float().cpu().numpy())
