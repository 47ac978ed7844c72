"""`cvt train`: its options are the settings of `cvt.train.recipe`."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvt.cli.options import FILE, FOLDER, argument, check_data, check_model, command, with_settings
from cvt.text import printable
from cvt.train.recipe import Recipe, json_schema, load_recipe, read_settings

if TYPE_CHECKING:
    from cvt.train.cross_validation import CrossValidation


@command
@argument(
    "words",
    nargs=-1,
    metavar="[DATA] [KEY=VALUE]...",
    help="Training data, and settings by their names. DATA is a folder with a folder per "
    "class, or with train/ and val/ of such; a csv of path and label; a parquet file; "
    "hub:OWNER/NAME; shards of a webdataset; CIFAR's folder; or the word digits.",
)
@click.option(
    "--config",
    type=FILE,
    help="Recipe, a yaml file or a name that `cvt recipes` lists; the settings given here "
    "override it.",
)
@click.option(
    "--output",
    type=FOLDER,
    help="Run folder to create (default runs/ and the recipe's name, or train).",
)
@click.option(
    "--resume/--no-resume",
    default=False,
    help="Resume the run in the output folder, or start it if there is none.",
)
@click.option(
    "--schema", is_flag=True, help="Print the JSON schema of a recipe, for editors, and exit."
)
@with_settings
def train(
    words: tuple[str, ...],
    config: Path | None,
    output: Path | None,
    resume: bool,
    schema: bool,
    **options: Any,
) -> None:
    """Train or fine-tune a classifier; the best epoch is kept as a model folder, OUTPUT/best.

    With --resume, the same command starts a run or resumes it exactly. With --folds, it trains a
    model for each fold and evaluates all of them on the images that they did not see. In several
    processes: torchrun --nproc-per-node 8 -m cvt train ...
    """
    if schema:
        click.echo(json.dumps(json_schema(), indent=2))
        return
    recipe, changes = read_recipe(list(words), config, options)
    from cvt.cli.console import out, quiet_libraries
    from cvt.cli.progress import TrainingBars
    from cvt.inference.metrics import metric_text
    from cvt.train import trainer
    from cvt.train.best_epoch import result
    from cvt.train.checkpointing import checkpoints
    from cvt.train.cross_validation import cross_validate, recipe_of_folds, resume_folds

    output = output or default_output(recipe.data, config.stem if config else "train")
    resumes_folds = resume and recipe_of_folds(output) is not None
    resumes = resume and bool(checkpoints(output / "checkpoints"))
    if not (resumes or resumes_folds or recipe.data):
        raise click.BadParameter("what to train on is missing", param_hint="DATA")
    quiet_libraries()
    if resumes_folds or (recipe.folds and not recipe.fold and not resumes):
        with TrainingBars() as progress:
            if resume:
                found = resume_folds(output, changes, progress)
            else:
                found = cross_validate(recipe, output, progress)
        print_folds(found, output)
        return
    with TrainingBars() as progress:
        if resumes:
            best = trainer.resume(output, changes, progress)
        else:
            best = trainer.train(recipe, output, progress)
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first prints
        return
    metric = load_recipe(output / "args.yaml").metric  # of a resumed run, its own
    shown = metric_text(metric, result(best, metric) or 0.0)
    out.print(f"best {shown}, after epoch {best['epoch']}; the model is {output / 'best'}")
    out.print(f"next: cvt predict {output / 'best'} IMAGES...")


def print_folds(found: "CrossValidation", output: Path) -> None:
    """Print the metrics of each fold, their mean and deviation, and what to do next."""
    from rich.table import Column, Table

    from cvt.cli.console import out
    from cvt.cli.rich_console import print_table
    from cvt.inference.metrics import METRIC_NAMES, metric_number, metric_text
    from cvt.train.cross_validation import OUT_OF_FOLD
    from cvt.train.recipe import METRICS_OF

    recipe, whole = found.recipe, found.evaluation
    metrics = [name for name in METRICS_OF[recipe.problem] if name not in ("top5", "lowest_recall")]
    if recipe.metric not in metrics:
        metrics.append(str(recipe.metric))
    columns = ("images", "best epoch", *(METRIC_NAMES[name] for name in metrics))
    table = Table("fold", *(Column(name, justify="right") for name in columns))

    def add(name: str, values: Callable[[str], float], *numbers: float) -> None:
        texts = (metric_number(metric, values(metric)) for metric in metrics)
        table.add_row(name, *(map(str, numbers) if numbers else ("", "")), *texts)

    for row in found.folds:
        add(str(row["fold"]), row.__getitem__, row["images"], row["epoch"])
    table.add_section()
    add("mean", found.mean)
    add("deviation", found.deviation)
    print_table(table)
    figures = "  ".join(metric_text(name, getattr(whole, name)) for name in metrics)
    folder = output / OUT_OF_FOLD
    out.print(f"out of fold: {figures}  {whole.images} images; all of it in {folder}")
    if skipped := len(whole.failures):
        out.print(f"{skipped} of {whole.images + skipped} images cannot be decoded")
    if (page := folder / "label_errors.html").exists():
        errors = len(found.label_errors)
        out.print(f"{errors} of {whole.images} labels are probably wrong: {page} shows them")
    best = output / f"fold-{found.best}"
    out.print(f"the best model by {recipe.metric} is {best / 'best'}")
    words = ["cvt", "train", "--config", str(best / "args.yaml"), "folds=none", "fold=none"]
    run = output.with_name(f"{output.name}-all")
    chosen = run / "best"
    if not (best / "test").exists():  # the validation images are those that it is trained on
        words += [f"val_data={recipe.data}", *["group_column=none"] * bool(recipe.group_column)]
        chosen = run / "last"
    command = shlex.join([*words, "--output", str(run)])
    out.print(f"next, for a model of all images, {chosen}: {command}")


def read_recipe(
    words: list[str], config: Path | None, options: dict[str, Any]
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and the settings that were given for it.

    Args:
        words: DATA and `key=value`.
        config: a yaml file or the name of a packaged recipe.
        options: settings by name; None where not given.

    Raises:
        click.BadParameter: a setting is given twice, unknown or illegal.
        FileNotFoundError: there is no such data or model.
    """
    changes = {name: value for name, value in options.items() if value is not None}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        if not equals or not name.isidentifier():
            name, value = "data", word
        if name in changes:
            raise click.BadParameter(f"{name} is given twice: {changes[name]} and {value}")
        changes[name] = value
    try:
        settings = read_settings(config, changes)
        recipe = load_recipe(None, settings)
    except ValueError as error:
        raise click.BadParameter(printable(str(error), keep="\n")) from None
    for check, names in (
        (check_data, (recipe.data, recipe.val_data)),
        (check_model, (recipe.model, recipe.teacher)),
    ):
        for name in filter(None, names):
            check(name)
    return recipe, settings


def default_output(data: str, name: str) -> Path:
    """`runs/NAME`; beside the data if that would be inside it, where it would be taken for data."""
    output, folder = Path("runs", name), Path(data or "-").resolve()
    if folder.is_dir() and folder in output.resolve().parents:
        return folder.parent / output
    return output
