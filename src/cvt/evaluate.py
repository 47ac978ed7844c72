"""How good a classifier is on labelled images."""

import csv
import heapq
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import tee
from math import ceil, inf, nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from cvt.configuration import CvtConfig
from cvt.datasets import Images, LabelledImages
from cvt.files import staged
from cvt.images import Source, StoredImage
from cvt.labels import imagenet_classes
from cvt.limits import check_counts
from cvt.predict import BLANK, classify, ranked, scores
from cvt.runtime.base import Runtime
from cvt.runtime.torch_runtime import TorchRuntime
from cvt.text import csv_cell

BINS = 15  # of the calibration error, as in its paper
MOST_CONFIDENT = 60  # mistakes whose images are kept
LARGEST_MATRIX = 1000  # classes; a larger confusion matrix is written as a list of its cells

# What is kept of every counted image.
COUNTED = np.dtype(
    [
        ("position", np.int64),  # in the data set
        ("name", object),
        ("true", np.int64),  # indices of classes
        ("predicted", np.int64),
        ("score", np.float64),  # of the predicted class, as `cvt.predict.predict` gives it
        ("in_top5", np.bool_),
        ("loss", np.float64),  # cross-entropy
        ("real", np.float64),  # whether ImageNet-ReaL agrees; nan where it is not asked or mute
    ]
)


class Mistake(NamedTuple):
    """An image that was taken for what it is not."""

    score: float
    position: int
    source: Source
    true: str
    predicted: str


class Failure(NamedTuple):
    """An image that could not be decoded; the error names it."""

    position: int
    name: str
    error: str


class Reliability(NamedTuple):
    """Images in bins of equal width by their score: how many, their mean score, their top-1.

    Each is an array of `BINS` numbers; means over nothing are nan.
    """

    images: np.ndarray
    score: np.ndarray
    top1: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """What became of every image, and the figures that follow from it.

    Attributes:
        labels: the classifier's K classes.
        counted: a row of `COUNTED` for every image that could be decoded, by position.
        mistakes: the most confident ones, at most `MOST_CONFIDENT`, the most confident first.
        failures: the images that could not be decoded, by position.
    """

    labels: list[str]
    counted: np.ndarray
    mistakes: list[Mistake]
    failures: list[Failure]

    @classmethod
    def joined(cls, parts: Sequence["Evaluation"]) -> "Evaluation":
        """The evaluation of one process, from the shares of several.

        Raises:
            ValueError: there were no images, or none could be decoded.
        """
        counted = np.concatenate([part.counted for part in parts])
        failures = sorted(failure for part in parts for failure in part.failures)
        mistakes = sorted((mistake for part in parts for mistake in part.mistakes), reverse=True)
        if not len(counted) and not failures:
            raise ValueError("there are no images to evaluate with")
        if not len(counted):
            raise ValueError(
                f"none of the {len(failures)} images could be decoded: {failures[0].error}"
            )
        order = np.argsort(counted["position"])
        return cls(parts[0].labels, counted[order], mistakes[:MOST_CONFIDENT], failures)

    @property
    def images(self) -> int:
        """How many images were counted."""
        return len(self.counted)

    @property
    def right(self) -> np.ndarray:
        """Of every counted image whether its best class is the true one."""
        return self.counted["true"] == self.counted["predicted"]

    @property
    def top1(self) -> float:
        """Share of images whose best class is the true one."""
        return float(self.right.mean())

    @property
    def top5(self) -> float:
        """Share of images whose best five classes hold the true one."""
        return float(self.counted["in_top5"].mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(self.counted["loss"].mean())

    @property
    def real_top1(self) -> float | None:
        """Share of images whose best class is among their ImageNet-ReaL labels, if there are any.

        Source: Beyer et al., Are we done with ImageNet?, arXiv 2006.07159.
        """
        real = self.counted["real"][~np.isnan(self.counted["real"])]
        return float(real.mean()) if len(real) else None

    @property
    def reliability(self) -> Reliability:
        """Whether images of a score of 0.8 are right in 80 of 100 cases, bin by bin."""
        edges = np.linspace(0, 1, BINS + 1)[1:-1]  # a score on an edge is in the bin below it
        bins = np.digitize(self.counted["score"], edges, right=True)
        images, score, right = (
            np.bincount(bins, weights, minlength=BINS)
            for weights in (None, self.counted["score"], self.right)
        )
        mean = np.where(images > 0, images, nan)
        return Reliability(images, score / mean, right / mean)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error: by how much score and accuracy differ, mean over all images.

        Source: Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599, section 2.
        """
        images, score, top1 = self.reliability
        return float(np.nansum(images * abs(top1 - score)) / self.images)

    @property
    def metrics(self) -> dict[str, float]:
        """The figures by their names."""
        names = ("images", "top1", "top5", "loss", "calibration_error", "real_top1")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def per_class(self) -> dict[str, tuple[int, float]]:
        """Number of images and top-1 of every class that has images."""
        totals = np.bincount(self.counted["true"], minlength=len(self.labels))
        right = np.bincount(self.counted["true"][self.right], minlength=len(self.labels))
        return {
            self.labels[i]: (int(totals[i]), float(right[i] / totals[i]))
            for i in totals.nonzero()[0]
        }

    @property
    def cells(self) -> np.ndarray:
        """The confusion matrix where it is not zero, (cells, 3): true, predicted, count."""
        pairs = np.stack([self.counted["true"], self.counted["predicted"]], axis=1)
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        return np.column_stack([found, counts])

    @property
    def confusion(self) -> np.ndarray:
        """The confusion matrix, (K, K): rows the true class, columns the predicted one."""
        matrix = np.zeros((len(self.labels), len(self.labels)), dtype=np.int64)
        true, predicted, count = self.cells.T
        matrix[true, predicted] = count
        return matrix

    def mistaken_for(self, label: str) -> str:
        """The class that images of `label` are most often taken for; empty if for none."""
        of_label = self.counted["true"] == self.labels.index(label)
        taken = np.bincount(self.counted["predicted"][of_label & ~self.right])
        return self.labels[taken.argmax()] if len(taken) else ""


# ------------------------------------------------------------------------------ classes and labels


def class_indices(names: Iterable[str], config: CvtConfig) -> dict[str, int]:
    """The classifier's index of every class name; ImageNet's also by their WordNet ids.

    Raises:
        ValueError: the classifier does not know a name; lists those and the nearest known.
    """
    names, rows, counts = list(names), class_rows(config), Counter(config.class_names)
    if twice := [name for name in names if counts[name] > 1]:
        raise ValueError("the model has several classes called " + ", ".join(twice))
    if unknown := [name for name in names if name not in rows]:
        raise ValueError(f"the model does not know these classes: {_nearest(unknown, rows)}")
    return rows


def class_rows(config: CvtConfig) -> dict[str, int]:
    """The classifier's row of every name that means one class; of ImageNet's, WordNet ids too."""
    classes, imagenet = config.class_names, imagenet_classes()
    counts = Counter(classes)
    rows = {name: i for i, name in enumerate(classes) if counts[name] == 1}
    if len(classes) == len(imagenet) and classes[0] == next(iter(imagenet.values())):
        rows |= {wordnet_id: i for i, wordnet_id in enumerate(imagenet)}
    return rows


def match_classes(
    classes: Sequence[str], config: CvtConfig, class_map: Mapping[str, str | None] | None = None
) -> dict[str, int]:
    """The classifier's index of every class of the data, by name, but for those left out.

    Args:
        classes: the names in the data.
        config: the classifier's.
        class_map: names in the data whose name in the model is another; None leaves a class out.

    Raises:
        ValueError: the data or the model does not know a name, or no class is left.
    """
    names = {name: name for name in classes} | dict(class_map or {})
    if unknown := names.keys() - set(classes):
        raise ValueError(
            f"the data has no such classes to map: {_nearest(sorted(unknown), classes)}"
        )
    kept = {name: wanted for name, wanted in names.items() if wanted is not None}
    if not kept:
        raise ValueError("the class map leaves all classes of the data out")
    indices = class_indices(kept.values(), config)
    return {name: indices[wanted] for name, wanted in kept.items()}


def _nearest(unknown: list[str], known: Iterable[str]) -> str:
    described = []
    for name in unknown[:20]:
        near = get_close_matches(name, known, n=1)
        described.append(f"{name!r}" + (f" (is it {near[0]!r}?)" if near else ""))
    more = len(unknown) - len(described)
    return ", ".join(described) + (f" and {more} more" if more else "")


def read_class_map(path: str | Path) -> dict[str, str | None]:
    """Names in the data and what the model calls them, from a JSON object or a two-column csv.

    An empty name, or null, leaves the images of that class out. The csv file has no header.

    Raises:
        ValueError: the file is no such map, or has a name twice.
        OSError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if Path(path).suffix == ".json":
            rows = json.loads(text, object_pairs_hook=tuple)
        else:
            rows = tuple(row for row in csv.reader(text.splitlines()) if row)
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(rows, tuple) or not all(
        len(row) == 2 and isinstance(row[0], str) and isinstance(row[1], str | None) for row in rows
    ):
        raise ValueError(
            f"{path} must be a JSON object, or a csv file of two columns without a header: the "
            "name of each class in the data and in the model, or nothing to leave it out"
        )
    if twice := [name for name, count in Counter(name for name, _ in rows).items() if count > 1]:
        raise ValueError(f"{path} maps classes twice: {', '.join(twice)}")
    return {name: wanted or None for name, wanted in rows}


def read_real_labels(path: str | Path) -> list[list[int]]:
    """ImageNet-ReaL's labels, its `real.json`: lists of class indices, one per validation image.

    Raises:
        ValueError: the file holds something else.
        OSError: the file cannot be read.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    classes = range(len(imagenet_classes()))
    if not isinstance(found, list) or not all(
        isinstance(labels, list)
        and all(type(label) is int and label in classes for label in labels)
        for labels in found
    ):
        raise ValueError(f"{path} must be a list of lists of class indices, as ImageNet-ReaL's is")
    return found


def _labels_of(name: str, real_labels: list[list[int]]) -> list[int]:
    """The number in an image's name is its place in the list."""
    match = re.search(r"ILSVRC2012_val_(\d{8})", name)
    number = int(match[1]) if match else 0
    if not 0 < number <= len(real_labels):
        raise ValueError(
            f"{name}: has no real labels; those are of the images ILSVRC2012_val_00000001 to "
            f"{len(real_labels):08d}"
        )
    return real_labels[number - 1]


# ------------------------------------------------------------------------------ evaluating


def evaluate(
    model: Runtime | nn.Module,
    processor: Callable,
    images: Images,
    batch_size: int = 32,
    workers: int = 0,
    progress: Callable[[], Any] = lambda: None,
    *,
    class_map: Mapping[str, str | None] | None = None,
    subset: bool = False,
    real_labels: list[list[int]] | None = None,
    rank: int = 0,
    world: int = 1,
    config: CvtConfig | None = None,
    exact: bool = True,
    max_pixels: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Classify labelled images and compare; classes are matched by name.

    Several processes share the work batch by batch, so that every image has the neighbours that it
    has in one process; `Evaluation.joined` then gives what one process gives. All call the model
    equally often, as a sharded one must be.

    Args:
        model: what runs a classifier; or a classifier, or what wraps one.
        processor: its image processor.
        images: images and class names.
        batch_size: images at a time.
        workers: processes that decode, see `cvt.predict.classify`.
        progress: called after every image.
        class_map: see `match_classes`.
        subset: only the classes that the data has compete, as is usual for ImageNet-R and -A.
        real_labels: ImageNet-ReaL's, see `read_real_labels`.
        rank: whose share of the images, from 0 to `world` - 1.
        world: how many processes share.
        config: the classifier's, where `model` does not have it.
        exact: decode every image whole, see `cvt.predict.classify`.
        max_pixels: the pixels that an image may have, likewise.
        interrupted: whether to give up while a worker is stuck, likewise.

    Returns:
        The evaluation; with `world` > 1 the share of this rank, for `Evaluation.joined`.

    Raises:
        TypeError: batch size or workers are no whole numbers.
        ValueError: these are out of bounds, the model does not know a class, no image could be
            decoded, an image has no place in the real labels, a stream of unknown length is to be
            shared, or the model is a regression.
        FloatingPointError: the model's answer is not finite.
        cvt.predict.Interrupted: `interrupted` was true while no image came.
    """
    check_counts(batch_size=batch_size, workers=workers)
    runtime = model if isinstance(model, Runtime) else TorchRuntime(model, config)
    config = runtime.config
    if config.problem_type == "regression":
        raise ValueError("problem_type = regression: such a model gives values, not classes")
    labels = config.class_names
    indices = match_classes(images.classes, config, class_map)
    ignored = torch.zeros(len(labels), dtype=torch.bool)
    if subset:
        ignored[:] = True
        ignored[list(indices.values())] = False
    if real_labels is not None:
        by_id = class_indices(imagenet_classes(), config)
        of_imagenet = [by_id[wordnet_id] for wordnet_id in imagenet_classes()]
        real_labels = [[of_imagenet[i] for i in of_image] for of_image in real_labels]
    rows: list[tuple] = []
    mistakes: list[Mistake] = []  # a heap
    failures: list[Failure] = []
    share, sent = tee(_share(images, indices, batch_size, rank, world))
    sources = (source for _, (source, _) in sent)
    results = classify(
        runtime, processor, sources, batch_size, workers, exact, max_pixels, interrupted
    )
    for result, (position, (source, label)) in zip(results, share, strict=True):
        if position is None:
            continue
        progress()
        if result.logits is None:
            failures.append(Failure(position, str(source), str(result.error)))
            continue
        if not result.logits.isfinite().all():
            raise FloatingPointError(f"{source}: the model's answer to it is not finite")
        logits = result.logits.masked_fill(ignored, -inf)
        true, best = indices[label], ranked(logits)[:5].tolist()
        score = scores(logits, config)[best[0]].item()
        loss = -logits.double().log_softmax(dim=-1)[true].item()
        real = nan
        if real_labels is not None and (of_image := _labels_of(str(source), real_labels)):
            real = best[0] in of_image
        rows.append((position, str(source), true, best[0], score, true in best, loss, real))
        if true != best[0]:
            mistake = Mistake(score, position, source, labels[true], labels[best[0]])
            heapq.heappush(mistakes, mistake)
            if len(mistakes) > MOST_CONFIDENT:
                heapq.heappop(mistakes)
    part = Evaluation(labels, np.array(rows, dtype=COUNTED), mistakes, failures)
    return part if world > 1 else Evaluation.joined([part])


def _share(
    images: Images, classes: Container[str], batch_size: int, rank: int, world: int
) -> Iterator[tuple[int | None, tuple[Source, str]]]:
    """Position, source and label of the images of these classes, of every `world`-th batch.

    Blank images without a position follow, where other ranks have a batch more.
    """
    own: Iterable[tuple[int, tuple[Source, str]]]
    if isinstance(images, LabelledImages):
        kept = [i for i, label in enumerate(images.labels) if label in classes]
        mine = [i for k, i in enumerate(kept) if k // batch_size % world == rank]
        own, total = zip(mine, images.select(mine), strict=True), len(kept)
    else:
        if world > 1 and images.length is None:
            raise ValueError("a stream whose length is not known cannot be shared by processes")
        stream = (item for item in enumerate(images) if item[1][1] in classes)
        own = (item for k, item in enumerate(stream) if k // batch_size % world == rank)
        total = images.length or 0
    batches = ceil(total / batch_size / world)
    count = 0
    for count, item in enumerate(own, start=1):
        if world > 1 and count > batches * batch_size:
            raise ValueError(f"the stream has more than the {total} images that it should have")
        yield item
    if world > 1:
        for _ in range(count, (batches - 1) * batch_size + 1):
            yield None, (StoredImage("blank", BLANK), "")


# ------------------------------------------------------------------------------ writing


def write_evaluation(evaluation: Evaluation, folder: str | Path, overwrite: bool = False) -> None:
    """Write metrics.json, per_class.csv, confusion_matrix.csv and predictions.csv.

    Of more than `LARGEST_MATRIX` classes, the confusion matrix is a list of its non-zero cells.

    Raises:
        FileExistsError: `folder` is there already and may not be overwritten.
    """
    labels = evaluation.labels
    metrics = evaluation.metrics | {"failures": [failure.name for failure in evaluation.failures]}
    matrix: list[Sequence]
    if len(labels) > LARGEST_MATRIX:
        cells = [(labels[i], labels[j], count) for i, j, count in evaluation.cells.tolist()]
        matrix = [("true", "predicted", "count"), *cells]
    else:
        rows = zip(labels, evaluation.confusion.tolist(), strict=True)
        matrix = [("true \\ predicted", *labels), *((label, *row) for label, row in rows)]
    classes = [(name, *values) for name, values in evaluation.per_class.items()]
    predictions = [
        (row["name"], labels[row["true"]], labels[row["predicted"]], row["score"])
        for row in evaluation.counted
    ]
    tables: dict[str, list[Sequence]] = {
        "per_class": [("class", "images", "top1"), *classes],
        "confusion_matrix": matrix,
        "predictions": [("name", "true", "predicted", "score"), *predictions],
    }
    with staged(folder, overwrite) as written:
        written.mkdir()
        (written / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        for name, table in tables.items():
            path = written / f"{name}.csv"
            with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                csv.writer(file).writerows(
                    [csv_cell(cell) if isinstance(cell, str) else cell for cell in row]
                    for row in table
                )
