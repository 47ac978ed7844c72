"""Reads the weights in .h5 files of Keras 2, as NumPy arrays; it needs no PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np

from cvt.checkpoints.errors import CheckpointError
from cvt.libraries import require

SUFFIXES = (".h5", ".hdf5")


def read_h5(path: Path) -> dict[str, np.ndarray]:
    """The weights in an .h5 file by their paths, with the order of axes of Keras.

    Of a whole model that was saved, its weights are read, and neither its layers nor the state of
    its optimizer.

    Raises:
        CheckpointError: the file is damaged, or refers to other files.
        ImportError: h5py is not installed.
    """
    require(f"{path}, an .h5 file,", "h5py", extra="tensorflow")
    import h5py

    found: dict[str, np.ndarray] = {}
    size = path.stat().st_size

    def visit(name: str, entry: Any) -> None:
        if not isinstance(entry, h5py.Dataset):
            return
        if entry.external or entry.is_virtual:
            raise CheckpointError(f"{path} was not read: {name} refers to another file")
        if entry.dtype.kind not in "fiu" or entry.nbytes > size:
            raise CheckpointError(f"{path} was not read: {name} holds no whole array of numbers")
        found[name] = entry[()]

    try:
        with h5py.File(path) as file:
            file.get("model_weights", file).visititems(visit)
    except (OSError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a whole h5 file: {error}") from error
    return found
