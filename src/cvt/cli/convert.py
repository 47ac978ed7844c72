"""`cvt convert`."""

from pathlib import Path

import click

from cvt.cli.options import FILE, argument, command, force_option, no_verify_option

DIALECTS = (
    "transformers", "authors", "transformers-tf", "timm", "lucid", "vformer", "paddlevit", "passl",
)  # fmt: skip


@command
@argument("source", help="MODEL to convert.")
@argument("dest", type=FILE, help="Model folder to write, or file of another dialect.")
@click.option(
    "--to",
    type=click.Choice(DIALECTS),
    default="transformers",
    help="Names and layout to write.",
)
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    help="Preprocessing's height and width, if not the source's.",
)
@click.option("--labels", type=FILE, help="Class names: a text file, a line each, or a JSON file.")
@click.option(
    "--num-labels",
    type=click.IntRange(min=1),
    help="Create a new classifier of this many classes.",
)
@click.option(
    "--config", type=FILE, help="config.json for weights that match no published variant."
)
@click.option("--key", help="Entry of a checkpoint, or beginning of names, to read.")
@click.option(
    "--hidden-act",
    type=click.Choice(("gelu", "quick_gelu")),
    help="Activation, if not the source's.",
)
@click.option(
    "--allow-nonfinite/--no-allow-nonfinite",
    default=False,
    help="Accept NaN and infinite weights.",
)
@no_verify_option
@force_option("Overwrite files in DEST.")
def convert(
    source: str,
    dest: Path,
    to: str,
    image_size: int | None,
    labels: Path | None,
    num_labels: int | None,
    config: Path | None,
    key: str | None,
    hidden_act: str | None,
    allow_nonfinite: bool,
    no_verify: bool,
    force: bool,
) -> None:
    """Convert a checkpoint, and check the result by reading it back and comparing outputs."""
    from cvt.checkpoints import convert as convert_checkpoint
    from cvt.cli.console import out, quiet_libraries

    quiet_libraries()
    done = convert_checkpoint(
        source,
        dest,
        to=to,
        image_size=image_size,
        labels=labels,
        num_labels=num_labels,
        config=config,
        key=key,
        hidden_act=hidden_act,
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
