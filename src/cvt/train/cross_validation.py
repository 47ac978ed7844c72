"""Cross-validation: a run for each fold, and the evaluation of all on images they did not see.

| file in the folder | what is in it |
|---|---|
| `fold-1/` and so on | a run folder each |
| `folds.csv` | the metrics of each fold's best model on the images of the fold |
| `out_of_fold/` | the same of all images together, each predicted by the model that did not see it: what `cvt evaluate` writes, with the scores of all classes, a report, and the labels that are probably wrong |
"""  # noqa: E501

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvt.checkpoints import load_classifier, load_processor
from cvt.data import LabelledImages
from cvt.files import check_path, is_occupied
from cvt.inference.evaluate import AnyEvaluation, evaluate, joined, write_evaluation
from cvt.inference.label_errors import LabelError, label_errors, write_label_errors
from cvt.inference.metrics import Evaluation
from cvt.inference.report import write_report
from cvt.train import trainer
from cvt.train.best_epoch import quality
from cvt.train.checkpointing import checkpoints
from cvt.train.progress import NullProgress, Progress
from cvt.train.recipe import METRICS_OF, SETTLED, Recipe, load_recipe, resumed_recipe
from cvt.train.run_folder import write_rows
from cvt.train.setup import splits_for

TABLE, OUT_OF_FOLD = "folds.csv", "out_of_fold"
Fold = dict[str, float]  # a row of the table


@dataclass(frozen=True)
class CrossValidation:
    """What the runs of all folds give.

    Attributes:
        recipe: of the folds.
        folds: the rows of `folds.csv`: `fold`, `images`, the best `epoch`, and its metrics.
        evaluation: of all images, each by the model that did not see it.
        label_errors: the labels that are probably wrong, of images of one class; their `index` is
            a row of `evaluation.counted`.
    """

    recipe: Recipe
    folds: list[Fold]
    evaluation: AnyEvaluation
    label_errors: list[LabelError]

    def mean(self, metric: str) -> float:
        """The mean of a metric over the folds."""
        return float(np.mean([row[metric] for row in self.folds]))

    def deviation(self, metric: str) -> float:
        """The standard deviation of a metric over the folds, of a sample."""
        return float(np.std([row[metric] for row in self.folds], ddof=1))

    @property
    def best(self) -> int:
        """The fold with the best metric of the recipe."""
        metric = self.recipe.metric
        return int(max(self.folds, key=lambda row: quality(metric, row[metric]))["fold"])


def cross_validate(
    recipe: Recipe, output: str | Path, progress: Progress | None = None
) -> CrossValidation:
    """Train a classifier for each fold, on all images but those of the fold.

    Args:
        recipe: how to train, with the number of `folds`.
        output: a folder for the run folders of all folds, and what they give together.
        progress: receives the progress.

    Raises:
        FileExistsError: `output` has something in it.
        ValueError: the recipe has no folds or chooses one, the data cannot be divided, or there are
            several processes; else as `cvt.train.train`, whose other errors are raised too.

    Example:
        >>> from cvt.train import cross_validate, load_recipe
        >>> changes = {"folds": 2, "epochs": 1, "steps": 2, "workers": 0}
        >>> found = cross_validate(load_recipe("digits", changes), "runs/folds")
        >>> len(found.folds), found.evaluation.images
        (2, 1437)
    """
    check_path(output, "output")
    output = Path(output)
    if is_occupied(output):
        raise FileExistsError(f"{output} exists already; --resume resumes the folds in it, if any")
    return _run(recipe, output, progress)


def resume_folds(
    output: str | Path,
    changes: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> CrossValidation:
    """Resume a cross-validation, as if it had not been stopped; complete folds stay as they are.

    Args:
        output: of `cross_validate`; or a folder with some `fold-1` and so on that were trained as
            runs of their own, with the setting `fold`.
        changes: settings, as in `cvt.train.resume`; all of them if `output` has only folds.
        progress: as in `cross_validate`.

    Returns:
        As `cross_validate`.

    Raises:
        ValueError: as `cvt.train.resume`, whose other errors are raised too.

    Example:
        >>> from cvt.train import resume_folds
        >>> resume_folds("runs/folds").evaluation.images  # of `cross_validate`: it is complete
        1437
    """
    check_path(output, "output")
    output, changes = Path(output), changes or {}
    found = recipe_of_folds(output)
    recipe = resumed_recipe(found, changes) if found else load_recipe(None, changes)
    return _run(recipe, output, progress)


def recipe_of_folds(output: Path) -> Recipe | None:
    """The recipe of the folds in a folder; None if it has none."""
    recipes = (load_recipe(path) for path in sorted(output.glob("fold-*/args.yaml")))
    recipe = next((recipe for recipe in recipes if recipe.folds), None)
    return recipe and dataclasses.replace(recipe, fold=None)


def _run(recipe: Recipe, output: Path, progress: Progress | None) -> CrossValidation:
    progress = progress or NullProgress()
    if not recipe.folds or recipe.fold:
        raise ValueError(f"folds = {recipe.folds}, fold = {recipe.fold}: give folds alone")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"folds = {recipe.folds}: several processes train one fold at a time, with fold=1 and "
            f"--output {output / 'fold-1'} for the first; the same command with --resume, in one "
            "process, then evaluates them together"
        )
    numbers, epochs = range(1, recipe.folds + 1), []
    for fold in numbers:
        folder = output / f"fold-{fold}"
        own = dataclasses.replace(recipe, fold=fold)
        progress.log(f"fold {fold} of {recipe.folds}, in {folder}")
        if checkpoints(folder / "checkpoints"):
            given = dataclasses.asdict(own).items()  # but for what each fold may find for itself
            changes = {name: value for name, value in given if name not in SETTLED}
            best = trainer.resume(folder, changes, progress)
        else:
            best = trainer.train(own, folder, progress)
        # What the first one has found, such as the precision, the others have too.
        recipe = recipe_of_folds(output) or recipe
        epochs.append(best["epoch"] or 0)
    recipes = [load_recipe(output / f"fold-{fold}/args.yaml") for fold in numbers]
    for name in SETTLED:
        values = [str(getattr(each, name)) for each in recipes]
        if len(set(values)) > 1:
            progress.log(f"the folds have different values of {name}: {', '.join(values)}")
    images = [_validation(output / f"fold-{fold}") for fold in numbers]
    positions = np.concatenate([each.positions for each in images])
    if len(set(positions.tolist())) < len(positions):
        raise ValueError(
            f"{output}: an image is in two folds; the data has changed since the first"
        )
    parts = [
        _evaluation(output / f"fold-{fold}", of_fold, progress)
        for fold, of_fold in zip(numbers, images, strict=True)
    ]
    rows: list[Fold] = [
        {"fold": fold, "images": part.images, "epoch": epoch}
        | {name: getattr(part, name) for name in METRICS_OF[recipe.problem]}
        for fold, epoch, part in zip(numbers, epochs, parts, strict=True)
    ]
    evaluation = joined(parts)
    errors = label_errors(evaluation) if isinstance(evaluation, Evaluation) else []
    found = CrossValidation(recipe, rows, evaluation, errors)
    _write(found, output, images)
    return found


def _validation(folder: Path) -> LabelledImages:
    """The images that a run was not trained on, as it has recorded them."""
    images = splits_for(load_recipe(folder / "args.yaml"), folder / "split.csv").validation
    assert isinstance(images, LabelledImages)
    return images


def _evaluation(folder: Path, images: LabelledImages, progress: Progress) -> AnyEvaluation:
    """The evaluation of a run's best model; positions are those in all images of the data."""
    recipe = load_recipe(folder / "args.yaml")
    assert recipe.batch_size != "auto"  # the run has settled it
    model: Any = load_classifier(folder / "best")
    processor = load_processor(folder / "best", model.config)
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    found = evaluate(
        model.to(best if recipe.device == "auto" else recipe.device),
        processor,
        images,
        recipe.batch_size,
        recipe.workers,
        progress.stage(f"out of fold, {folder.name}", len(images)),
        max_pixels=recipe.max_pixels,
        keep_scores=True,
    )
    return found.placed(images.positions)


def _write(found: CrossValidation, output: Path, images: list[LabelledImages]) -> None:
    """Write `folds.csv` and `out_of_fold/`."""
    write_rows(output / TABLE, found.folds)
    folder, places = output / OUT_OF_FOLD, {}
    for of_fold in images:
        places.update({place: (of_fold, i) for i, place in enumerate(of_fold.positions)})

    def picture(position: int) -> Any:
        of_fold, i = places[position]
        return of_fold[i][0]

    title = f"{found.recipe.data}, {found.recipe.folds} folds"
    write_evaluation(found.evaluation, folder, overwrite=True)
    write_report(found.evaluation, folder / "report.html", title, overwrite=True)
    if isinstance(found.evaluation, Evaluation):
        errors = found.label_errors
        write_label_errors(found.evaluation, errors, folder, title, picture, overwrite=True)
