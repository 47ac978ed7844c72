"""From whatever names a model to the model, its configuration and its preprocessing."""

import copy
import logging
from pathlib import Path
from typing import Any

from cvt.checkpoints import adapters
from cvt.checkpoints.authors import load_authors, read_file
from cvt.checkpoints.errors import CheckpointError
from cvt.checkpoints.preprocessing import settings_of
from cvt.checkpoints.source import ModelSource, model_source, unknown_model
from cvt.configuration import CvtConfig
from cvt.data.image_processor import build_processor
from cvt.data.preprocessing import Preprocessing
from cvt.files import check_checksums
from cvt.hub import UnavailableError
from cvt.libraries import require
from cvt.modeling import CvtForImageClassification
from cvt.strict_loading import CLASSIFIER

logger = logging.getLogger(__name__)


def load_classifier(
    source: str | Path | ModelSource,
    *,
    config: str | Path | None = None,
    num_labels: int | None = None,
    hidden_act: str | None = None,
    key: str | None = None,
    allow_nonfinite: bool = False,
    verify: bool = True,
) -> CvtForImageClassification:
    """A trained classifier.

    Args:
        source: a file of weights (see `read_weights`), a model folder, a folder with an adapter of
            PEFT, the name of a published checkpoint, or USER/NAME or USER/NAME@REVISION of the hub;
            or what `model_source` returned for it.
        config: a config.json for a file that is no published variant.
        num_labels: create a new, random classifier for so many classes if the source's has others.
        hidden_act: the activation, if not the source's own.
        key: the entry of a file, or the model in it; see `read_weights`.
        allow_nonfinite: accept NaN and infinite weights in a file.
        verify: compare a folder with its `checksums.json`, where it has one.

    Raises:
        FileNotFoundError: `source` is none of these.
        ValueError: its weights do not fit; lists every fault.

    Example:
        >>> import cvt
        >>> from cvt.checkpoints import load_classifier
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> cvt.CvtForImageClassification(config).save_pretrained("my-cvt")
        >>> load_classifier("my-cvt", num_labels=3).config.num_labels  # a new classifier
        3
    """
    source = model_source(source)
    if source.kind == "file":
        return load_authors(
            source.path,
            config=config,
            num_labels=num_labels,
            hidden_act=hidden_act,
            key=key,
            allow_nonfinite=allow_nonfinite,
        )
    if config is not None:
        raise ValueError(f"a config is for files of weights; {source.name} brings its own")
    if key is not None:
        raise ValueError(f"key = {key!r}: is for files of weights; {source.name} has one model")
    if source.kind == "variant":  # it has no weights
        raise unknown_model(source.name)
    if source.kind == "adapter":
        return load_adapted(
            source.path, num_labels=num_labels, hidden_act=hidden_act, verify=verify
        )
    given = {"num_labels": num_labels, "hidden_act": hidden_act}
    given = {name: value for name, value in given.items() if value is not None}
    return CvtForImageClassification.from_pretrained(str(source.path), verify=verify, **given)


def load_adapted(
    folder: Path,
    *,
    num_labels: int | None = None,
    hidden_act: str | None = None,
    verify: bool = True,
) -> CvtForImageClassification:
    """A trained classifier from a folder with an adapter, as PEFT saves it, merged with its base.

    Its classes are those of the config.json beside it, if it has one, else its base's where their
    number is the same.

    Args:
        folder: of the adapter.
        num_labels: as in `load_classifier`.
        hidden_act: the activation, if not the one it was trained with: that of the config.json
            beside it, GELU if it was trained on a model of transformers, else its base's.
        verify: as in `load_classifier`, of the adapter and of its base.

    Raises:
        ImportError: peft is not installed.
        FileNotFoundError: its base is not here.
        CheckpointError: it does not fit its base; lists every fault.
        ValueError: the weights of its base do not fit.
    """
    require(f"{folder} is an adapter, which", "peft", extra="train")
    if verify:
        check_checksums(folder)
    weights, config = adapters.read_adapter(folder), adapters.config_of(folder)
    own = adapters.activation_of(folder)
    try:
        source = model_source(adapters.base_of(folder))
    except UnavailableError as error:
        raise FileNotFoundError(f"{folder} is an adapter without its base: {error}") from error
    if source.path.resolve() == folder.resolve():  # a repository that names itself
        raise CheckpointError(f"{folder} is an adapter that names itself as its base")
    with adapters.silence_new_head_warning():
        base = load_classifier(
            source,
            num_labels=adapters.classes_of(weights),
            hidden_act=hidden_act or own,
            verify=verify,
        )
    if config is not None and config.num_labels == base.config.num_labels:
        base.config.class_names = config.class_names
        base.config.problem_type = config.problem_type
        base.config.thresholds = config.thresholds
    model = adapters.merge(base, folder, weights)
    if num_labels is None or num_labels == model.config.num_labels:
        return model
    logger.warning(
        f"New classifier of {num_labels} classes: {folder} has {model.config.num_labels}. It is "
        "random until trained."
    )
    config = copy.deepcopy(model.config)
    config.num_labels = num_labels
    kept = {name: w for name, w in model.state_dict().items() if name not in CLASSIFIER}
    return adapters.model_from_config(config, kept, model.dtype)


def load_config(source: str | Path | ModelSource) -> CvtConfig:
    """The configuration of whatever `load_classifier` takes, or of a variant, without its weights.

    Raises:
        FileNotFoundError: `source` is none of these.

    Example:
        >>> from cvt.checkpoints import load_config
        >>> load_config("cvt-w24").embed_dim
        [192, 768, 1024]
    """
    source = model_source(source)
    if source.kind == "file":
        return read_file(source.path).config
    if source.kind == "adapter":
        return adapters.config_of(source.path) or load_adapted(source.path).config
    if source.kind == "folder":
        return CvtConfig.from_pretrained(source.path)
    assert source.variant
    return CvtConfig.from_variant(source.variant)


def load_processor(
    source: str | Path | ModelSource,
    config: CvtConfig,
    image_size: int | None = None,
    crop_pct: float | None = None,
) -> Any:
    """The image processor of whatever `load_classifier` takes.

    Args:
        source: as in `load_classifier`.
        config: the model's configuration.
        image_size: height and width in pixels; else the source's, else that of the
            published file of this name, else 224, with a warning.
        crop_pct: see `cvt.image_processor`; else the source's.

    Example:
        >>> from cvt.checkpoints import image_size_of, load_config, load_processor
        >>> processor = load_processor("cvt-13-384", load_config("cvt-13-384"))
        >>> image_size_of(processor)
        384
    """
    return build_processor(settings_of(source, config, image_size, crop_pct))


def image_size_of(processor: Any) -> int:
    """Height and width, in pixels, of the square images that an image processor returns.

    Raises:
        ValueError: it returns others.

    Example:
        >>> import cvt
        >>> from cvt.checkpoints import image_size_of
        >>> image_size_of(cvt.image_processor("cvt-21-384"))
        384
    """
    if isinstance(processor, Preprocessing):
        return processor.image_size
    size = processor.size
    if size.shortest_edge or (size.height and size.height == size.width):
        return size.shortest_edge or size.height
    raise ValueError(f"the image processor is set for {dict(size)}, which are no square images")
