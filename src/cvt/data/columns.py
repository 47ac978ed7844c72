"""Which columns of a table, as `datasets` describes it, are the image and its label."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from hashlib import sha256
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvt.data.decoding import Source, StoredImage
from cvt.data.labelled import label_map
from cvt.data.task import NEEDS_SEPARATOR, Task
from cvt.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL

if TYPE_CHECKING:
    from datasets import Features

LABEL_NAMES = ("label", "labels", "cls")  # taken where several columns could be the label
WORD, WHOLE, FRACTION = r"(large_)?string", r"u?int\d+", r"float\d+"
# The types of a label's column, and what is wrong with others.
LABELS = {
    SINGLE_LABEL: (rf"{WORD}|{WHOLE}", "neither names nor whole numbers"),
    MULTI_LABEL: (rf"{WORD}|list of ({WORD}|{WHOLE})", "neither names nor lists of classes"),
    REGRESSION: (rf"{WHOLE}|{FRACTION}", "no numbers"),
}
FLAGS = rf"bool|{WHOLE}|{FRACTION}|{WORD}", "neither 0 and 1 nor true and false"


@dataclass(frozen=True)
class Columns:
    """The image and the label in the rows of a table.

    Attributes:
        table: what messages call it.
        image: the image's column.
        labels: the label's column, or those of its classes or values; `json.label` is a field of
            the column `json`.
        names: the names of the outputs in order; None where the labels are names of classes and no
            file lists them.
        class_by_label: the names by what may be in the label's column, where they are listed.
        task: what the labels mean.
        group: the column that says what an image shows, if one is named.
    """

    table: str
    image: str
    labels: list[str]
    names: list[str] | None
    class_by_label: Mapping[str | int, str]
    task: Task = Task()  # noqa: RUF009 (it is frozen)
    group: str | None = None

    def label_of(self, row: dict[str, Any], name: str) -> str:
        """The label of a row, see `Task.label_of`.

        Args:
            row: the cells by their columns.
            name: of the row, for messages.

        Raises:
            ValueError: a cell does not fit; names the row and the column.
        """
        cells = {column: _cell(row, column) for column in self.labels}
        first = self.labels[0]
        try:
            if self.task.has_one_class:
                return self._class_of(first, cells[first])
            if isinstance(cells[first], list):
                return self.task.joined([self._class_of(first, cell) for cell in cells[first]])
            words = {name: "" if cell is None else str(cell) for name, cell in cells.items()}
            label = self.task.label_of(words)
            if self.task.problem_type == REGRESSION:
                return label
            return self.task.joined([self._class_of(first, x) for x in self.task.classes_of(label)])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _class_of(self, column: str, cell: str | int | None) -> str:
        """The name of a class, from what is in the label's column."""
        if isinstance(cell, str) and cell and self.names is None:
            return cell
        if cell is None or cell not in self.class_by_label:
            raise ValueError(f"{column} is {cell!r}, which is none of the classes")
        return self.class_by_label[cell]

    def source(self, row: dict[str, Any], name: str) -> Source:
        """The image of a row, encoded as it is stored, or the file that the row names."""
        value = row[self.image]
        if isinstance(value, dict):
            path = value.get("path")
            if value.get("bytes") is None and path:
                if "://" not in path:
                    return Path(path)
                import fsspec

                with fsspec.open(path) as file:
                    return StoredImage(path, file.read())
            value = value.get("bytes")
        return StoredImage(name, value or b"")  # decoding raises the error for an empty image

    def sample(self, row: dict[str, Any]) -> tuple[Source, str]:
        """The image and the name of the class of a row whose number is not known."""
        if "__key__" in row:  # of a webdataset
            name = f"{row['__url__']}: {row['__key__']}"
        else:
            image = row[self.image] or b""
            path = image.get("path") if isinstance(image, dict) else None
            content = image.get("bytes") or b"" if isinstance(image, dict) else image
            name = f"{self.table}: {path or 'image of SHA-256 ' + sha256(content).hexdigest()}"
        return self.source(row, name), self.label_of(row, name)


def _cell(row: dict[str, Any], column: str) -> Any:
    return row[column] if column in row else reduce(getitem, column.split("."), row)


def find_columns(
    features: "Features",
    table: str,
    names: list[str] | None,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    task: Task = Task(),  # noqa: B008 (it is frozen)
    label_separator: str | None = None,
) -> Columns:
    """The columns of the image and the label, found by their types unless they are named.

    Args:
        features: the columns and their types.
        table: what messages call it.
        names: the class names in order, where a file gives them.
        image_column: the images' column.
        label_column: the labels' column; several have commas between.
        group_column: the groups' column, if images are in groups.
        task: what the labels mean.
        label_separator: what is between the classes in a column of text, where that is given.

    Raises:
        ValueError: there is no such column, or a choice; lists all columns and names the option.
    """
    from datasets import Image

    columns = dict(_flat(features))

    def failed(problem: str, option: str) -> ValueError:
        return ValueError(
            f"{table} {problem}; its columns are {', '.join(columns)}. Name one with {option}"
        )

    images = [name for name, feature in columns.items() if isinstance(feature, Image)]
    if image_column:
        images = [name for name in (image_column,) if name in features]
    if len(images) != 1:
        found = "several columns" if images else f"no column {image_column or ''}".rstrip()
        raise failed(f"has {found} of images", "image_column")
    if group_column and not re.fullmatch(
        LABELS[SINGLE_LABEL][0], _dtype(features.get(group_column))
    ):
        raise failed(f"has no column {group_column} of names or whole numbers", "group_column")

    try:
        labels = task.columns_in(label_column, columns) if label_column else []
    except ValueError as error:
        raise ValueError(f"{table}: {error}") from None
    if missing := [name for name in labels if name not in columns]:
        raise failed(f"has no column {missing[0]} that could be the label", "label_column")
    labels = labels or _label_columns(columns, images[0], task)
    if not label_column and len(labels) != 1:
        found = "several columns" if labels else "no column"
        raise failed(f"has {found} that could be the label", "label_column")
    first, is_flags = labels[0], task.problem_type == MULTI_LABEL and len(labels) > 1
    if task.has_one_class and _dtype(columns[first]).startswith("list"):
        raise ValueError(
            f"{table} has several labels per image in {first}: give problem_type={MULTI_LABEL}"
        )
    pattern, fault = FLAGS if is_flags else LABELS[task.problem_type]
    for name in labels:
        if not re.fullmatch(pattern, _dtype(columns[name])):
            raise failed(f"has {fault} in {name}", "label_column")
    if is_flags or task.problem_type == REGRESSION:
        names = names or labels
        return Columns(table, images[0], labels, names, label_map(names), task, group_column)
    if not (task.has_one_class or label_separator or _dtype(columns[first]).startswith("list")):
        raise ValueError(f"{table}: {NEEDS_SEPARATOR}")

    class_by_label = label_map(names or [])
    own = getattr(_item(columns[first]), "names", None)  # of a ClassLabel
    if own:
        # Its numbers mean its own names; a file of classes may have them in another order.
        names = names or list(own)
        known = label_map(names)
        class_by_label = {i: known[name] for i, name in enumerate(own) if name in known}
    elif names is None and "string" not in _dtype(columns[first]):
        raise ValueError(
            f"{table} numbers its classes, in {first}, and does not name them: give a file of "
            "their names, one per line, as classes"
        )
    return Columns(table, images[0], labels, names, class_by_label, task, group_column)


def _label_columns(columns: Mapping[str, Any], image: str, task: Task) -> list[str]:
    """The columns that could be the label: by type, else by name, else all that fit."""
    pattern, _ = LABELS[task.problem_type]
    fitting = {
        name: feature
        for name, feature in columns.items()
        if re.fullmatch(pattern, _dtype(feature))
        and name != image
        and not name.startswith((f"{image}.", "__"))
    }
    if task.problem_type != REGRESSION:
        if named := [name for name, each in fitting.items() if hasattr(_item(each), "names")]:
            return named
        lists = [name for name, each in columns.items() if _dtype(each).startswith("list")]
        if lists and not (task.has_one_class and fitting):
            return lists
    return [name for name in LABEL_NAMES if name in fitting][:1] or list(fitting)


def _item(feature: Any) -> Any:
    """The type of what a list has; of what is no list, its own type."""
    from datasets import LargeList, List

    if isinstance(feature, List | LargeList):
        return feature.feature
    return feature[0] if isinstance(feature, list) else feature


def _dtype(feature: Any) -> str:
    item = _item(feature)
    name = getattr(item, "dtype", "")
    return name if item is feature else f"list of {name}"


def _flat(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Columns and their types; those of a dict's fields are named column.field."""
    for name, feature in features.items():
        if isinstance(feature, dict):
            yield from _flat(feature, f"{prefix}{name}.")
        else:
            yield prefix + name, feature
