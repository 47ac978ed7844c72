"""`cvt demo`."""

import shlex
import shutil
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import click

from cvt.cli.options import FOLDER, command


def free(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist: nothing is overwritten."""
    names = (path.with_name(f"{path.name}-{i}") for i in count(2))
    return path if not path.exists() else next(name for name in names if not name.exists())


@command
@click.option(
    "--output",
    type=FOLDER,
    default=Path("runs/demo"),
    help="Run folder to create; where there is one, its name gets a number.",
)
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Passes over the training images, if not 40."
)
def demo(output: Path, epochs: int | None) -> None:
    """Train a small CvT on scikit-learn's handwritten digits, evaluate it, classify image files.

    Nothing is downloaded.
    """
    import torch

    from cvt.checkpoints import load_classifier, load_processor
    from cvt.cli.console import out, quiet_libraries
    from cvt.cli.progress import TrainingBars, bar
    from cvt.data import image_folder, write_digits
    from cvt.inference.evaluate import evaluate
    from cvt.inference.predict import predict
    from cvt.inference.report import plot_predictions
    from cvt.train import load_recipe, train

    run = free(output)
    quiet_libraries()
    # So small a model gains little from a second thread, and waits long for it on a busy machine.
    torch.set_num_threads(1)

    out.print(
        f"1. Training a CvT of 1.0 M parameters on 1,437 images of digits, in {run}", bold=True
    )
    recipe = load_recipe("digits", {"epochs": epochs} if epochs else None)
    start = time.perf_counter()
    with TrainingBars() as progress:
        train(recipe, run, progress)
    seconds = time.perf_counter() - start
    out.print("2. Evaluating the best epoch on the 360 images held out", bold=True)
    classifier = load_classifier(run / "best")
    processor = load_processor(run / "best", classifier.config)
    write_digits(run / "digits")
    held_out = image_folder(run / "digits" / "test")
    with bar("evaluate", len(held_out)) as step:
        evaluation: Any = evaluate(classifier, processor, held_out, progress=step)

    out.print("3. Predicting the same images from their files", bold=True)
    predictions: Any = list(predict(classifier, processor, held_out.sources))  # all are readable
    plot_predictions(predictions, held_out.labels, run / "predictions.png")
    out.print(
        f"\n{100 * evaluation.top1:.2f} % of the {evaluation.images} held-out images are right, in "
        f"the best of {recipe.epochs} epochs; training took {seconds:.0f} s.",
        bold=True,
        fg="green",
    )
    print_what_next(run)


def print_what_next(run: Path) -> None:
    """Print what is in the run folder, and commands to try."""
    from cvt.cli.console import out

    out.print(f"{run} has")
    for name, what in {
        "best/": "the model, with labels, preprocessing and a model card",
        "results.csv": "loss and accuracy of every epoch",
        "learning_curve.png": "the same as a picture",
        "confusion_matrix.png": "which digit is taken for which",
        "predictions.png": "predictions of held-out images, the wrong ones first and marked",
        "digits/": "the images, a folder per class",
    }.items():
        out.print(f"  {name:<22}{what}")
    cvt = "cvt" if shutil.which("cvt") else f"{shlex.quote(sys.executable)} -m cvt"
    best, sevens = shlex.quote(str(run / "best")), shlex.quote(str(run / "digits/test/7"))
    out.print(
        "\nTry next:\n"
        f"  {cvt} predict {best} {sevens} --topk 2\n"
        f"  {cvt} info {best}\n"
        f"  {cvt} train YOUR_PHOTOS --config photos    # needs the hub once"
    )
