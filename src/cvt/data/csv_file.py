"""Comma-separated files of path and label."""

import csv
import os
from functools import partial
from pathlib import Path

from cvt.data.folder import Files, refuse_missing
from cvt.data.labelled import SPLIT_NAMES, LabelledImages, SplitReaders
from cvt.data.task import Task
from cvt.problem_type import REGRESSION

PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_NAMES = ("label", "class", "class_name")
UNNAMED = "value"  # what a file without a header has
Rows = list[tuple[int, list[str]]]  # number and cells of each line


def csv_splits(
    path: Path,
    image_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    task: Task = Task(),  # noqa: B008 (it is frozen)
) -> SplitReaders:
    """The images that a file lists, by the values of its column `split` if it has one.

    Its first line is a header if a cell of it is one of `PATH_NAMES`, or if a column is named.
    Without a header a line is path and label. Several label columns have commas between.

    Raises:
        ValueError: the file is malformed; names the line, or the files that are missing.
        OSError: the file cannot be read.
    """
    advice = "; name the columns with image_column and label_column"
    header, rows = _table(path, bool(image_column or label_column or group_column), advice)
    image, labels, split_column, group = 0, {UNNAMED: 1}, None, None
    if header:
        image = _column(path, header, image_column, PATH_NAMES, "image_column")
        labels = _label_columns(path, header, label_column, task)
        if "split" in (lowered := [cell.lower() for cell in header]):
            split_column = _column(path, lowered, "split", (), "")
        if group_column:
            group = _column(path, header, group_column, (), "group_column")
    elif len(rows[0][1]) != 2:
        raise ValueError(
            f"{path} has {len(rows[0][1])} columns, separated by commas, and no header that names "
            "a path column"
        )

    has_columns = len(labels) > 1 or task.problem_type == REGRESSION
    classes = list(labels) if has_columns else None
    splits = _by_split(path, rows, (image, labels, split_column, group), task)
    names = [name for of_split, _, _ in splits.values() for name in of_split]
    refuse_missing(path, Files(path.parent, names))
    return {
        split: partial(
            LabelledImages,
            Files(path.parent, names),
            written,
            classes,
            task,
            groups=groups if group_column else None,
        )
        for split, (names, written, groups) in splits.items()
    }


def csv_images(path: Path) -> Files:
    """The images that a file lists, once each, in its order; its other columns are not read.

    Its first line is a header if a cell of it is one of `PATH_NAMES`; without a header, a line
    begins with the path.

    Raises:
        ValueError: the file is malformed; names the line.
        FileNotFoundError: images that it lists are missing; names them.
    """
    header, rows = _table(path)
    image = _column(path, header, None, PATH_NAMES, "") if header else 0
    names: dict[str, None] = {}
    for line, cells in rows:
        if not cells[image]:
            raise ValueError(f"{path}, line {line}: has no path")
        names[cells[image]] = None
    files = Files(path.parent, list(names))
    refuse_missing(path, files)
    return files


def has_labels(path: Path) -> bool:
    """Whether a file has a label for each of the images that it lists, as `csv_splits` finds it."""
    header, rows = _table(path)
    if header:
        return any(cell.lower() in LABEL_NAMES for cell in header)
    return len(rows[0][1]) == 2


def _table(path: Path, has_header: bool = False, advice: str = "") -> tuple[list[str] | None, Rows]:
    """The header, if it has one or must have one, and the other lines; all are of one width.

    The advice ends the error for a first line that is neither a header nor an image.
    """
    rows = _read(path)
    if not rows:
        raise ValueError(f"{path} is empty")
    first = rows[0][1]
    for line, cells in rows:
        if len(cells) != len(first):
            raise ValueError(f"{path}, line {line}: {len(cells)} columns, expected {len(first)}")
    if has_header or {cell.lower() for cell in first} & set(PATH_NAMES):
        if not rows[1:]:
            raise ValueError(f"{path} lists no images")
        return first, rows[1:]
    if not (path.parent / first[0]).is_file():
        raise ValueError(
            f"{path}, line 1: {', '.join(first)} is neither a file, relative to the folder of the "
            f"list, nor a header that names a column {', '.join(PATH_NAMES)}{advice}"
        )
    return None, rows


def _by_split(
    path: Path,
    rows: Rows,
    columns: tuple[int, dict[str, int], int | None, int | None],
    task: Task,
) -> dict[str, tuple[list[str], list[str], list[str]]]:
    """The paths, labels and groups in the rows, by the name of their split, once each.

    Args:
        path: of the csv file.
        rows: number and cells of each line.
        columns: of path, labels by their names, split and group.
        task: what the labels mean.
    """
    image, label_columns, split_column, group_column = columns
    splits: dict[str, tuple[list[str], list[str], list[str]]] = {}
    seen: dict[str, tuple[str, str, str]] = {}  # by path, however it is written
    for line, cells in rows:
        name = cells[image]
        try:
            written = task.label_of({column: cells[i] for column, i in label_columns.items()})
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
        if not name or (not written and task.has_one_class):
            raise ValueError(f"{path}, line {line}: has no {'label' if name else 'path'}")
        split = "" if split_column is None else cells[split_column].lower()
        if split_column is not None and split not in SPLIT_NAMES:
            raise ValueError(
                f"{path}, line {line}: split is {cells[split_column]!r}, "
                f"not one of {', '.join(SPLIT_NAMES)}"
            )
        group = "" if group_column is None else cells[group_column]
        if group_column is not None and not group:
            raise ValueError(f"{path}, line {line}: has no group")
        file = os.path.normpath(path.parent / name)
        values = (written, split, group)
        if file in seen:
            if seen[file] != values:
                raise ValueError(
                    f"{path}, line {line}: {name} is {' '.join(filter(None, values))}, "
                    f"and {' '.join(filter(None, seen[file]))} on an earlier line; an image has "
                    "one label and is in one split and one group"
                )
            continue
        seen[file] = values
        names, labels, groups = splits.setdefault(split, ([], [], []))
        names.append(name)
        labels.append(written)
        groups.append(group)
    return splits


def _read(path: Path) -> Rows:
    """The lines that are not blank, with their numbers; cells without the spaces around them."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            rows = ((reader.line_num, [cell.strip() for cell in cells]) for cells in reader)
            return [(line, cells) for line, cells in rows if any(cells)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _column(
    path: Path, header: list[str], chosen: str | None, known: tuple[str, ...], option: str
) -> int:
    names = header if chosen else [cell.lower() for cell in header]
    found = [i for i, name in enumerate(names) if name in ((chosen,) if chosen else known)]
    if len(found) == 1:
        return found[0]
    if chosen:
        fault = f"{'several are' if found else 'none is'} called {chosen}"
    else:
        fault = f"name the one to use with {option}" if option else "several could have the paths"
    raise ValueError(f"{path} has the columns {', '.join(header)}: {fault}")


def _label_columns(path: Path, header: list[str], chosen: str | None, task: Task) -> dict[str, int]:
    """The columns of the label by their names."""
    if chosen is None:
        column = _column(path, header, chosen, LABEL_NAMES, "label_column")
        return {header[column]: column}
    try:
        names = task.columns_in(chosen, header)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {name: _column(path, header, name, (), "label_column") for name in names}
