"""`cvt recipes`."""

import click

from cvt.cli.options import argument, command


@command
@argument("name", required=False, help="Recipe to print, as yaml.")
def recipes(name: str | None) -> None:
    """List the packaged recipes, which `cvt train --config NAME` takes, or print one.

    For a copy to edit: cvt recipes photos > mine.yaml
    """
    from cvt.train.recipe import packaged_recipe, packaged_recipes

    if name is not None:
        click.echo(packaged_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    packaged = packaged_recipes()
    width = max(map(len, packaged))
    for name, file in packaged.items():
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        click.echo(f"{name:<{width}}  {first.removeprefix('# ')}")
