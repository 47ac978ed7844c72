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
from cvt.data import Images, LabelledImages, Task
from cvt.data.class_names import distinct_names, imagenet_classes
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
from cvt.inference.output_metrics import (
    MultiLabelEvaluation,
    RegressionEvaluation,
    Worst,
    thresholds_of,
)
from cvt.inference.predict import BLANK, Keep, Result, classify, ranked, runtime_of, scores
from cvt.limits import check_counts
from cvt.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from cvt.runtime.base import Runtime
from cvt.text import csv_cell

if TYPE_CHECKING:
    from torch import nn

AnyEvaluation = Evaluation | MultiLabelEvaluation | RegressionEvaluation
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
    exact: bool = True,
    max_pixels: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    keep_scores: bool = False,
    tta: str | None = None,
    keep: Keep | None = None,
) -> AnyEvaluation:
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
        subset: predict only classes that the data has, as is usual for ImageNet-R and -A.
        real_labels: ImageNet-ReaL's, see `read_real_labels`.
        rank: whose share of the images, from 0 to `world` - 1.
        world: how many processes share.
        exact: decode every image whole, see `cvt.inference.predict.classify`.
        max_pixels: the pixels that an image may have, likewise.
        interrupted: whether to give up while a worker is stuck, likewise.
        keep_scores: keep the scores of all classes, 4 bytes each, for every image.
        tta: test-time augmentation, likewise.
        keep: keeps resized images for the next call, likewise; numbered in the share of a rank.

    Returns:
        The evaluation; with `world` > 1 the share of this rank, for `Evaluation.joined`.

    Raises:
        TypeError: batch size or workers are no whole numbers.
        ValueError: these are out of bounds, the model does not know a class, no image could be
            decoded, an image has no place in the real labels, a stream of unknown length is to be
            shared, or the labels are of another problem than the model's.
        FloatingPointError: the model's answer is not finite.
        cvt.data.workers.Interrupted: `interrupted` was true while no image came.
    """
    check_counts(batch_size=batch_size, workers=workers)
    runtime = runtime_of(model)
    config = runtime.config
    check_problem(images.task, config)
    if not images.task.has_one_class and (subset or real_labels is not None):
        raise ValueError("subset and real_labels are for models that give one class")
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
    collected: _Collected | _CollectedOutputs
    if images.task.has_one_class:
        collected = _Collected(config, indices, ignored, real_labels, keep_scores)
    else:
        collected = _CollectedOutputs(config, indices, images.classes, images.task)
    share, sent = tee(_share(images, indices, batch_size, rank, world))
    sources = (source for _, (source, _) in sent)
    results = classify(
        *(runtime, processor, sources, batch_size, workers, exact, max_pixels, interrupted, tta),
        keep=keep,
    )
    for result, (position, (source, label)) in zip(results, share, strict=True):
        if position is not None:
            progress()
            collected.add(result, position, source, label)
    part = collected.evaluation()
    return part if world > 1 else joined([part])


def joined(parts: Sequence[AnyEvaluation]) -> AnyEvaluation:
    """The evaluation of one process, from the shares of several; raises as theirs."""
    return type(parts[0]).joined(parts)  # type: ignore[arg-type]


def check_problem(task: Task, config: Architecture) -> None:
    """Raise a ValueError if labels are of another problem than a model.

    One class of each image may also be compared with the best of several.
    """
    problem = config.problem_type or SINGLE_LABEL
    if task.problem_type == problem or (task.has_one_class and problem == MULTI_LABEL):
        return
    settings = {
        REGRESSION: "label_column, the column of the values, and problem_type=regression",
        MULTI_LABEL: "label_separator, or label_column with a column of 0 and 1 for each class and "
        f"problem_type={MULTI_LABEL}",
        SINGLE_LABEL: "neither label_separator nor problem_type",
    }
    raise ValueError(
        f"problem_type = {problem} of the model, and the labels are read for {task.problem_type}: "
        f"give {settings[problem]}"
    )


def evaluation_of(
    results: Iterable[tuple[Result, str]],
    config: Architecture,
    task: Task = Task(),  # noqa: B008 (it is frozen)
) -> AnyEvaluation:
    """The evaluation of images that are classified already.

    Args:
        results: of every image its result and its label, of classes of the classifier.
        config: the classifier's.
        task: what the labels mean.

    Raises:
        ValueError: there were no images, or none could be decoded.
        FloatingPointError: logits are not finite.
    """
    indices = {name: i for i, name in enumerate(config.class_names)}
    collected: _Collected | _CollectedOutputs
    if task.has_one_class:
        collected = _Collected(config, indices, np.zeros(len(indices), bool), None)
    else:
        collected = _CollectedOutputs(config, indices, config.class_names, task)
    for position, (result, label) in enumerate(results):
        collected.add(result, position, result.path, label)
    return joined([collected.evaluation()])


class _Collected:
    """What is kept of the images so far.

    Args:
        config: the classifier's.
        indices: of the classes of the data, by name.
        ignored: which classes are never predicted, (K,).
        real_labels: indices of the classes that are right, by the number of the image.
        keep_scores: whether to keep the scores of all classes.
    """

    def __init__(
        self,
        config: Architecture,
        indices: Mapping[str, int],
        ignored: np.ndarray,
        real_labels: list[list[int]] | None,
        keep_scores: bool = False,
    ) -> None:
        self.config, self.labels = config, distinct_names(config.class_names)
        self.indices = indices
        self.ignored, self.real_labels = ignored, real_labels
        self.rows: list[tuple] = []
        self.scores: list[np.ndarray] | None = [] if keep_scores else None
        self.mistakes: list[Mistake] = []  # a heap
        self.failures: list[Failure] = []

    def add(self, result: Result, position: int, source: Source, label: str) -> None:
        """Compare the result of an image with its label.

        Raises:
            FloatingPointError: its logits are not finite.
            ValueError: it has no place in the real labels.
        """
        answer = _answer(result, position, source)
        if isinstance(answer, Failure):
            self.failures.append(answer)
            return
        logits = np.where(self.ignored, np.float32(-inf), answer)
        true, best = self.indices[label], ranked(logits)[:5].tolist()
        of_classes = scores(logits, self.config)
        score = of_classes[best[0]].item()
        loss = cross_entropy(logits, true)
        real = nan
        if self.real_labels and (right := real_labels_of(str(source), self.real_labels)):
            real = next((float(k) for k, index in enumerate(best) if index in right), inf)
        self.rows.append((position, str(source), true, best[0], score, true in best, loss, real))
        if self.scores is not None:
            self.scores.append(of_classes)
        if true != best[0]:
            labels = self.labels
            mistake = Mistake(score, position, source, labels[true], labels[best[0]])
            heapq.heappush(self.mistakes, mistake)
            if len(self.mistakes) > MOST_CONFIDENT:
                heapq.heappop(self.mistakes)

    def evaluation(self) -> Evaluation:
        """The evaluation of these images."""
        counted = np.array(self.rows, dtype=COUNTED)
        kept = None
        if self.scores is not None:
            kept = np.array(self.scores, np.float32).reshape(-1, len(self.labels))
        return Evaluation(self.labels, counted, self.mistakes, self.failures, kept)


class _CollectedOutputs:
    """What is kept of the images so far, where every output has a target.

    Args:
        config: the classifier's.
        indices: of the outputs that are evaluated, by their names in the data.
        classes: of the data.
        task: what the labels mean.
    """

    def __init__(
        self, config: Architecture, indices: Mapping[str, int], classes: list[str], task: Task
    ) -> None:
        self.config, self.task = config, task
        self.in_data = {name: i for i, name in enumerate(classes)}
        self.evaluated = [i for i, name in enumerate(classes) if name in indices]
        self.columns = [indices[classes[i]] for i in self.evaluated]
        is_multi_label = task.problem_type == MULTI_LABEL
        self.kind: Any = MultiLabelEvaluation if is_multi_label else RegressionEvaluation
        self.rows: list[tuple[int, str, list[float], np.ndarray]] = []
        self.worst: list[Worst] = []  # a heap
        self.failures: list[Failure] = []

    def add(self, result: Result, position: int, source: Source, label: str) -> None:
        """Compare the result of an image with its label.

        Raises:
            FloatingPointError: its logits are not finite.
        """
        answer = _answer(result, position, source)
        if isinstance(answer, Failure):
            self.failures.append(answer)
            return
        of_data = self.task.target(label, self.in_data)
        assert isinstance(of_data, list)
        target, output = [of_data[i] for i in self.evaluated], answer[self.columns]
        self.rows.append((position, str(source), target, output))
        loss = float(self.kind.losses(output, np.array(target)).mean())
        heapq.heappush(self.worst, Worst(loss, position, source))
        if len(self.worst) > MOST_CONFIDENT:
            heapq.heappop(self.worst)

    def evaluation(self) -> Any:
        """The evaluation of these images."""
        positions, names, targets, outputs = zip(*self.rows, strict=True) if self.rows else [()] * 4
        given = thresholds_of(self.config)
        thresholds = [given[i] for i in self.columns]
        shape = (-1, len(self.columns))
        return self.kind(
            labels=[self.config.class_names[i] for i in self.columns],
            positions=np.array(positions, np.int64),
            names=np.array(names, object),
            targets=np.array(targets, np.float32).reshape(shape),
            outputs=np.array(outputs, np.float32).reshape(shape),
            worst=self.worst,
            failures=self.failures,
            **({"thresholds": thresholds} if self.kind is MultiLabelEvaluation else {}),
        )


def _answer(result: Result, position: int, source: Source) -> np.ndarray | Failure:
    """The logits of an image, or why there are none.

    Raises:
        FloatingPointError: they are not finite.
    """
    if result.logits is None:
        return Failure(position, str(source), str(result.error))
    if not np.isfinite(result.logits).all():
        raise FloatingPointError(f"{source}: the model's answer to it is not finite")
    return result.logits


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
        one = images.task.has_one_class
        kept = [i for i, label in enumerate(images.labels) if not one or label in classes]
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


def class_tables(evaluation: Evaluation) -> dict[str, list[Sequence]]:
    """Rows of csv files, by the names of the files."""
    labels = evaluation.labels
    matrix: list[Sequence]
    if len(labels) > LARGEST_MATRIX:
        cells = [(labels[i], labels[j], count) for i, j, count in evaluation.cells.tolist()]
        matrix = [("true", "predicted", "count"), *cells]
    else:
        rows = zip(labels, evaluation.confusion.tolist(), strict=True)
        matrix = [("true \\ predicted", *labels), *((label, *row) for label, row in rows)]
    classes = [(name, *values) for name, values in evaluation.per_class.items()]
    kept = evaluation.scores
    of_classes = [()] * evaluation.images if kept is None else kept
    predictions = [
        (row["name"], labels[row["true"]], labels[row["predicted"]], row["score"], *more)
        for row, more in zip(evaluation.counted, of_classes, strict=True)
    ]
    return {
        "per_class": [("class", *ClassMetrics._fields), *classes],
        "confusion_matrix": matrix,
        "predictions": [
            ("name", "true", "predicted", "score", *(labels if kept is not None else ())),
            *predictions,
        ],
    }


def write_evaluation(
    evaluation: AnyEvaluation, folder: str | Path, overwrite: bool = False
) -> None:
    """Write metrics.json and predictions.csv, and per_class.csv or per_value.csv.

    Of images of one class also confusion_matrix.csv; of more than `LARGEST_MATRIX` classes, it is a
    list of the matrix's non-zero cells.

    Raises:
        FileExistsError: `folder` is there already and may not be overwritten.
    """
    metrics = evaluation.metrics | {"failures": [failure.name for failure in evaluation.failures]}
    tables = class_tables(evaluation) if isinstance(evaluation, Evaluation) else evaluation.tables()
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
