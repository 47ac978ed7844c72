"""`cvt probe`."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvt.cli.options import (
    FOLDER,
    argument,
    batch_size_option,
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
    from cvt.inference.probe import Probe


@command
@argument("model", help="MODEL whose features are probed; no export.")
@argument(
    "data",
    help="Labelled images, as `cvt train` takes them: folder, csv, parquet, hub:NAME, CIFAR, "
    "shards or digits.",
)
@click.option("--val-data", help="Validation data, if DATA has no validation split.")
@data_options
@click.option("--group-column", help="Column of a table whose groups a drawn split keeps whole.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    help="Seed of the cross-validation, and of the validation split where DATA has none.",
)
@batch_size_option()
@workers_option(0)
@device_option
@threads_option()
@max_pixels_option
@click.option(
    "--output",
    type=FOLDER,
    help="New folder for tables, predictions, confusion matrices, and the model with the linear "
    "probe as its classifier.",
)
@no_verify_option
@force_option("Overwrite existing files in the folder.")
def probe(
    model: str,
    data: str,
    val_data: str | None,
    group_column: str | None,
    seed: int,
    batch_size: int,
    workers: int,
    device: str,
    threads: int | None,
    max_pixels: int | None,
    output: Path | None,
    no_verify: bool,
    force: bool,
    **how_labelled: Any,
) -> None:
    """Evaluate a model's features on your classes, without training: linear probe and neighbours.

    Features are computed once for each image. C of the linear probe (logistic regression) and k of
    the nearest neighbours are chosen by cross-validation on the training images; both methods are
    then evaluated on the validation images.
    """
    from cvt.cli.console import out, quiet_libraries
    from cvt.cli.progress import bar
    from cvt.data import open_training
    from cvt.data.labelled import total_length
    from cvt.files import staged
    from cvt.inference.probe import probe as probe_features
    from cvt.inference.probe import write_probe
    from cvt.libraries import require

    quiet_libraries()
    # What may not be written is refused before the work begins.
    with staged(output, force) if output else nullcontext() as folder:
        if output:
            require("the picture in --output", "matplotlib", extra="train")
        splits = open_training(
            *(data, val_data),
            seed=seed,
            group_column=group_column,
            **how_labelled,
        )
        with bar("features", total_length((splits.train, splits.validation))) as step:
            result = probe_features(
                *(model, splits),
                seed=seed,
                batch_size=batch_size,
                workers=workers,
                device=device,
                threads=threads,
                max_pixels=max_pixels,
                verify=not no_verify,
                progress=step,
            )
        if folder:
            write_probe(result, folder)
    print_probe(result)
    if output:
        out.print(f"written to {output}; the model is {output / 'model'}")
    if result.train.failures or result.linear.evaluation.failures:
        raise click.exceptions.Exit(3)


def print_probe(result: "Probe") -> None:
    """Print the images that were skipped, what was done, and how good both methods are."""
    from rich.table import Table

    from cvt.cli.console import err, out
    from cvt.cli.rich_console import print_table

    failures = [*result.train.failures, *result.linear.evaluation.failures]
    for failure in failures:
        err.print(f"skipped {failure.error}", fg="yellow")
    images, width = result.train.values.shape
    done = images + result.linear.evaluation.images
    out.print(
        f"{width} features of {done:,} images in {result.feature_seconds:.1f} s, "
        f"{done / result.feature_seconds:.0f} images/s ({result.runtime})"
    )
    out.print(
        f"C and k chosen by {result.folds}-fold cross-validation on {images:,} training images, in "
        f"{result.fit_seconds:.1f} s"
    )
    table = Table("method", "chosen", title_justify="left")
    for name in ("cross-validated top-1 %", "top-1 %", "macro F1 %", "images"):
        table.add_column(name, justify="right")
    for method in (result.linear, result.knn):
        row = method.row
        table.add_row(
            *(method.name, f"{method.parameter} = {method.value:g}"),
            *(f"{100 * row[name]:.2f}" for name in ("cv_top1", "top1", "f1_macro")),
            str(row["images"]),
        )
    print_table(table)
    if failures:
        err.print(f"{len(failures)} of {done + len(failures)} images skipped")
