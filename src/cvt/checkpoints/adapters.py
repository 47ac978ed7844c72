"""Adapters, as PEFT saves them: their base is loaded, and they are checked and merged into it."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvt import hub, strict_loading
from cvt.checkpoints import authors
from cvt.checkpoints.errors import CheckpointError
from cvt.checkpoints.reading import load_tensors
from cvt.configuration import CvtConfig
from cvt.files import ADAPTER
from cvt.modeling import CvtForImageClassification
from cvt.strict_loading import list_faults

logger = logging.getLogger(__name__)

FILES = ("adapter_model.safetensors", "adapter_model.bin")


def base_of(folder: str | Path) -> str | Path:
    """The model that an adapter was trained on: a name on the hub, a folder or a file.

    A relative path is looked for from here, as PEFT does, and from the adapter's folder; a folder
    there comes before a model on the hub, unless that is a published one.

    Raises:
        CheckpointError: the adapter does not name it.
        FileNotFoundError: there is no such model.
    """
    name = settings(folder).get("base_model_name_or_path")
    change = f"set base_model_name_or_path in {Path(folder, ADAPTER)} to its folder or name"
    if not name:
        raise CheckpointError(f"{folder} is an adapter that does not name its base: {change}")
    if not hub.published(name):
        for path in (Path(name), Path(folder, name)):
            if path.exists() and path.resolve() != Path(folder).resolve():
                return path
    if found := hub.repository(name):
        revision = settings(folder).get("revision")  # of the base, by PEFT's documentation
        return f"{found.hub_id}@{revision}" if revision else name
    raise FileNotFoundError(
        f"{folder} is an adapter of {name}, which is no model on the hub and no folder here: "
        f"{change}"
    )


def settings(folder: str | Path) -> dict[str, Any]:
    """The fields of the adapter_config.json of a folder.

    Raises:
        CheckpointError: it is damaged.
    """
    path = Path(folder, ADAPTER)
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not whole: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: must be an object")
    return found


def merge(
    base: CvtForImageClassification, folder: str | Path, weights: dict[str, Tensor]
) -> CvtForImageClassification:
    """A classifier of the base's configuration with an adapter in its weights.

    Args:
        base: with as many classes as the adapter; it is changed.
        folder: the adapter's.
        weights: the adapter's, under the names in its file.

    Raises:
        CheckpointError: the adapter does not fit; lists every fault.
    """
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    merged: Any = None
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise ValueError(f"{config.peft_type.value} cannot be merged into weights")
        config.base_model_name_or_path = None  # get_peft_model takes it from the model
        adapted = get_peft_model(base, config)
        loaded: Any = set_peft_model_state_dict(adapted, weights)
        missing = [name for name in loaded.missing_keys if ".default" in name]  # the adapter's name
        faults = list_faults(missing, loaded.unexpected_keys, {})
        if not faults:
            merged = adapted.merge_and_unload(safe_merge=True)
    except KeyError as error:  # a weight that PEFT looks up
        faults = list_faults(error.args, (), {})
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        faults = f"\n  {' '.join(str(error).split())}"
    if faults:
        raise CheckpointError(f"the adapter in {folder} does not fit its base:{faults}")
    # A new model, without what PEFT leaves in the merged one.
    return model_from_config(base.config, merged.state_dict(), base.dtype)


def model_from_config(
    config: CvtConfig, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> CvtForImageClassification:
    """A classifier with these weights; those that it lacks are random."""
    model: Any = CvtForImageClassification(config)
    model.to(dtype)
    model.load_state_dict({**model.state_dict(), **weights})
    return model


def read_adapter(folder: str | Path) -> dict[str, Tensor]:
    """The weights of an adapter.

    Raises:
        CheckpointError: they cannot be read.
        FileNotFoundError: there are none.
    """
    for name in FILES:
        if Path(folder, name).is_file():
            return load_tensors(Path(folder, name))
    raise FileNotFoundError(f"{folder} is an adapter without weights: none of {', '.join(FILES)}")


def classes_of(weights: dict[str, Tensor]) -> int | None:
    """How many classes an adapter's own classifier has; None if it keeps its base's."""
    heads = (w for name, w in weights.items() if name.endswith(".classifier.weight"))
    head = next(heads, None)
    return None if head is None else len(head)


def config_of(folder: str | Path) -> CvtConfig | None:
    """The configuration beside an adapter, as our runs write it and PEFT alone does not."""
    return CvtConfig.from_pretrained(folder) if Path(folder, "config.json").is_file() else None


def activation_of(folder: str | Path) -> str | None:
    """The activation that an adapter was trained with, if that is not its base's.

    transformers computes GELU, whatever the base's configuration has.
    """
    if config := config_of(folder):
        return config.hidden_act
    mapping = settings(folder).get("auto_mapping") or {}
    is_transformers = str(mapping.get("parent_library")).startswith("transformers.")
    return "gelu" if is_transformers else None


@contextmanager
def silence_new_head_warning() -> Iterator[None]:
    """Keep back the warnings of a random classifier, whose weights the adapter brings."""

    def is_other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("New classifier")

    loggers = (strict_loading.logger, authors.logger)
    for each in loggers:
        each.addFilter(is_other)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(is_other)
