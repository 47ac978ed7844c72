"""From the name of a data set to its splits, by the reader of its kind."""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

from cvt.data.cifar import cifar_splits, is_cifar
from cvt.data.class_names import read_labels
from cvt.data.columns import find_columns
from cvt.data.csv_file import csv_splits
from cvt.data.digits import digits_splits
from cvt.data.flowers import flowers_splits, is_flowers
from cvt.data.folder import folder_splits
from cvt.data.folds import fold as fold_of
from cvt.data.huggingface import (
    SAVED,
    by_split,
    file_splits,
    files_of,
    hub_splits,
    saved_splits,
)
from cvt.data.labelled import (
    TEST_NAMES,
    TRAIN_NAMES,
    VALIDATION_NAMES,
    Images,
    LabelledImages,
    SplitReaders,
    Splits,
    StreamedImages,
    label_map,
    split,
)
from cvt.data.pets import is_pets, pets_splits
from cvt.data.split_file import recorded_split
from cvt.data.task import NEEDS_SEPARATOR, Task, other_task
from cvt.files import check_path
from cvt.problem_type import MULTI_LABEL, PROBLEMS, REGRESSION, SINGLE_LABEL
from cvt.text import CLASSES, listed

logger = logging.getLogger(__name__)


def open_training(
    data: str | Path,
    val_data: str | Path | None = None,
    *,
    seed: int = 0,
    classes: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    folds: int | None = None,
    fold: int = 1,
    label_separator: str | None = None,
    problem_type: str | None = None,
    split_file: Path | None = None,
) -> Splits:
    """The images to train on, those that validate, of the same classes, and those held out.

    Args:
        data: what to train on; see the table of `cvt.data`.
        val_data: what to validate with, if it is not a split of `data`.
        seed: draws the validation images where the data has no split for them.
        classes: a text file of class names, one per line, in the order of the classifier's outputs.
            With it, `val_data` may lack classes.
        image_column: the column of a table or csv file with the images, where it is not plain.
        label_column: the column with the labels, likewise; with `problem_type` several, with commas
            between: one of 0 and 1 for each class, or one for each value.
        group_column: the column that says what an image shows; images of one group are on one side
            of the split.
        folds: divide the training images into so many folds, in place of drawing a fifth; what
            would validate otherwise is held out if it is called a test split.
        fold: the one of them that validates, from 1.
        label_separator: what is between the classes of a label, as `;` in `a;b`.
        problem_type: `single_label_classification`, `multi_label_classification` or `regression`;
            by default the second with a `label_separator`, else the first.
        split_file: what `write_split` wrote; the split in it, if it is of these images, is taken
            in place of one drawn.

    Returns:
        The splits `train`, `validation` and `test`. A test split without a validation split beside
        it validates, and `test` is then None.

    Raises:
        ValueError: there is only one class, a class has no images, the splits differ in their
            classes or share a group, there are folds beside a validation split, the labels look
            like those of another problem, or the data is malformed.
        OSError: a file is missing or cannot be read, or the hub cannot be reached.
        ImportError: a library that this kind of data needs is not installed.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from cvt.data import open_training
        >>> for label, red in (("cat", 0), ("dog", 100)):
        ...     Path("photos", label).mkdir(parents=True)
        ...     for i in range(10):
        ...         Image.new("RGB", (8, 8), (red + i, 0, 0)).save(f"photos/{label}/{i}.png")
        >>> splits = open_training("photos", seed=0)
        >>> len(splits.train), len(splits.validation)
        (16, 4)
    """
    options = _options(
        classes, image_column, label_column, label_separator, problem_type, group_column
    )
    splits = _splits(data, options)
    name = _chosen(data, splits, TRAIN_NAMES)
    is_held_out = name in VALIDATION_NAMES + TEST_NAMES
    if is_held_out and (Path(data).is_dir() or "hub:" in os.fspath(data)):
        raise ValueError(f"{data} has the split {name} alone, and none to train on")
    source, others = (data, splits) if val_data is None else (val_data, _splits(val_data, options))
    train: Images = splits[name]()
    _check_names(data, train.classes)
    if isinstance(train, LabelledImages):
        _check_task(data, train, label_separator, problem_type)
    validation: Images
    validating = name
    if folds and (val_data or set(splits) & set(VALIDATION_NAMES)):
        raise ValueError(
            f"folds = {folds}: {val_data or data} has a validation split, whose place folds take; "
            "name the images to divide alone"
        )
    if folds and isinstance(train, StreamedImages):
        raise ValueError(f"folds = {folds}: {data} is a stream, which cannot be divided")
    if val_data is None and (folds or len(splits) == 1):
        if isinstance(train, StreamedImages):
            raise ValueError(
                f"{data} has no validation split, and streams are not split: give val_data"
            )
        recorded = recorded_split(train, split_file) if split_file else None
        drawn = partial(fold_of, train, folds, fold, seed) if folds else partial(split, train, seed)
        train, validation = recorded or drawn()
    else:
        validating = _chosen(source, others, VALIDATION_NAMES, TEST_NAMES)
        validation = others[validating]()
    held_out = [
        read
        for of in (splits, others)
        for key, read in of.items()
        if key in TEST_NAMES and (of, key) not in ((splits, name), (others, validating))
    ]
    test = held_out[0]() if held_out else None
    where = str(data) if val_data is None else f"{data} and {val_data}"
    _check(where, train, validation, test, may_lack=bool(classes and val_data))
    return Splits(train, validation, test)


def _check(
    where: str, train: Images, validation: Images, test: Images | None, may_lack: bool
) -> None:
    """Raise a ValueError if the splits differ in their classes, or one has no images of a class.

    Validation images of their own may lack classes where all are listed in a file: those of
    ImageNet-1k validate ImageNet-22k. It is logged.
    """
    if differing := sorted(set(train.classes) ^ set(validation.classes)):
        raise ValueError(
            f"of the training and the validation split of {where} only one has the class "
            f"{listed(differing, CLASSES)}"
        )
    if test is not None and (unknown := sorted(set(test.classes) - set(train.classes))):
        raise ValueError(
            f"{where}: only the test split has the class {listed(unknown, CLASSES)}, which is not "
            "trained on"
        )
    for images, name in ((train, "training"), (validation, "validation")):
        if isinstance(images, StreamedImages):
            continue
        if not len(images):
            raise ValueError(f"{where} has no {name} images")
        used = {name for label in set(images.labels) for name in images.task.classes_of(label)}
        if train.task.problem_type != REGRESSION and (empty := sorted(set(images.classes) - used)):
            if not (may_lack and images is validation):
                raise ValueError(
                    f"{where} has classes without {name} images: {listed(empty, CLASSES)}"
                )
            logger.warning(
                "%s: %d of the %d classes have validation images",
                *(where, len(used), len(train.classes)),
            )
    every = {"training": train, "validation": validation, "test": test}
    groups = {name: set(getattr(images, "groups", None) or ()) for name, images in every.items()}
    for one, other in combinations(groups, 2):
        if shared := sorted(groups[one] & groups[other]):
            raise ValueError(
                f"{where}: {len(shared)} groups, such as {shared[0]}, have images in the {one} and "
                f"in the {other} split"
            )
    if len(train.classes) < 2 and train.task.has_one_class:
        raise ValueError(
            f"{where} has a single class, {', '.join(train.classes)}; at least two are needed"
        )


def _check_names(data: str | Path, classes: list[str]) -> None:
    """Raise a ValueError if class names look the same, or written as text."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(" ".join(name.split()), []).append(name)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{data} has a class whose name is not UTF-8, {name!a}; rename it"
            ) from None
    if pairs := [repr(name) for names in alike.values() if len(names) > 1 for name in names]:
        raise ValueError(
            f"{data} has classes that differ in spaces alone: {listed(pairs, CLASSES)}"
        )


def open_labelled(
    data: str | Path,
    *,
    classes: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    problem_type: str | None = None,
) -> Images:
    """The images to evaluate with: the validation split, else the test split, else all of them.

    Args:
        data: see the table of `cvt.data`.
        classes: as in `open_training`.
        image_column: likewise.
        label_column: likewise.
        label_separator: likewise.
        problem_type: likewise.

    Raises:
        ValueError: the data is malformed.
        OSError: a file is missing or cannot be read, or the hub cannot be reached.
        ImportError: a library that this kind of data needs is not installed.

    Example:
        >>> from cvt.data import open_labelled
        >>> images = open_labelled("digits")
        >>> len(images), images.classes
        (360, ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9'])
    """
    options = _options(classes, image_column, label_column, label_separator, problem_type)
    splits = _splits(data, options)
    images = splits[_chosen(data, splits, VALIDATION_NAMES, TEST_NAMES)]()
    _check_names(data, images.classes)
    return images


def open_splits(
    data: str | Path,
    *,
    classes: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    problem_type: str | None = None,
) -> dict[str, Images]:
    """All splits of a data set by their names; one that has none is called "".

    Args:
        data: see the table of `cvt.data`.
        classes: as in `open_training`.
        image_column: likewise.
        label_column: likewise.
        label_separator: likewise.
        problem_type: likewise.

    Raises:
        ValueError: the data is malformed.
        OSError: a file is missing or cannot be read, or the hub cannot be reached.
        ImportError: a library that this kind of data needs is not installed.

    Example:
        >>> from cvt.data import open_splits
        >>> {name: len(images) for name, images in open_splits("digits").items()}
        {'train': 1437, 'test': 360}
    """
    options = _options(classes, image_column, label_column, label_separator, problem_type)
    return {name: read() for name, read in _splits(data, options).items()}


@dataclass(frozen=True)
class _Options:
    names: list[str] | None
    image_column: str | None
    label_column: str | None
    task: Task
    group_column: str | None
    label_separator: str | None


def _options(
    classes: Path | None,
    image_column: str | None,
    label_column: str | None,
    label_separator: str | None,
    problem_type: str | None,
    group_column: str | None = None,
) -> _Options:
    """The options with the class names in a file, however many they are.

    Raises:
        ValueError: options contradict each other.
    """
    problem = problem_type or (MULTI_LABEL if label_separator else SINGLE_LABEL)
    if problem not in PROBLEMS:
        raise ValueError(f"problem_type = {problem}: must be one of {', '.join(PROBLEMS)}")
    if label_separator and problem != MULTI_LABEL:
        raise ValueError(f"label_separator = {label_separator}: means several labels, no {problem}")
    if classes and problem == REGRESSION:
        raise ValueError(f"classes = {classes}: values have no classes; leave it out")
    names = None if classes is None else read_labels(classes)
    task = Task(problem, label_separator or Task.separator)
    return _Options(names, image_column, label_column, task, group_column, label_separator)


def _check_task(
    data: str | Path, images: LabelledImages, separator: str | None, problem_type: str | None
) -> None:
    """Raise a ValueError if labels look like those of another problem than the one assumed."""
    if separator and problem_type is None and not any(separator in x for x in images.labels):
        raise ValueError(
            f"label_separator = {separator}: no label of {data} has several classes, such as "
            f"{images.labels[0]}; give problem_type={MULTI_LABEL} too if that is right"
        )
    if problem_type is None and images.task.has_one_class and (found := other_task(images.labels)):
        raise ValueError(f"{data} {found}; if each is one class, problem_type={SINGLE_LABEL}")


def _chosen(data: str | Path, splits: SplitReaders, *names: tuple[str, ...]) -> str:
    """The name of the split that has one of the first of `names`; else of the only one there is."""
    for split_names in names:
        chosen = [name for name in splits if name in split_names]
        if len(chosen) > 1:
            raise ValueError(f"{data} has two splits of one kind: {', '.join(chosen)}")
        if chosen:
            return chosen[0]
    if len(splits) > 1:
        asked = ", ".join(name for split_names in names for name in split_names)
        raise ValueError(f"{data} has the splits {', '.join(splits)} and none of {asked}")
    return next(iter(splits))


def check_exists(data: str | Path) -> None:
    """Make sure that there is data of a name, without reading it; the hub is not asked.

    Raises:
        ValueError: the name is empty.
        FileNotFoundError: it is no folder, no file and no pattern of files.
    """
    check_path(data, "data")
    name = os.fspath(data).removeprefix("stream:")
    if name == "digits" or name.startswith("hub:") or Path(name).exists():
        return
    if not (files_of("tar", name) or files_of("parquet", name)):
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            hint = f"; a data set of the hub is written hub:{name}"
        raise FileNotFoundError(f"{Path(name)} is not a folder, nor a file{hint}")


def _splits(data: str | Path, options: _Options) -> SplitReaders:
    """The splits of `data`, by the reader of its kind."""
    check_exists(data)
    name = os.fspath(data)
    streaming = name.startswith("stream:")
    name = name.removeprefix("stream:")
    path = Path(name)
    columns = (options.image_column, options.label_column, options.group_column)
    find = partial(
        find_columns,
        names=options.names,
        image_column=options.image_column,
        label_column=options.label_column,
        group_column=options.group_column,
        task=options.task,
        label_separator=options.label_separator,
    )
    if name.startswith("hub:"):
        return hub_splits(name.removeprefix("hub:"), find, streaming)
    if shards := files_of("tar", name):
        return file_splits("webdataset", by_split(shards), find, streaming=True)
    if tables := files_of("parquet", name):
        return file_splits("parquet", by_split(tables), find, streaming)
    if streaming:
        raise ValueError(f"{data}: neither shards nor parquet files nor hub:OWNER/NAME to stream")
    if any((path / file).is_file() for file in SAVED):
        return saved_splits(path, find)
    if path.suffix.lower() == ".csv" and path.is_file():
        several = options.label_separator or "," in (options.label_column or "")
        if options.task.problem_type == MULTI_LABEL and not several:
            raise ValueError(NEEDS_SEPARATOR)
        return _renamed(csv_splits(path, *columns, options.task), options.names, path)
    if not options.task.has_one_class:
        raise ValueError(
            f"problem_type = {options.task.problem_type}: such labels are in columns of a csv or "
            f"parquet file or a data set of the hub, and {data} has none"
        )
    if any(columns):
        raise ValueError(
            f"{data} has no columns to choose from: leave image_column, label_column and "
            f"group_column out; `cvt check {data} --groups FILE.csv` writes a csv file with groups"
        )
    return _renamed(_plain_splits(name, options.names), options.names, path)


def _plain_splits(name: str, classes: list[str] | None) -> SplitReaders:
    path = Path(name)
    if name == "digits":
        if path.is_dir():
            raise ValueError(
                "digits is scikit-learn's data set, and a folder here: for the folder write "
                "./digits; for the data set, start in another folder"
            )
        return digits_splits()
    if path.is_dir():
        if is_pets(path):
            return pets_splits(path)
        if is_flowers(path):
            return flowers_splits(path, classes)
        is_packed = is_cifar([file.name for file in path.iterdir() if file.is_file()])
        return cifar_splits(path) if is_packed else folder_splits(path)
    if path.is_file() and name.endswith((".tar.gz", ".tgz")):
        return cifar_splits(path)
    raise ValueError(
        f"{path} is neither a .csv nor a .parquet file, nor an archive of CIFAR or shards"
    )


def _renamed(splits: SplitReaders, names: list[str] | None, path: Path) -> SplitReaders:
    """The same with the classes `names`, if there are any."""
    if names is None:
        return splits
    known = label_map(names)

    def renamed(read: Callable[[], Images]) -> LabelledImages:
        images = read()
        assert isinstance(images, LabelledImages)
        task = images.task
        used = {name for label in set(images.labels) for name in task.classes_of(label)}
        if unknown := sorted(used - known.keys()):
            raise ValueError(
                f"{path} has labels that are none of the classes: {listed(unknown, CLASSES)}"
            )
        labels = [
            task.joined([known[name] for name in task.classes_of(label)]) for label in images.labels
        ]
        return LabelledImages(images.sources, labels, names, task, images.groups)

    return {name: partial(renamed, read) for name, read in splits.items()}
