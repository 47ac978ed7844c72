"""How well does CvT learn from a few thousand pictures, beside a ViT, a ResNet and a PVT?

    apt-get download openclipart-png && dpkg -x openclipart-png_*.deb clipart
    python benchmarks/clipart.py clipart/usr/share/openclipart/png    # about two hours, two cores
    python benchmarks/clipart.py PATH --search    # recipes for CvT, on the fold that is kept for it
    python benchmarks/clipart.py PATH --quick     # an epoch of two folds: does all of it run?

All are trained from scratch at 64 pixels by one recipe, `few-pictures` of this package, with about
the same parameters and multiply-adds. The data is cleaned by `cvt check`: no links, no blank or
unreadable pictures, one of each group of equal or similar ones, none of a group that has several
labels, no `shapes/stars`, and classes of at least 50. Pictures of one series, whose names differ
in digits only, stay together.

The pictures are divided into six folds. The first is kept: on it, `--search` compares recipes, and
every model's learning rate is chosen. The others are the test sets of five trainings, on all
other folds. The accuracy is that of the last epoch. Differences are between trainings on the same
folds; their standard error is over the five.

The csv file gets a row for each training as it ends; the same command resumes after the last.
Prints a table; the file is `results/clipart-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import csv
import dataclasses
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import Row, command_line, count, counts, result_file, show, some_of
from PIL import Image, ImageOps
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import cvt
from cvt.data import check, decode, open_splits
from cvt.inference.benchmark import device_name, versions
from cvt.macs import MacCounter
from cvt.train import Recipe, load_recipe
from cvt.train.augmentation import augmentation, mixing
from cvt.train.loader import seed_all
from cvt.train.optim import Schedule, optimizer_for
from cvt.train.plan import Plan

SIDE, STORED = 64, 80  # pixels of a view, and of a stored picture
LEAST_IMAGES = 50  # of a class
FOLDS = 6  # the first is kept for choices
RATES = (5e-4, 1e-3, 2e-3)
RECIPE = "few-pictures"
# What `--search` changes in the recipe, one at a time.
SEARCH: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no auto_augment": {"auto_augment": None},
    "weaker auto_augment": {"auto_augment": "rand-m5-mstd0.5-inc1"},
    "stronger auto_augment": {"auto_augment": "rand-m12-mstd0.5-inc1"},
    "no mixing": {"mixup": 0.0, "cutmix": 0.0},
    "mixup alone": {"cutmix": 0.0},
    "cutmix alone": {"mixup": 0.0},
    "no erasing": {"random_erase": 0.0},
    "larger crops": {"crop_scale": 0.6},
    "smaller crops": {"crop_scale": 0.2},
    "no drop path": {"drop_path": 0.0},
    "more drop path": {"drop_path": 0.2},
    "less weight decay": {"weight_decay": 0.02},
    "more weight decay": {"weight_decay": 0.2},
    "no label smoothing": {"label_smoothing": 0.0},
    "smaller batches": {"batch_size": 32},
    "lower lr": {"lr": 5e-4},
    "higher lr": {"lr": 2e-3},
    "averaged weights": {"ema_decay": 0.998},
    "lion": {"optimizer": "lion", "lr": 2e-4},
    "muon": {"optimizer": "muon"},
}


def build(name: str, classes: int, drop_path: float) -> nn.Module:
    """A model of about 2.3 M parameters."""
    if name == "cvt":
        config = cvt.CvtConfig.from_variant("cvt-7", num_labels=classes)
        config.drop_path_rate = [0.0, 0.0, drop_path]
        return cvt.CvtForImageClassification(config)
    settings = {"num_classes": classes, "drop_path_rate": drop_path}
    if name == "vit":
        return VisionTransformer(
            SIDE, patch_size=8, embed_dim=192, depth=5, num_heads=3, **settings
        )
    if name == "resnet":
        widths = (32, 64, 128, 224)
        stem = {"stem_type": "deep", "stem_width": 24, "avg_down": True}
        return ResNet(BasicBlock, (2, 2, 2, 2), channels=widths, **stem, **settings)
    return PyramidVisionTransformerV2(
        depths=(2, 2, 2, 2),
        embed_dims=(40, 80, 160, 200),
        num_heads=(1, 2, 5, 5),
        mlp_ratios=(4, 4, 4, 4),
        sr_ratios=(4, 2, 1, 1),
        **settings,
    )


PEERS = ("cvt", "vit", "resnet", "pvt")


# ------------------------------------------------------------------------------ pictures


class Pictures(NamedTuple):
    """Pixels (N, 80, 80, 3) of 8 bits, the class of each (N,), and its fold (N,)."""

    pixels: np.ndarray
    classes: np.ndarray
    folds: np.ndarray


def prepare(path: Path, least_images: int) -> Pictures:
    """The cleaned pictures of a folder, as small squares on white."""
    from sklearn.model_selection import StratifiedGroupKFold

    found = check(open_splits(path), workers=2)
    labels = defaultdict(set)
    for image, group in zip(found.images, found.groups, strict=True):
        labels[group].add(image.label)
    kept, taken = [], set()
    for image, group in zip(found.images, found.groups, strict=True):
        is_picture = not (image.link or image.fault or image.is_oversized or image.colour)
        if is_picture and "/stars/" not in image.path and len(labels[group]) == 1:
            if group not in taken:
                kept.append(image)
            taken.add(group)
    large = {label for label, n in Counter(i.label for i in kept).items() if n >= least_images}
    kept = [image for image in kept if image.label in large]
    series = [re.sub(r"[\d_-]+", "", image.path) for image in kept]
    names = sorted(large)
    classes = np.array([names.index(image.label) for image in kept])
    folds = np.zeros(len(kept), int)
    drawn = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    for fold, (_, test) in enumerate(drawn.split(classes, classes, series)):
        folds[test] = fold
    print(
        f"{len(kept):,} of {len(found.images):,} pictures, {len(names)} classes, "
        f"{len(set(series)):,} series; the largest class has {np.bincount(classes).max()}",
        flush=True,
    )
    pixels = np.stack([np.asarray(square(image.path)) for image in kept])
    return Pictures(pixels, classes, folds)


def square(path: str) -> Image.Image:
    """The whole picture in the middle of a white square."""
    image = decode(path, least_of_large=STORED)
    return ImageOps.pad(image, (STORED, STORED), Image.Resampling.BICUBIC, "white")


# ------------------------------------------------------------------------------ training


class Job(NamedTuple):
    """One training."""

    peer: str
    fold: int
    name: str  # of the recipe
    settings: dict[str, Any]  # that differ from it


def train(job: Job, work: Path, recipe: Recipe) -> Row:
    """Train a model on all folds but one; returns how well it knows that one."""
    torch.set_num_threads(1)
    recipe = dataclasses.replace(recipe, **job.settings)
    pictures = Pictures(*(np.load(work / f"{name}.npy", "r") for name in Pictures._fields))
    train_rows = np.flatnonzero(pictures.folds != job.fold)
    classes = int(pictures.classes.max()) + 1
    plan = Plan(len(train_rows), recipe.batch_size, 1, 0, 1, recipe.epochs)
    seed_all(recipe.seed)
    model = build(job.peer, classes, recipe.drop_path or 0.0)
    model = model.to(memory_format=torch.channels_last)
    with torch.no_grad(), MacCounter() as counter:
        model.eval()(torch.zeros(1, 3, SIDE, SIDE))
    average = ModelEmaV3(model, recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
    processor = cvt.image_processor(cvt.CvtConfig.from_variant("cvt-7"), SIDE, crop_pct=1.0)
    augment, mix = augmentation(recipe, processor), mixing(recipe, classes)
    schedule = Schedule(recipe, plan)
    optimizer = optimizer_for(model, recipe, schedule.peak)
    start = time.process_time()  # of one thread: other work on the machine changes little
    model.train()
    for step, rows in enumerate(batches(train_rows, recipe, plan)):
        schedule.set(optimizer, step)
        views = [augment(Image.fromarray(pictures.pixels[row])) for row in rows]
        pixels = torch.stack(views).contiguous(memory_format=torch.channels_last)
        pixels, targets = mix(pixels, torch.from_numpy(pictures.classes[rows]))
        smoothing = recipe.label_smoothing if targets.ndim == 1 else 0.0
        loss = F.cross_entropy(logits_of(model(pixels)), targets, label_smoothing=smoothing)
        loss.backward()
        if recipe.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average.update(model, step)
    seconds = time.process_time() - start
    return {
        "peer": job.peer,
        "fold": job.fold,
        "recipe": job.name,
        "lr": recipe.peak_lr(recipe.batch_size),
        "epochs": recipe.epochs,
        **accuracies(average.module if average else model, pictures, job.fold, processor),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": counter.macs,
        "core_seconds": round(seconds, 1),
    }


def batches(rows: np.ndarray, recipe: Recipe, plan: Plan) -> Iterator[np.ndarray]:
    """The rows of every step, in another order in every epoch."""
    for epoch in range(recipe.epochs):
        order = np.random.default_rng((recipe.seed, epoch)).permutation(rows)
        for step in range(plan.steps_per_epoch):
            yield order[step * recipe.batch_size : (step + 1) * recipe.batch_size]


def logits_of(answer: Any) -> Tensor:
    """Logits, (B, K), of a model that may answer with more."""
    return answer if isinstance(answer, Tensor) else answer.logits


@torch.no_grad()
def accuracies(model: nn.Module, pictures: Pictures, fold: int, processor: Any) -> Row:
    """Top-1 and balanced accuracy in percent, and the mean cross-entropy."""
    from sklearn.metrics import balanced_accuracy_score

    model.eval()
    rows = np.flatnonzero(pictures.folds == fold)
    found = []
    for start in range(0, len(rows), 256):
        images = [Image.fromarray(pictures.pixels[row]) for row in rows[start : start + 256]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        found.append(logits_of(model(pixels)))
    logits, truth = torch.cat(found), pictures.classes[rows]
    guess, loss = logits.argmax(dim=1).numpy(), F.cross_entropy(logits, torch.from_numpy(truth))
    return {
        "images": len(rows),
        "top1": round(100 * float((guess == truth).mean()), 2),
        "balanced_accuracy": round(100 * float(balanced_accuracy_score(truth, guess)), 2),
        "loss": round(float(loss), 4),
    }


def trained(jobs: list[Job], work: Path, recipe: Recipe, path: Path, processes: int) -> list[Row]:
    """The rows of the jobs: those of the file, and those that are trained now."""
    found = rows_of(path)
    done = {(row["peer"], str(row["fold"]), row["recipe"]) for row in found}
    left = [job for job in jobs if (job.peer, str(job.fold), job.name) not in done]
    about = {"device": device_name("cpu"), **versions(("torch", "timm", "cvt"))}
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        calls = [pool.apply_async(train, (job, work, recipe)) for job in left]
        for call in calls:
            row = call.get() | about
            add_row(path, row)
            print(
                *(row[name] for name in ("peer", "fold", "recipe", "top1", "core_seconds")),
                flush=True,
            )
    wanted = {(job.peer, str(job.fold), job.name) for job in jobs}
    return [r for r in rows_of(path) if (r["peer"], r["fold"], r["recipe"]) in wanted]


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add_row(path: Path, row: Mapping[str, object]) -> None:
    """Add a row to a csv file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


# ------------------------------------------------------------------------------ questions


def search(options: argparse.Namespace, work: Path, recipe: Recipe, path: Path) -> None:
    """Recipes for CvT, the best first, on the fold that is kept for it."""
    names = options.only or list(SEARCH)
    jobs = [Job("cvt", 0, name, SEARCH[name]) for name in names]
    rows = trained(jobs, work, recipe, path, options.processes)
    columns = ("recipe", "top1", "balanced_accuracy", "loss", "core_seconds")
    rows.sort(key=lambda row: -float(row["top1"]))
    show([{name: row[name] for name in columns} for row in rows])


def compare(options: argparse.Namespace, work: Path, recipe: Recipe, path: Path) -> None:
    """The peers, each at its best learning rate."""
    choices = [
        Job(peer, 0, f"lr {rate:g}", {"lr": rate}) for peer in options.peers for rate in RATES
    ]
    chosen: dict[str, dict[str, str]] = {}
    for row in trained(choices, work, recipe, path, options.processes):
        if float(row["top1"]) > float(chosen.get(row["peer"], {"top1": -1})["top1"]):
            chosen[row["peer"]] = row
    jobs = [
        Job(peer, fold, row["recipe"], {"lr": float(row["lr"])})
        for fold in options.folds
        for peer, row in chosen.items()
    ]
    rows = trained(jobs, work, recipe, path, options.processes)
    by_peer: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        by_peer[row["peer"]][row["fold"]] = row
    show([summary(peer, by_peer) for peer in options.peers])


def summary(peer: str, by_peer: Mapping[str, Mapping[str, Mapping[str, str]]]) -> Row:
    """A row of the table: means over the folds, and what differs from CvT on the same ones."""
    rows = by_peer[peer]
    row = {
        "peer": peer,
        "parameters": f"{int(next(iter(rows.values()))['parameters']) / 1e6:.2f} M",
        "multiply-adds": f"{int(next(iter(rows.values()))['macs']) / 1e6:.0f} M",
        "lr": next(iter(rows.values()))["lr"],
    }
    for name in ("top1", "balanced_accuracy"):
        values = [float(each[name]) for each in rows.values()]
        row[name] = f"{statistics.mean(values):.1f}"
        ours = by_peer.get("cvt", rows)
        differences = [float(rows[fold][name]) - float(ours[fold][name]) for fold in rows]
        row[f"{name}, CvT = 0"] = with_error(differences) if rows is not ours else ""
    seconds = statistics.mean(float(each["core_seconds"]) for each in rows.values())
    return row | {"core-minutes": f"{seconds / 60:.1f}"}


def with_error(values: list[float]) -> str:
    """Their mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):+.1f} ± {error:.1f}"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("pictures", type=Path, help="folder with a folder for each class")
    parser.add_argument("--search", action="store_true", help="compare recipes for CvT instead")
    parser.add_argument("--only", type=some_of(SEARCH), help="recipes of the search")
    parser.add_argument("--peers", type=some_of(PEERS), default=list(PEERS))
    parser.add_argument("--folds", type=counts, default=list(range(1, FOLDS)))
    parser.add_argument("--epochs", type=count, help="if not the recipe's")
    parser.add_argument("--processes", type=count, default=2, help="trainings at a time")
    parser.add_argument("--prepared", type=Path, help="folder that keeps the cleaned pictures")
    parser.add_argument("--quick", action="store_true", help="one epoch, two folds, small classes")
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs, options.folds = 1, [1, 2]
    return options


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    name = "clipart-search" if options.search else "clipart"
    # A file of today is resumed, not replaced.
    path = result_file(options.results, name + options.quick * "-quick", "cpu", overwrite=True)
    if options.overwrite:
        path.unlink(missing_ok=True)
    recipe = load_recipe(RECIPE)
    if options.epochs:
        warmup = min(recipe.warmup_epochs or 0.0, options.epochs / 4)
        recipe = dataclasses.replace(recipe, epochs=options.epochs, warmup_epochs=warmup)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.prepared or Path(temporary)
        if not (work / "folds.npy").exists():
            pictures = prepare(options.pictures, 6 if options.quick else LEAST_IMAGES)
            work.mkdir(parents=True, exist_ok=True)
            for name, array in pictures._asdict().items():
                np.save(work / f"{name}.npy", array)
        (search if options.search else compare)(options, work, recipe, path)
    print(path)


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
