"""`cvt export`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cvt.cli.options import (
    FILE,
    FOLDER,
    FiniteRange,
    argument,
    command,
    force_option,
    no_verify_option,
)
from cvt.runtime import PRECISIONS
from cvt.runtime.manifest import FORMATS

if TYPE_CHECKING:
    from cvt.runtime.manifest import Manifest


@command
@argument("model", help="MODEL to export.")
@argument("output", type=FOLDER, help="Folder to write.")
@click.option(
    "--to",
    required=True,
    type=click.Choice(list(FORMATS)),
    help="Format to write; web: a page that runs the model in the visitor's browser.",
)
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="fp32", help="Precision of the export."
)
@click.option(
    "--dynamic",
    type=click.Choice(("batch", "size", "batch,size", "none")),
    default="batch",
    help="What may differ from call to call: number and size of images.",
)
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    help="Height and width of the images, if not the model's.",
)
@click.option(
    "--features", is_flag=True, help="Give features too, as a second output beside the logits."
)
@click.option(
    "--calibration",
    type=FILE,
    help="For int8: a folder of images like those the model will process.",
)
@click.option(
    "--min-agreement",
    type=FiniteRange(min=0, max=1),
    default=0.99,
    help="For int8: share of images that it must classify as fp32 does.",
)
@click.option(
    "--lang", type=click.Choice(("en", "zh")), default="en", help="Language of the web page."
)
@click.option(
    "--runtime-files",
    type=FILE,
    help="For web: the unpacked npm package onnxruntime-web; default: npm fetches it once.",
)
@no_verify_option
@force_option("Overwrite files in OUTPUT.")
def export(
    model: str,
    output: Path,
    to: str,
    precision: str,
    dynamic: str,
    image_size: int | None,
    features: bool,
    calibration: Path | None,
    min_agreement: float,
    lang: Literal["en", "zh"],
    runtime_files: Path | None,
    no_verify: bool,
    force: bool,
) -> None:
    """Export a classifier to other software, and check the result against the torch model."""
    from cvt.cli.console import err, out, quiet_libraries
    from cvt.export import export as export_model

    quiet_libraries()
    done = export_model(
        model,
        output,
        to,
        precision=precision,
        dynamic=() if dynamic == "none" else dynamic.split(","),
        image_size=image_size,
        features=features,
        calibration=calibration,
        min_agreement=min_agreement,
        language=lang,
        runtime_files=runtime_files,
        verify=not no_verify,
        overwrite=force,
        progress=err.print,
    )
    print_checks(done)
    out.print(f"{output}: {done.format}, {done.precision}")
    if to == "web":
        out.print(f"to try it: python -m http.server --directory {shlex.quote(str(output))}")


def print_checks(done: "Manifest") -> None:
    """Print how the export compared with the model."""
    from rich.table import Table

    from cvt.cli.console import out
    from cvt.cli.rich_console import print_table

    table = Table("images", "pixels", "same class", "largest difference", "accepted")
    for column in table.columns:
        column.justify = "right"
    for check in done.parity["checks"]:
        accepted = check["tolerance"]
        table.add_row(
            str(check["images"]),
            f"{check['height']} x {check['width']}",
            str(check["same_class"]),
            f"{check['difference']:.2g}",
            "" if accepted is None else f"{accepted:.2g}",
        )
    print_table(table)
    if done.agreement is not None:
        out.print(
            f"of {done.parity['images']} images that were not used for calibration, "
            f"{done.agreement:.2%} get the class that they get in fp32"
        )
