"""`cvt show`: its options are those of `cvt train`."""

from pathlib import Path
from typing import Any

import click

from cvt.cli.options import FOLDER, command, force_option, recipe_options, with_settings
from cvt.cli.train import read_recipe


@command
@recipe_options
@click.option(
    "--output",
    type=FOLDER,
    default=Path("views"),
    help="New folder for training.png and validation.png.",
)
@click.option("--images", type=click.IntRange(1, 1000), default=30, help="Images on a sheet.")
@force_option("Overwrite an existing output.")
@with_settings
def show(
    words: tuple[str, ...],
    config: Path | None,
    output: Path,
    images: int,
    force: bool,
    **options: Any,
) -> None:
    """Draw what `cvt train` would give the model: augmented views, and validation images."""
    recipe, _ = read_recipe(list(words), config, options)
    if not recipe.data:
        raise click.BadParameter("what to show is missing", param_hint="DATA")
    from cvt.cli.console import err, out, quiet_libraries
    from cvt.libraries import require
    from cvt.train.show import show as draw

    quiet_libraries()
    require("the pictures", "matplotlib", extra="train")
    skipped = draw(recipe, output, images, overwrite=force)
    out.print(f"written to {output / 'training.png'} and {output / 'validation.png'}")
    if skipped:
        err.print(f"{skipped} images skipped, which cannot be read")
        raise click.exceptions.Exit(3)
