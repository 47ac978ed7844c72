"""Weights of the Keras models: found, read and written under transformers' names, and strictly.

PyTorch is imported for its own files alone (.pth, .bin), not for .safetensors and .h5.
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
from cvt.checkpoints.names import keras_to_transformers
from cvt.configuration import CvtConfig, check_file_size
from cvt.files import pointer_fault, staged
from cvt.keras.layers import as_config
from cvt.strict_loading import CLASSIFIER, COUNTER, HEAD, new_weights, verify_folder

Weights = dict[str, np.ndarray]  # under transformers' names, in PyTorch's order of axes

# What weights are read from: the first of these files that a folder has.
FILES = ("model.safetensors", "model.safetensors.index.json", "tf_model.h5", "pytorch_model.bin")
OF_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
}


# ------------------------------------------------------------------------------ models


def load(
    source: str | os.PathLike, make: Callable[[CvtConfig], keras.Model], **kwargs: Any
) -> keras.Model:
    """The model that `make` makes of the source's config, with the source's weights.

    Args:
        source: as in `TFCvtPreTrainedModel.from_pretrained`, whose errors it raises.
        make: makes a model.
        kwargs: `config` in the place of the source's, fields of it to set otherwise, and those for
            the hub, `OF_HUB`.
    """
    verify = kwargs.pop("verify", True)
    of_hub = {name: kwargs.pop(name) for name in OF_HUB if name in kwargs}
    given = kwargs.pop("config", None)
    default = CvtConfig()
    if unknown := [name for name in kwargs if not hasattr(default, name)]:
        raise TypeError(
            f"from_pretrained does not take {', '.join(unknown)}: it takes config, the config's "
            "fields and " + ", ".join(OF_HUB)
        )
    new_head = "num_labels" in kwargs or "id2label" in kwargs
    if given is not None:
        given = CvtConfig.from_dict(as_config(given).to_dict(), **kwargs)
    if os.path.isfile(source):
        config, found = read_authors(Path(source), kwargs)
    else:
        if verify:
            verify_folder(source)
        config = given or CvtConfig.from_pretrained(source, **of_hub, **kwargs)
        with hub.resolved(source, of_hub) as resolved:
            files = find(resolved, of_hub)
        found = {name: weight for file in files for name, weight in read(file).items()}
        check_file_size(config, sum(os.path.getsize(file) for file in files), source, new_head)
    model = make(given or config)
    is_classifier = bool(HEAD & named_variables(model).keys())
    if os.path.isfile(source) and is_classifier and not (new_head or CLASSIFIER & found.keys()):
        from cvt.checkpoints.authors import headless

        raise headless(str(source))
    assign(model, found, source, new_head)
    return model


def assign(model: keras.Model, found: Weights, source: Any, new_head: bool = False) -> None:
    """Give a model weights, all of them and no others.

    Args:
        model: one without a head takes a classifier's weights, too.
        found: the weights.
        source: how messages call where they come from.
        new_head: leave a classifier that they do not fit as it is, random; that is logged.

    Raises:
        ValueError: weights are missing, unexpected or of the wrong shape; lists all of them.
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

    Files of these names are replaced, others in the folder are left alone.
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
    """A model's variables under transformers' names of its weights."""
    named = ((keras_to_transformers(variable.path), variable) for variable in model.variables)
    return {name: variable for name, variable in named if name}  # seeds of dropout have none


def to_keras(weight: np.ndarray) -> np.ndarray:
    """From PyTorch's order of axes: outputs first, those of a kernel last."""
    return weight.transpose({2: (1, 0), 4: (2, 3, 1, 0)}.get(weight.ndim, range(weight.ndim)))


def to_torch(weight: np.ndarray) -> np.ndarray:
    """From Keras' order of axes: inputs and outputs last."""
    return weight.transpose({2: (1, 0), 4: (3, 2, 0, 1)}.get(weight.ndim, range(weight.ndim)))


# ------------------------------------------------------------------------------ files


def find(source: str | os.PathLike, of_hub: dict[str, Any]) -> list[Path]:
    """The files that hold the weights of a model folder or a repository of the hub.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the index of several files is damaged.
    """

    def located(name: str) -> str | None:
        return cached_file(source, name, **of_hub, _raise_exceptions_for_missing_entries=False)

    for name in FILES:
        if path := located(name):
            break
    else:
        raise FileNotFoundError(f"{source} has no weights: none of {', '.join(FILES)}")
    if not name.endswith(".json"):
        return [Path(path)]
    try:
        shards = sorted(set(json.loads(Path(path).read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a whole index of weights: {error}") from error
    paths = {shard: located(shard) for shard in shards}
    if absent := [shard for shard, found in paths.items() if not found]:
        raise FileNotFoundError(f"{source} lacks {', '.join(absent)}, which {name} names")
    return [Path(found) for found in paths.values() if found]


def read(path: Path) -> Weights:
    """The weights in a .safetensors, .h5 or .bin file; those of a model without a head, too.

    Raises:
        ValueError: the file is damaged, a pointer of git-lfs, or holds what is no weight of a CvT.
    """
    if fault := pointer_fault(path):
        raise ValueError(fault)
    if path.suffix == ".h5":
        return read_h5(path)
    if path.suffix == ".bin":
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
    return {f"cvt.{name}" if name.startswith("encoder.") else name: w for name, w in found.items()}


def read_h5(path: Path) -> Weights:
    """The weights in a tf_model.h5, as transformers 4 wrote it.

    Raises:
        ValueError: the file is damaged, or holds what is no weight of a CvT.
    """
    import h5py

    found: Weights = {}
    unknown: list[str] = []

    def visit(path: str, entry: Any) -> None:
        if isinstance(entry, h5py.Dataset):
            name = keras_to_transformers(path)
            if name is None:
                unknown.append(path)
            else:
                found[name] = to_torch(entry[()])

    try:
        with h5py.File(path) as file:
            file.visititems(visit)
    except OSError as error:
        raise ValueError(f"{path} is not a whole h5 file: {error}") from error
    if unknown:
        raise ValueError(f"{path} holds what is no weight of a CvT: {', '.join(unknown)}")
    return found


def read_authors(path: Path, fields: dict[str, Any]) -> tuple[CvtConfig, Weights]:
    """The config and the weights of an authors' .pth file; needs PyTorch.

    Args:
        path: the file.
        fields: of the config, to be set otherwise.

    Raises:
        CheckpointError: the file cannot be read, or holds NaN or infinity.
    """
    from cvt.checkpoints.authors import nonfinite, read_file
    from cvt.checkpoints.reading import CheckpointError

    file = read_file(path, hidden_act=fields.get("hidden_act"))
    if bad := nonfinite(file.weights):
        raise CheckpointError(f"{path} has NaN or infinity in {', '.join(bad)}")
    config = CvtConfig.from_dict(file.config.to_dict(), **fields)
    found = {name: weight.float().numpy() for name, weight in file.weights.items()}
    return config, found | {name: np.empty(0) for name in file.unexpected}
