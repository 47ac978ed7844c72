"""How much sooner is a head trained on kept features than by transformers' Trainer?

    python benchmarks/probe.py                    # about an hour on two cores
    python benchmarks/probe.py --images 200       # a fifth of that
    python benchmarks/probe.py --quick            # a tiny model: does all of it run?

Peers: transformers' Trainer with its own CvT, whose backbone is frozen; `cvt train` with
`head_only=true`, where the frozen stages run once for one view of each image, or for three, or in
every epoch (`views=0`). Data: scikit-learn's digits as JPEGs of 320 x 240 in the colours of two
photographs, a fifth of them for validation. All start from the same weights, which are first
trained for a few minutes on small images of the other digits; batches of 32, AdamW, a cosine
schedule, the same number of epochs and a validation after each. Ours crops at random; the Trainer
has images as in validation and moves the statistics of the frozen BatchNorms.

The ratio is that of whole trainings, from images to the last validation, in one run; the peers are
trained one after the other, in an order that `--reverse` turns round.

Prints a table and writes it to `results/probe-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from common import SHAPES, Row, command_line, count, result_file, show, transformers_cvt, write_rows
from peers import shape
from PIL import Image

import cvt
from cvt.data import decode, open_training
from cvt.inference.benchmark import device_name, versions
from cvt.train import load_recipe, train

PEER = "transformers, Trainer"
VIEWS = {"cvt train, views=1": 1, "cvt train, views=3": 3, "cvt train, views=0": 0}
LR = 1e-2
BATCH = 32
DIGITS = 1797  # of the data set


def write_digits(folder: Path, images: range) -> None:
    """JPEGs of digits, as dark shapes on pieces of photographs; a folder for each class."""
    from sklearn.datasets import load_digits, load_sample_images

    scenes = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    digits, draw = load_digits(), np.random.default_rng(0)
    for i in images:
        scene = scenes[i % 2]
        left, top = (
            draw.integers(size - part) for size, part in zip(scene.size, (320, 240), strict=True)
        )
        picture = scene.crop((left, top, left + 320, top + 240)).point(
            lambda value: 128 + value // 2
        )
        scan = Image.fromarray((digits.images[i] * 15).astype("uint8"))
        scan = scan.resize((240, 240), Image.Resampling.BICUBIC)
        picture.paste(0, (40, 0, 280, 240), scan)
        path = folder / str(digits.target[i]) / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)


class Pixels(torch.utils.data.Dataset):
    """Images as the Trainer takes them."""

    def __init__(self, images: cvt.data.LabelledImages, processor: Callable) -> None:
        self.images, self.processor = images, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, object]:
        source, label = self.images[i]
        pixels = self.processor(decode(source), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.images.classes.index(label)}


def start_model(options: argparse.Namespace, work: Path) -> None:
    """Write the model that all start from: its stages know digits, its head does not."""
    write_digits(work / "others", range(options.images, DIGITS))
    config = shape(options.variant)
    cvt.CvtForImageClassification(config).save_pretrained(work / "new")
    cvt.image_processor(config, 64).save_pretrained(work / "new")
    settings = {
        "data": str(work / "others"),
        "model": str(work / "new"),
        "image_size": 64,
        "epochs": options.first_epochs,
        "batch_size": BATCH,
        "lr": 5e-4,
        "warmup_epochs": 1,
        "flip": 0,
    }
    train(load_recipe(None, settings), work / "first")
    model = cvt.CvtForImageClassification.from_pretrained(work / "first" / "best")
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    model.save_pretrained(work / "model")
    cvt.image_processor(model.config, options.image_size).save_pretrained(work / "model")


def by_trainer(options: argparse.Namespace, work: Path) -> float:
    """Train the head by transformers' Trainer; returns its accuracy."""
    splits = open_training(work / "digits")
    config = shape(options.variant)
    config.class_names = splits.train.classes
    model = transformers_cvt(config)
    weights = cvt.CvtForImageClassification.from_pretrained(work / "model").state_dict()
    model.load_state_dict({**model.state_dict(), **weights})
    model.cvt.requires_grad_(False)
    processor = cvt.image_processor(config, options.image_size)
    arguments = transformers.TrainingArguments(
        str(work / "trainer"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=LR,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=Pixels(splits.train, processor),
        eval_dataset=Pixels(splits.validation, processor),
        compute_metrics=lambda found: {
            "accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()
        },
    )
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]
    return float(last["eval_accuracy"])


def by_cvt(views: int, options: argparse.Namespace, work: Path) -> float:
    """Train the head by `cvt train`; returns its accuracy."""
    settings = {
        "data": str(work / "digits"),
        "model": str(work / "model"),
        "head_only": True,
        "views": views,
        "epochs": options.epochs,
        "batch_size": BATCH,
        "lr": LR,
        "warmup_epochs": 0,
        "crop_scale": 0.8,
        "flip": 0,
        "label_smoothing": 0,
        "image_size": options.image_size,
    }
    run = work / f"views-{views}"
    train(load_recipe(None, settings), run)
    with (run / "results.csv").open() as file:
        *_, last = csv.DictReader(file)
    return float(last["val_top1"])


def measure(options: argparse.Namespace, work: Path) -> list[Row]:
    """A row for each peer."""
    write_digits(work / "digits", range(options.images))
    start_model(options, work)
    runs: dict[str, Callable[[], float]] = {PEER: lambda: by_trainer(options, work)}
    for name, views in VIEWS.items():
        if views or options.every_epoch:
            runs[name] = lambda views=views: by_cvt(views, options, work)
    found: dict[str, tuple[float, float]] = {}
    for name in sorted(runs, reverse=options.reverse):
        start = time.perf_counter()
        accuracy = runs[name]()
        found[name] = time.perf_counter() - start, accuracy
        print(f"{name}: {found[name][0]:.1f} s, accuracy {accuracy:.3f}", flush=True)
    return [
        {
            "peer": name,
            "seconds": round(found[name][0], 1),
            "times as fast": round(found[PEER][0] / found[name][0], 2),
            "val_top1": round(found[name][1], 4),
            "images": options.images,
            "epochs": options.epochs,
            "variant": options.variant,
            "image_size": options.image_size,
            "threads": options.threads,
        }
        for name in runs
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--images", type=count, default=1000, help="of all classes, at most 1797")
    parser.add_argument("--epochs", type=count, default=20)
    parser.add_argument("--first-epochs", type=count, default=12, help="of the starting weights")
    parser.add_argument("--variant", choices=SHAPES, default="cvt-13")
    parser.add_argument("--image-size", type=count, default=224)
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    parser.add_argument("--every-epoch", action="store_true", help="with views=0, too")
    parser.add_argument("--reverse", action="store_true", help="the peers in the other order")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few and small images")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.epochs, options.first_epochs = 50, 2, 1
        options.variant, options.image_size, options.every_epoch = "tiny", 64, True
    return options


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    name = "probe-quick" if options.quick else "probe"
    path = result_file(options.results, name, "cpu", options.overwrite)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        rows = measure(options, Path(work))
    show(rows)
    about = {"device": device_name("cpu"), **versions(("torch", "transformers", "cvt"))}
    write_rows(path, [row | about for row in rows], "w" if options.overwrite else "x")


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
