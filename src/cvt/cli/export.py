"""`cvt export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cvt.cli.options import NoVerify

if TYPE_CHECKING:
    from cvt.runtime.manifest import Manifest


def export(
    model: Annotated[str, typer.Argument(help="MODEL to export.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        Literal["onnx", "openvino", "torch-export", "saved-model", "litert"],
        typer.Option(help="Software that is to run it."),
    ],
    precision: Annotated[
        Literal["fp32", "bf16", "fp16", "int8"], typer.Option(help="What it computes in.")
    ] = "fp32",
    dynamic: Annotated[
        Literal["batch", "size", "batch,size", "none"],
        typer.Option(help="What may differ from call to call: number and size of images."),
    ] = "batch",
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
    no_verify: NoVerify = False,
    force: Annotated[bool, typer.Option(help="Overwrite files in OUTPUT.")] = False,
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
        calibration=calibration,
        min_agreement=min_agreement,
        verify=not no_verify,
        overwrite=force,
        progress=err.print,
    )
    print_checks(done)
    out.print(f"{output}: {done.format}, {done.precision}")


def print_checks(done: "Manifest") -> None:
    """Print how the export compared with the model."""
    from rich.table import Table

    from cvt.cli.console import out

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
