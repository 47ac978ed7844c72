"""Batches from the workers of a DataLoader, one of which may be stuck or short of memory."""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cvt.data.workers import Interrupted

logger = logging.getLogger(__name__)


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
