"""Image folders: a folder for every class, perhaps below `train` and `val`."""

import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cvt.data.decoding import IMAGE_SUFFIXES, is_image, oversize
from cvt.data.labelled import (
    SPLIT_NAMES,
    TEST_NAMES,
    TRAIN_NAMES,
    VALIDATION_NAMES,
    LabelledImages,
    SplitReaders,
    resembles_splits,
    split_name,
)
from cvt.text import CLASSES, listed

logger = logging.getLogger(__name__)

# Suffixes of images that are not decoded.
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".jxl", ".ico", ".svg", ".psd", ".jp2", ".j2k", ".tga", ".eps", ".dng"),
    *(".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".dds", ".icns", ".xcf", ".exr"),
    *(".hdr", ".pcx", ".xbm", ".xpm", ".ras", ".jxr", ".emf", ".wmf"),
)
# Such as photo.jpg.1, photo.jpg~ and photo.jpg_large.
_INNER_SUFFIX = re.compile(rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})[^a-z0-9]", re.IGNORECASE)
OUTPUTS = "folders of runs and models"
HELD_OUT_NAMES = VALIDATION_NAMES + TEST_NAMES
HEADERS_AT_ONCE = 10_000
SHOWN = 3  # names that a message lists for each reason


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
        return self.folder / self.name(index)

    def name(self, index: int) -> str:
        """The path of a file from the folder."""
        index = range(len(self))[index]
        return self.text[self.ends[index] : self.ends[index + 1]]


def refuse_missing(source: Path, files: Files) -> None:
    """Raise a FileNotFoundError if images that a file lists are not there."""
    missing = [files.name(i) for i, path in enumerate(files) if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{source} lists {len(missing)} images that are not in {files.folder}: "
            f"{listed(missing)}"
        )


class Skipped:
    """Files that may be images and are not read, by the reason, to be logged in one line.

    Attributes:
        root: the folder that is searched.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = root
        self.names: dict[str, list[str]] = {}  # the first ones
        self.counts: dict[str, int] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one file."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= SHOWN:
            self.names.setdefault(reason, []).append(name)

    def log(self) -> None:
        """Log how many there are of each kind, with the names of the first ones."""
        if self.counts and os.environ.get("RANK", "0") == "0":  # of several processes, one logs
            kinds = [
                f"{count} {reason} ({', '.join(self.names[reason])}"
                f"{', ...' if count > SHOWN else ''})"
                for reason, count in sorted(self.counts.items())
            ]
            logger.warning("%s: not read: %s", self.root, "; ".join(kinds))


def images_below(folder: Path) -> Iterator[Path]:
    """The image files in a folder and in the folders in it, found by suffix, sorted; none hidden.

    Each folder is read when its turn comes; no more is kept than the names in those on the way.
    Links to folders are followed. What may be an image and is not read is logged at the end.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from cvt.data import images_below
        >>> Path("album/2026").mkdir(parents=True)
        >>> Image.new("RGB", (8, 8)).save("album/2026/1.png")
        >>> [path.name for path in images_below(Path("album"))]
        ['1.png']
    """
    skipped = Skipped(folder)
    for name in _names_below(folder, "", skipped):
        yield folder / name
    skipped.log()


def _names_below(
    folder: str | Path, prefix: str, skipped: Skipped, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[str]:
    """The images below a folder, sorted; `above` are device and inode of the folders above it."""
    if _identity(folder) in above:
        skipped.add("links to a folder that they are in", prefix.rstrip("/"))
        return
    if prefix and is_output(folder):
        skipped.add(OUTPUTS, prefix.rstrip("/"))
        return
    above = (*above, _identity(folder))
    names, folders = [], set()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name[0] == ".":
                continue
            if _is_folder(entry):
                folders.add(entry.name)
                names.append(entry.name)
            elif reason := unreadable(entry):
                skipped.add(reason, prefix + entry.name)
            elif _suffix(entry.name) in IMAGE_SUFFIXES:
                names.append(entry.name)
    for name in names:
        if name in folders:
            yield from _names_below(os.path.join(folder, name), f"{prefix}{name}/", skipped, above)
        else:
            yield prefix + name


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry | Path) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def unreadable(entry: os.DirEntry | Path) -> str:
    """Why what is no folder is not read though it may be an image; empty for all else."""
    try:
        regular = entry.is_file() or stat.S_ISREG(os.stat(entry).st_mode)
    except OSError:
        return "broken links"
    suffix = _suffix(entry.name)
    if not regular:
        return "pipes, sockets or devices"
    if suffix in IMAGE_SUFFIXES:
        return ""
    if suffix in OTHER_SUFFIXES:
        return f"of the suffix {suffix}"
    if (not suffix or _INNER_SUFFIX.search(entry.name)) and is_image(entry):
        return "images without the suffix of one"
    return ""


def is_output(folder: str | Path) -> bool:
    """Whether a folder is a run of `cvt train`, a model folder or an export."""
    path = Path(folder)
    if (path / "args.yaml").is_file():
        return (path / "checkpoints").is_dir() or (path / "results.csv").is_file()
    for name, key in (("config.json", "model_type"), ("export.json", "format")):
        try:
            if key in json.loads((path / name).read_text("utf-8")):
                return True
        except (OSError, ValueError, TypeError):
            continue
    return False


def image_folder(root: str | Path) -> LabelledImages:
    """The images of a folder that has one sub-folder per class, named like it.

    A folder of runs or models is no class.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no class folders, or some without images; names all of those.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from cvt.data import image_folder
        >>> for path in Path("pets/cat/1.png"), Path("pets/dog/2.png"):
        ...     path.parent.mkdir(parents=True)
        ...     Image.new("RGB", (8, 8)).save(path)
        >>> images = image_folder("pets")
        >>> images.classes, images.labels
        (['cat', 'dog'], ['cat', 'dog'])
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    names: list[str] = []
    labels: list[str] = []
    classes: list[str] = []
    empty: list[str] = []
    skipped, above = Skipped(root), (_identity(root),)
    for path in sorted(root.iterdir(), key=lambda path: path.name):
        if path.name[0] == ".":
            continue
        if not _is_folder(path):
            if reason := unreadable(path):
                skipped.add(reason, path.name)
            elif _suffix(path.name) in IMAGE_SUFFIXES:
                skipped.add("outside the folders of the classes", path.name)
            continue
        outputs = skipped.counts.get(OUTPUTS, 0)
        names += _names_below(path, f"{path.name}/", skipped, above)
        if len(names) > len(labels):
            classes.append(path.name)
            labels += [path.name] * (len(names) - len(labels))
        elif skipped.counts.get(OUTPUTS, 0) == outputs:
            empty.append(path.name)
    skipped.log()
    if empty:
        raise ValueError(f"{root} has classes without images: {listed(empty, CLASSES)}")
    if not classes:
        raise ValueError(f"{root} has no folder per class in it")
    return LabelledImages(Files(root, names), labels, classes)


def oversized(
    images: LabelledImages, max_pixels: int | None, rank: int = 0, world: int = 1
) -> Iterator[str]:
    """Why files of labelled images have too many pixels to be decoded, by their headers alone.

    Args:
        images: those of tables and archives are not looked at, which would mean reading them all.
        max_pixels: the pixels that an image may have, as in `cvt.data.decoding.decode`.
        rank: whose share of the images, from 0 to `world` - 1.
        world: how many processes share.

    Returns:
        A sentence for each that names it.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from cvt.data import LabelledImages, oversized
        >>> Image.new("RGB", (40, 30)).save("large.png")
        >>> images = LabelledImages([Path("large.png")], ["cat"])
        >>> len(list(oversized(images, max_pixels=1000))), len(list(oversized(images, None)))
        (1, 0)
    """
    files = (images.sources[i] for i in range(rank, len(images), world))
    with ThreadPoolExecutor() as pool:
        for paths in iter(lambda: list(islice(files, HEADERS_AT_ONCE)), []):
            if not isinstance(paths[0], Path):
                return
            yield from filter(None, pool.map(partial(oversize, max_pixels=max_pixels), paths))


def folder_splits(root: Path) -> SplitReaders:
    """The `train`, `val` and `test` folders in it, by their names; or itself, as "".

    Raises:
        ValueError: two folders are of the same split, a split has no other beside it, or names may
            be those of splits or not; lists the folders.
    """
    folders = [path for path in root.iterdir() if path.name[0] != "." and _is_folder(path)]
    folders.sort(key=lambda path: path.name)
    names = {path: path.name.lower() for path in folders if path.name.lower() in SPLIT_NAMES}
    if len({_kind(name) for name in names.values()}) < 2:  # a class may be called train
        nested = [path for path in folders if _holds_folders_alone(path)]
        names = {path: name for path in nested if (name := split_name(path.name))}
        if unclear := resembles_splits([path.name for path in nested if path not in names]):
            raise ValueError(
                f"{root} has the folders {', '.join(unclear)}, which may be splits or not; call "
                "them train, val and test, or name each, the second as val_data"
            )
    found: dict[str, Path] = {}
    for path, name in names.items():
        other = found.setdefault(_kind(name), path)
        if other != path:
            raise ValueError(f"{root} has two folders of one split, {other.name} and {path.name}")
    if list(found) == [_kind(TRAIN_NAMES[0])]:
        (train,) = names
        raise ValueError(
            f"{root} has a {train.name} folder and none of {', '.join(HELD_OUT_NAMES)}; "
            f"to use its images alone, name {train}"
        )
    beside = [path.name for path in folders if path not in names and not is_output(path)]
    if len(found) == 1 and beside:
        raise ValueError(
            f"{root} has the folder {next(iter(names)).name}, which is a split, beside "
            f"{listed(beside)}; put the classes to train on into a folder train"
        )
    return {name: partial(image_folder, path) for path, name in names.items()} or {
        "": partial(image_folder, root)
    }


def _kind(name: str) -> str:
    """The same for all names of a split."""
    return name[:3]


def _holds_folders_alone(folder: Path) -> bool:
    """Whether a folder has folders in it and no images beside them."""
    has_folder = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != ".":
                if _suffix(entry.name) in IMAGE_SUFFIXES:
                    return False
                has_folder = has_folder or _is_folder(entry)
    return has_folder
