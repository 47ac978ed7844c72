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

if TYPE_CHECKING:
    from datasets import Features

LABEL_NAMES = ("label", "cls")  # taken where several columns could be the label


@dataclass(frozen=True)
class Columns:
    """The image and the label in the rows of a table.

    Attributes:
        table: what messages call it.
        image: the image's column.
        label: the label's column; `json.label` is a field of the column `json`.
        names: the class names in order; None where the labels are names and no file lists them.
        class_by_label: the names by what may be in the label's column, where they are listed.
        group: the column that says what an image shows, if one is named.
    """

    table: str
    image: str
    label: str
    names: list[str] | None
    class_by_label: Mapping[str | int, str]
    group: str | None = None

    def class_of(self, label: str | int | None, row: str) -> str:
        """The name of a class, from what is in the label's column.

        Raises:
            ValueError: it is no class; names the row.
        """
        if isinstance(label, str) and label and self.names is None:
            return label
        if label is None or label not in self.class_by_label:
            raise ValueError(f"{row}: {self.label} is {label!r}, which is none of the classes")
        return self.class_by_label[label]

    def label_in(self, row: dict[str, Any]) -> Any:
        """What a row has in the label's column."""
        if self.label in row:
            return row[self.label]
        return reduce(getitem, self.label.split("."), row)

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
        return self.source(row, name), self.class_of(self.label_in(row), name)


def find_columns(
    features: "Features",
    table: str,
    names: list[str] | None,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
) -> Columns:
    """The columns of the image and the label, found by their types unless they are named.

    Args:
        features: the columns and their types.
        table: what messages call it.
        names: the class names in order, where a file gives them.
        image_column: the images' column.
        label_column: the labels' column.
        group_column: the groups' column, if images are in groups.

    Raises:
        ValueError: there is no such column, or a choice; lists all columns and names the option.
    """
    from datasets import ClassLabel, Image, LargeList, List

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
    labels = _label_columns(columns, images[0])
    if label_column:
        labels = [name for name in (label_column,) if name in columns]
    several = [name for name, f in columns.items() if isinstance(f, List | LargeList | list)]
    if several and (label_column in several or not labels):
        raise ValueError(f"{table} has several labels per image in {several[0]}: one is needed")
    if len(labels) != 1:
        found = "several columns" if labels else f"no column {label_column or ''}".rstrip()
        raise failed(f"has {found} that could be the label", "label_column")

    if group_column and not _is_label(features.get(group_column)):
        raise failed(f"has no column {group_column} of names or whole numbers", "group_column")
    feature = columns[labels[0]]
    class_by_label = label_map(names or [])
    if isinstance(feature, ClassLabel):
        # Its numbers mean its own names; a file of classes may have them in another order.
        names = names or list(feature.names)
        known, own = label_map(names), enumerate(feature.names)
        class_by_label = {i: known[name] for i, name in own if name in known}
    elif not _is_label(feature):
        raise failed(f"has neither names nor whole numbers in {labels[0]}", "label_column")
    elif names is None and "string" not in feature.dtype:
        raise ValueError(
            f"{table} numbers its classes, in {labels[0]}, and does not name them: give a file of "
            "their names, one per line, as classes"
        )
    return Columns(table, images[0], labels[0], names, class_by_label, group_column)


def _label_columns(columns: Mapping[str, Any], image: str) -> list[str]:
    """The columns that could be the label: by type, else by name, else all plain ones."""
    from datasets import ClassLabel

    if labels := [name for name, feature in columns.items() if isinstance(feature, ClassLabel)]:
        return labels
    plain = [
        name
        for name, feature in columns.items()
        if _is_label(feature) and name != image and not name.startswith((f"{image}.", "__"))
    ]
    return [name for name in LABEL_NAMES if name in plain][:1] or plain


def _is_label(feature: Any) -> bool:
    return bool(re.fullmatch(r"(large_)?string|u?int\d+", getattr(feature, "dtype", "")))


def _flat(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Columns and their types; those of a dict's fields are named column.field."""
    for name, feature in features.items():
        if isinstance(feature, dict):
            yield from _flat(feature, f"{prefix}{name}.")
        else:
            yield prefix + name, feature
