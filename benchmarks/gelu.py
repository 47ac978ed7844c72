"""What does the activation cost: GELU beside QuickGELU, in accuracy and in time?

    python benchmarks/gelu.py
    python benchmarks/gelu.py --quick    # one epoch and a tiny model: does it run?

- accuracy: `cvt-digits` is trained on scikit-learn's handwritten digits, without augmentation, once
  per activation and seed. Each model is then evaluated with both activations on the 360 validation
  images: top-1, loss, how many images keep their class, and how far the logits move, as a mean and
  at most, beside their standard deviation.
- speed: inference of the variant, eager and fused, and an eager training step, with random weights
  in fp32. The two activations take turns in one process, so that a busy machine slows both; the
  ratio is the median of the turns' own ratios, to GELU in the same form, and its spread their
  quartiles.

Prints a table for each, and writes it to
`results/gelu-<question>-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import math
import sys
from collections.abc import Callable
from itertools import product

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
    some_of,
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

ACTIVATIONS = ("gelu", "quick_gelu")
SPLITS = ("train", "validation")
LR, BATCH = 3e-3, 128
FORMS = ("eager", "fused", "training step")
ACCURACY = (
    "trained_with", "evaluated_with", "seed", "top1", "loss", "same_class",
    "mean_logit_difference", "largest_logit_difference", "logit_deviation",
)  # fmt: skip
SPEED = ("hidden_act", "form", "batch_size")
TRAINED: Row = {"variant": "cvt-digits", "image_size": 16}


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, 16, 16) and class indices (B,) of a split of the digits."""
    images = open_training("digits")[SPLITS.index(split)]
    processor = image_processor(CvtConfig.from_variant("cvt-digits"), image_size=16, crop_pct=1.0)
    pictures = [decode(source) for source, _ in images]
    labels = [images.classes.index(label) for _, label in images]
    return processor(pictures, return_tensors="pt")["pixel_values"], torch.tensor(labels)


def model_of_digits(activation: str) -> CvtForImageClassification:
    """`cvt-digits` for ten classes, with random weights."""
    config = CvtConfig.from_variant("cvt-digits", hidden_act=activation, num_labels=10)
    return CvtForImageClassification(config)


def trained(
    activation: str, seed: int, epochs: int, pixels: Tensor, labels: Tensor
) -> CvtForImageClassification:
    """A model that was trained with an activation on pixels (B, 3, 16, 16) and labels (B,)."""
    torch.manual_seed(seed)
    model = model_of_digits(activation).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.05)
    steps = epochs * math.ceil(len(labels) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(BATCH):
            loss = model(pixels[batch], labels=labels[batch]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


@torch.no_grad()
def evaluated(model: CvtForImageClassification, activation: str, pixels: Tensor) -> Tensor:
    """Logits (B, K) of the weights of a model with an activation that need not be its own."""
    other = model_of_digits(activation).eval()
    other.load_state_dict(model.state_dict())
    return other(pixels).logits


def accuracy_rows(options: argparse.Namespace) -> list[Row]:
    """A row for each activation in training, in evaluation, and seed."""
    rows, training, (pixels, labels) = [], digits("train"), digits("validation")
    for seed, own in product(range(options.seeds), ACTIVATIONS):
        model = trained(own, seed, options.epochs, *training)
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
            rows.append(dict(zip(ACCURACY, row, strict=True)) | TRAINED)
            print(*rows[-1].values(), flush=True)
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


QUESTIONS = {"accuracy": accuracy_rows, "speed": speed_rows}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--only", type=some_of(QUESTIONS), default=QUESTIONS, help=f"of {', '.join(QUESTIONS)}"
    )
    parser.add_argument("--epochs", type=count, default=10, help="of each training")
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
    about = {
        "variant": options.variant,
        "image_size": options.image_size,
        "epochs": options.epochs,
        "threads": options.threads,
        "device": device_name("cpu"),
        **versions(("torch", "transformers", "cvt")),
    }
    torch.set_num_threads(options.threads)
    for question in options.only:
        name = f"gelu-{question}-quick" if options.quick else f"gelu-{question}"
        path = result_file(options.results, name, "cpu", options.overwrite)
        rows = QUESTIONS[question](options)
        show(rows)
        write_rows(path, [row | about | row for row in rows], "w" if options.overwrite else "x")


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
