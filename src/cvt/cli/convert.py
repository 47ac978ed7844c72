"""`cvt convert`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cvt.cli.options import NoVerify


class Dialect(StrEnum):
    """What a checkpoint can be converted to."""

    transformers = "transformers"
    authors = "authors"


class Activation(StrEnum):
    """The activations a model can have."""

    gelu = "gelu"
    quick_gelu = "quick_gelu"


def convert(
    source: Annotated[str, typer.Argument(help="MODEL to convert.")],
    dest: Annotated[Path, typer.Argument(help="Model folder to write, or .pth file.")],
    to: Annotated[Dialect, typer.Option(help="Names and layout to write.")] = Dialect.transformers,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Preprocessing's height and width, if not the source's."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Class names: a text file, a line each, or a JSON file.")
    ] = None,
    num_labels: Annotated[
        int | None,
        typer.Option(min=1, help="Create a new classifier of this many classes."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="config.json of an authors' file that is no variant.")
    ] = None,
    hidden_act: Annotated[
        Activation | None, typer.Option(help="Activation, if not the source's.")
    ] = None,
    allow_nonfinite: Annotated[bool, typer.Option(help="Accept NaN and infinite weights.")] = False,
    no_verify: NoVerify = False,
    force: Annotated[bool, typer.Option(help="Overwrite files in DEST.")] = False,
) -> None:
    """Convert a checkpoint, and check the result by reading it back and comparing outputs."""
    from cvt.checkpoints import convert as convert_checkpoint
    from cvt.cli.console import out, quiet_libraries

    quiet_libraries()
    done = convert_checkpoint(
        source,
        dest,
        to=to.value,
        image_size=image_size,
        labels=labels,
        num_labels=num_labels,
        config=config,
        hidden_act=hidden_act and hidden_act.value,
        allow_nonfinite=allow_nonfinite,
        verify=not no_verify,
        force=force,
    )
    model = done.model.config
    pixels = f", {done.image_size} pixels" if done.image_size else ""
    out.print(
        f"{dest}: CvT of depth {model.depth}, {model.num_labels} classes, "
        f"{model.hidden_act}{pixels}"
    )
    out.print(f"largest difference after reading it back: {done.largest_difference:.3g}")
