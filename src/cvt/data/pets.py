"""The Oxford-IIIT Pet data set as its two archives unpack: `images/` and `annotations/`.

Source: O. M. Parkhi, A. Vedaldi, A. Zisserman and C. V. Jawahar, Cats and Dogs, CVPR 2012.
"""

import re
from functools import partial
from pathlib import Path

from cvt.data.folder import Files, refuse_missing
from cvt.data.labelled import LabelledImages, SplitReaders

LISTS = {"train": "trainval.txt", "test": "test.txt"}
ALL = "list.txt"  # of both, with comments at its head
# Name of an image without `.jpg`, whose class stands before its number; number of the class; the
# species and the number of the breed in it are not read.
_LINE = re.compile(r"((\S+)_\d+) (\d+) [12] \d+")


def is_pets(path: Path) -> bool:
    """Whether a folder has a list of images as this data set has them."""
    return any((path / "annotations" / name).is_file() for name in (*LISTS.values(), ALL))


def pets_splits(path: Path) -> SplitReaders:
    """The images in `trainval.txt` as `train` and in `test.txt` as `test`; in `list.txt`, as "".

    The classes are the breeds, in the order of their numbers.

    Raises:
        ValueError: a list is missing or malformed; names the line.
        OSError: an image is missing, or a file cannot be read.
    """
    folder = path / "annotations"
    lists = {split: folder / name for split, name in LISTS.items()}
    if not any(file.is_file() for file in lists.values()):
        lists = {"": folder / ALL}
    if missing := [file.name for file in lists.values() if not file.is_file()]:
        raise ValueError(f"{path} is not all of Oxford-IIIT Pet: no annotations/{missing[0]}")
    classes: dict[int, str] = {}
    found = {split: _read(file, classes) for split, file in lists.items()}
    names = [classes[number] for number in sorted(classes)]
    splits = {}
    for split, rows in found.items():
        files = Files(path / "images", [f"{image}.jpg" for image, _ in rows])
        refuse_missing(lists[split], files)
        labels = [label for _, label in rows]
        splits[split] = partial(LabelledImages, files, labels, names)
    return splits


def _read(path: Path, classes: dict[int, str]) -> list[tuple[str, str]]:
    """The images of a list and the names of their classes, which are added to `classes`."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(
                f"{path}, line {number}: must be an image, the numbers of its class, species and "
                f"breed, as Abyssinian_1 1 1 1; it is {line.strip()[:80]!r}"
            )
        name = classes.setdefault(int(match[3]), match[2])
        if name != match[2]:
            raise ValueError(f"{path}, line {number}: class {match[3]} is {name} on another line")
        rows.append((match[1], name))
    if not rows:
        raise ValueError(f"{path} lists no images")
    return rows
