"""`cvt recipes`."""

from typing import Annotated

import typer

from cvt.train.recipe import packaged_recipe, packaged_recipes


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe to print, as yaml.", show_default=False)
    ] = None,
) -> None:
    """List the packaged recipes, which `cvt train --config NAME` takes, or print one.

    For a copy to edit: cvt recipes photos > mine.yaml
    """
    if name is not None:
        typer.echo(packaged_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    packaged = packaged_recipes()
    width = max(map(len, packaged))
    for name, file in packaged.items():
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(f"{name:<{width}}  {first.removeprefix('# ')}")
