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

from cvt.checkpoints.errors import CheckpointError
from cvt.checkpoints.names import prefixes, without_wrappers
from cvt.files import pointer_fault

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


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a .safetensors file or a PyTorch checkpoint, under the names of the model.

    A checkpoint of a training run is unwrapped, `{"epoch", "state_dict", ...}` of the authors and
    all of `WRAPPERS`; where it has averaged weights, those are read. In front of the names,
    `module.` of distributed training, `model.` of Lightning and the like are removed, and what
    torch.compile adds. Numbers and texts beside the weights are skipped; tensors are not, unless
    a warning names them.

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
    content = unwrapped(load_content(path), path)
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no weights, but {describe(content)}")
    if any(isinstance(value, Tensor) for value in content.values()):
        content = {key: v for key, v in content.items() if not isinstance(v, PLAIN)}
    alien = [f"{key!r} is {describe(v)}" for key, v in content.items() if not isinstance(v, Tensor)]
    if alien:
        raise CheckpointError(f"{path} holds things that are no weights:\n  " + "\n  ".join(alien))
    named = {without_wrappers(str(name)): weight for name, weight in content.items()}
    if len(named) < len(content):
        raise CheckpointError(f"{path} holds weights twice: compiled, under _orig_mod., and not")
    return without_prefix(named, path)


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
    """What is in a .safetensors file or a PyTorch checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    if fault := pointer_fault(path):
        raise CheckpointError(fault)
    return load_safetensors(path) if path.suffix == ".safetensors" else load_pickle(path)


def unwrapped(content: Any, path: Path) -> Any:
    """What a checkpoint of a training run holds of the model; anything else as it is.

    Raises:
        CheckpointError: it holds several, none of which is the average of the others.
    """
    while isinstance(content, dict):
        inner = [key for key in WRAPPERS if isinstance(content.get(key), dict) and content[key]]
        if not inner:
            break
        chosen = [key for key in inner if key in AVERAGED] or inner
        if len(chosen) > 1:
            raise CheckpointError(
                f"{path} holds weights in each of {', '.join(map(repr, chosen))}: save one of them "
                "to a file of its own, with torch.save"
            )
        beside = [key for key, v in content.items() if key not in chosen and is_weights(v)]
        if beside:
            logger.warning(
                f"{path}: the weights are those in {chosen[0]!r}; not read: "
                + ", ".join(map(repr, beside))
            )
        content = content[chosen[0]]
    return content


def is_weights(value: Any) -> bool:
    """Whether a part of a checkpoint could be weights: an optimizer's state, for one, is none."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.ndim > 0  # no loss, and no state of a generator
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(weight, Tensor) for weight in value.values())
    )


def without_prefix(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of the model among those of what holds it, under its own names of them.

    Raises:
        CheckpointError: there are several models, or one without a classifier and weights beside.
    """
    found = prefixes(weights)
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds {len(found)} models, whose names begin with "
            f"{', '.join(map(repr, found))}: save the state dict of one of them, with torch.save"
        )
    prefix = found[0] if found else "module."
    named = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    beside = [name for name in weights if not name.startswith(prefix)]
    if not found:  # no CvT: the caller, who compares the names, raises the error
        return named | {name: weights[name] for name in beside}
    if not beside:
        return named
    names = ", ".join(beside[:5]) + (f" and {len(beside) - 5} more" if len(beside) > 5 else "")
    if not {"head.weight", "classifier.weight"} & named.keys():
        raise CheckpointError(
            f"{path} holds a CvT without a classifier, whose names begin with {prefix!r}, and "
            f"beside it {names}: save the state dict of the CvT alone, with torch.save, and give "
            "num_labels for a new classifier"
        )
    logger.warning(
        f"{path}: the weights are those whose names begin with {prefix!r}; not read: {names}"
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
        return f"a dict of {', '.join(repr(key) for key in list(value)[:5])}"
    return f"{type(value).__name__}"
