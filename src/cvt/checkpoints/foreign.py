"""What `from_pretrained` reads beside transformers' own folders: files, and folders of others."""

import os
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvt.architecture import check_file_size
from cvt.checkpoints.authors import announce, name_imagenet, nonfinite, read_file
from cvt.checkpoints.errors import CheckpointError
from cvt.checkpoints.names import dialect_of
from cvt.checkpoints.reading import read_weights
from cvt.configuration import CvtConfig


def read(
    path: Path, name: str | os.PathLike, kwargs: dict[str, Any]
) -> tuple[CvtConfig, dict[str, Tensor], Set[str]] | None:
    """The configuration and the weights of a model, under transformers' names.

    Args:
        path: the file of the weights.
        name: the same, or the folder that has a config.json for it.
        kwargs: of `from_pretrained`, with `config`, its fields, and `key`, see `read_weights`.

    Returns:
        The configuration, the weights, and the names of the arguments that the configuration has;
        None if the names of the weights are of no CvT that is known.

    Raises:
        CheckpointError: the file cannot be read, does not record its activation, or holds NaN or
            infinity.
    """
    default, given = CvtConfig(), kwargs.get("config")
    types = ("dtype", "torch_dtype")  # of the model, too
    fields = {n: value for n, value in kwargs.items() if hasattr(default, n) and n not in types}
    if os.path.isfile(name):
        act, key = fields.get("hidden_act"), kwargs.get("key")
        file = read_file(path, config=given, hidden_act=act, key=key)
        config, weights, unexpected = file.config, file.weights, file.unexpected
        if not config.num_labels and not given:  # of a model without a head
            config.num_labels = default.num_labels  # so that a missing classifier is one
    else:
        found = read_weights(path)
        dialect = dialect_of(found)
        if dialect is None:
            return None
        announce(dialect, path)
        weights, unexpected = dialect.read(found)
        source: Any = given or Path(name, kwargs.get("subfolder") or "")
        is_name = isinstance(source, str | os.PathLike)
        config = CvtConfig.from_pretrained(source, **fields) if is_name else source
    if bad := nonfinite(weights):
        raise CheckpointError(f"{path} has NaN or infinity in {', '.join(bad)}")
    attention = {"attn_implementation": config._attn_implementation}  # no dict has it
    config = CvtConfig.from_dict(config.to_dict() | attention, **fields)
    name_imagenet(config)
    new_head = "num_labels" in kwargs or "id2label" in kwargs
    check_file_size(config, sum(weight.nbytes for weight in weights.values()), path, new_head)
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    weights |= dict.fromkeys(unexpected, torch.empty(0))
    return config, weights, {"config", "key", *fields}
