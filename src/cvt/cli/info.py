"""`cvt info`."""

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from cvt.cli.options import argument, batch_size_option, command

if TYPE_CHECKING:
    from cvt.profile import Profile


@command
@argument("model", help="MODEL, or a variant: cvt-13, cvt-21, cvt-w24.")
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    help="Height and width in pixels, if not the model's.",
)
@batch_size_option(1, "Images at a time, for the memory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(model: str, image_size: int | None, batch_size: int, as_json: bool) -> None:
    """Show a model's parameters, operations, stages and memory, without running it."""
    from cvt.checkpoints import image_size_of, load_config, load_processor, model_source
    from cvt.cli.console import out, quiet_libraries
    from cvt.profile import profile

    quiet_libraries()
    source = model_source(model)
    config = load_config(source)
    has_processor = source.kind != "variant" and config.num_channels == 3
    size = image_size or (image_size_of(load_processor(source, config)) if has_processor else 224)
    result = profile(config, size, batch_size)
    if as_json:
        out.print(json.dumps(dataclasses.asdict(result), default=str, indent=2))
        return
    out.print(
        f"{model}: {config.num_labels} classes, {config.hidden_act}, {size} x {size} pixels",
        bold=True,
    )
    print_profile(result)


def print_profile(result: "Profile") -> None:
    """Print totals, and a table of the stages."""
    from rich.table import Table

    from cvt.cli.console import out
    from cvt.cli.rich_console import print_table

    out.print(f"parameters  {result.parameters:,}")
    out.print(
        f"operations  {result.macs / 1e9:.2f} G multiply-adds per image "
        "(convolutions and matrix products, attention included)"
    )
    training = (
        "too little for BatchNorm to train on"
        if result.training_bytes is None
        else f"{mebibytes(result.training_bytes)} to train (AdamW)"
    )
    out.print(
        f"memory      {mebibytes(result.weight_bytes)} weights; "
        f"{mebibytes(result.inference_bytes)} to infer, {training}; float32, "
        f"batch {result.batch_size}"
    )
    table = Table("stage", *("grid", "tokens", "width", "blocks", "heads", "parameters", "GMAC"))
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in result.stages:
        grid = f"{stage.grid[0]} x {stage.grid[1]}"
        numbers = (stage.tokens, stage.width, stage.depth, stage.heads)
        table.add_row(
            *(stage.name, grid, *map(str, numbers)),
            *(f"{stage.parameters:,}", f"{stage.macs / 1e9:.2f}"),
        )
    head = result.parameters - sum(stage.parameters for stage in result.stages)
    table.add_row("head", *[""] * 5, f"{head:,}", "0.00")
    print_table(table)


def mebibytes(size: int) -> str:
    """A number of bytes as a text."""
    return f"{size / 2**20:,.0f} MiB"
