"""Which of the paper's ablations can be seen in a small model on a small data set?

    apt-get download openclipart-png && dpkg -x openclipart-png_*.deb clipart
    python benchmarks/ablations.py clipart/usr/share/openclipart/png --figure ablations.png
    python benchmarks/ablations.py --data digits    # without a download
    python benchmarks/ablations.py PATH --quick     # an epoch of two folds: does all of it run?

The paper trains CvT-13 on ImageNet-1k; here `cvt-7` is trained on clip art at 64 pixels, and
`cvt-digits` on scikit-learn's digits at 16. What differs from the model is what the recipes
`ablations/*` of this package change in CvT-13 (`cvt recipes`): a position embedding in every
stage, the first, the last or none; patches that do not overlap instead of the convolutional token
embedding, with and without positions; linear projections in place of the convolutional ones in
all stages, from the second on, in the last, or nowhere; keys and values of stride 1 or 2. A linear
projection has no stride, so its partner is the model of stride 1.

All models have the same number of epochs, by the recipes `few-pictures` and `digits`. The data is
cleaned and divided into six folds as by `clipart.py`. On the first fold, each model's learning
rate is chosen; the others are the test sets of five trainings. Differences are between trainings
on the same folds: mean, standard error, and the 95 % interval of Student's t, by which the last
column judges whether the claim of the paper is seen. `top1_curve` in the file has the accuracy
after each fifth of a training.

The csv files get a row for each training as it ends; the same command resumes after the last,
with `--data NAME --resume FILE` on another day. Prints a table for each data set and writes
`results/ablations-<data>-<processor>-torch<version>-<date>.csv`; `--figure` draws both as a PNG.
"""

import argparse
import math
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from common import Row, show, some_of
from small_training import (
    QUICK_IMAGES,
    Rows,
    by_fold,
    compared,
    digits,
    file_of,
    folder_of_clip_art,
    multiply_adds,
    options_of,
    paired,
    parser_of,
    row_of,
    save,
    shortened,
    with_error,
)
from torch import nn

import cvt
from cvt.train import Recipe, load_recipe

BASE = "as it is"
NO_GAIN, LOSS = "no gain", "loss"  # what the paper reports of a model, beside its reference


class Model(NamedTuple):
    """A row of an ablation."""

    label: str
    name: str  # of the recipe, or `BASE`
    paper: str = ""  # of the reference, nothing


# The last model of each is the reference of the others.
ABLATIONS: dict[str, tuple[Model, ...]] = {
    "position embedding": (
        Model("every stage", "positions-every", NO_GAIN),
        Model("first stage", "positions-first", NO_GAIN),
        Model("last stage", "positions-last", NO_GAIN),
        Model("none", BASE),
    ),
    "token embedding": (
        Model("patches", "patches", LOSS),
        Model("patches, positions", "patches-positions", LOSS),
        Model("convolution, positions", "positions-every", NO_GAIN),
        Model("convolution", BASE),
    ),
    "convolutional projection": (
        Model("no stage", "projection-linear", LOSS),
        Model("stage 1", "projection-stage-1", LOSS),
        Model("stages 1 and 2", "projection-stages-1-2", LOSS),
        Model("stages 1 to 3", "stride-1"),
    ),
    "key and value stride": (Model("2", BASE, LOSS), Model("1", "stride-1")),
}
NAMES = list(dict.fromkeys(model.name for models in ABLATIONS.values() for model in models))


class Data(NamedTuple):
    """A data set: the recipe of its trainings, and the learning rates to choose from."""

    recipe: str
    rates: tuple[float, ...]


DATA = {
    "clipart": Data("few-pictures", (4e-3, 8e-3)),  # 8e-3 is the best of `cvt-7` in clipart.py
    "digits": Data("digits", (1e-3, 3e-3, 1e-2)),
}


# ------------------------------------------------------------------------------ models


def config_of(name: str, variant: str, classes: int, image_size: int) -> cvt.CvtConfig:
    """The configuration of a variant with the changes of an ablation.

    Patches that do not overlap are as large as the variant's own strides.
    """
    changes: dict[str, Any] = {}
    if name != BASE:
        stages = len(cvt.CvtConfig.from_variant(variant).depth)
        changes = load_recipe(f"ablations/{name}").config_changes(stages)
    if "patch_sizes" in changes:
        changes["patch_sizes"] = cvt.CvtConfig.from_variant(variant).patch_stride
    changes |= {"num_labels": classes, "image_size": image_size}
    return cvt.CvtConfig.from_variant(variant, **changes)


def build(name: str, classes: int, recipe: Recipe) -> nn.Module:
    """The recipe's model with the changes of an ablation."""
    config = config_of(name, recipe.model, classes, recipe.image_size)
    if recipe.drop_path is not None:
        config.drop_path_rate = [*[0.0] * (len(config.depth) - 1), recipe.drop_path]
    return cvt.CvtForImageClassification(config)


def at_the_papers_size() -> None:
    """Print the parameters and multiply-adds of the same changes in CvT-13 at 224 pixels."""
    rows = []
    for name in NAMES:
        model = cvt.CvtForImageClassification(config_of(name, "cvt-13", 1000, 224))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        macs = multiply_adds(model, 224)
        size = {"parameters": f"{parameters:,}", "multiply-adds": f"{macs / 1e9:.2f} G"}
        rows.append({"CvT-13, 224 pixels": name, **size})
    show(rows)


# ------------------------------------------------------------------------------ answers


def summaries(rows: Rows) -> list[Row]:
    """A row for each model of each ablation: means over the folds, and paired differences."""
    by_name = by_fold(rows)
    found = []
    for ablation, models in ABLATIONS.items():
        reference = top1_of(by_name[models[-1].name])
        for model in models:
            of_model = by_name[model.name]
            first, values = next(iter(of_model.values())), top1_of(of_model)
            row: Row = {
                "ablation": ablation,
                "model": model.label,
                "parameters": f"{int(first['parameters']):,}",
                "multiply-adds": f"{int(first['macs']) / 1e6:.1f} M",
                "lr": first["lr"],
                "top1": f"{statistics.mean(values.values()):.1f}",
                "difference": "",
                "95 %": "",
                "paper": model.paper,
                "here": "",
            }
            if model.paper:
                mean, error = paired(values, reference)
                margin = error * student(len(values))
                row["difference"] = with_error((mean, error))
                row["95 %"] = f"{mean - margin:+.1f} to {mean + margin:+.1f}"
                row["here"] = verdict(model.paper, mean, margin)
            found.append(row)
    return found


def top1_of(rows: dict[str, dict[str, str]]) -> dict[str, float]:
    """The accuracy in percent by fold."""
    return {fold: float(row["top1"]) for fold, row in rows.items()}


def student(folds: int) -> float:
    """Standard errors on each side of a mean that its 95 % interval has."""
    from scipy.stats import t

    return float(t.ppf(0.975, folds - 1)) if folds > 1 else float("nan")


def verdict(paper: str, mean: float, margin: float) -> str:
    """Whether a difference, with the margin of its interval, agrees with what the paper reports."""
    if mean + margin < 0:
        return "agrees"
    if mean - margin > 0:
        return "disagrees"
    return "no gain seen" if paper == NO_GAIN and mean <= 0 else "cannot tell"


def draw(found: dict[str, Rows], figure: Path) -> None:
    """The differences of all ablations with their errors, two rows of panels for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = math.ceil(len(ABLATIONS) / 2) * len(found)
    drawing, panels = pyplot.subplots(lines, 2, figsize=(8, 2.5 * lines), layout="constrained")
    for (data, rows), of_data in zip(found.items(), panels.reshape(len(found), -1), strict=True):
        by_name = by_fold(rows)
        folds = len(next(iter(by_name.values())))
        for (ablation, models), panel in zip(ABLATIONS.items(), of_data, strict=False):
            reference = top1_of(by_name[models[-1].name])
            labels = []
            for place, model in enumerate(models):
                values = top1_of(by_name[model.name])
                mean, error = paired(values, reference)
                panel.errorbar(mean, -place, xerr=error * student(folds), fmt="o", capsize=3)
                macs = int(next(iter(by_name[model.name].values()))["macs"]) / 1e6
                labels.append(f"{model.label}\n{macs:.1f} M MACs")
            panel.axvline(0, color="grey", linewidth=0.8)
            panel.set_yticks([-place for place in range(len(models))], labels, fontsize=8)
            panel.set_ylim(0.5 - len(models), 0.5)
            panel.set_title(f"{ablation}: {data}, {folds} folds", fontsize=10)
            panel.set_xlabel(f"top-1 less that of {models[-1].label}, points", fontsize=8)
    save(drawing, figure)
    pyplot.close(drawing)


# ------------------------------------------------------------------------------ command line


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--data", type=some_of(DATA), default=list(DATA), help="clipart,digits")
    parser.add_argument("--figure", type=Path, help="PNG file to draw")
    options = options_of(parser, arguments)
    if options.resume and len(options.data) > 1:
        parser.error("--resume continues the file of one --data")
    return options


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    at_the_papers_size()
    found: dict[str, Rows] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for data in options.data:
            recipe = shortened(load_recipe(DATA[data].recipe), options.epochs)
            path = file_of(f"ablations-{data}", options, recipe)
            work = Path(temporary) / data
            if data == "digits":
                pictures = digits()
                (pictures.some(QUICK_IMAGES) if options.quick else pictures).save(work)
            else:
                work = folder_of_clip_art(options, work)
            measure = partial(row_of, build=build, work=work, recipe=recipe)
            found[data] = compared(NAMES, DATA[data].rates, measure, path, options)
            show(summaries(found[data]))
            print(path)
    if options.figure:
        draw(found, options.figure)


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
