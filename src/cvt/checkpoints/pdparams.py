"""Reads the .pdparams files of PaddlePaddle, as NumPy arrays, without PaddlePaddle or PyTorch.

They are pickles of dicts of arrays. Nothing that such a file names is imported or called: each of
the few names that it may use stands for a function here, and any other is refused.
"""

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cvt.checkpoints.errors import CheckpointError
from cvt.text import printable

SUFFIX = ".pdparams"
_NAMES = "StructuredToParameterName@@"  # PaddlePaddle's own names of the parameters, not needed
_NUMBERS = re.compile(r"[<>|=]?(f[248]|[iu][1248]|b1)")
_NUMPY = ("numpy.core", "numpy._core")


def read_pdparams(path: Path) -> dict[str, Any]:
    """What is in a .pdparams file: arrays, with the order of axes of PaddlePaddle, in dicts.

    Raises:
        CheckpointError: the file is damaged, holds something else, or asks for code to be run.
    """
    try:
        with open(path, "rb") as file:
            content = _plain(_Reader(file, encoding="latin1").load())
    except _RefusedError as refused:
        raise CheckpointError(
            f"{path} was not read: it asks to run {printable(str(refused))}; only arrays and plain "
            "containers are read from a checkpoint"
        ) from refused
    except OSError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        raise CheckpointError(f"{path} is no file of PaddlePaddle, or not a whole one") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no weights, but {type(content).__name__}")
    return content


class _RefusedError(Exception):
    """A name that a checkpoint does not need."""


class _Allowed:
    """A function that a pickle may call, and not change."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError


class _Type:
    """A type of numbers of NumPy, as a pickle describes it."""

    def __init__(self, text: str, *_: Any) -> None:
        self.text = text

    def __setstate__(self, state: tuple) -> None:
        self.text = f"{state[1].replace('|', '')}{self.text}"

    def read(self, data: bytes | bytearray | str, shape: tuple[int, ...], order: str) -> np.ndarray:
        """The array of these bytes, which must be as many as its shape needs."""
        if not _NUMBERS.fullmatch(self.text):
            raise _RefusedError(f"numpy.dtype({self.text!r})")
        if isinstance(data, str):  # of Python 2
            data = data.encode("latin1")
        flat = np.frombuffer(data, np.dtype(self.text))
        if flat.size != math.prod(shape):
            raise pickle.UnpicklingError
        return flat.reshape(shape, order="F" if order == "F" else "C")


class _Array:
    """An array, which a pickle describes bit by bit."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = dtype.read(data, shape, "F" if is_fortran else "C")


def _from_buffer(
    data: bytes | bytearray,
    dtype: _Type,
    shape: tuple[int, ...],
    order: str,
    axes: tuple[int, ...] | None = None,
) -> _Array:
    found = _Array()
    found.array = dtype.read(data, shape, order).transpose(axes or tuple(range(len(shape))))
    return found


def _scalar(dtype: _Type, data: bytes | str) -> Any:
    return dtype.read(data, (), "C").item()


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _RefusedError(f"_codecs.encode(…, {encoding!r})")
    return text.encode("latin1")


_ALLOWED = {
    ("numpy", "ndarray"): _Allowed(_Array),
    ("numpy", "dtype"): _Allowed(_Type),
    ("_codecs", "encode"): _Allowed(_encoded),
    ("collections", "OrderedDict"): _Allowed(dict),
    ("builtins", "tuple"): _Allowed(tuple),
    ("__builtin__", "tuple"): _Allowed(tuple),
}
for _core in _NUMPY:
    _ALLOWED |= {
        (f"{_core}.multiarray", "_reconstruct"): _Allowed(lambda *_: _Array()),
        (f"{_core}.multiarray", "scalar"): _Allowed(_scalar),
        (f"{_core}.numeric", "_frombuffer"): _Allowed(_from_buffer),
    }


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _RefusedError(f"{module}.{name}")
        return _ALLOWED[module, name]


def _plain(value: Any) -> Any:
    """Content with arrays in place of their descriptions; a tensor is a named array."""
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items() if key != _NAMES}
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], _Array):
        value = value[1]
    if not isinstance(value, _Array):
        return value
    if value.array is None:
        raise pickle.UnpicklingError
    if value.array.dtype == np.uint16:  # PaddlePaddle's bfloat16
        return (value.array.astype(np.uint32) << 16).view(np.float32)
    return value.array
