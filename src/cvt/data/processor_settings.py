"""The settings of a model's preprocessing: published, in a folder, or of a configuration."""

import logging
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, SupportsIndex

from PIL import Image

from cvt import hub
from cvt.architecture import MODEL_TYPE, VARIANTS, Architecture, ClassifierConfig
from cvt.data.preprocessing import CONVNEXT, IMAGE_MEAN, IMAGE_STD, square
from cvt.files import read_json
from cvt.hub import PUBLISHED

logger = logging.getLogger(__name__)

FILES = ("config.json", "preprocessor_config.json", "processor_config.json")  # that are read
IMAGE_SIZE = 224  # where neither the caller nor the source gives one
CVT_PREPROCESSING = {
    "crop_pct": 0.875,  # of the resized image's short side; not used from 384 pixels up
    "resample": Image.Resampling.BICUBIC,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
}


@dataclass(frozen=True)
class ProcessorSettings:
    """What an image processor of transformers is built of.

    Attributes:
        kind: the name of its class, without the backend.
        values: its settings; what is missing is the default of the class.
        source: how errors call where they are from.
        named: the class as the file has it, for errors.
        minimum_image_size: the height and width, in pixels, that the model needs; None if unknown.
        changes: names of the values that were not in the file.
    """

    kind: str
    values: dict[str, Any]
    source: str
    named: str = ""
    minimum_image_size: int | None = None
    changes: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, settings: Mapping[str, Any], source: str) -> "ProcessorSettings":
        """The settings of a preprocessor_config.json, as any version of transformers wrote them."""
        keys = ("image_processor_type", "feature_extractor_type")
        key = next((key for key in keys if settings.get(key)), keys[0])
        saved = str(settings.get(key) or CONVNEXT)
        kind = re.sub("(Fast|Pil)$", "", saved).replace("FeatureExtractor", "ImageProcessor")
        # A null was written for the class's own default.
        values = {n: v for n, v in settings.items() if v is not None and n not in keys}
        return cls(kind, values, source, f"{key} = {saved!r}")

    def changed(self, changes: Mapping[str, Any]) -> "ProcessorSettings":
        """The same with other values.

        Raises:
            ValueError: the size is none that a `ConvNextImageProcessor` has, or too small for the
                model.
        """
        values = {**self.values, **changes}
        if self.kind == CONVNEXT and "size" in values:
            size = square(values["size"], self.source)
            values["size"] = {"shortest_edge": size}
            self.check_size(size)
        return replace(self, values=values, changes=frozenset(changes))

    def check_size(self, size: int) -> None:
        """Make sure that the model takes images of this height and width, in pixels.

        Raises:
            ValueError: it does not.
        """
        if self.minimum_image_size is not None and size < self.minimum_image_size:
            raise ValueError(
                f"image_size = {size}: this model needs at least {self.minimum_image_size} pixels"
            )


def processor_settings(
    source: str | os.PathLike | Architecture,
    image_size: int | None = None,
    crop_pct: float | None = None,
    **others: Any,
) -> ProcessorSettings:
    """The settings of the image processor of a model; arguments and errors of `image_processor`."""
    changes = {**_checked_changes(image_size, crop_pct), **others}
    if isinstance(source, str | os.PathLike) and not hub.published(source):
        source = hub.snapshot(source, FILES) if hub.repository(source) else source
    config, default_size = _model(source)
    if config is not None and config.num_channels != 3:
        raise ValueError(
            f"num_channels = {config.num_channels}: images are decoded to RGB, so only models of 3 "
            "channels have an image processor"
        )
    if default_size is None:
        assert isinstance(source, str | os.PathLike)
        saved = read_settings(source)
        assert saved is not None
        found = ProcessorSettings.parse(saved, os.fspath(source))
    else:
        values = CVT_PREPROCESSING | {"size": {"shortest_edge": default_size}}
        found = ProcessorSettings(CONVNEXT, values, CONVNEXT)
    least = config.minimum_image_size if config is not None else None
    return replace(found, minimum_image_size=least).changed(changes)


def read_settings(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The settings of the image processor in a folder; None if it has no file of them.

    Raises:
        OSError: the file cannot be read, or holds no settings; names it.
    """
    nested, own = Path(folder, "processor_config.json"), Path(folder, "preprocessor_config.json")
    for path in (nested, own):
        if not path.is_file():
            continue
        try:
            found = read_json(path)
        except ValueError as error:
            raise OSError(f"{path} is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise OSError(f"{path} holds no settings of an image processor: must be an object")
        if path is own:
            return found
        if isinstance(found.get("image_processor"), dict):
            return found["image_processor"]
    return None


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


def _model(
    source: str | os.PathLike | Architecture,
) -> tuple[Architecture | None, int | None]:
    """Its configuration, where it has one, and its image size, where no file of its own has one."""
    if isinstance(source, Architecture):
        return source, IMAGE_SIZE
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            "source is a published name, a model folder or a cvt.CvtConfig, "
            f"not {type(source).__module__}.{type(source).__qualname__}"
        )
    if checkpoint := hub.published(source):
        return ClassifierConfig(**VARIANTS[checkpoint.variant]), checkpoint.image_size
    if not os.path.isdir(source):
        raise OSError(
            f"{source}: is neither a model folder nor a published checkpoint; "
            f"those are {', '.join(PUBLISHED)}"
        )
    config, size = None, None
    path = Path(source, "config.json")
    if path.is_file():
        fields = read_json(path)
        if isinstance(fields, dict) and fields.get("model_type") == MODEL_TYPE:
            config = ClassifierConfig.from_file(path, hidden_act="gelu")  # which matters not here
            size = _size_in_lucid(fields)
    if read_settings(source) is not None:
        return config, None
    if size is not None:
        return config, size
    logger.warning(
        "%s has no %s: CvT's own preprocessing is assumed, at %d pixels unless image_size is given",
        source,
        FILES[1],
        IMAGE_SIZE,
    )
    return config, IMAGE_SIZE


def _size_in_lucid(fields: Mapping[str, Any]) -> int | None:
    """The image size, in pixels, in a config.json of lucid-dl's hub; None if it has none.

    The rest of its preprocessing is that of the published models, which it is a port of.
    """
    preset = fields.get("preprocessing")
    kwargs = preset.get("init_kwargs") if isinstance(preset, dict) else None
    size = kwargs.get("crop_size") if isinstance(kwargs, dict) else None
    return size if isinstance(size, int) and size > 0 else None
