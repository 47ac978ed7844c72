"""Other libraries: whether they are installed, which version, and what they print.

It imports none of them itself, except Triton and TensorFlow on request.
"""

import importlib.metadata
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from types import ModuleType
from typing import Any

ERRORS = RLock()  # held while the error stream is redirected, which is one for all threads


def is_installed(*libraries: str) -> bool:
    """Whether all of these can be imported; imports nothing."""
    return all(map(importlib.util.find_spec, libraries))


def require(purpose: str, *libraries: str, extra: str = "export") -> None:
    """Make sure that optional libraries are installed.

    Args:
        purpose: what needs them, as the beginning of the error.
        libraries: the names that they are imported by.
        extra: of this package, that brings them.

    Raises:
        ImportError: one is not; names the command that installs it.
    """
    if missing := [name for name in libraries if not is_installed(name)]:
        raise ImportError(
            f"{purpose} needs {' and '.join(missing)}: pip install 'cvt-vision[{extra}]'"
        )


def version_of(library: str) -> str | None:
    """The installed version of a library, by the name of its package or of its import."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # TensorFlow has several packages
        packages = importlib.metadata.packages_distributions().get(library, [])
        other = next((package for package in packages if package != library), None)
        return importlib.metadata.version(other) if other else None


def keep_triton_apart() -> None:
    """Call this before TensorFlow is imported.

    TensorFlow and PyTorch's Triton each bring an LLVM; Triton's, when it comes second, ends the
    process ("Option ... registered more than once"). So it is loaded first, and kept from being
    loaded if TensorFlow is here already: PyTorch then does without.
    """
    if "triton" in sys.modules:
        return
    if "tensorflow" in sys.modules:
        sys.modules["triton"] = None  # type: ignore[assignment]  # what Python takes for missing
    elif is_installed("triton"):
        import triton  # noqa: F401


def import_tensorflow() -> Any:
    """Import TensorFlow beside PyTorch, without its log lines about this machine.

    Raises:
        ImportError: it is not installed.
    """
    require("the runtime tensorflow", "tensorflow", extra="tensorflow")
    keep_triton_apart()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with silence_stderr():
        import tensorflow
    return tensorflow


def keep_tensorflow_out_of_tensorboard() -> None:
    """Call this before TensorBoard's writer is imported: TensorFlow takes seconds to load.

    TensorBoard does without TensorFlow where it finds this module.
    """
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))


@contextmanager
def silence_stderr() -> Iterator[None]:
    """Keep back what libraries in C++ write to the error stream, which no setting keeps back."""
    if sys.stderr is None:  # then its number may be another file's
        yield
        return
    with ERRORS, open(os.devnull, "w") as nothing:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keep back warnings, and of these loggers all but errors: no user can change their causes."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in loggers:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
