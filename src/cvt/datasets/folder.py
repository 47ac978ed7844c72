"""Image folders: a folder for every class, perhaps below `train` and `val`."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cvt.datasets.labelled import TEST_NAMES, TRAIN_NAMES, LabelledImages, Parts
from cvt.images import IMAGE_SUFFIXES


class Files(Sequence[Path]):
    """Files below a folder, 1.28 million of ImageNet's in 50 MB: their names are one string."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.text = "".join(names)
        self.ends = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        return self.folder / self.text[self.ends[index] : self.ends[index + 1]]


def images_below(folder: Path) -> Iterator[Path]:
    """The image files in a folder and in the folders in it, told by suffix, sorted; none hidden.

    Each folder is read when its turn comes; no more is kept than the names in those on the way.
    """
    return (folder / name for name in _names_below(folder))


def _names_below(folder: str | Path, prefix: str = "") -> Iterator[str]:
    names, folders = [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            is_image = os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
            if entry.name[0] == ".":
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.add(entry.name)
                names.append(entry.name)
            elif is_image and entry.is_file():
                names.append(entry.name)
    for name in sorted(names):
        if name in folders:
            yield from _names_below(os.path.join(folder, name), f"{prefix}{name}/")
        else:
            yield prefix + name


def image_folder(root: str | Path) -> LabelledImages:
    """The images of a folder that has one sub-folder per class, named like it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no class folders, or some without images; names all of those.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    names: list[str] = []
    labels: list[str] = []
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    if not classes:
        raise ValueError(f"{root} has no folder per class in it")
    for name in classes:
        names += _names_below(root / name, f"{name}/")
        labels += [name] * (len(names) - len(labels))
    if empty := sorted(set(classes) - set(labels)):
        raise ValueError(f"{root} has classes without images: {', '.join(empty)}")
    return LabelledImages(Files(root, names), labels, classes)


def folder_parts(root: Path) -> Parts:
    """The `train` and `val` (or `test`) folders in it, or itself.

    Raises:
        ValueError: it has a `train` folder with class folders in it, and no other half.
    """
    names = TRAIN_NAMES + TEST_NAMES
    halves = {p.name.lower(): p for p in root.iterdir() if p.is_dir() and p.name.lower() in names}
    train = next((halves[name] for name in TRAIN_NAMES if name in halves), None)
    has_test = any(name in halves for name in TEST_NAMES)
    if train and has_test:
        return {name: partial(image_folder, half) for name, half in halves.items()}
    if train and any(path.is_dir() for path in train.iterdir()):
        raise ValueError(
            f"{root} has a {train.name} folder and none of {', '.join(TEST_NAMES)}; "
            f"to use its images alone, name {train}"
        )
    return {"": partial(image_folder, root)}
