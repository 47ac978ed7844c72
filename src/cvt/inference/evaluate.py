"""How good a classifier is on labelled images."""

import csv
import heapq
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from itertools import tee
from math import ceil, inf, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cvt.architecture import Architecture
from cvt.data import Images, LabelledImages
from cvt.data.class_names import imagenet_classes
from cvt.data.decoding import Source, StoredImage
from cvt.files import staged
from cvt.inference.class_matching import class_indices, match_classes, real_labels_of
from cvt.inference.metrics import (
    COUNTED,
    MOST_CONFIDENT,
    ClassMetrics,
    Evaluation,
    Failure,
    Mistake,
)
from cvt.inference.predict import BLANK, Result, classify, ranked, runtime_of, scores
from cvt.limits import check_counts
from cvt.runtime.base import Runtime
from cvt.text import csv_cell

if TYPE_CHECKING:
    from torch import nn

LARGEST_MATRIX = 1000  # classes; a larger confusion matrix is written as a list of its cells


def evaluate(
    model: "Runtime | nn.Module",
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
    config: Architecture | None = None,
    exact: bool = True,
    max_pixels: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    tta: str | None = None,
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
        workers: processes that decode, see `cvt.inference.predict.classify`.
        progress: called after every image.
        class_map: see `match_classes`.
        subset: only the classes that the data has compete, as is usual for ImageNet-R and -A.
        real_labels: ImageNet-ReaL's, see `read_real_labels`.
        rank: whose share of the images, from 0 to `world` - 1.
        world: how many processes share.
        config: the classifier's, where `model` does not have it.
        exact: decode every image whole, see `cvt.inference.predict.classify`.
        max_pixels: the pixels that an image may have, likewise.
        interrupted: whether to give up while a worker is stuck, likewise.
        tta: test-time augmentation, likewise.

    Returns:
        The evaluation; with `world` > 1 the share of this rank, for `Evaluation.joined`.

    Raises:
        TypeError: batch size or workers are no whole numbers.
        ValueError: these are out of bounds, the model does not know a class, no image could be
            decoded, an image has no place in the real labels, a stream of unknown length is to be
            shared, or the model is a regression.
        FloatingPointError: the model's answer is not finite.
        cvt.data.workers.Interrupted: `interrupted` was true while no image came.
    """
    check_counts(batch_size=batch_size, workers=workers)
    runtime = runtime_of(model, config)
    config = runtime.config
    if config.problem_type == "regression":
        raise ValueError("problem_type = regression: such a model gives values, not classes")
    labels = config.class_names
    indices = match_classes(images.classes, config, class_map)
    ignored = np.zeros(len(labels), bool)
    if subset:
        ignored[:] = True
        ignored[list(indices.values())] = False
    if real_labels is not None:
        by_id = class_indices(imagenet_classes(), config)
        imagenet_rows = [by_id[wordnet_id] for wordnet_id in imagenet_classes()]
        real_labels = [[imagenet_rows[i] for i in image_labels] for image_labels in real_labels]
    collected = _Collected(config, indices, ignored, real_labels)
    share, sent = tee(_share(images, indices, batch_size, rank, world))
    sources = (source for _, (source, _) in sent)
    results = classify(
        runtime, processor, sources, batch_size, workers, exact, max_pixels, interrupted, tta
    )
    for result, (position, (source, label)) in zip(results, share, strict=True):
        if position is not None:
            progress()
            collected.add(result, position, source, label)
    part = collected.evaluation()
    return part if world > 1 else Evaluation.joined([part])


def evaluation_of(results: Iterable[tuple[Result, str]], config: Architecture) -> Evaluation:
    """The evaluation of images that are classified already.

    Args:
        results: of every image its result and the name of its class, one of the classifier's.
        config: the classifier's.

    Raises:
        ValueError: there were no images, or none could be decoded.
        FloatingPointError: logits are not finite.
    """
    indices = {name: i for i, name in enumerate(config.class_names)}
    collected = _Collected(config, indices, np.zeros(len(indices), bool), None)
    for position, (result, label) in enumerate(results):
        collected.add(result, position, result.path, label)
    return Evaluation.joined([collected.evaluation()])


class _Collected:
    """What is kept of the images so far.

    Args:
        config: the classifier's.
        indices: of the classes of the data, by name.
        ignored: which classes do not compete, (K,).
        real_labels: indices of the classes that are right, by the number of the image.
    """

    def __init__(
        self,
        config: Architecture,
        indices: Mapping[str, int],
        ignored: np.ndarray,
        real_labels: list[list[int]] | None,
    ) -> None:
        self.config, self.labels, self.indices = config, config.class_names, indices
        self.ignored, self.real_labels = ignored, real_labels
        self.rows: list[tuple] = []
        self.mistakes: list[Mistake] = []  # a heap
        self.failures: list[Failure] = []

    def add(self, result: Result, position: int, source: Source, label: str) -> None:
        """Compare the result of an image with its label.

        Raises:
            FloatingPointError: its logits are not finite.
            ValueError: it has no place in the real labels.
        """
        if result.logits is None:
            self.failures.append(Failure(position, str(source), str(result.error)))
            return
        if not np.isfinite(result.logits).all():
            raise FloatingPointError(f"{source}: the model's answer to it is not finite")
        logits = np.where(self.ignored, np.float32(-inf), result.logits)
        true, best = self.indices[label], ranked(logits)[:5].tolist()
        score = scores(logits, self.config)[best[0]].item()
        loss = cross_entropy(logits, true)
        real = nan
        if self.real_labels and (right := real_labels_of(str(source), self.real_labels)):
            real = best[0] in right
        self.rows.append((position, str(source), true, best[0], score, true in best, loss, real))
        if true != best[0]:
            labels = self.labels
            mistake = Mistake(score, position, source, labels[true], labels[best[0]])
            heapq.heappush(self.mistakes, mistake)
            if len(self.mistakes) > MOST_CONFIDENT:
                heapq.heappop(self.mistakes)

    def evaluation(self) -> Evaluation:
        """The evaluation of these images."""
        counted = np.array(self.rows, dtype=COUNTED)
        return Evaluation(self.labels, counted, self.mistakes, self.failures)


def cross_entropy(logits: np.ndarray, label: int) -> float:
    """The loss of an image, computed in float64 from logits, (K,)."""
    shifted = logits.astype(np.float64) - logits.max()
    return float(np.log(np.exp(shifted).sum()) - shifted[label])


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
        "per_class": [("class", *ClassMetrics._fields), *classes],
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
