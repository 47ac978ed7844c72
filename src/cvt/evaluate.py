"""How good a classifier is on labelled images."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from cvt.configuration import CvtConfig
from cvt.datasets import LabelledImages
from cvt.files import staged
from cvt.labels import imagenet_classes
from cvt.modeling import CvtForImageClassification
from cvt.predict import Result, classify


@dataclass(frozen=True)
class Evaluation:
    """Counts and rates over the images that could be decoded.

    Attributes:
        labels: the classifier's K classes.
        confusion: (K, K) counts, rows the true class, columns the predicted one.
        top1: share of images whose best class is the true one.
        top5: share of images whose best five classes hold the true one.
        loss: mean cross-entropy.
        failures: the files that could not be decoded.
    """

    labels: list[str]
    confusion: np.ndarray
    top1: float
    top5: float
    loss: float
    failures: list[Result] = field(default_factory=list)

    @property
    def images(self) -> int:
        """How many images were counted."""
        return int(self.confusion.sum())

    @property
    def per_class(self) -> dict[str, tuple[int, float]]:
        """Number of images and top-1 of every class that has images."""
        totals, right = self.confusion.sum(axis=1), self.confusion.diagonal()
        return {
            label: (int(totals[i]), float(right[i] / totals[i]))
            for i, label in enumerate(self.labels)
            if totals[i]
        }

    def mistaken_for(self, label: str) -> str:
        """The class that images of `label` are most often taken for; empty if for none."""
        row = self.confusion[self.labels.index(label)].copy()
        row[self.labels.index(label)] = 0
        return self.labels[row.argmax()] if row.any() else ""


def class_indices(names: list[str], config: CvtConfig) -> dict[str, int]:
    """The classifier's index of every class name; ImageNet's also by their WordNet ids.

    Raises:
        ValueError: the classifier does not know a name; lists all of those and the nearest known.
    """
    classes, imagenet = config.class_names, imagenet_classes()
    indices = {name: i for i, name in enumerate(classes)}
    if len(classes) == len(imagenet) and classes[0] == next(iter(imagenet.values())):
        indices |= {wordnet_id: i for i, wordnet_id in enumerate(imagenet)}
    if twice := [name for name in names if classes.count(name) > 1]:
        raise ValueError("the model has several classes called " + ", ".join(twice))
    unknown = []
    for name in names:
        if name not in indices:
            near = get_close_matches(name, indices, n=1)
            unknown.append(f"{name!r}" + (f" (is it {near[0]!r}?)" if near else ""))
    if unknown:
        raise ValueError("the model does not know these classes: " + ", ".join(unknown))
    return indices


def evaluate(
    model: CvtForImageClassification,
    processor: Callable,
    images: LabelledImages,
    batch_size: int = 32,
    progress: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Classify labelled images and compare; classes are matched by name.

    Args:
        model: a classifier.
        processor: its image processor.
        images: files and class names.
        batch_size: images at a time.
        progress: called after every image.

    Raises:
        ValueError: the model does not know a class, or no image could be decoded.
    """
    indices = class_indices(images.classes, model.config)
    labels = model.config.class_names
    confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)
    failures, in_top5, losses = [], 0, 0.0
    results = classify(model, processor, images.paths, batch_size)
    for result, label in zip(results, images.labels, strict=True):
        progress()
        if result.logits is None:
            failures.append(result)
            continue
        true = indices[label]
        best = result.logits.topk(min(5, len(labels))).indices.tolist()
        confusion[true, best[0]] += 1
        in_top5 += true in best
        losses -= result.logits.log_softmax(dim=-1)[true].item()
    counted = confusion.sum()
    if not counted:
        raise ValueError(f"none of the {len(images)} images could be decoded: {failures[0].error}")
    return Evaluation(
        labels=labels,
        confusion=confusion,
        top1=float(confusion.trace() / counted),
        top5=float(in_top5 / counted),
        loss=float(losses / counted),
        failures=failures,
    )


def write_evaluation(evaluation: Evaluation, folder: str | Path, overwrite: bool = False) -> None:
    """Write metrics.json, per_class.csv and confusion_matrix.csv.

    Raises:
        FileExistsError: `folder` is there already and may not be overwritten.
    """
    metrics = {name: getattr(evaluation, name) for name in ("top1", "top5", "loss", "images")}
    metrics["failures"] = [str(failure.path) for failure in evaluation.failures]
    with staged(folder, overwrite) as written:
        written.mkdir()
        (written / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        with open(written / "per_class.csv", "w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["class", "images", "top1"])
            rows.writerows((name, *values) for name, values in evaluation.per_class.items())
        with open(written / "confusion_matrix.csv", "w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["true \\ predicted", *evaluation.labels])
            rows.writerows(
                [label, *row]
                for label, row in zip(evaluation.labels, evaluation.confusion.tolist(), strict=True)
            )
