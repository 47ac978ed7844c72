"""Batches from worker processes, one of which may be stuck, killed or short of memory."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)
POLL_SECONDS = 2.0  # between checks whether to keep waiting for a worker


class Interrupted(Exception):  # noqa: N818
    """The batch that is waited for is no longer wanted."""


def fetch_batches(loader: DataLoader, interrupted: Callable[[], bool]) -> Iterator[Any]:
    """The batches of a loader with a timeout; one of its workers may be stuck.

    Raises:
        Interrupted: the timeout passed without a batch, and `interrupted` was true.
    """
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:  # the loader can be asked again afterwards
            if not str(error).startswith("DataLoader timed out"):
                raise
            if interrupted():
                raise Interrupted from None
        else:
            yield batch


def shared(tensor: Tensor) -> Tensor | np.ndarray:
    """A tensor for another process: in shared memory, or as an array, which needs none.

    To be called in the worker: where there is no memory left, its queue would lose the tensor
    without an error.
    """
    try:
        return tensor.share_memory_()
    except RuntimeError:  # /dev/shm is full, which is small in a container
        return tensor.numpy()


@cache
def _warn_of_shared_memory() -> None:
    logger.warning(
        "shared memory (/dev/shm) is full: workers send images through pipes, which is slower; in "
        "a container give more, as by docker run --shm-size=1g"
    )


def received(value: Tensor | np.ndarray) -> Tensor:
    """The tensor of `shared`, in the process that receives it."""
    if isinstance(value, Tensor):
        return value
    _warn_of_shared_memory()
    return torch.from_numpy(value)


def answer_nothing(worker: int) -> None:
    """In a worker: what ends a run, as Ctrl-C does, the main process answers alone.

    What is sent to the group does not reach the worker, and of a batch that the main process was
    fetching when it ended, multiprocessing's thread in the worker prints no traceback.
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    sys.excepthook = _hook_but_for_lost_connections


def _hook_but_for_lost_connections(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
