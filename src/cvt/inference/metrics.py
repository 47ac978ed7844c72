"""The figures of an evaluation: accuracy, per class too, calibration, confusion, mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import ClassVar, NamedTuple

import numpy as np

from cvt.data.decoding import Source

BINS = 15  # of the calibration error, as in its paper
MOST_CONFIDENT = 60  # mistakes whose images are kept
# What the metrics are called where they are printed; shares, but for `NOT_SHARES`.
METRIC_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "loss": "loss",
    "balanced_accuracy": "balanced accuracy",
    "f1_macro": "macro F1",
    "lowest_recall": "lowest recall",
    "mean_average_precision": "mAP",
    "f1_micro": "micro F1",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "r2": "R²",
}
NOT_SHARES = ("loss", "mae", "rmse", "r2")

# What is kept of every counted image.
COUNTED = np.dtype(
    [
        ("position", np.int64),  # in the data set
        ("name", object),
        ("true", np.int64),  # indices of classes
        ("predicted", np.int64),
        (
            "score",
            np.float64,
        ),  # of the predicted class, as `inference.predict.predict` gives it
        ("in_top5", np.bool_),
        ("loss", np.float64),  # cross-entropy
        # How many classes are better than the best one that ImageNet-ReaL has, inf for none of the
        # best five; nan where it is not asked or has no label.
        ("real", np.float64),
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


class ClassMetrics(NamedTuple):
    """The figures of a class.

    Attributes:
        images: of the class.
        recall: share of them that are predicted as the class, which is their top-1.
        precision: share of the images predicted as the class that are of it; 0 if there are none.
        f1: harmonic mean of both.
    """

    images: int
    recall: float
    precision: float
    f1: float


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
        scores: of every class for each row of `counted`, (N, K) in float32, where they were kept.
    """

    METRICS: ClassVar = (
        *("top1", "top5", "loss", "balanced_accuracy", "f1_macro", "lowest_recall"),
    )

    labels: list[str]
    counted: np.ndarray
    mistakes: list[Mistake]
    failures: list[Failure]
    scores: np.ndarray | None = None

    def placed(self, places: Sequence[int]) -> "Evaluation":
        """The same images in a larger data set, in which each position of theirs has a place."""
        counted = self.counted.copy()
        counted["position"] = np.array(places)[counted["position"]]
        return replace(
            self,
            counted=counted,
            mistakes=[each._replace(position=places[each.position]) for each in self.mistakes],
            failures=[each._replace(position=places[each.position]) for each in self.failures],
        )

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
        kept = [part.scores for part in parts if part.scores is not None]
        scores = np.concatenate(kept)[order] if kept else None
        return cls(parts[0].labels, counted[order], mistakes[:MOST_CONFIDENT], failures, scores)

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
    def balanced_accuracy(self) -> float:
        """Macro recall: mean recall of the classes that have images.

        Source: `sklearn.metrics.balanced_accuracy_score`.
        """
        return float(np.mean([each.recall for each in self.per_class.values()]))

    @property
    def f1_macro(self) -> float:
        """Mean F1 of the classes that have images or are predicted; without images it is 0.

        Source: `sklearn.metrics.f1_score` and `torchmetrics.F1Score`, `average="macro"`.
        """
        classes = np.union1d(self.counted["true"], self.counted["predicted"])
        return sum(each.f1 for each in self.per_class.values()) / len(classes)

    @property
    def lowest_recall(self) -> float:
        """Recall of the class that is recognised worst, of those that have images."""
        return min(each.recall for each in self.per_class.values())

    @property
    def real_top1(self) -> float | None:
        """Share of images whose best class is among their ImageNet-ReaL labels, if there are any.

        Source: Beyer et al., Are we done with ImageNet?, arXiv 2006.07159.
        """
        return self._real_share(1)

    @property
    def real_top5(self) -> float | None:
        """Share of images of which one ImageNet-ReaL label is among the best five classes."""
        return self._real_share(5)

    def _real_share(self, classes: int) -> float | None:
        """Of the images that have ImageNet-ReaL labels, those with one among the best classes."""
        real = self.counted["real"][~np.isnan(self.counted["real"])]
        return float((real < classes).mean()) if len(real) else None

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
        names = ("images", *self.METRICS, "calibration_error", "real_top1", "real_top5")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def per_class(self) -> dict[str, ClassMetrics]:
        """The figures of every class that has images."""
        true, predicted = self.counted["true"], self.counted["predicted"]
        images, answers, right = (
            np.bincount(indices, minlength=len(self.labels))
            for indices in (true, predicted, true[self.right])
        )
        return {
            self.labels[i]: ClassMetrics(
                images=int(images[i]),
                recall=float(right[i] / images[i]),
                precision=float(right[i] / max(answers[i], 1)),
                f1=float(2 * right[i] / (images[i] + answers[i])),
            )
            for i in images.nonzero()[0]
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
        """The wrong class that images of `label` most often get; empty if none do."""
        has_label = self.counted["true"] == self.labels.index(label)
        taken = np.bincount(self.counted["predicted"][has_label & ~self.right])
        return self.labels[taken.argmax()] if len(taken) else ""


def metric_number(metric: str, value: float) -> str:
    """The value of a metric for people: `99.44 %`, of a loss `0.1284`, of an error `3.107`."""
    if metric in ("mae", "rmse"):  # in units of the values
        return f"{value:.4g}"
    return f"{value:.4f}" if metric in NOT_SHARES else f"{100 * value:.2f} %"


def metric_text(metric: str, value: float) -> str:
    """A metric for people: `top-1 99.44 %`, `loss 0.1284`, `mean absolute error 3.107`."""
    return f"{METRIC_NAMES[metric]} {metric_number(metric, value)}"
