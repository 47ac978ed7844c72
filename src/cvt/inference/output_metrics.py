"""The figures of an evaluation where every output has a target: several classes, or values."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from cvt.architecture import Architecture
from cvt.data.decoding import Source
from cvt.inference.metrics import MOST_CONFIDENT, Failure

Evaluated = TypeVar("Evaluated", bound="OutputEvaluation")
DEFAULT_THRESHOLD = 0.5  # of a model that has none


def thresholds_of(config: Architecture) -> list[float]:
    """The score of each class from which on an image has it; 0.5 of a model without thresholds."""
    return config.thresholds or [DEFAULT_THRESHOLD] * len(config.class_names)


class Worst(NamedTuple):
    """An image with a large loss."""

    loss: float
    position: int
    source: Source


@dataclass(frozen=True)
class OutputEvaluation(ABC):
    """Outputs and targets of every image.

    Attributes:
        labels: the names of the K outputs that are evaluated.
        positions: of the N images in the data set, (N,).
        names: of the images, (N,).
        targets: (N, K).
        outputs: logits or values, (N, K).
        worst: the images with the largest loss, at most `MOST_CONFIDENT`, the largest first.
        failures: the images that could not be decoded, by position.
    """

    METRICS: ClassVar[tuple[str, ...]]

    labels: list[str]
    positions: np.ndarray
    names: np.ndarray
    targets: np.ndarray
    outputs: np.ndarray
    worst: list[Worst]
    failures: list[Failure]

    @classmethod
    def joined(cls: type[Evaluated], parts: Sequence[Evaluated]) -> Evaluated:
        """The evaluation of one process, from the shares of several.

        Raises:
            ValueError: there were no images, or none could be decoded.
        """
        positions = np.concatenate([part.positions for part in parts])
        failures = sorted(failure for part in parts for failure in part.failures)
        if not len(positions):
            raise ValueError(
                f"none of the {len(failures)} images could be decoded: {failures[0].error}"
                if failures
                else "there are no images to evaluate with"
            )
        order = np.argsort(positions)
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])[order]
            for name in ("positions", "names", "targets", "outputs")
        }
        worst = sorted((each for part in parts for each in part.worst), reverse=True)
        return replace(parts[0], **arrays, worst=worst[:MOST_CONFIDENT], failures=failures)

    def placed(self: Evaluated, places: Sequence[int]) -> Evaluated:
        """The same images in a larger data set, in which each position of theirs has a place."""
        return replace(
            self,
            positions=np.array(places)[self.positions],
            worst=[each._replace(position=places[each.position]) for each in self.worst],
            failures=[each._replace(position=places[each.position]) for each in self.failures],
        )

    @property
    def images(self) -> int:
        """How many images were counted."""
        return len(self.positions)

    @property
    def metrics(self) -> dict[str, float]:
        """The figures by their names."""
        return {name: getattr(self, name) for name in ("images", *self.METRICS)}

    def row_of(self, position: int) -> int:
        """The row of the image with this position."""
        return int(np.searchsorted(self.positions, position))

    @abstractmethod
    def texts(self, position: int) -> tuple[str, str]:
        """What was predicted of an image, and what is right."""

    @abstractmethod
    def tables(self) -> dict[str, list[Sequence]]:
        """Rows of csv files, by the names of the files."""


class OutputClassMetrics(NamedTuple):
    """The figures of one of several classes.

    Attributes:
        images: that have the class.
        average_precision: of the order of the images by their score; nan without images.
        threshold: of the score, from which on an image is predicted to have the class.
        precision: share of the images predicted to have the class that have it; 0 without any.
        recall: share of the images of the class that are predicted to have it; 0 without any.
        f1: harmonic mean of both.
    """

    images: int
    average_precision: float
    threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class MultiLabelEvaluation(OutputEvaluation):
    """The evaluation of a classifier of images that have several classes, or none.

    Attributes:
        thresholds: of each output; `DEFAULT_THRESHOLD` of a model that has none.
    """

    METRICS = ("mean_average_precision", "f1_macro", "f1_micro", "loss")

    thresholds: list[float]

    @classmethod
    def joined(cls, parts: Sequence[Any]) -> Any:
        """As of all evaluations; the thresholds of several models become their medians."""
        thresholds = np.median([part.thresholds for part in parts], axis=0).tolist()
        return replace(super().joined(parts), thresholds=thresholds)

    @cached_property
    def scores(self) -> np.ndarray:
        """From 0 to 1, (N, K)."""
        return 1 / (1 + np.exp(-self.outputs.astype(np.float64)))

    @cached_property
    def predicted(self) -> np.ndarray:
        """Which classes each image is predicted to have, (N, K)."""
        return self.scores >= self.thresholds

    @property
    def loss(self) -> float:
        """Mean binary cross-entropy."""
        return float(self.losses(self.outputs, self.targets).mean())

    @staticmethod
    def losses(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The binary cross-entropy of every output, in float64, from logits."""
        logits = outputs.astype(np.float64)
        return np.logaddexp(0, logits) - targets * logits

    @cached_property
    def per_class(self) -> dict[str, OutputClassMetrics]:
        """The figures of every class."""
        has = self.targets > 0
        images, answers = has.sum(axis=0), self.predicted.sum(axis=0)
        right = (has & self.predicted).sum(axis=0)
        return {
            label: OutputClassMetrics(
                int(images[k]),
                average_precision(has[:, k], self.scores[:, k]),
                self.thresholds[k],
                precision=float(right[k] / max(answers[k], 1)),
                recall=float(right[k] / max(images[k], 1)),
                f1=float(2 * right[k] / max(images[k] + answers[k], 1)),
            )
            for k, label in enumerate(self.labels)
        }

    @property
    def mean_average_precision(self) -> float:
        """Mean average precision of the classes that have images (mAP).

        Source: `sklearn.metrics.average_precision_score`, `average="macro"`.
        """
        found = [each.average_precision for each in self.per_class.values() if each.images]
        return float(np.mean(found)) if found else 0.0

    @property
    def f1_macro(self) -> float:
        """Mean F1 of the classes that have images or are predicted.

        Source: `sklearn.metrics.f1_score`, `average="macro"`.
        """
        counted = (self.targets.any(axis=0) | self.predicted.any(axis=0)).sum()
        return sum(each.f1 for each in self.per_class.values()) / max(int(counted), 1)

    @property
    def f1_micro(self) -> float:
        """F1 of all classes of all images together.

        Source: `sklearn.metrics.f1_score`, `average="micro"`.
        """
        has = self.targets > 0
        return float(2 * (has & self.predicted).sum() / max(has.sum() + self.predicted.sum(), 1))

    def at_best_thresholds(self) -> "MultiLabelEvaluation":
        """The same images, with the threshold of each class that gives the best F1 on them."""
        chosen = [
            best_threshold(self.targets[:, k] > 0, self.scores[:, k])
            for k in range(len(self.labels))
        ]
        return replace(self, thresholds=chosen)

    def texts(self, position: int) -> tuple[str, str]:
        """What an image was predicted to have, and what it has."""
        row = self.row_of(position)
        return self._names(self.predicted[row]), self._names(self.targets[row])

    def _names(self, flags: np.ndarray) -> str:
        return ", ".join(self.labels[k] for k in flags.nonzero()[0])

    def tables(self) -> dict[str, list[Sequence]]:
        """Rows of csv files, by the names of the files."""
        classes = [(label, *figures) for label, figures in self.per_class.items()]
        predictions = [
            (self.names[i], self._names(self.targets[i]), self._names(self.predicted[i]), *scores)
            for i, scores in enumerate(self.scores.tolist())
        ]
        return {
            "per_class": [("class", *OutputClassMetrics._fields), *classes],
            "predictions": [("name", "true", "predicted", *self.labels), *predictions],
        }


def average_precision(has: np.ndarray, scores: np.ndarray) -> float:
    """The area below precision over recall, in steps; nan if no image has the class.

    Args:
        has: whether each image has the class, (N,).
        scores: (N,).
    """
    if not has.any():
        return float("nan")
    precision, recall = precision_recall(has, scores)
    return float((np.diff(recall, prepend=0) * precision).sum())


def precision_recall(has: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall at each distinct score, the largest first.

    Args:
        has: whether each image has the class, (N,); one has.
        scores: (N,).
    """
    right, predicted, _ = _cuts(has, scores)
    return right / predicted, right / has.sum()


def best_threshold(has: np.ndarray, scores: np.ndarray) -> float:
    """The threshold with the best F1, half-way between two scores; of equal ones nearest to 1/2.

    Args:
        has: whether each image has the class, (N,).
        scores: from 0 to 1, (N,).
    """
    if not has.any():
        return DEFAULT_THRESHOLD
    right, predicted, distinct = _cuts(has, scores)
    f1 = 2 * right / (predicted + has.sum())
    thresholds = (distinct + np.append(distinct[1:], 0)) / 2
    best = np.flatnonzero(f1 == f1.max())
    return float(thresholds[best[abs(thresholds[best] - DEFAULT_THRESHOLD).argmin()]])


def _cuts(has: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each distinct score, the largest first: images of the class from it up, images, score."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    return np.cumsum(has[order])[last], last + 1, ordered[last]


class ValueMetrics(NamedTuple):
    """The figures of one value: mean absolute and root mean squared error, and R²."""

    mae: float
    rmse: float
    r2: float


@dataclass(frozen=True)
class RegressionEvaluation(OutputEvaluation):
    """The evaluation of a model that gives values."""

    METRICS = ("mae", "rmse", "r2")

    @staticmethod
    def losses(outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The squared error of every output, in float64."""
        return np.square(outputs.astype(np.float64) - targets)

    @cached_property
    def per_value(self) -> dict[str, ValueMetrics]:
        """The figures of every value."""
        targets = self.targets.astype(np.float64)
        errors = self.outputs - targets
        squared = np.square(errors)
        spread = np.square(targets - targets.mean(axis=0))
        return {
            label: ValueMetrics(
                float(abs(errors[:, k]).mean()),
                float(np.sqrt(squared[:, k].mean())),
                _r2(squared[:, k].sum(), spread[:, k].sum()),
            )
            for k, label in enumerate(self.labels)
        }

    def _mean(self, name: str) -> float:
        return float(np.mean([getattr(each, name) for each in self.per_value.values()]))

    @property
    def mae(self) -> float:
        """Mean absolute error, a mean over the values.

        Source: `sklearn.metrics.mean_absolute_error`.
        """
        return self._mean("mae")

    @property
    def rmse(self) -> float:
        """Root mean squared error, a mean over the values.

        Source: `sklearn.metrics.root_mean_squared_error`.
        """
        return self._mean("rmse")

    @property
    def r2(self) -> float:
        """Share of the variance that is predicted, a mean over the values (R²).

        Source: `sklearn.metrics.r2_score`.
        """
        return self._mean("r2")

    @property
    def loss(self) -> float:
        """Mean squared error of values that are scaled to a variance of 1 over these images."""
        return 1 - self.r2

    def texts(self, position: int) -> tuple[str, str]:
        """What was predicted of an image, and what is right."""
        row = self.row_of(position)
        predicted, true = (
            ", ".join(f"{value:.4g}" for value in values[row].tolist())
            for values in (self.outputs, self.targets)
        )
        return predicted, true

    def tables(self) -> dict[str, list[Sequence]]:
        """Rows of csv files, by the names of the files."""
        values = [(label, *figures) for label, figures in self.per_value.items()]
        header = [f"{kind} {label}" for label in self.labels for kind in ("true", "predicted")]
        pairs = np.stack([self.targets, self.outputs], axis=-1).reshape(self.images, -1)
        rows = zip(self.names, pairs.tolist(), strict=True)
        return {
            "per_value": [("value", *ValueMetrics._fields), *values],
            "predictions": [("name", *header), *((name, *row) for name, row in rows)],
        }


def _r2(squared: float, spread: float) -> float:
    if spread:
        return float(1 - squared / spread)
    return float(squared == 0)  # as scikit-learn
