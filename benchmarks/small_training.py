"""What the benchmarks that train small models share: pictures in folds, trainings, rows.

The pictures are arrays in a folder, so that each training, in a process of its own, maps them. A
training is one thread; several run at a time. Each becomes rows of a csv file as it ends, and is
not repeated.
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import multiprocessing
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import Row, command_line, count, counts, result_file
from PIL import Image, ImageOps
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import cvt
from cvt.data import LabelledImages, check, decode, open_splits
from cvt.inference.benchmark import device_name, versions
from cvt.macs import MacCounter
from cvt.train import Recipe
from cvt.train.augmentation import augmentation, mixing
from cvt.train.loader import seed_all
from cvt.train.optim import Schedule, optimizer_for
from cvt.train.plan import Plan

STORED = 80  # pixels of a stored picture of clip art
LEAST_IMAGES = 50  # of a class
FOLDS = 6  # the first is kept for choices
RATES = (1e-3, 2e-3, 4e-3)
QUICK_IMAGES = 240
CURVE = 5  # evaluations during a training, the last one included


# ------------------------------------------------------------------------------ pictures


class Pictures(NamedTuple):
    """Pixels (N, H, W, 3) of 8 bits, the class of each (N,), and its fold (N,)."""

    pixels: np.ndarray
    classes: np.ndarray
    folds: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "Pictures":
        """Those in a folder; what is not read of them is not in memory."""
        return cls(*(np.load(folder / f"{name}.npy", "r") for name in cls._fields))

    def save(self, folder: Path) -> None:
        """Write them into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in self._asdict().items():
            np.save(folder / f"{name}.npy", array)

    def some(self, number: int) -> "Pictures":
        """About so many of them, of all folds and classes alike."""
        rows = slice(None, None, max(1, len(self.classes) // number))
        return Pictures(*(array[rows] for array in self))


def clip_art(path: Path | None, quick: bool) -> Pictures:
    """The cleaned pictures of a folder, as small squares on white.

    Args:
        path: of the folder.
        quick: a part of them, in smaller classes.

    Raises:
        SystemExit: there is no folder.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if path is None:
        raise SystemExit("name the folder of the clip art, or one with --prepared arrays")
    splits, least_images = open_splits(path), LEAST_IMAGES
    if quick:
        least_images = 6
        splits = {
            name: images.select(range(0, len(images), max(1, len(images) // (2 * QUICK_IMAGES))))
            for name, images in splits.items()
            if isinstance(images, LabelledImages)
        }
    found = check(splits, workers=2)
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
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    print(
        f"{len(kept):,} of {len(found.images):,} pictures, {len(names)} classes, "
        f"{len(set(series)):,} series; the largest class has {np.bincount(classes).max()}",
        flush=True,
    )
    pixels = np.stack([np.asarray(square(image.path)) for image in kept])
    return Pictures(pixels, classes, folds_of(splitter.split(classes, classes, series)))


def square(path: str) -> Image.Image:
    """The whole picture in the middle of a white square."""
    image = decode(path, least_of_large=STORED)
    return ImageOps.pad(image, (STORED, STORED), Image.Resampling.BICUBIC, "white")


def digits() -> Pictures:
    """scikit-learn's handwritten digits, 8 x 8 pixels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import StratifiedKFold

    found = load_digits()
    grey = (found.images * (255 / 16)).round().astype(np.uint8)  # they are counts from 0 to 16
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    folds = folds_of(splitter.split(found.target, found.target))
    return Pictures(np.repeat(grey[..., None], 3, axis=3), found.target, folds)


def folds_of(splits: Iterator) -> np.ndarray:
    """The number of the fold that each picture is tested in, (N,)."""
    tests = [test for _, test in splits]
    folds = np.zeros(sum(map(len, tests)), int)
    for fold, test in enumerate(tests):
        folds[test] = fold
    return folds


def folder_of_clip_art(options: argparse.Namespace, temporary: Path) -> Path:
    """The folder with the arrays of the clip art, which are prepared unless they are there."""
    folder = options.prepared or temporary / "clipart"
    if not (folder / "folds.npy").exists():
        clip_art(options.pictures, options.quick).save(folder)
    if options.quick:
        pictures, folder = Pictures.load(folder).some(QUICK_IMAGES), temporary / "quick"
        pictures.save(folder)
    return folder


# ------------------------------------------------------------------------------ training


class Job(NamedTuple):
    """One training."""

    peer: str
    fold: int
    name: str  # of the recipe
    settings: dict[str, Any]  # that differ from it

    @property
    def key(self) -> tuple[str, str, str]:
        """Of its rows, as text."""
        return self.peer, str(self.fold), self.name


Build = Callable[[str, int, Recipe], nn.Module]  # from a peer and a number of classes


def train(job: Job, build: Build, work: Path, recipe: Recipe) -> tuple[nn.Module, Row]:
    """Train a model on all folds but one; returns it, and how well it knows that one.

    The folder of the pictures keeps it; such a training is not repeated for another question.
    """
    recipe = dataclasses.replace(recipe, **job.settings)
    settings = json.dumps(dataclasses.asdict(recipe), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    kept = work / "trained" / f"{job.peer}-{job.fold}-{digest}.pt"
    if not kept.exists():
        model, row = _trained(job, build, work, recipe)
        kept.parent.mkdir(exist_ok=True)
        torch.save({"weights": model.state_dict(), "row": row}, kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
        return model, row
    found = torch.load(kept, weights_only=True)
    model = build(job.peer, int(Pictures.load(work).classes.max()) + 1, recipe)
    model.load_state_dict(found["weights"])
    return model.to(memory_format=torch.channels_last), found["row"] | {"recipe": job.name}


def _trained(job: Job, build: Build, work: Path, recipe: Recipe) -> tuple[nn.Module, Row]:
    torch.set_num_threads(1)
    pictures, side = Pictures.load(work), recipe.image_size
    train_rows = np.flatnonzero(pictures.folds != job.fold)
    classes = int(pictures.classes.max()) + 1
    plan = Plan(len(train_rows), recipe.batch_size, 1, 0, 1, recipe.epochs)
    seed_all(recipe.seed)
    model = build(job.peer, classes, recipe)
    model = model.to(memory_format=torch.channels_last)
    macs = multiply_adds(model, side)
    average = ModelEmaV3(model, recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
    processor = processor_of(side)
    augment, mix = augmentation(recipe, processor), mixing(recipe, classes)
    schedule = Schedule(recipe, plan)
    optimizer = optimizer_for(model, recipe, schedule.peak)
    evaluated = average.module if average else model
    ends = [max(1, round(plan.steps * (i + 1) / CURVE)) for i in range(CURVE - 1)]
    curve: list[float] = []
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
        if step + 1 in ends:
            paused = time.process_time()
            top1 = accuracies(evaluated, pictures, job.fold, processor)["top1"]
            curve += [top1] * ends.count(step + 1)
            model.train()
            start += time.process_time() - paused
    seconds = time.process_time() - start
    found = accuracies(evaluated, pictures, job.fold, processor)
    return evaluated, {
        "peer": job.peer,
        "fold": job.fold,
        "recipe": job.name,
        "lr": recipe.peak_lr(recipe.batch_size),
        "epochs": recipe.epochs,
        **found,
        "top1_curve": " ".join(map(str, [*curve, found["top1"]])),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": macs,
        "core_seconds": round(seconds, 1),
    }


def row_of(job: Job, build: Build, work: Path, recipe: Recipe) -> list[Row]:
    """The row of a training."""
    return [train(job, build, work, recipe)[1]]


@torch.no_grad()
def multiply_adds(model: nn.Module, side: int) -> int:
    """Of one image of so many pixels."""
    with MacCounter() as counter:
        model.eval()(torch.zeros(1, 3, side, side))
    return counter.macs


def processor_of(side: int) -> Any:
    """The preprocessing of pictures without a crop."""
    return cvt.image_processor(cvt.CvtConfig.from_variant("cvt-7"), side, crop_pct=1.0)


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
def logits_on(
    model: nn.Module,
    pictures: Pictures,
    fold: int,
    processor: Any,
    change: Callable[[Image.Image], Image.Image] = lambda picture: picture,
) -> Tensor:
    """Logits, (N, K), of the changed pictures of a fold."""
    model.eval()
    rows = np.flatnonzero(pictures.folds == fold)
    found = []
    for start in range(0, len(rows), 256):
        images = [change(Image.fromarray(pictures.pixels[i])) for i in rows[start : start + 256]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        found.append(logits_of(model(pixels)))
    return torch.cat(found)


def accuracies(model: nn.Module, pictures: Pictures, fold: int, processor: Any) -> Row:
    """Top-1 and balanced accuracy in percent, and the mean cross-entropy."""
    logits = logits_on(model, pictures, fold, processor)
    truth = np.array(pictures.classes[pictures.folds == fold])
    guess, loss = logits.argmax(dim=1).numpy(), F.cross_entropy(logits, torch.from_numpy(truth))
    recalls = [(guess[truth == label] == label).mean() for label in np.unique(truth)]
    return {
        "images": len(truth),
        "top1": round(100 * float((guess == truth).mean()), 2),
        "balanced_accuracy": round(100 * float(np.mean(recalls)), 2),
        "loss": round(float(loss), 4),
    }


# ------------------------------------------------------------------------------ rows


Rows = list[dict[str, str]]


def measured(jobs: list[Job], measure: "Measure", path: Path, processes: int) -> Rows:
    """The rows of the jobs in a csv file: those that are there, and those that are measured now.

    Args:
        jobs: in their order.
        measure: returns the rows of a job, of which each begins with its key.
        path: of the file.
        processes: jobs at a time.
    """
    done = {key_of(row) for row in rows_of(path)}
    about = {"device": device_name("cpu"), **versions(("torch", "timm", "cvt"))}
    left = [job for job in jobs if job.key not in done]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        calls = [pool.apply_async(measure, (job,)) for job in left]
        for job, call in zip(left, calls, strict=True):
            rows = [row | about for row in call.get()]
            add_rows(path, rows)
            print(*job.key, rows[0]["top1"], flush=True)
    wanted = {job.key for job in jobs}
    return [row for row in rows_of(path) if key_of(row) in wanted]


def key_of(row: Row) -> tuple:
    """The key of the job that a row is of."""
    return row["peer"], row["fold"], row["recipe"]


def rows_of(path: Path) -> Rows:
    """The rows of a csv file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add_rows(path: Path, rows: Sequence[Row]) -> None:
    """Add the rows of a job to a csv file, all of them or, if this is killed, none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    elif (found := path.read_text().partition("\n")[0]) != ",".join(rows[0]):
        sys.exit(f"{path} has other columns, {found}; pass --overwrite to replace it")
    writer.writerows(rows)
    with path.open("a", newline="") as file:
        file.write(text.getvalue())


Measure = Callable[[Job], list[Row]]


def compared(
    peers: Sequence[str],
    rates: Sequence[float],
    measure: Measure,
    path: Path,
    options: argparse.Namespace,
    choose: Measure | None = None,
) -> Rows:
    """The rows of all peers on the folds that are asked for, each at its best learning rate.

    Args:
        peers: their names.
        rates: to choose from, as in `best_rates`.
        measure: as in `measured`.
        path: of the csv file.
        options: of the command line.
        choose: measures instead where a rate is chosen, by `top1`.
    """
    best = best_rates(peers, rates, choose or measure, path, options)
    jobs = [
        Job(peer, fold, f"lr {best[peer]:g}", {"lr": best[peer]})
        for fold in options.folds
        for peer in peers
    ]
    return measured(jobs, measure, path, options.processes)


def best_rates(
    peers: Sequence[str],
    rates: Sequence[float],
    measure: Measure,
    path: Path,
    options: argparse.Namespace,
) -> dict[str, float]:
    """The learning rate of each peer with the highest `top1` on the fold that is kept for it.

    While the lowest or the highest of those tried is the best, half or twice as much is tried.
    """
    tried = {peer: list(rates[1:2] if options.quick else rates) for peer in peers}
    trials = [(peer, rate) for peer in peers for rate in tried[peer]]
    best: dict[str, tuple[float, float]] = {}  # top1 and rate
    while trials:
        jobs = [Job(peer, 0, f"lr {rate:g}", {"lr": rate}) for peer, rate in trials]
        for row in measured(jobs, measure, path, options.processes):
            top1 = float(row["top1"])
            if row["peer"] not in best or top1 > best[row["peer"]][0]:
                best[row["peer"]] = top1, float(row["lr"])
        trials = []
        for peer, (_, rate) in () if options.quick else best.items():
            ends = ((min(tried[peer]), rate / 2), (max(tried[peer]), rate * 2))
            trials += [(peer, beyond) for end, beyond in ends if rate == end]
        for peer, rate in trials:
            tried[peer].append(rate)
    return {peer: rate for peer, (_, rate) in best.items()}


def by_fold(rows: Rows) -> dict[str, dict[str, dict[str, str]]]:
    """The row of each peer and fold."""
    found: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for row in rows:
        found[row["peer"]][row["fold"]] = row
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """A mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def paired(rows: dict[str, float], reference: dict[str, float]) -> tuple[float, float]:
    """The mean of the differences on the same folds, and its standard error."""
    return mean_and_error([rows[fold] - reference[fold] for fold in rows])


def with_error(difference: tuple[float, float]) -> str:
    """A mean and its standard error."""
    return "{:+.1f} ± {:.1f}".format(*difference)


def save(drawing: Any, figure: Path) -> None:
    """Write a drawing of matplotlib as a PNG file."""
    figure.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(figure, dpi=150)
    print(figure)


def parser_of(about: str) -> argparse.ArgumentParser:
    """The options of these benchmarks."""
    parser = command_line(about)
    parser.add_argument(
        "pictures", type=Path, nargs="?", help="folder of clip art, with a folder for each class"
    )
    parser.add_argument("--folds", type=counts, default=list(range(1, FOLDS)))
    parser.add_argument("--epochs", type=count, help="if not the recipe's")
    parser.add_argument("--processes", type=count, default=2, help="trainings at a time")
    parser.add_argument("--prepared", type=Path, help="folder that keeps the cleaned pictures")
    parser.add_argument("--resume", type=Path, help="csv file of another day to continue")
    parser.add_argument(
        "--quick", action="store_true", help="an epoch of two folds of few pictures"
    )
    return parser


def options_of(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The options that are given."""
    options = parser.parse_args(arguments)
    if options.resume and (options.overwrite or not options.resume.is_file()):
        parser.error(f"--resume {options.resume}: must be a file, without --overwrite")
    if options.quick:
        options.epochs, options.folds = 1, [1, 2]
    return options


def file_of(question: str, options: argparse.Namespace, recipe: Recipe) -> Path:
    """The csv file of a question; the given one or one of today is resumed, not replaced."""
    question += options.quick * "-quick"
    path = options.resume or result_file(options.results, question, "cpu", overwrite=True)
    if options.overwrite:
        path.unlink(missing_ok=True)
    if others := {row["epochs"] for row in rows_of(path)} - {str(recipe.epochs)}:
        sys.exit(f"{path} has trainings of {', '.join(others)} epochs, not of {recipe.epochs}")
    return path


def shortened(recipe: Recipe, epochs: int | None) -> Recipe:
    """A recipe of so many epochs, if they are given."""
    if epochs is None:
        return recipe
    warmup = min(recipe.warmup_epochs or 0.0, epochs / 4)
    return dataclasses.replace(recipe, epochs=epochs, warmup_epochs=warmup)
