"""`cvt benchmark`."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cvt.cli.options import (
    FOLDER,
    FiniteRange,
    argument,
    command,
    device_option,
    force_option,
    no_verify_option,
    numbers,
    threads_option,
    words,
)
from cvt.limits import BOUNDS
from cvt.runtime import PRECISIONS, RUNTIMES

if TYPE_CHECKING:
    from cvt.inference.benchmark import Measurement


@command
@argument("model", help="MODEL, an exported folder, or a variant: cvt-13, cvt-21, cvt-w24.")
@click.option(
    "--runtimes",
    help=f"Runtimes to measure, separated by commas: {', '.join(('auto', *RUNTIMES))}; "
    "ratios refer to the first. Default: all but compiled.",
)
@click.option(
    "--precisions",
    help=f"Precisions to measure, separated by commas: {', '.join(PRECISIONS)}. "
    "Default: fp32,bf16.",
)
@click.option("--batch-sizes", default="1,32", help="Batch sizes, separated by commas.")
@click.option(
    "--image-sizes", help="Heights and widths in pixels, separated by commas, if not the model's."
)
@threads_option("Number of CPU threads; default: each runtime's own.")
@device_option
@click.option(
    "--seconds",
    type=FiniteRange(min=0),
    default=3.0,
    help="Seconds per row; every row gets at least eight turns.",
)
@click.option("--output", type=FOLDER, help="New folder for benchmark.csv and benchmark.png.")
@no_verify_option
@force_option("Overwrite files in the output folder.")
def benchmark(
    model: str,
    runtimes: str | None,
    precisions: str | None,
    batch_sizes: str,
    image_sizes: str | None,
    threads: int | None,
    device: str,
    seconds: float,
    output: Path | None,
    no_verify: bool,
    force: bool,
) -> None:
    """Time a model over runtimes, precisions, batch and image sizes, from pixels to logits.

    Rows of the same batch and image size take turns. A model that is only named has random weights:
    they are as fast, and nothing is downloaded.
    """
    batches = numbers(batch_sizes, "--batch-sizes", BOUNDS["batch_size"][1]) or []
    sizes = numbers(image_sizes, "--image-sizes")
    from cvt.cli.console import out, quiet_libraries
    from cvt.cli.progress import bar
    from cvt.files import staged
    from cvt.inference.benchmark import benchmark as time_model
    from cvt.inference.benchmark import versions, write_benchmark
    from cvt.libraries import require

    quiet_libraries()
    # What may not be written is refused before the work begins.
    with staged(output, force) if output else nullcontext() as folder:
        if output:
            require("the picture in --output", "matplotlib")
        with bar("benchmark", None) as step:
            rows = time_model(
                *(model, words(runtimes), words(precisions), batches, sizes),
                *(threads, device, seconds, step),
                verify=not no_verify,
            )
        devices = ", ".join(dict.fromkeys(row.device for row in rows if row.device))
        title = f"{model} on {devices}"
        if folder:
            about = {"model": model, "threads": threads, **versions()}
            write_benchmark(rows, folder, about, title)
    print_measurements(rows, title)
    if output:
        out.print(f"written to {output}")


def print_measurements(rows: "list[Measurement]", title: str) -> None:
    """Print a table, a section for each batch and image size; then what could not be measured."""
    from rich.table import Table

    from cvt.cli.console import err
    from cvt.cli.rich_console import print_table

    table = Table("batch", "pixels", "runtime", title=title, title_justify="left")
    for name in ("ms", "p95 ms", "images/s", "ratio"):
        table.add_column(name, justify="right")
    before = rows[0]
    for row in rows:
        if (row.batch_size, row.image_size) != (before.batch_size, before.image_size):
            table.add_section()
        before = row
        figures = (row.median_ms, row.p95_ms, row.images_per_second, row.ratio)
        table.add_row(
            *(str(row.batch_size), str(row.image_size), f"{row.runtime} {row.precision}"),
            *("–" if figure is None else f"{figure:.2f}" for figure in figures),
        )
    print_table(table)
    for reason in dict.fromkeys(f"{r.runtime} {r.precision}: {r.reason}" for r in rows if r.reason):
        err.print(f"skipped {reason}", fg="yellow")
