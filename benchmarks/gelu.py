"""What does the activation cost: GELU beside QuickGELU, in accuracy and in time?

    python benchmarks/gelu.py
    python benchmarks/gelu.py --quick    # one epoch and a tiny model: does it run?

- accuracy: `cvt-digits` is trained on scikit-learn's handwritten digits, with the recipe `digits`
  but for its length, once per activation and seed. Each model is then evaluated with both
  activations on the 360 validation images: top-1, loss, how many images keep their class, and how
  far the logits move, as a mean and at most, beside their standard deviation.
- speed: inference of the variant, eager and fused, and an eager training step, with random weights
  in fp32. The two activations take turns in one process, so that a busy machine slows both; the
  ratio is the median of the turns' own ratios, to GELU in the same form, and its spread their
  quartiles.

Prints two tables and writes them to `results/gelu-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from common import (
    SHAPES,
    Row,
    command_line,
    count,
    duration,
    per_image,
    ratio,
    result_file,
    show,
    speed,
    write_rows,
)
from peers import Logits, shape, training_step
from torch import Tensor

from cvt import CvtConfig, CvtForImageClassification
from cvt.data import decode, image_processor, open_training
from cvt.inference.benchmark import device_name, in_turns, versions
from cvt.kernels import recompute_activations
from cvt.runtime import open_runtime
from cvt.train import load_recipe, train

ACTIVATIONS = ("gelu", "quick_gelu")
FORMS = ("eager", "fused", "training step")
ACCURACY = (
    "trained_with", "evaluated_with", "seed", "top1", "loss", "same_class",
    "mean_logit_difference", "largest_logit_difference", "logit_deviation",
)  # fmt: skip
SPEED = ("hidden_act", "form", "batch_size")
MEASURED = ("ms_per_image", "images_per_second", "ratio", "ratio_quartiles")


def trained(activation: str, seed: int, epochs: int, folder: Path) -> Path:
    """The folder of the last epoch's model, trained with an activation."""
    start = folder / activation
    CvtConfig.from_variant("cvt-digits", hidden_act=activation).save_pretrained(start)
    changes = {"model": str(start), "seed": seed, "epochs": epochs, "workers": 0}
    train(load_recipe("digits", changes), folder / f"{activation}-{seed}")
    return folder / f"{activation}-{seed}" / "last"


def validation(folder: Path) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, H, W) and class indices (B,) of the validation images, for a model folder."""
    _, images, _ = open_training("digits")
    processor = image_processor(folder)
    pixels = [
        processor(decode(source), return_tensors="pt")["pixel_values"] for source, _ in images
    ]
    labels = [images.classes.index(label) for _, label in images]
    return torch.cat(pixels), torch.tensor(labels)


@torch.no_grad()
def evaluated(folder: Path, activation: str, pixels: Tensor) -> Tensor:
    """Logits (B, K) of a model with an activation that need not be its own."""
    model = CvtForImageClassification.from_pretrained(folder, hidden_act=activation)
    return model.eval()(pixels).logits


def accuracy_rows(options: argparse.Namespace, folder: Path) -> list[Row]:
    """A row for each activation in training, in evaluation, and seed."""
    rows = []
    for seed, own in product(range(options.seeds), ACTIVATIONS):
        model = trained(own, seed, options.epochs, folder)
        pixels, labels = validation(model)
        logits = {activation: evaluated(model, activation, pixels) for activation in ACTIVATIONS}
        for activation, theirs in logits.items():
            difference = (theirs - logits[own]).abs()
            agree = (theirs.argmax(1) == logits[own].argmax(1)).float().mean()
            figures = (
                (theirs.argmax(1) == labels).float().mean(),
                torch.nn.functional.cross_entropy(theirs, labels),
                agree, difference.mean(), difference.max(), theirs.std(),
            )  # fmt: skip
            row = own, activation, seed, *(f"{float(figure):.4f}" for figure in figures)
            rows.append(dict(zip(ACCURACY, row, strict=True)))
    return rows


def model_with(activation: str, variant: str) -> CvtForImageClassification:
    """A variant with random weights and an activation."""
    torch.manual_seed(0)
    config = shape(variant)
    config.hidden_act = activation
    return CvtForImageClassification(config).eval()


def prepared(
    activation: str, form: str, images: Tensor, options: argparse.Namespace
) -> Callable[[], object]:
    """What is timed: one call on images (B, 3, H, W)."""
    model = model_with(activation, options.variant)
    if form == "training step":
        recompute_activations(model)  # as `cvt train` has it
        return training_step(model, Logits(model), images, torch.float32)
    name = "torch" if form == "eager" else "fused"
    runtime = open_runtime(model, name, "fp32", "cpu", options.threads)
    return lambda: runtime(images)


def speed_rows(options: argparse.Namespace) -> list[Row]:
    """A row for each form and activation; those of a form take turns."""
    torch.set_num_threads(options.threads)
    rows = []
    for form, batch_size in product(FORMS, options.batch_sizes):
        images = torch.randn(batch_size, 3, options.image_size, options.image_size)
        runs = {name: prepared(name, form, images, options) for name in ACTIVATIONS}
        times = in_turns(runs, options.seconds, turn=0.0 if form == FORMS[-1] else 0.2)
        times = {name: per_image(batch_size, turns) for name, turns in times.items()}
        for name, turns in times.items():
            row: Row = dict(zip(SPEED, (name, form, batch_size), strict=True))
            rows.append(row | speed(turns) | ratio(turns, times["gelu"]))
    return rows


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--epochs", type=count, default=15, help="of each training")
    parser.add_argument("--seeds", type=count, default=3, help="of each activation")
    parser.add_argument("--variant", choices=SHAPES, default="cvt-13", help="whose speed it is")
    parser.add_argument("--image-size", type=count, default=224)
    parser.add_argument("--batch-size", dest="batch_sizes", type=count, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=duration, default=8.0, help="of each that takes turns")
    parser.add_argument("--quick", action="store_true", help="one epoch and a tiny model")
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs = options.seeds = 1
        options.variant, options.image_size, options.batch_sizes = "tiny", 32, [2]
        options.seconds = 0.0
    return options


def run(options: argparse.Namespace) -> None:
    """Trains, evaluates, measures, prints and writes."""
    name = "gelu-quick" if options.quick else "gelu"
    path = result_file(options.results, name, "cpu", options.overwrite)
    with tempfile.TemporaryDirectory() as folder:
        accuracy = accuracy_rows(options, Path(folder))
    show(accuracy)
    speeds = speed_rows(options)
    show(speeds)
    about = {
        "variant": options.variant,
        "image_size": options.image_size,
        "epochs": options.epochs,
        "threads": options.threads,
        "device": device_name("cpu"),
        **versions(("torch", "transformers", "cvt")),
    }
    empty = dict.fromkeys(("question", *ACCURACY, *SPEED, *MEASURED), "")
    rows = [empty | {"question": "accuracy"} | row | about for row in accuracy]
    rows += [empty | {"question": "speed"} | row | about for row in speeds]
    write_rows(path, rows, "w" if options.overwrite else "x")


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
