"""`cvt export`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Format(str, Enum):
    """What a classifier can be exported to."""

    onnx = "onnx"
    openvino = "openvino"
    torch_export = "torch-export"


class Precision(str, Enum):
    """What an export computes in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"


class Dynamic(str, Enum):
    """What may differ from call to call."""

    batch = "batch"
    size = "size"
    both = "batch,size"
    none = "none"


def export(
    model: Annotated[str, typer.Argument(help="MODEL to export.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[Format, typer.Option(help="Software that is to run it.")],
    precision: Annotated[Precision, typer.Option(help="What it computes in.")] = Precision.fp32,
    dynamic: Annotated[
        Dynamic, typer.Option(help="What may differ from call to call: number and size of images.")
    ] = Dynamic.batch,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Height and width of its images, if not the model's."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="For int8: a folder of images, such as it will be used on.")
    ] = None,
    min_agreement: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of images that int8 must classify as fp32 does."),
    ] = 0.99,
    force: Annotated[bool, typer.Option(help="Overwrite files in OUTPUT.")] = False,
) -> None:
    """Export a classifier to other software, and check the result against the torch model."""
    from rich.table import Table

    from cvt.cli.console import err, out, quiet_libraries
    from cvt.export import export as export_model

    quiet_libraries()
    done = export_model(
        model,
        output,
        to.value,
        precision=precision.value,
        dynamic=() if dynamic is Dynamic.none else dynamic.value.split(","),
        image_size=image_size,
        calibration=calibration,
        min_agreement=min_agreement,
        overwrite=force,
        progress=err.print,
    )
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
    out.print(table)
    if done.agreement is not None:
        out.print(
            f"of {done.parity['images']} images that were not used for calibration, "
            f"{done.agreement:.2%} get the class that they get in fp32"
        )
    out.print(f"{output}: {done.format}, {done.precision}")
