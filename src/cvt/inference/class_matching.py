"""Classes of the data and of the classifier, matched by name; ImageNet's also by WordNet id."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from cvt.architecture import Architecture
from cvt.data.class_names import imagenet_classes
from cvt.text import CLASSES, listed


def class_indices(names: Iterable[str], config: Architecture) -> dict[str, int]:
    """The classifier's index of every class name; ImageNet's also by their WordNet ids.

    Raises:
        ValueError: the classifier does not know a name; lists those and the nearest known.
    """
    names, rows, counts = list(names), class_rows(config), Counter(config.class_names)
    if twice := [name for name in names if counts[name] > 1]:
        raise ValueError("the model has several classes called " + ", ".join(twice))
    if unknown := [name for name in names if name not in rows]:
        raise ValueError(f"the model does not know these classes: {_nearest(unknown, rows)}")
    return rows


def class_rows(config: Architecture) -> dict[str, int]:
    """The classifier's row of every name that means one class; of ImageNet's, WordNet ids too."""
    classes, imagenet = config.class_names, imagenet_classes()
    counts = Counter(classes)
    rows = {name: i for i, name in enumerate(classes) if counts[name] == 1}
    if len(classes) == len(imagenet) and classes[0] == next(iter(imagenet.values())):
        rows |= {wordnet_id: i for i, wordnet_id in enumerate(imagenet)}
    return rows


def match_classes(
    classes: Sequence[str], config: Architecture, class_map: Mapping[str, str | None] | None = None
) -> dict[str, int]:
    """The classifier's index of every class of the data, by name, without the excluded ones.

    Args:
        classes: the names in the data.
        config: the classifier's.
        class_map: names in the data whose name in the model is another; None leaves a class out.

    Raises:
        ValueError: the data or the model does not know a name, or no class is left.
    """
    names = {name: name for name in classes} | dict(class_map or {})
    if unknown := names.keys() - set(classes):
        raise ValueError(
            f"the data has no such classes to map: {_nearest(sorted(unknown), classes)}"
        )
    kept = {name: wanted for name, wanted in names.items() if wanted is not None}
    if not kept:
        raise ValueError("the class map leaves all classes of the data out")
    indices = class_indices(kept.values(), config)
    return {name: indices[wanted] for name, wanted in kept.items()}


def _nearest(unknown: list[str], known: Iterable[str]) -> str:
    described = [repr(name) for name in unknown]
    for i, name in enumerate(unknown[:CLASSES]):
        if near := get_close_matches(name, known, n=1):
            described[i] += f" (is it {near[0]!r}?)"
    return listed(described, CLASSES)


def read_class_map(path: str | Path) -> dict[str, str | None]:
    """Names in the data and what the model calls them, from a JSON object or a two-column csv.

    An empty name, or null, leaves the images of that class out. The csv file has no header.

    Raises:
        ValueError: the file is no such map, or has a name twice.
        OSError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix == ".json":
            rows = json.loads(text, object_pairs_hook=tuple)
        else:
            rows = tuple(row for row in csv.reader(text.splitlines()) if row)
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(rows, tuple) or not all(
        len(row) == 2 and isinstance(row[0], str) and isinstance(row[1], str | None) for row in rows
    ):
        raise ValueError(
            f"{path} must be a JSON object, or a csv file of two columns without a header: the "
            "name of each class in the data and in the model, or nothing to leave it out"
        )
    if twice := [name for name, count in Counter(name for name, _ in rows).items() if count > 1]:
        raise ValueError(f"{path} maps classes twice: {listed(twice, CLASSES)}")
    return {name: wanted or None for name, wanted in rows}


def read_real_labels(path: str | Path) -> list[list[int]]:
    """ImageNet-ReaL's labels, its `real.json`: lists of class indices, one per validation image.

    Raises:
        ValueError: the file holds something else.
        OSError: the file cannot be read.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    classes = range(len(imagenet_classes()))
    if not isinstance(found, list) or not all(
        isinstance(labels, list)
        and all(type(label) is int and label in classes for label in labels)
        for labels in found
    ):
        raise ValueError(f"{path} must be a list of lists of class indices, as ImageNet-ReaL's is")
    return found


def real_labels_of(name: str, real_labels: list[list[int]]) -> list[int]:
    """The number in an image's name is its place in the list."""
    match = re.search(r"ILSVRC2012_val_(\d{8})", name)
    number = int(match[1]) if match else 0
    if not 0 < number <= len(real_labels):
        raise ValueError(
            f"{name}: has no real labels; those are of the images ILSVRC2012_val_00000001 to "
            f"{len(real_labels):08d}"
        )
    return real_labels[number - 1]
