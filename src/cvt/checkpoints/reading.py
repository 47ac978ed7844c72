"""Reading weights from files that may be anything: nothing in them is ever run."""

import io
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# What a checkpoint of tensors imports.
TENSOR_PARTS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_\w+"
    r"|torch\.(\w+Storage|Size|device|\w*(float|int|bool)\w*)"
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and every fault found in it."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The weights in a .safetensors file or a PyTorch checkpoint, under the names they have.

    The authors' training checkpoints, `{"epoch", "state_dict", ...}`, and the `module.` prefix that
    distributed training leaves are unwrapped.

    Raises:
        CheckpointError: the file is empty, truncated, asks for code to be run, or holds no weights.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty")
    content = load_safetensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no weights, but {describe(content)}")
    alien = [f"{key!r} is {describe(v)}" for key, v in content.items() if not isinstance(v, Tensor)]
    if alien:
        raise CheckpointError(f"{path} holds things that are no weights:\n  " + "\n  ".join(alien))
    return {str(name).removeprefix("module."): weight for name, weight in content.items()}


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
            warnings.simplefilter("ignore")  # the error says it better
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes
        if asked := functions_asked_for(path):
            raise CheckpointError(
                f"{path} was not read: it asks to run {', '.join(asked)}; only tensors and plain "
                "containers are read from a checkpoint"
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
    """A few words for what a checkpoint holds."""
    if isinstance(value, dict) and value:
        return f"a dict of {', '.join(repr(key) for key in list(value)[:5])}"
    return f"{type(value).__name__}"
