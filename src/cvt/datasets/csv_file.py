"""Comma-separated files of path and label."""

import csv
import os
from functools import partial
from pathlib import Path

from cvt.datasets.folder import Files
from cvt.datasets.labelled import TEST_NAMES, TRAIN_NAMES, LabelledImages, Parts

PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_NAMES = ("label", "class", "class_name")
SHOWN = 5  # files or lines that an error lists


def csv_parts(
    path: Path, image_column: str | None = None, label_column: str | None = None
) -> Parts:
    """The images that a file lists, by the values of its column `split` if it has one.

    Its first line is a header if a cell of it is one of `PATH_NAMES`, or if a column is named.
    Without a header a line is path and label.

    Raises:
        ValueError: the file is malformed; names the line, or the files that are missing.
        OSError: the file cannot be read.
    """
    rows = _read(path)
    if not rows:
        raise ValueError(f"{path} is empty")
    header = [cell.lower() for cell in rows[0][1]]
    image, label, part = 0, 1, None
    if image_column or label_column or set(header) & set(PATH_NAMES):
        image = _column(path, rows[0][1], image_column, PATH_NAMES, "image_column")
        label = _column(path, rows[0][1], label_column, LABEL_NAMES, "label_column")
        part = header.index("split") if "split" in header else None
        del rows[0]
    elif len(header) != 2:
        raise ValueError(
            f"{path} has {len(header)} columns, separated by commas, and no header that names a "
            "path column"
        )

    parts: dict[str, tuple[list[str], list[str]]] = {}
    seen: dict[str, tuple[str, str]] = {}
    for line, cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {line}: {len(cells)} columns, expected {len(header)}")
        name, written = cells[image], cells[label].strip()
        if not name or not written:
            raise ValueError(f"{path}, line {line}: has no {'label' if name else 'path'}")
        half = "" if part is None else cells[part].strip().lower()
        if part is not None and half not in TRAIN_NAMES + TEST_NAMES:
            raise ValueError(
                f"{path}, line {line}: split is {cells[part]!r}, "
                f"not one of {', '.join(TRAIN_NAMES + TEST_NAMES)}"
            )
        if seen.setdefault(name, (written, half)) != (written, half):
            raise ValueError(
                f"{path}, line {line}: {name} is {' '.join(filter(None, (written, half)))}, and "
                f"{' '.join(filter(None, seen[name]))} on an earlier line; an image has one label "
                "and is in one split"
            )
        names, labels = parts.setdefault(half, ([], []))
        names.append(name)
        labels.append(written)
    if not parts:
        raise ValueError(f"{path} lists no images")
    missing = [name for name in seen if not os.path.isfile(path.parent / name)]
    if missing:
        raise FileNotFoundError(
            f"{path} lists {len(missing)} files that do not exist (paths are relative to its "
            f"folder): {', '.join(missing[:SHOWN])}{', ...' if missing[SHOWN:] else ''}"
        )
    return {
        half: partial(LabelledImages, Files(path.parent, names), labels)
        for half, (names, labels) in parts.items()
    }


def _read(path: Path) -> list[tuple[int, list[str]]]:
    """The lines that are not blank, with their numbers."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True, strict=True)
            return [(reader.line_num, cells) for cells in reader if cells]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _column(
    path: Path, header: list[str], chosen: str | None, known: tuple[str, ...], option: str
) -> int:
    lower = [cell.lower() for cell in header]
    found = [chosen] if chosen else [name for name in lower if name in known]
    if len(found) == 1 and found[0] in (header if chosen else lower):
        return (header if chosen else lower).index(found[0])
    raise ValueError(
        f"{path} has the columns {', '.join(header)}: "
        + (f"none is called {chosen}" if chosen else f"name the one to use with {option}")
    )
