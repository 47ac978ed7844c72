"""Reading weights from files that may be anything: nothing in them is ever run."""

import argparse
import io
import logging
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cvt.checkpoints import h5, pdparams
from cvt.checkpoints.errors import CheckpointError
from cvt.checkpoints.names import (
    classifier_beside,
    dialect_of,
    other_network,
    prefixes,
    without_wrappers,
)
from cvt.files import pointer_fault
from cvt.text import listed

logger = logging.getLogger(__name__)

# The entries of training checkpoints that hold weights, by timm, Lightning and many scripts; those
# of averaged weights come before others, as where timm reads a checkpoint to evaluate it.
AVERAGED = ("state_dict_ema", "model_ema", "ema")
WRAPPERS = (
    *AVERAGED,
    *("state_dict", "model_state_dict", "model_state", "model", "net", "module"),
)
PLAIN = (int, float, str, np.generic, type(None))  # beside weights: an epoch, an accuracy, a name

# What a checkpoint of tensors imports, and one with numbers of NumPy or parsed arguments beside.
TENSOR_PARTS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_\w+"
    r"|torch\.(\w+Storage|Size|device|\w*(float|int|bool)\w*)"
    r"|numpy\._?core\.multiarray\.scalar|numpy\.dtype|_codecs\.encode|argparse\.Namespace"
)
_SCALAR: Any = np.float64(0).__reduce__()[0]  # what reads a NumPy number from its bytes
PLAIN_GLOBALS: list[Any] = [
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdgU"},
    argparse.Namespace,
]


def read_weights(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The weights in a file, under the names of the model, as the software lays them out.

    A checkpoint of a training run is unwrapped, `{"epoch", "state_dict", ...}` of the authors and
    all of `WRAPPERS`; where it has averaged weights, those are read. In front of the names,
    `module.` of distributed training, `model.` of Lightning and the like are removed, and what
    torch.compile adds. Of a detector or a segmenter its backbone is read; a classifier that stands
    beside the backbone belongs to it. Numbers and texts beside the weights are skipped; tensors are
    not, unless a warning names them.

    Args:
        path: a PyTorch checkpoint, a .safetensors file, an .h5 file of Keras 2 or a .pdparams file
            of PaddlePaddle.
        key: the entry of the checkpoint that has the weights, as `state_dict` where there is
            `state_dict_ema` too, or what the names of one of several models begin with.

    Raises:
        CheckpointError: the file is empty, truncated, a pointer of git-lfs, asks for code to be
            run, holds no weights, or holds several models.
        OSError: the file cannot be opened.

    Example:
        >>> import cvt, torch
        >>> from cvt.checkpoints import read_weights
        >>> model = cvt.CvtForImageClassification(cvt.CvtConfig.from_variant("cvt-digits"))
        >>> torch.save({"epoch": 3, "state_dict": model.state_dict()}, "run.pth")
        >>> read_weights("run.pth")["layernorm.weight"].shape
        torch.Size([128])
    """
    path = Path(path)
    content = load_content(path)
    entry = key if isinstance(content, dict) and isinstance(content.get(key), dict) else None
    content = unwrapped(content, path, entry)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no weights, but {describe(content)}")
    if any(isinstance(value, Tensor) for value in content.values()):
        content = {key: v for key, v in content.items() if not isinstance(v, PLAIN)}
    others = {key: value for key, value in content.items() if not isinstance(value, Tensor)}
    if others:
        lines = "".join(f"\n  {key!r} is {describe(value)}" for key, value in others.items())
        raise CheckpointError(f"{path} holds things that are no weights:{lines}")
    named = {without_wrappers(str(name)): weight for name, weight in content.items()}
    if len(named) < len(content):
        raise CheckpointError(f"{path} holds weights twice: compiled, under _orig_mod., and not")
    if path.suffix in h5.SUFFIXES:  # whose names are paths, which begin with anything
        return named
    return without_prefix(named, path, None if entry else key)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that holds nothing else, under the names they have in it.

    Raises:
        CheckpointError: as `read_weights`.
    """
    content = load_content(path)
    if not is_weights(content):
        raise CheckpointError(f"{path} holds no weights, but {describe(content)}")
    return content


def load_content(path: Path) -> Any:
    """What is in a file of weights, of the kinds that `read_weights` takes.

    Raises:
        CheckpointError: it cannot be read.
    """
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    if fault := pointer_fault(path):
        raise CheckpointError(fault)
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    if path.suffix == pdparams.SUFFIX:
        return as_tensors(pdparams.read_pdparams(path))
    return as_tensors(h5.read_h5(path)) if path.suffix in h5.SUFFIXES else load_pickle(path)


def as_tensors(content: Any) -> Any:
    """Content with tensors in place of arrays."""
    if isinstance(content, dict):
        return {key: as_tensors(value) for key, value in content.items()}
    return torch.from_numpy(content.copy()) if isinstance(content, np.ndarray) else content


def unwrapped(content: Any, path: Path, key: str | None = None) -> Any:
    """What a checkpoint of a training run holds of the model; anything else as it is.

    Args:
        content: of the checkpoint.
        path: of the file, for messages.
        key: the entry that is asked for.

    Raises:
        CheckpointError: it holds several, none of which is the average of the others.
    """
    if key is not None:
        content = content[key]
    while isinstance(content, dict):
        inner = [key for key in WRAPPERS if isinstance(content.get(key), dict) and content[key]]
        if not inner:
            break
        chosen = [key for key in inner if key in AVERAGED] or inner
        if len(chosen) > 1:
            raise CheckpointError(
                f"{path} holds weights in each of {', '.join(map(repr, chosen))}: ask for one of "
                f"them by key ({converted_by_key(path)})"
            )
        beside = [key for key, v in content.items() if key not in chosen and is_weights(v)]
        if beside:
            logger.warning(
                f"{path}: the weights are those in {chosen[0]!r}; not read: "
                + ", ".join(map(repr, beside))
                + f" ({converted_by_key(path)} for another)"
            )
        content = content[chosen[0]]
    return content


def converted_by_key(path: Path) -> str:
    """How a command gets the model of a file that holds several."""
    return f"`cvt convert {path} FOLDER --key KEY`, and use FOLDER"


def is_weights(value: Any) -> bool:
    """Whether a part of a checkpoint could be weights: an optimizer's state, for one, is none."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.ndim > 0  # no loss, and no state of a generator
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(weight, Tensor) for weight in value.values())
    )


def without_prefix(
    weights: dict[str, Tensor], path: Path, key: str | None = None
) -> dict[str, Tensor]:
    """The weights of the model among those of what holds it, under its own names of them.

    Args:
        weights: all of them.
        path: of the file, for messages.
        key: what the names of the model begin with, if there are several.

    Raises:
        CheckpointError: there are several models, or none that begins with `key`.
    """
    found = prefixes(weights)
    chosen = found if key is None else [p for p in found if p.rstrip(".") == key.rstrip(".")]
    if len(chosen) > 1 or (key is not None and not chosen):
        raise CheckpointError(
            f"{path} holds {len(found)} models, whose names begin with "
            f"{', '.join(map(repr, found))}: ask for one of them by key ({converted_by_key(path)})"
            if key is None
            else f"{path} holds no {key!r}, neither an entry nor what the names of a model begin "
            f"with: {', '.join(map(repr, found)) or 'nothing'}"
        )
    if why := other_network(weights):
        raise CheckpointError(f"{path} holds no CvT of the paper: {why}")
    prefix = chosen[0] if chosen else "module."
    named = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    beside = [name for name in weights if not name.startswith(prefix)]
    if not chosen:  # no CvT: the caller, who compares the names, raises the error
        return named | {name: weights[name] for name in beside}
    dialect = dialect_of(named)
    assert dialect
    has_classifier = any((dialect.our_name(name) or "").startswith("classifier.") for name in named)
    head = None if has_classifier else classifier_beside(weights, prefix)
    if head is not None:
        for tensor in ("weight", "bias"):
            named[f"{dialect.modules['classifier']}.{tensor}"] = weights[f"{head}.{tensor}"]
            beside.remove(f"{head}.{tensor}")
    if beside or (head and not head.endswith(dialect.modules["classifier"])):
        names = listed(beside)
        begin = f"{prefix!r} and {head!r}" if head else repr(prefix)
        logger.warning(
            f"{path}: the weights are those whose names begin with {begin}"
            + (f"; not read: {names}" if beside else "")
        )
    return named


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def load_pickle(path: Path) -> Any:
    """The content of a PyTorch checkpoint, by the reader that runs nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error is clearer
            with torch.serialization.safe_globals(PLAIN_GLOBALS):
                return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes
        if asked := functions_asked_for(path):
            raise CheckpointError(
                f"{path} was not read: it asks to run {', '.join(asked)}; only tensors and plain "
                "containers are read from a checkpoint; save model.state_dict() alone"
            ) from error
        raise CheckpointError(f"{path} is no PyTorch checkpoint, or not a whole one") from error


def functions_asked_for(path: Path) -> list[str]:
    """What a pickle, or the pickle in a PyTorch archive, would import, but for what tensors need.

    The opcodes are listed, not run.
    """
    data = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            data = b"".join(archive.read(name) for name in pickles)
    asked: dict[str, None] = {}
    strings: list[str] = []
    stream = io.BytesIO(data)
    try:
        while stream.tell() < len(data):  # the old format is several pickles in a row
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name == "GLOBAL" and argument:
                    asked[argument.replace(" ", ".")] = None
                elif opcode.name == "STACK_GLOBAL":
                    asked[".".join(strings[-2:])] = None
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # what follows is no pickle
        pass
    return [name for name in asked if not TENSOR_PARTS.fullmatch(name)]


def describe(value: Any) -> str:
    """A short description of what a checkpoint holds."""
    if isinstance(value, dict) and value:
        return f"a dict of {listed([repr(key) for key in value])}"
    return f"{type(value).__name__}"
