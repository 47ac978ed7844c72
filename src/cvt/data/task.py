"""What the labels of images mean: one class of each image, several classes, or values."""

import math
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass

from cvt.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL

FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
SEPARATORS = (";", "|", ",")  # that labels of several classes usually have
NEEDS_SEPARATOR = (
    f"problem_type = {MULTI_LABEL}: give label_separator for a column of several classes, or "
    "label_column=A,B,C for columns of 0 and 1"
)


@dataclass(frozen=True)
class Task:
    """How a label, which is text, becomes the target of a classifier.

    Attributes:
        problem_type: one of `cvt.problem_type.PROBLEMS`. A label is the name of a class, the names
            of several or of none, or one or more numbers.
        separator: between the names or the numbers of a label.

    Example:
        >>> from cvt.data import Task
        >>> task = Task("multi_label_classification")
        >>> task.label_of({"tags": "outdoor; dog"})
        'dog;outdoor'
        >>> task.target("dog;outdoor", {"cat": 0, "dog": 1, "outdoor": 2})
        [0.0, 1.0, 1.0]
    """

    problem_type: str = SINGLE_LABEL
    separator: str = ";"

    @property
    def has_one_class(self) -> bool:
        """Whether a label is the name of a class."""
        return self.problem_type == SINGLE_LABEL

    def columns_in(self, chosen: str, columns: Container[str]) -> list[str]:
        """The names of columns in a setting: of one column, or of several with commas between.

        Raises:
            ValueError: they are several, and an image has one class; or a name is missing or twice.
        """
        if chosen in columns or "," not in chosen:
            return [chosen]
        if self.has_one_class:
            raise ValueError(
                f"label_column = {chosen} are several columns: give problem_type={MULTI_LABEL} if "
                f"they are classes, of 0 and 1, or {REGRESSION}"
            )
        names = [name.strip() for name in chosen.split(",")]
        if "" in names or len(set(names)) < len(names):
            fault = "a name is missing" if "" in names else "a column is named twice"
            raise ValueError(f"label_column = {chosen}: {fault}")
        return names

    def joined(self, names: Collection[str]) -> str:
        """The label of an image that has these classes.

        Raises:
            ValueError: a name has the separator in it.
        """
        for name in names:
            if self.separator in name:
                raise ValueError(
                    f"the class {name!r} has a {self.separator} in it: give another label_separator"
                )
        return self.separator.join(sorted(set(names)))

    def label_of(self, cells: Mapping[str, str]) -> str:
        """The label in the label columns of a row.

        Args:
            cells: by the names of the columns: one, or a column of 0 and 1 for each class, or one
                for each number.

        Raises:
            ValueError: a cell does not fit; names its column.
        """
        if self.problem_type == REGRESSION:
            return self.separator.join(map(_number, cells, cells.values()))
        first, *others = cells.values()
        if not others:
            if self.has_one_class:
                return first
            names = {name.strip() for name in first.split(self.separator)} - {""}
        else:
            names = {name for name, cell in cells.items() if _flag(name, cell)}
        return self.joined(names)

    def classes_of(self, label: str) -> list[str]:
        """The names of the classes of a label; of numbers there are none."""
        if self.has_one_class:
            return [label]
        return label.split(self.separator) if label and self.problem_type == MULTI_LABEL else []

    def target(self, label: str, indices: Mapping[str, int]) -> int | list[float]:
        """What a classifier is trained to give for a label.

        Args:
            label: as `label_of` returns it.
            indices: the index of every output by its name.

        Returns:
            The index of the class; of several classes 0 or 1 for each output; the numbers.
        """
        if self.has_one_class:
            return indices[label]
        if self.problem_type == REGRESSION:
            return [float(number) for number in label.split(self.separator)]
        target = [0.0] * len(indices)
        for name in self.classes_of(label):
            target[indices[name]] = 1.0
        return target


def _number(column: str, cell: str) -> str:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{column} is {cell!r}, not a number")
    return repr(number)


def _flag(column: str, cell: str) -> bool:
    if cell.lower() not in FLAGS:
        raise ValueError(f"{column} is {cell!r}, neither 0 nor 1")
    return FLAGS[cell.lower()]


def other_task(labels: Iterable[str]) -> str:
    """Which settings labels that are read as class names seem to need, and why; empty if none.

    Args:
        labels: of all images.
    """
    counts = Counter(labels)
    images = counts.total()
    if 2 * len(counts) > images and all(map(_is_number, counts)):
        example = next(iter(counts))
        return (
            f"has {len(counts)} different numbers as the labels of {images} images, such as "
            f"{example}: to predict values, give problem_type=regression"
        )
    for separator in SEPARATORS:
        several = {label for label in counts if separator in label.strip(separator)}
        names = {name.strip() for label in counts for name in label.split(separator)}
        # The synonyms in a name, as in "tench, Tinca tinca", do not recur in other labels.
        if 5 * sum(counts[label] for label in several) > images and len(names) < len(counts):
            return (
                f"has labels of several classes, such as {min(several)}: give "
                f'label_separator="{separator}"'
            )
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
