"""`cvt tune`: its options are those of `cvt train`, and the search."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvt.cli.options import FOLDER, command, recipe_options, with_settings
from cvt.cli.train import default_output, read_recipe

if TYPE_CHECKING:
    from cvt.train import Trial


@command
@recipe_options
@click.option(
    "--search",
    "searches",
    multiple=True,
    metavar="KEY=VALUES",
    help="Setting to search, can be repeated: lr=1e-5..1e-3:log (by orders of magnitude), "
    "flip=0..0.5, or optimizer=adamw,lion.",
)
@click.option(
    "--trials",
    type=click.IntRange(1, 100_000),
    default=20,
    help="Trials of the whole search, those before a resume included.",
)
@click.option(
    "--prune/--no-prune",
    default=True,
    help="End trials that are worse than the median of those before.",
)
@click.option("--output", type=FOLDER, help="Folder to create (default runs/tune).")
@click.option(
    "--resume/--no-resume",
    default=False,
    help="Resume the search in the output folder, or start it if there is none.",
)
@with_settings
def tune(
    words: tuple[str, ...],
    config: Path | None,
    searches: tuple[str, ...],
    trials: int,
    prune: bool,
    output: Path | None,
    resume: bool,
    **options: Any,
) -> None:
    """Search for the best settings of a recipe, by Optuna; each trial is a run folder.

    OUTPUT/best.yaml is the recipe of the best trial, for `cvt train --config`. With --resume, the
    same command starts a search or resumes it.
    """
    recipe, _ = read_recipe(list(words), config, options)
    if not recipe.data:
        raise click.BadParameter("what to train on is missing", param_hint="DATA")
    search: dict[str, str] = {}
    for word in searches:
        name, equals, values = word.partition("=")
        name = name.replace("-", "_")
        if not equals or name in search:
            fault = "is given twice" if equals else "must be KEY=VALUES"
            raise click.BadParameter(f"{word}: {fault}", param_hint="--search")
        search[name] = values
    from cvt.cli.console import out, quiet_libraries
    from cvt.cli.progress import TrainingBars
    from cvt.train import tune as run

    output = output or default_output(recipe.data, "tune")
    quiet_libraries()
    with TrainingBars() as progress:
        found = run(recipe, search, output, trials, resume=resume, prune=prune, progress=progress)
    print_trials(found, recipe.metric)
    out.print(f"the model of trial {found[0].number} is {found[0].folder / 'best'}")
    out.print(f"next: cvt train --config {output / 'best.yaml'}")


def print_trials(trials: "list[Trial]", metric: str) -> None:
    """Print a table of the trials, the best first."""
    from rich.table import Table

    from cvt.cli.rich_console import print_table
    from cvt.inference.metrics import metric_text
    from cvt.train.tuning import shown

    table = Table("trial", "state", "best", "epoch", *trials[0].settings)
    for trial in trials:
        best = "" if trial.value is None else metric_text(metric, trial.value)
        values = [shown(value) for value in trial.settings.values()]
        table.add_row(*(str(trial.number), trial.state, best, str(trial.epoch or ""), *values))
    print_table(table)
