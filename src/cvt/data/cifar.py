"""CIFAR-10 and CIFAR-100 in their author's files: python or binary version, packed or unpacked.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from cvt.data.decoding import StoredImage
from cvt.data.labelled import LabelledImages, SplitReaders

PIXELS = 3 * 32 * 32  # of an image, a byte each: red, green, blue


@dataclass(frozen=True)
class Version:
    """One of the ways in which the images are packed.

    Attributes:
        names: the file with the names of the classes.
        train: the files with images to train on.
        test: the file with images to test on.
        classes: how many there are.
        names_key: where the names are in a pickle; None in the binary versions.
        labels_key: where the labels are in a pickle.
        label_bytes: how many stand before an image in the binary versions; the last is its label.
    """

    names: str
    train: tuple[str, ...]
    test: str
    classes: int
    names_key: str | None = None
    labels_key: str = ""
    label_bytes: int = 0

    @property
    def files(self) -> set[str]:
        """The names of all its files."""
        return {self.names, *self.train, self.test}


BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
BINARY_BATCHES = tuple(f"{name}.bin" for name in BATCHES)
VERSIONS = (
    Version("batches.meta", BATCHES, "test_batch", 10, "label_names", "labels"),
    Version("batches.meta.txt", BINARY_BATCHES, "test_batch.bin", 10, label_bytes=1),
    Version("meta", ("train",), "test", 100, "fine_label_names", "fine_labels"),
    Version("fine_label_names.txt", ("train.bin",), "test.bin", 100, label_bytes=2),
)
FILES = {name for version in VERSIONS for name in version.files}


def is_cifar(files: Collection[str]) -> bool:
    """Whether these are names of CIFAR's files, perhaps not of all."""
    return any(len(version.files.intersection(files)) > 1 for version in VERSIONS)


def cifar_splits(path: Path) -> SplitReaders:
    """The `train` and `test` images in a folder or an archive (.tar.gz) of CIFAR, fine labels.

    Raises:
        ValueError: a file is missing or damaged, or is a pickle of more than arrays; names it.
        OSError: a file cannot be read.
    """
    read = _members(path) if path.is_file() else {
        file.name: file.read_bytes for file in path.iterdir() if file.name in FILES
    }  # fmt: skip
    version = max(VERSIONS, key=lambda version: len(version.files & read.keys()))
    if missing := sorted(version.files - read.keys()):
        raise ValueError(f"{path} is not all of CIFAR-{version.classes}: no {', '.join(missing)}")

    def read_split(files: Sequence[str]) -> LabelledImages:
        names = _names(read[version.names](), version, f"{path}: {version.names}")
        batches = [_batch(read[file](), version, f"{path}: {file}") for file in files]
        images = [
            StoredImage(f"{file}#{i}", Image.fromarray(pixels))
            for file, (arrays, _) in zip(files, batches, strict=True)
            for i, pixels in enumerate(arrays)
        ]
        labels = [names[label] for _, found in batches for label in found]
        return LabelledImages(images, labels, names)

    return {
        "train": lambda: read_split(version.train),
        "test": lambda: read_split([version.test]),
    }


def _members(archive: Path) -> dict[str, Callable[[], bytes]]:
    """What reads CIFAR's files out of an archive; nothing is unpacked to the disk."""
    read: dict[str, Callable[[], bytes]] = {}
    try:
        with tarfile.open(archive) as members:
            for member in members:
                name = PurePosixPath(member.name).name
                if member.isfile() and name in FILES:
                    content = members.extractfile(member)
                    assert content  # as of every regular file
                    read[name] = io.BytesIO(content.read()).getvalue
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} is not a whole archive: {error}") from error
    return read


def _names(content: bytes, version: Version, file: str) -> list[str]:
    if version.names_key:
        names = _unpickled(content, file).get(version.names_key)
    else:
        names = content.decode("utf-8", errors="replace").split()
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
        or len(set(names)) != version.classes
    ):
        raise ValueError(f"{file} does not name {version.classes} classes")
    return names


def _batch(content: bytes, version: Version, file: str) -> tuple[np.ndarray, Sequence[int]]:
    """The images of a file, (N, 32, 32, 3), and their labels."""
    damaged = f"{file} is damaged: not images of CIFAR-{version.classes} and their labels"
    if version.names_key:
        batch = _unpickled(content, file)
        pixels, labels = batch.get("data"), batch.get(version.labels_key)
        if not isinstance(pixels, np.ndarray) or not isinstance(labels, list):
            raise ValueError(damaged)
        whole = pixels.dtype == np.uint8 and pixels.shape == (len(labels), PIXELS)
        whole = whole and all(isinstance(label, int) for label in labels)
    else:
        width = version.label_bytes + PIXELS
        whole = len(content) % width == 0
        records = np.frombuffer(content[: len(content) // width * width], np.uint8)
        records = records.reshape(-1, width)
        pixels, labels = records[:, -PIXELS:], records[:, version.label_bytes - 1].tolist()
    if not whole or not labels or not 0 <= min(labels) <= max(labels) < version.classes:
        raise ValueError(damaged)
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _unpickled(content: bytes, file: str) -> dict[str, Any]:
    try:
        found = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle fails in many ways
        raise ValueError(f"{file} was not read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged: holds no dict")
    return found


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain containers and numpy arrays; whatever else a pickle asks for is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}, and only arrays are read")


def _empty_array(*_: Any) -> np.ndarray:
    """What numpy's `_reconstruct` returns; the content of the array follows."""
    return np.empty(0, np.uint8)
