"""Labels that are probably wrong, by confident learning on out-of-fold predictions.

Source: Northcutt, Jiang, Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels,
Journal of Artificial Intelligence Research 70, 2021, arXiv 1911.00068, section 3.
"""

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from cvt.data.decoding import Source
from cvt.files import staged
from cvt.inference.metrics import Evaluation
from cvt.inference.page import embedded_thumbnail, render, write_page
from cvt.text import csv_cell

ROUNDING = 1e-6  # of a mean of equal scores
PICTURES = 120  # that the page shows
PAIRS = 30  # of label and suggestion, likewise
HEADER = ("name", "label", "label_score", "suggestion", "suggestion_score")


@dataclass(frozen=True)
class LabelError:
    """An image whose label is probably wrong.

    Attributes:
        index: of the image.
        label: index of the class that it has.
        suggestion: index of the class that it probably is of.
        label_score: the model's score of the label.
        suggestion_score: that of the suggestion.
    """

    index: int
    label: int
    suggestion: int
    label_score: float
    suggestion_score: float


def confident_classes(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The class that each image confidently belongs to, (N,); -1 where it is none.

    An image confidently belongs to the class of the highest score among those whose score is at
    least the mean score of that class on the images labelled with it. Counted by label, these
    classes are the confident joint of the paper, equation 1.

    Args:
        labels: index of each image's class, (N,).
        scores: of every class, (N, K), from a model that was not trained on the image.
    """
    own = scores[np.arange(len(labels)), labels].astype(np.float64)
    images = np.bincount(labels, minlength=scores.shape[1])
    with np.errstate(invalid="ignore"):  # no image has the label: nothing is as high as nan
        thresholds = np.bincount(labels, own, scores.shape[1]) / images
    is_confident = scores >= thresholds - ROUNDING
    best = np.where(is_confident, scores, -1).argmax(axis=1)
    return np.where(is_confident.any(axis=1), best, -1)


def find_label_errors(labels: np.ndarray, scores: np.ndarray) -> list[LabelError]:
    """The images whose label is probably wrong, those whose label has the lowest score first.

    These are the images that confidently belong to another class than their label, off the diagonal
    of the paper's confident joint; and, as in the library cleanlab, only those whose highest score
    is not that of the label.

    Args:
        labels: index of each image's class, (N,).
        scores: of every class, (N, K), from a model that was not trained on the image, as `cvt
            train --folds` writes them.

    Raises:
        ValueError: the shapes do not fit each other, a label is no class, or a score is not finite.

    Example:
        >>> import numpy as np
        >>> from cvt import find_label_errors
        >>> labels = np.array([0, 0, 0, 1, 1, 1])
        >>> cat = np.array([0.9, 0.8, 0.1, 0.2, 0.1, 0.3])
        >>> errors = find_label_errors(labels, np.stack([cat, 1 - cat], axis=1))
        >>> [(error.index, error.suggestion) for error in errors]
        [(2, 1)]
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(
            f"labels {labels.shape}, scores {scores.shape}: their shapes must be (N,) and (N, K)"
        )
    if not np.isfinite(scores).all():
        raise ValueError("scores: must be finite")
    if labels.dtype.kind not in "iu" or not np.isin(labels, np.arange(scores.shape[1])).all():
        raise ValueError(f"labels: must be indices of the {scores.shape[1]} classes")
    rows, classes = np.arange(len(labels)), confident_classes(labels, scores)
    own = scores[rows, labels]
    wrong = (classes >= 0) & (classes != labels) & (own < scores.max(axis=1, initial=0))
    found = rows[wrong][np.argsort(own[wrong], kind="stable")]
    columns = (found, labels[found], classes[found], own[found], scores[found, classes[found]])
    return [LabelError(*values) for values in zip(*(c.tolist() for c in columns), strict=True)]


def label_errors(evaluation: Evaluation) -> list[LabelError]:
    """The same of an evaluation that kept its scores; `index` is that of a row of `counted`."""
    assert evaluation.scores is not None
    return find_label_errors(evaluation.counted["true"], evaluation.scores)


def write_label_errors(
    evaluation: Evaluation,
    errors: Sequence[LabelError],
    folder: str | Path,
    title: str,
    picture: Callable[[int], Source | None],
    overwrite: bool = False,
) -> None:
    """Write `label_errors.csv`, and `label_errors.html`, one page with the pictures.

    Args:
        evaluation: of the images.
        errors: what `label_errors` found in it.
        folder: where to; its other files stay.
        title: the heading of the page.
        picture: returns an image by its position in the data; None where images are not looked up.
        overwrite: whether a folder that is there already may be written to.

    Raises:
        FileExistsError: `folder` is there already and may not be written to.
    """
    names, counted = evaluation.labels, evaluation.counted

    @cache
    def thumbnail(index: int) -> str:
        source = picture(int(counted[index]["position"]))
        return embedded_thumbnail(source) if source else ""

    pairs = Counter((names[error.label], names[error.suggestion]) for error in errors)
    page = render(
        "label_errors.html.jinja",
        title=title,
        images=evaluation.images,
        errors=errors,
        shown=errors[:PICTURES],
        pairs=pairs.most_common(PAIRS),
        names=names,
        name=lambda index: counted[index]["name"],
        thumbnail=thumbnail,
    )
    with staged(folder, overwrite) as beside:
        beside.mkdir()
        write_page(beside / "label_errors.html", page)
        path = beside / "label_errors.csv"
        with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER)
            for error in errors:
                name, label, suggestion = map(
                    csv_cell,
                    (counted[error.index]["name"], names[error.label], names[error.suggestion]),
                )
                row = (name, label, error.label_score, suggestion, error.suggestion_score)
                writer.writerow(row)
