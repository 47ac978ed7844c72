"""Labelled images to train on and to evaluate with, whatever they are stored in.

What `data` may be, wherever this package asks for it:

| data | what it is | the test half | classes |
|---|---|---|---|
| `digits` | scikit-learn's 1,797 digits | a fifth, always the same | 0 to 9 |
| folder of a folder per class | an image folder | a fifth of every class, by `seed` | the folders, sorted |
| folder with `train/` and `val/` or `test/` | two image folders | `val/`, else `test/` | the folders, sorted |
| `FILE.csv` | lines of path and label; the path is relative to the csv file | its column `split`, else a fifth by `seed` | the labels, sorted |
| folder or `.tar.gz` of CIFAR-10 or CIFAR-100 | python or binary version | its own | its own order; fine labels |
| folder written by `save_to_disk` | a `Dataset` or `DatasetDict` of the library `datasets` | its split `validation` or `test`, else a fifth | of the `ClassLabel`, else the labels, sorted |
| `FILE.parquet`, folder of parquet files | tables of encoded images; `train-*` and `validation-*` or `test-*` tell the splits | likewise | likewise |
| `hub:OWNER/NAME`, and `:CONFIG` or `@SPLIT` behind it | a data set of the Hugging Face hub | likewise | likewise |
| `stream:hub:OWNER/NAME`, `stream:FOLDER` of parquet files or shards | the same, read one after the other | likewise, and never a fifth | of the `ClassLabel`, else the file `classes` |
| folder of `.tar` files, `shards/train-{000..012}.tar`, `shards/*.tar` | webdataset shards, always streamed | by their names, as for parquet files | the file `classes` |

A second such name, `val_data`, is the test half where it is given. A file of `classes`, one name per line, gives
the order of the classes, and the names of labels that are numbers. Of several test halves the one that comes first in
`TEST_NAMES` is used.
"""  # noqa: E501

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cvt.datasets.cifar import cifar_parts, is_cifar
from cvt.datasets.columns import find_columns
from cvt.datasets.csv_file import csv_parts
from cvt.datasets.digits import digits_parts, write_digits
from cvt.datasets.folder import folder_parts, image_folder, images_below
from cvt.datasets.huggingface import SAVED, by_split, file_parts, files_of, hub_parts, saved_parts
from cvt.datasets.labelled import (
    TEST_NAMES,
    TRAIN_NAMES,
    Images,
    LabelledImages,
    Parts,
    StreamedImages,
    label_map,
    split,
)
from cvt.files import check_path
from cvt.labels import read_labels

__all__ = [
    "Images",
    "LabelledImages",
    "StreamedImages",
    "image_folder",
    "images_below",
    "open_labelled",
    "open_training",
    "split",
    "write_digits",
]


def open_training(
    data: str | Path,
    val_data: str | Path | None = None,
    *,
    seed: int = 0,
    classes: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[Images, Images]:
    """The images to train on and those to test on, of the same classes.

    Args:
        data: what to train on; the module's table says what that may be.
        val_data: what to test on, if it is not a part of `data`.
        seed: draws the test half where the data has none.
        classes: a text file of class names, one per line, in the order of the classifier's outputs.
        image_column: the column of a table or csv file with the images, where it is not plain.
        label_column: the column with the labels, likewise.

    Raises:
        ValueError: there is only one class, a class has no images, the halves differ in their
            classes, or the data is malformed.
        OSError: a file is missing or cannot be read, or the hub cannot be reached.
        ImportError: a library that this kind of data needs is not installed.
    """
    options = _Options(_names(classes), image_column, label_column)
    parts = _parts(data, options)
    if val_data is not None:
        train = _half(data, parts, TRAIN_NAMES)
        test = _half(val_data, _parts(val_data, options), TEST_NAMES)
    elif len(parts) > 1:
        train, test = _half(data, parts, TRAIN_NAMES), _half(data, parts, TEST_NAMES)
    else:
        whole = _half(data, parts, TRAIN_NAMES)
        if isinstance(whole, StreamedImages):
            raise ValueError(f"{data} has no test half, and streams are not split: give val_data")
        train, test = split(whole, seed)
    where = data if val_data is None else f"{data} and {val_data}"
    if differing := sorted(set(train.classes) ^ set(test.classes)):
        raise ValueError(f"only one half of {where} has the class {', '.join(differing)}")
    for half, name in ((train, "training"), (test, "test")):
        labels = half.labels if isinstance(half, LabelledImages) else half.classes
        if empty := sorted(set(half.classes) - set(labels)):
            raise ValueError(f"{where} has classes without {name} images: {', '.join(empty)}")
    if len(train.classes) < 2:
        raise ValueError(
            f"{data} has a single class, {', '.join(train.classes)}; at least two are needed"
        )
    return train, test


def open_labelled(
    data: str | Path,
    *,
    classes: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Images:
    """The images to evaluate with: the test half, if `data` has halves, else all of them.

    Args:
        data: the module's table says what that may be.
        classes: as in `open_training`.
        image_column: likewise.
        label_column: likewise.

    Raises:
        ValueError: the data is malformed.
        OSError: a file is missing or cannot be read, or the hub cannot be reached.
        ImportError: a library that this kind of data needs is not installed.
    """
    options = _Options(_names(classes), image_column, label_column)
    return _half(data, _parts(data, options), TEST_NAMES)


@dataclass(frozen=True)
class _Options:
    names: list[str] | None
    image_column: str | None
    label_column: str | None


def _names(file: Path | None) -> list[str] | None:
    """The class names in a text file, however many they are."""
    if file is None:
        return None
    lines = Path(file).read_text(encoding="utf-8-sig", errors="replace").splitlines()
    return read_labels(file, sum(bool(line.strip()) for line in lines))


def _half(data: str | Path, parts: Parts, names: tuple[str, ...]) -> Images:
    """The first of `names`, or the only part there is."""
    chosen = next((name for name in names if name in parts), None)
    if chosen is None and len(parts) > 1:
        raise ValueError(f"{data} has the splits {', '.join(parts)} and none of {', '.join(names)}")
    return parts[next(iter(parts)) if chosen is None else chosen]()


def _parts(data: str | Path, options: _Options) -> Parts:
    """The splits of `data`, by the reader of its kind."""
    check_path(data, "data")
    name = os.fspath(data)
    streaming = name.startswith("stream:")
    name = name.removeprefix("stream:")
    path = Path(name)
    columns = (options.image_column, options.label_column)
    find = partial(
        find_columns,
        names=options.names,
        image_column=options.image_column,
        label_column=options.label_column,
    )
    if name.startswith("hub:"):
        return hub_parts(name.removeprefix("hub:"), find, streaming)
    if shards := files_of("tar", name):
        return file_parts("webdataset", by_split(shards), find, streaming=True)
    if tables := files_of("parquet", name):
        return file_parts("parquet", by_split(tables), find, streaming)
    if streaming:
        raise ValueError(f"{data}: neither shards nor parquet files nor hub:OWNER/NAME to stream")
    if any((path / file).is_file() for file in SAVED):
        return saved_parts(path, find)
    if path.suffix == ".csv" and path.is_file():
        return _renamed(csv_parts(path, *columns), options.names, path)
    if any(columns):
        raise ValueError(
            f"{data} has no columns to choose from: leave image_column and label_column out"
        )
    return _renamed(_plain_parts(name), options.names, path)


def _plain_parts(name: str) -> Parts:
    path = Path(name)
    if name == "digits":
        return digits_parts()
    if path.is_dir():
        is_packed = is_cifar([file.name for file in path.iterdir() if file.is_file()])
        return cifar_parts(path) if is_packed else folder_parts(path)
    if path.is_file() and name.endswith((".tar.gz", ".tgz")):
        return cifar_parts(path)
    if path.is_file():
        raise ValueError(
            f"{path} is neither a .csv nor a .parquet file, nor an archive of CIFAR or shards"
        )
    hint = ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        hint = f"; a data set of the hub is written hub:{name}"
    raise FileNotFoundError(f"{path} is not a folder, nor a file{hint}")


def _renamed(parts: Parts, names: list[str] | None, path: Path) -> Parts:
    """The same with the classes `names`, if there are any."""
    if names is None:
        return parts
    known = label_map(names)

    def renamed(part: Callable[[], Images]) -> LabelledImages:
        images = part()
        assert isinstance(images, LabelledImages)
        if unknown := sorted(set(images.labels) - known.keys()):
            raise ValueError(
                f"{path} has labels that are none of the classes: {', '.join(unknown)}"
            )
        return LabelledImages(images.sources, [known[label] for label in images.labels], names)

    return {name: partial(renamed, part) for name, part in parts.items()}
