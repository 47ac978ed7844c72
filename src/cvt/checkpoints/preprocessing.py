"""The preprocessing of whatever names a model."""

import logging
from pathlib import Path

from cvt.architecture import Architecture
from cvt.checkpoints.source import ModelSource, model_source
from cvt.data.image_processor import build_preprocessing
from cvt.data.preprocessing import AnyPreprocessing
from cvt.data.processor_settings import ProcessorSettings, processor_settings

logger = logging.getLogger(__name__)


def load_preprocessing(source: str | Path | ModelSource, config: Architecture) -> AnyPreprocessing:
    """The preprocessing of whatever `load_classifier` takes, or of an export, without transformers.

    Args:
        source: as in `load_classifier`, or an exported folder.
        config: the model's configuration.

    Raises:
        ImportError: it has another image processor than CvT's, and transformers is not installed.
        OSError: its settings cannot be read.
        ValueError: a setting is illegal; names it.

    Example:
        >>> import cvt
        >>> from cvt.checkpoints import load_preprocessing
        >>> load_preprocessing("cvt-13-384", cvt.CvtConfig.from_variant("cvt-13")).image_size
        384
    """
    return build_preprocessing(settings_of(source, config))


def settings_of(
    source: str | Path | ModelSource,
    config: Architecture,
    image_size: int | None = None,
    crop_pct: float | None = None,
) -> ProcessorSettings:
    """The settings of the image processor of a model; arguments as in `load_processor`."""
    source = model_source(source)
    if source.kind == "adapter" and not (source.path / "preprocessor_config.json").is_file():
        from cvt.checkpoints.adapters import base_of

        return settings_of(base_of(source.path), config, image_size, crop_pct)
    if source.kind != "file":
        return processor_settings(str(source.path), image_size, crop_pct)
    image_size = image_size or source.image_size
    if image_size is None:
        logger.warning(
            f"{source.name} does not record its resolution; preprocessing is set for 224"
        )
    return processor_settings(config, image_size, crop_pct)
