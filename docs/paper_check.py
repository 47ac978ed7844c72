"""Counts the parameters and multiply-adds of every model in the tables of pages, and compares.

    PYTHONPATH=src python docs/paper_check.py    # exits with 1 where a page differs

A table is checked if it has a column for billions of multiply-adds (G). Its first column names a
published model, or a variant and what the setting `architecture` of a recipe changes: `cvt-13
stride_kv=1`. The column of the pixels has the height and width; other columns, such as the
paper's, are not read.
"""

import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from cvt import CvtConfig, CvtForImageClassification
from cvt.hub import PUBLISHED
from cvt.macs import MacCounter
from cvt.profile import count_parameters
from cvt.train.models import changed_config
from cvt.train.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "README.zh-CN.md", "docs/en/paper.md", "docs/zh/paper.md")
# How the header of a column begins, in English and in Chinese.
PIXELS, PARAMETERS = ("pixels", "像素"), ("parameters", "参数")
MACS = ("multiply-adds, G", "乘加运算，G")
MODEL = re.compile(r"`(\S+?)((?: \w+=\S+)*)`")


class Row(NamedTuple):
    """A model in a table, and the figures that the page gives for it."""

    line: int
    model: str
    pixels: str
    parameters: str
    in_millions: bool
    macs: str


class Cost(NamedTuple):
    """What `cvt info` prints of a model, for one image."""

    parameters: int
    macs: int


def rows(text: str) -> Iterator[Row]:
    """The rows of the tables of a page that have a column for billions of multiply-adds.

    Raises:
        ValueError: such a table has no column for the pixels or for the parameters.
    """
    header: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else []
        if not cells or not header:
            header = cells
            continue
        if not any(cell.startswith(MACS) for cell in header) or set(line) <= set("|-: "):
            continue
        places = [column(header, word, number) for word in (PIXELS, PARAMETERS, MACS)]
        pixels, parameters, macs = (cells[place] for place in places)
        in_millions = header[places[1]].endswith("M")
        yield Row(number, cells[0], pixels, parameters, in_millions, macs)


def column(header: list[str], word: tuple[str, ...], line: int) -> int:
    """The place of the column whose header begins with this word."""
    for i, cell in enumerate(header):
        if cell.startswith(word):
            return i
    raise ValueError(f"line {line}: a table of {MACS[0]} needs a column {word[0]}")


def count(model: str, pixels: int) -> Cost:
    """What a model costs, by its cell in a table.

    Raises:
        ValueError: it is no model, or is not published for so many pixels.
    """
    match = MODEL.fullmatch(model)
    if match is None:
        raise ValueError(f"{model} is no model: write `cvt-13` or `cvt-13 stride_kv=1`")
    name, changes = match.groups()
    published = PUBLISHED.get(name)
    if published and name != published.variant:
        if pixels != published.image_size:
            raise ValueError(f"{name} is published for {published.image_size} pixels")
        name = published.variant
    return count_variant(name, changes, pixels)


@cache
def count_variant(name: str, changes: str, pixels: int) -> Cost:
    """What a variant costs with the changes of a recipe's `architecture`, and `num_labels`."""
    classes = re.search(r" num_labels=(\d+)", changes)
    architecture = changes.replace(classes[0], "") if classes else changes
    recipe = Recipe(architecture=architecture.strip() or None, image_size=pixels)
    config = changed_config(CvtConfig.from_variant(name), recipe)
    config.num_labels = int(classes[1]) if classes else config.num_labels
    with torch.device("meta"), torch.no_grad():
        model = CvtForImageClassification(config).eval()
        with MacCounter() as counter:
            model(torch.empty(1, config.num_channels, pixels, pixels))
    return Cost(count_parameters(model), counter.macs)


def fault(row: Row) -> str:
    """What is wrong with the figures of a row; empty if nothing is."""
    try:
        found = count(row.model, int(row.pixels))
    except ValueError as error:
        return f"line {row.line}: {error}"
    millions = f"{found.parameters / 1e6:.1f}"
    parameters = millions if row.in_millions else f"{found.parameters:,}"
    macs = f"{found.macs / 1e9:.{len(row.macs.partition('.')[2])}f}"
    if (row.parameters, row.macs) == (parameters, macs):
        return ""
    return (
        f"line {row.line}: {row.model} at {row.pixels} pixels has {parameters} parameters and "
        f"{macs} G multiply-adds, not {row.parameters} and {row.macs}"
    )


def main() -> int:
    """Print how many rows of each page were compared, and every fault."""
    failed = False
    for page in PAGES:
        table = list(rows((ROOT / page).read_text(encoding="utf-8")))
        faults = [text for row in table if (text := fault(row))]
        print(f"{page}: {len(table)} models, {len(faults)} differ", *faults, sep="\n  ")
        failed |= bool(faults) or not table
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
