"""`cvt search`."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cvt.cli.options import (
    FILE,
    argument,
    command,
    exact_decoding_option,
    force_option,
    max_pixels_option,
    no_verify_option,
    run_options,
)

if TYPE_CHECKING:
    from cvt.inference.search import Answer


@command
@argument("index", type=FILE, help="File of `cvt embed`: .parquet, .npz or .npy.")
@argument("images", nargs=-1, help="Image files, folders, glob patterns, csv files of paths.")
@click.option("--top", type=click.IntRange(min=1), default=12, help="Neighbours of each image.")
@click.option(
    "--output",
    type=FILE,
    help="Write a sheet of pictures, .png or .html, or a table, .csv or .json.",
)
@click.option(
    "--add",
    multiple=True,
    help="Images to add to INDEX, or to replace there; can be repeated.",
)
@click.option(
    "--remove",
    multiple=True,
    help="Pattern of the paths to remove from INDEX, such as 'old/*'; can be repeated.",
)
@click.option("--model", help="MODEL that computed INDEX, if it has moved since.")
@run_options(0)
@exact_decoding_option
@max_pixels_option
@no_verify_option
@force_option("Overwrite the output file.")
def search(
    index: Path,
    images: tuple[str, ...],
    top: int,
    output: Path | None,
    add: tuple[str, ...],
    remove: tuple[str, ...],
    model: str | None,
    batch_size: int,
    workers: int,
    runtime: str,
    precision: str | None,
    device: str,
    threads: int | None,
    exact_decoding: bool,
    max_pixels: int | None,
    no_verify: bool,
    force: bool,
) -> None:
    """Find the images that look most alike to a model, among those that `cvt embed` embedded.

    Images that cannot be decoded are skipped (exit code 3). Rows are added and removed before
    the search. The settings of decoding are those of INDEX, unless they are given.
    """
    from cvt.cli.console import open_classifier, out, quiet_libraries
    from cvt.cli.progress import consume, exit_if_skipped
    from cvt.files import staged
    from cvt.inference import search as searching
    from cvt.inference.embed import embed
    from cvt.inference.embedding_file import read_embeddings, write_embeddings
    from cvt.inference.predict import Result, find_images
    from cvt.inference.result_file import claimed

    quiet_libraries()
    if not (images or add or remove):
        raise click.UsageError("Give IMAGES to search for, or --add or --remove.")
    if output and not images:
        raise click.UsageError("--output needs IMAGES to search for.")
    if output:
        searching.check_output(output)
    done: dict[bool, list[Result]] = {True: [], False: []}  # by whether an image is to be added
    skipped = 0
    # What may not be written is refused before the work begins.
    with (
        claimed(index) if add or remove else nullcontext(),
        staged(output, force) if output else nullcontext() as sheet,
    ):
        rows = read_embeddings(index)
        if rows.unread and (add or remove):
            raise ValueError(
                f"{index} has {', '.join(rows.unread)} beside what cvt embed writes, which would "
                "be lost: keep them in another file"
            )
        before = len(rows)
        if remove:
            rows = searching.without(rows, remove)
        removed = before - len(rows)
        new, queries = searching.distinct(find_images(add)), list(find_images(images))
        if new or queries:
            source = searching.model_of(rows, index, model)
            how = (runtime, precision, device, threads, len(new) + len(queries), not no_verify)
            features = searching.features_of(rows)
            classifier, processor = open_classifier(source, *how, features=features)
            results = embed(
                *(classifier, processor, [*new, *queries], batch_size, workers),
                exact_decoding or bool(rows.about.get("exact_decoding")),
                max_pixels or rows.about.get("max_pixels"),
                normalize=bool(rows.about.get("normalize")),
            )
            is_new = [True] * len(new) + [False] * len(queries)
            skipped, _ = consume(
                "embed",
                zip(results, is_new, strict=True),
                lambda row: done[row[1]].append(row[0]),
                lambda row: row[0].error,
            )
        if queries and not done[False]:
            raise ValueError(f"none of the {len(queries)} images could be decoded")
        if done[True]:
            rows = searching.with_rows(rows, done[True])
        if remove or done[True]:
            write_embeddings(rows, index, overwrite=True)
            added = f"{removed} rows removed, {len(done[True])} images added"
            out.print(f"{index}: {added}, {len(rows)} rows now")
        if done[False]:
            exact = True if len(queries) <= searching.FEW else None
            found = searching.Index(rows, exact)
            answers = searching.answers(found, done[False], top)
            print_answers(answers, found.describe)
            if sheet:
                searching.write_answers(answers, sheet, f"nearest in {index.name}")
    if output:
        out.print(f"written to {output}")
    exit_if_skipped(skipped, len(new) + len(queries))


def print_answers(answers: "Sequence[Answer]", description: str) -> None:
    """Print a table of the neighbours of each image."""
    from rich.table import Table

    from cvt.cli.console import out
    from cvt.cli.rich_console import print_table

    for query, neighbours in answers:
        table = Table("similarity", "class", "path", title=query, title_justify="left")
        table.columns[0].justify = "right"
        for each in neighbours:
            table.add_row(f"{each.similarity:.3f}", each.label or "", each.path)
        print_table(table)
    out.print(description)
