"""`cvt check`."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvt.cli.options import (
    FILE,
    FOLDER,
    FiniteRange,
    argument,
    command,
    data_options,
    device_option,
    force_option,
    max_pixels_option,
    no_verify_option,
    threads_option,
    workers_option,
)

if TYPE_CHECKING:
    from cvt.data import Check

SHOWN = 20  # classes in the table


@command
@argument("data", help="Folder with a sub-folder per class, .csv, .parquet, hub:NAME, CIFAR.")
@click.option("--output", type=FOLDER, help="New folder for report.html and findings.csv.")
@click.option(
    "--groups",
    type=FILE,
    help="New csv file with path, label and group of every image: a group is one picture.",
)
@click.option(
    "--distance",
    type=click.IntRange(0, 32),
    default=12,
    help="Bits of 256 in which the hashes of nearly equal images may differ.",
)
@click.option("--model", help="MODEL whose features are compared, too; no export.")
@click.option(
    "--similarity",
    type=FiniteRange(min=0, max=1, min_open=True),
    default=0.95,
    help="Cosine of the features of images that look alike to --model.",
)
@device_option
@threads_option()
@no_verify_option
@click.option(
    "--min-images",
    type=click.IntRange(min=0),
    default=10,
    help="Different images that a class needs.",
)
@max_pixels_option
@workers_option(2)
@data_options
@force_option("Overwrite existing files.")
def check(
    data: str,
    output: Path | None,
    groups: Path | None,
    distance: int,
    model: str | None,
    similarity: float,
    device: str,
    threads: int | None,
    no_verify: bool,
    min_images: int,
    max_pixels: int | None,
    workers: int,
    force: bool,
    **how_labelled: Any,
) -> None:
    """Find what is wrong with images before training on them (exit code 3 if anything is)."""
    from cvt.cli.console import out, quiet_libraries
    from cvt.cli.progress import bar
    from cvt.data import check as check_images
    from cvt.data import open_splits
    from cvt.data.findings import write_groups
    from cvt.data.labelled import total_length
    from cvt.files import staged
    from cvt.inference.check_report import write_check
    from cvt.inference.features import feature_rows

    quiet_libraries()
    splits = open_splits(data, **how_labelled)
    # What may not be written is refused before the work begins.
    with (
        staged(output, force) if output else nullcontext() as folder,
        staged(groups, force) if groups else nullcontext() as file,
    ):
        length = total_length(splits.values())
        with bar("check", length and length * (2 if model else 1)) as step:
            how: Any = {"device": device, "threads": threads, "verify": not no_verify}
            how |= {"max_pixels": max_pixels, "progress": step}
            found = check_images(
                splits,
                distance=distance,
                features=partial(feature_rows, model, **how) if model else None,
                similarity=similarity,
                min_images=min_images,
                max_pixels=max_pixels,
                workers=workers,
                step=step,
            )
        if folder:
            write_check(found, folder, data)
        if groups and file:
            write_groups(found, file, groups.parent)
    print_check(found, data)
    for written in filter(None, (output, groups)):
        out.print(f"written to {written}")
    if found.findings:
        raise click.exceptions.Exit(3)


def print_check(found: "Check", data: str) -> None:
    """Print the smallest classes, and how many findings there are of each kind."""
    from rich.table import Table

    from cvt.cli.console import out
    from cvt.cli.rich_console import print_table
    from cvt.data.findings import KINDS

    names = [name for name in found.splits if name]
    table = Table("class", "images", *names, "different, to train on")
    for column in table.columns[1:]:
        column.justify = "right"
    classes = sorted(found.classes, key=lambda each: each.images)
    for each in classes[:SHOWN]:
        counts = (each.images, *(each.by_split[name] for name in names), each.distinct)
        table.add_row(each.name, *map(str, counts))
    if classes:
        print_table(table)
    if len(classes) > SHOWN:
        out.print(f"the smallest {SHOWN} of {len(classes)} classes; all of them in --output")
    text = f"{len(found.images)} images"
    if classes:
        text += (
            f" of {len(classes)} classes; the largest class has {classes[-1].images}, the smallest "
            f"{classes[0].images}"
        )
    out.print(text)
    if not found.findings:
        out.print("nothing was found")
        return
    table = Table("finding", "number", "meaning", "first")
    table.columns[1].justify = "right"
    for kind, meaning in KINDS.items():
        if findings := found.of_kind(kind):
            first = findings[0].path.removeprefix(f"{data}/") or findings[0].label
            table.add_row(kind, str(len(findings)), meaning, first)
    print_table(table)
