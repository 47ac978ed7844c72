"""How well a model's features separate classes: a linear probe and nearest neighbours.

C and k are chosen by cross-validation on the training images, so nothing is chosen by the images
that the methods are evaluated on.
"""

import csv
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvt.architecture import Architecture
from cvt.checkpoints import ModelSource, load_classifier, load_processor, model_source
from cvt.data import Images, LabelledImages, Splits, open_training, write_split
from cvt.data.decoding import Source
from cvt.files import staged, write_checksums
from cvt.inference.classifier import check_processor
from cvt.inference.evaluate import evaluation_of, write_evaluation
from cvt.inference.features import Features, feature_runtime, features, with_classifier
from cvt.inference.metrics import Evaluation
from cvt.inference.predict import Result
from cvt.libraries import require
from cvt.modeling import CvtForImageClassification

C_GRID = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)
K_GRID = (1, 3, 5, 9, 15, 25, 49)
FOLDS = 5
MOST_ITERATIONS = 1000  # of the solver of the regression

Folds = list[tuple[np.ndarray, np.ndarray]]  # of each fold the rows to fit to, and those held out
Tried = dict[float, dict[str, float]]  # figures of the cross-validation by value of a parameter


@dataclass(frozen=True)
class Method:
    """A way to classify features, and how good it is.

    Attributes:
        name: `linear` or `knn`.
        parameter: what was chosen, `C` or `k`.
        tried: the figures of the cross-validation by value: `top1`, and of `linear` `loss`.
        evaluation: of the validation images.
    """

    name: str
    parameter: str
    tried: Tried
    evaluation: Evaluation

    @property
    def value(self) -> float:
        """The chosen value, see `best`."""
        return best(self.tried)

    @property
    def row(self) -> dict[str, Any]:
        """The figures by their names."""
        return {
            "method": self.name,
            "parameter": self.parameter,
            "value": self.value,
            "cv_top1": self.tried[self.value]["top1"],
            "top1": self.evaluation.top1,
            "f1_macro": self.evaluation.f1_macro,
            "images": self.evaluation.images,
        }


@dataclass(frozen=True)
class Probe:
    """What `probe` returns.

    Attributes:
        linear: logistic regression on standardised features.
        knn: the vote of the k training images whose features have the largest cosine with an
            image's; the score of a class is (votes + 1) / (k + classes).
        model: the model with the linear probe as its classifier.
        processor: its image processor.
        splits: the images.
        train: the features of the training images.
        folds: of the cross-validation.
        runtime: what computed the features, as a text.
        feature_seconds: that decoding all images and computing their features took.
        fit_seconds: that the cross-validation and fitting both methods took.
    """

    linear: Method
    knn: Method
    model: CvtForImageClassification
    processor: Any
    splits: Splits
    train: Features
    folds: int
    runtime: str
    feature_seconds: float
    fit_seconds: float


def probe(
    model: str | Path | ModelSource | CvtForImageClassification,
    data: str | Path | Splits,
    *,
    seed: int = 0,
    processor: Any = None,
    batch_size: int = 32,
    workers: int = 0,
    device: str = "auto",
    threads: int | None = None,
    max_pixels: int | None = None,
    verify: bool = True,
    progress: Callable[[], Any] = lambda: None,
) -> Probe:
    """Fit a linear probe and nearest neighbours to the features of a model, and evaluate both.

    The features are what the model's own classifier receives, of every image once and without
    augmentation, in fp32. The model is not trained.

    Args:
        model: a published name, a model folder, a file of weights, or a loaded model, which is left
            as it is.
        data: as `cvt.data.open_training` takes it, or what that returned.
        seed: draws the folds of the cross-validation; and, where the data has none, the validation
            images, as `cvt train` does.
        processor: the image processor, if not the model's own; a loaded model needs one.
        batch_size: images at a time.
        workers: processes that decode, see `cvt.inference.predict.classify`.
        device: as in `cvt.runtime.open_runtime`.
        threads: likewise.
        max_pixels: the pixels that an image may have, see `cvt.data.decoding.decode`.
        verify: compare a model folder with the SHA-256 that were written with it.
        progress: called after every image.

    Raises:
        FileNotFoundError: there is no such model or data.
        ImportError: scikit-learn is not installed.
        ValueError: the model is an export, a loaded model comes without its processor, no training
            image of a class could be decoded, no class has two, or images do not have one class
            each.
        FloatingPointError: the features of an image are not finite.

    Example:
        >>> import cvt
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=2)
        >>> model = cvt.CvtForImageClassification(config)
        >>> processor = cvt.image_processor(config, image_size=16)
        >>> probe = cvt.probe(model, "digits", processor=processor)
        >>> probe.linear.evaluation.images, probe.model.config.num_labels
        (360, 10)
    """
    require("a probe", "sklearn", extra="train")
    splits = data if isinstance(data, Splits) else open_training(data, seed=seed)
    if not splits.train.task.has_one_class:
        raise ValueError(
            f"problem_type = {splits.train.task.problem_type}: a probe is of images of one class "
            "each; train with head_only instead"
        )
    opened, processor = _opened(model, processor, verify)
    runtime = feature_runtime(opened, device, threads)

    def featured(images: Images) -> tuple[Features, list[str]]:
        """The features of a split, and the class of every image."""
        labels: list[str] = []

        def sources() -> Iterator[Source]:
            for source, label in images:
                labels.append(label)
                yield source

        # Decoded whole, as in an evaluation.
        how: Any = {"exact": True, "max_pixels": max_pixels}
        found = features(runtime, processor, sources(), batch_size, workers, progress, **how)
        return found, labels

    began = time.perf_counter()
    train, names = featured(splits.train)
    labels = _indices(np.array(names)[train.positions], splits.train.classes)
    validation, _ = featured(splits.validation)
    computed = time.perf_counter()
    folds = cross_validation(labels, seed)
    regression, tried_c = fit_linear(train.values, labels, folds)
    neighbours, tried_k = fit_knn(train.values, labels, folds)
    fitted = time.perf_counter()

    weights = as_classifier(regression)
    probed = with_classifier(opened, splits.train.classes, weights)
    weight, bias = (tensor.numpy() for tensor in weights.values())
    votes = np.rint(neighbours.predict_proba(validation.values) * neighbours.n_neighbors)
    linear, knn = (
        _evaluation(splits.validation, validation, logits, probed.config)
        for logits in (validation.values @ weight.T + bias, np.log1p(votes))
    )
    return Probe(
        linear=Method("linear", "C", tried_c, linear),
        knn=Method("knn", "k", tried_k, knn),
        model=probed,
        processor=processor,
        splits=splits,
        train=train,
        folds=len(folds),
        runtime=runtime.describe,
        feature_seconds=computed - began,
        fit_seconds=fitted - computed,
    )


def _opened(
    model: str | Path | ModelSource | CvtForImageClassification, processor: Any, verify: bool
) -> tuple[CvtForImageClassification, Any]:
    """The model and its image processor."""
    check_processor(model, processor)
    if isinstance(model, CvtForImageClassification):
        return model, processor
    source = model_source(model)
    if source.is_export:
        raise ValueError(f"{model} is an export, without features: probe the model it comes from")
    opened = load_classifier(source, verify=verify)
    return opened, processor or load_processor(source, opened.config)


def _indices(names: np.ndarray, classes: list[str]) -> np.ndarray:
    """The index of each class name.

    Raises:
        ValueError: a class has none.
    """
    if missing := sorted(set(classes) - set(names.tolist())):
        raise ValueError(f"no training image of these classes could be decoded: {missing}")
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[name] for name in names.tolist()])


def _evaluation(
    images: Images, found: Features, logits: np.ndarray, config: Architecture
) -> Evaluation:
    """The evaluation of images whose features were classified."""
    rows = dict(zip(found.positions.tolist(), logits, strict=True))
    errors = {failure.position: failure.error for failure in found.failures}
    results = (
        (Result(source, rows.get(i), errors.get(i)), label)
        for i, (source, label) in enumerate(images)
    )
    evaluation = evaluation_of(results, config)
    assert isinstance(evaluation, Evaluation)
    return evaluation


# ------------------------------------------------------------------------------ on features


def cross_validation(labels: np.ndarray, seed: int) -> Folds:
    """Stratified folds; the only image of a class is never held out, so each has all to fit to.

    Args:
        labels: indices of classes, (N,).
        seed: draws the folds.

    Raises:
        ValueError: no class has two images.
    """
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(labels)
    if counts.max() < 2:
        raise ValueError(
            "no class has two training images, which the cross-validation of C and k needs"
        )
    splitter = StratifiedKFold(
        min(FOLDS, int(counts.max())), shuffle=True, random_state=seed % 2**32
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")
        held_out = [held[counts[labels[held]] > 1] for _, held in splitter.split(labels, labels)]
    rows = np.arange(len(labels))
    return [(np.setdiff1d(rows, held), held) for held in held_out]


def best(tried: Tried) -> float:
    """The value with the best top-1; of equal ones that with the lowest loss, else the smallest."""
    return max(tried, key=lambda value: (tried[value]["top1"], -tried[value].get("loss", 0.0)))


def fit_linear(values: np.ndarray, labels: np.ndarray, folds: Folds) -> tuple[Any, Tried]:
    """Logistic regression on standardised features.

    Args:
        values: features, (N, C).
        labels: indices of classes, (N,).
        folds: of the cross-validation.

    Returns:
        scikit-learn's pipeline, fitted to all rows; and the figures by C.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fit(C: float, rows: Any) -> Any:
        regression = LogisticRegression(C=C, max_iter=MOST_ITERATIONS)
        return make_pipeline(StandardScaler(), regression).fit(values[rows], labels[rows])

    tried = {}
    for C in C_GRID:
        scores, true = _held_out(partial(fit, C), values, labels, folds)
        loss = log_loss(true, scores, labels=range(scores.shape[1]))
        tried[C] = {"top1": _top1(scores, true), "loss": loss}
    return fit(best(tried), ...), tried


def fit_knn(values: np.ndarray, labels: np.ndarray, folds: Folds) -> tuple[Any, Tried]:
    """Nearest neighbours by cosine; arguments and results as of `fit_linear`, with k for C."""
    from sklearn.neighbors import KNeighborsClassifier

    def fit(k: float, rows: Any) -> Any:
        return KNeighborsClassifier(int(k), metric="cosine").fit(values[rows], labels[rows])

    fewest = min(len(kept) for kept, _ in folds)
    tried: Tried = {}
    for k in (k for k in K_GRID if k <= fewest):
        tried[k] = {"top1": _top1(*_held_out(partial(fit, k), values, labels, folds))}
    return fit(best(tried), ...), tried


def _held_out(
    fit: Callable[[np.ndarray], Any], values: np.ndarray, labels: np.ndarray, folds: Folds
) -> tuple[np.ndarray, np.ndarray]:
    """Scores, (M, K), and labels, (M,), of all rows that are held out of what is fitted."""
    scores = [fit(kept).predict_proba(values[held]) for kept, held in folds]
    return np.concatenate(scores), np.concatenate([labels[held] for _, held in folds])


def _top1(scores: np.ndarray, labels: np.ndarray) -> float:
    return float((scores.argmax(axis=1) == labels).mean())


def as_classifier(regression: Any) -> dict[str, Tensor]:
    """The weights of a classifier that answers to features what `fit_linear`'s pipeline answers."""
    scaler, fitted = regression  # the steps
    weight = fitted.coef_ / scaler.scale_  # (K, C)
    bias = fitted.intercept_ - weight @ scaler.mean_
    if len(weight) == 1:  # of two classes, it is the difference of their logits
        weight, bias = (np.concatenate([-each, each]) / 2 for each in (weight, bias))
    return {
        "classifier.weight": torch.from_numpy(weight).float(),
        "classifier.bias": torch.from_numpy(bias).float(),
    }


# ------------------------------------------------------------------------------ files


def write_probe(probe: Probe, folder: str | Path, overwrite: bool = False) -> None:
    """Write what a probe found, and its model.

    `results.csv` has a row for each method, `grid.csv` the figures of the cross-validation for
    every C and k. `linear/` and `knn/` have the tables of `write_evaluation` and
    `confusion_matrix.png`. `model/` is a model folder whose classifier is the linear probe.
    `split.csv` is the split, where the validation images were drawn from the data.

    Raises:
        FileExistsError: `folder` is there already and may not be overwritten.
        ImportError: matplotlib is not installed.
    """
    require("the picture of a probe", "matplotlib", extra="train")
    from cvt.inference.report import plot_confusion

    methods = (probe.linear, probe.knn)
    with staged(folder, overwrite) as written:
        for method in methods:
            write_evaluation(method.evaluation, written / method.name)
            plot_confusion(method.evaluation, written / method.name / "confusion_matrix.png")
        _write_table(written / "results.csv", [method.row for method in methods])
        grid = [
            {
                "method": method.name,
                "parameter": method.parameter,
                "value": value,
                "cv_top1": figures["top1"],
                "cv_loss": figures.get("loss"),
            }
            for method in methods
            for value, figures in method.tried.items()
        ]
        _write_table(written / "grid.csv", grid)
        probe.model.save_pretrained(written / "model")
        probe.processor.save_pretrained(written / "model")
        write_checksums(written / "model")
        train, validation, _ = probe.splits
        if probe.splits.drawn:
            assert isinstance(train, LabelledImages)
            assert isinstance(validation, LabelledImages)
            write_split(written / "split.csv", train, validation)


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
