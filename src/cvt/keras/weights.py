"""Finds, reads, assigns and writes the weights of the Keras models under transformers' names.

Only PyTorch's own files (.pth, .bin) require PyTorch; .safetensors and .h5 do not.
"""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file
from transformers.utils import cached_file

from cvt import hub
from cvt.architecture import check_file_size
from cvt.checkpoints import h5
from cvt.checkpoints.names import DIALECTS, dialect_of, keras_to_transformers
from cvt.configuration import CvtConfig
from cvt.files import pointer_fault, staged
from cvt.keras.layers import as_config
from cvt.strict_loading import CLASSIFIER, COUNTER, HEAD, new_weights, verify_folder

Weights = dict[str, np.ndarray]  # by transformers' names, with PyTorch's order of axes

# The first of these files that a folder contains is read.
FILES = ("model.safetensors", "model.safetensors.index.json", "tf_model.h5", "pytorch_model.bin")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
}


# ------------------------------------------------------------------------------ models


def load(
    source: str | os.PathLike, build_model: Callable[[CvtConfig], keras.Model], **kwargs: Any
) -> keras.Model:
    """Build a model from the source's config and assign the source's weights.

    Args:
        source: as in `TFCvtPreTrainedModel.from_pretrained`, which documents the errors too.
        build_model: creates a model from a config.
        kwargs: `config` to replace the source's, fields of the config to override, `HUB_OPTIONS`,
            and `verify`, whether to compare a folder with its `checksums.json`.
    """
    verify = kwargs.pop("verify", True)
    hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    given_config = kwargs.pop("config", None)
    default = CvtConfig()
    if unknown := [name for name in kwargs if not hasattr(default, name)]:
        raise TypeError(
            f"from_pretrained does not take {', '.join(unknown)}: it takes config, the config's "
            "fields and " + ", ".join(HUB_OPTIONS)
        )
    new_head = "num_labels" in kwargs or "id2label" in kwargs
    if given_config is not None:
        given_config = CvtConfig.from_dict(as_config(given_config).to_dict(), **kwargs)
    if os.path.isfile(source):
        config, found = read_authors(Path(source), kwargs, given_config)
    else:
        if verify:
            verify_folder(source)
        config = given_config or CvtConfig.from_pretrained(source, **hub_options, **kwargs)
        with hub.resolved(source, hub_options) as resolved:
            files = find(resolved, hub_options)
        found = {name: weight for file in files for name, weight in read(file).items()}
        check_file_size(config, sum(os.path.getsize(file) for file in files), source, new_head)
    model = build_model(given_config or config)
    is_classifier = bool(HEAD & named_variables(model).keys())
    if os.path.isfile(source) and is_classifier and not (new_head or CLASSIFIER & found.keys()):
        from cvt.checkpoints.authors import headless

        raise headless(str(source))
    assign(model, found, source, new_head)
    return model


def assign(model: keras.Model, found: Weights, source: Any, new_head: bool = False) -> None:
    """Assign weights to a model strictly: all of them and no others.

    Args:
        model: the model; a model without a classifier ignores the weights of one.
        found: the weights.
        source: the name of the weights' origin in messages.
        new_head: keep the random weights of a classifier that the weights do not fit, and log it.

    Raises:
        ValueError: weights are missing, unexpected or of the wrong shape; the message lists all of
            them.
    """
    variables = named_variables(model)
    shapes = {name: to_torch(np.empty(v.shape, bool)).shape for name, v in variables.items()}
    missing = variables.keys() - found.keys()
    mismatched = {
        name: (found[name].shape, shape)
        for name, shape in shapes.items()
        if name not in missing and found[name].shape != shape
    }
    others = found.keys() - variables.keys()
    unexpected = {name for name in others if not name.endswith(COUNTER)}
    if not HEAD & variables.keys():
        unexpected -= HEAD
    new = new_weights(model, source, missing, unexpected, mismatched, new_head)
    for name, variable in variables.items():
        if name not in new:
            variable.assign(to_keras(found[name]))


def save(model: keras.Model, folder: str | Path) -> None:
    """Write config.json and model.safetensors, as the PyTorch classes do.

    Existing files of these names are replaced; other files in the folder are kept.
    """
    variables = named_variables(model)
    headless = not HEAD & variables.keys()
    weights: Weights = {}
    for name, variable in variables.items():
        name = name.removeprefix("cvt.") if headless else name
        weights[name] = np.ascontiguousarray(to_torch(ops.convert_to_numpy(variable)))
        module, _, tensor = name.rpartition(".")
        if tensor == "running_mean":
            weights[f"{module}.{COUNTER}"] = np.array(0, np.int64)
    config = copy.deepcopy(model.config)
    config.architectures = ["CvtModel" if headless else "CvtForImageClassification"]
    config.dtype = model.variable_dtype
    with staged(folder, overwrite=True) as written:
        config.save_pretrained(written)
        save_file(weights, written / "model.safetensors", metadata={"format": "pt"})


def named_variables(model: keras.Model) -> dict[str, Any]:
    """Return the variables of a model by transformers' names; seeds of dropout have none."""
    named = ((keras_to_transformers(variable.path), variable) for variable in model.variables)
    return {name: variable for name, variable in named if name}


def to_keras(weight: np.ndarray) -> np.ndarray:
    """Transpose from PyTorch's order of axes, (outputs, inputs, ...), to that of Keras."""
    return weight.transpose({2: (1, 0), 4: (2, 3, 1, 0)}.get(weight.ndim, range(weight.ndim)))


def to_torch(weight: np.ndarray) -> np.ndarray:
    """Transpose from the order of axes of Keras, (..., inputs, outputs), to PyTorch's."""
    return weight.transpose({2: (1, 0), 4: (3, 2, 0, 1)}.get(weight.ndim, range(weight.ndim)))


# ------------------------------------------------------------------------------ files


def find(source: str | os.PathLike, hub_options: dict[str, Any]) -> list[Path]:
    """Find the weight files of a model folder or of a repository on the hub.

    Raises:
        FileNotFoundError: no weight file exists, or a shard is missing.
        ValueError: the index of the shards is damaged.
    """

    def locate(name: str) -> str | None:
        # Without the private argument an absent file and an unreachable hub raise the same error.
        return cached_file(source, name, **hub_options, _raise_exceptions_for_missing_entries=False)

    for name in FILES:
        if path := locate(name):
            break
    else:
        raise FileNotFoundError(f"{source} has no weights: none of {', '.join(FILES)}")
    if not name.endswith(".json"):
        return [Path(path)]
    try:
        shards = sorted(set(json.loads(Path(path).read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a whole index of weights: {error}") from error
    paths = {shard: locate(shard) for shard in shards}
    if absent := [shard for shard, found in paths.items() if not found]:
        raise FileNotFoundError(f"{source} lacks {', '.join(absent)}, which {name} names")
    return [Path(found) for found in paths.values() if found]


def read(path: Path) -> Weights:
    """Read the weights in a .safetensors, .h5 or .bin file of a model with or without a classifier.

    Raises:
        ValueError: the file is damaged, is a git-lfs pointer, or is an .h5 file with a weight that
            no CvT has.
    """
    if fault := pointer_fault(path):
        raise ValueError(fault)
    if path.suffix in h5.SUFFIXES:
        found = h5.read_h5(path)
    elif path.suffix == ".bin":
        from cvt.checkpoints.reading import read_weights

        found = {name: weight.float().numpy() for name, weight in read_weights(path).items()}
    else:
        try:
            tensors = deserialize(path.read_bytes())
            found = {
                name: np.frombuffer(tensor["data"], SAFETENSORS[tensor["dtype"]]).reshape(
                    tensor["shape"]
                )
                for name, tensor in tensors
            }
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        except KeyError as error:
            raise ValueError(f"{path} holds weights of type {error}, which no CvT has") from error
    dialect = dialect_of(found) or DIALECTS["transformers"]
    weights, unknown = dialect.read(found)
    if unknown and path.suffix in h5.SUFFIXES:
        raise ValueError(f"{path} holds what is no weight of a CvT: {', '.join(unknown)}")
    return weights | {name: found[name] for name in unknown}


def read_authors(
    path: Path, fields: dict[str, Any], config: CvtConfig | None = None
) -> tuple[CvtConfig, Weights]:
    """Read the config and the weights of a file of any dialect; this requires PyTorch.

    Args:
        path: the file.
        fields: the fields of the config to override.
        config: of the model, if the file is of no published variant.

    Raises:
        CheckpointError: the file cannot be read, or contains NaN or infinity.
    """
    from cvt.checkpoints.authors import nonfinite, read_file
    from cvt.checkpoints.errors import CheckpointError

    file = read_file(path, config=config, hidden_act=fields.get("hidden_act"))
    if bad := nonfinite(file.weights):
        raise CheckpointError(f"{path} has NaN or infinity in {', '.join(bad)}")
    config = CvtConfig.from_dict(file.config.to_dict(), **fields)
    found = {name: weight.float().numpy() for name, weight in file.weights.items()}
    return config, found | {name: np.empty(0) for name in file.unexpected}
