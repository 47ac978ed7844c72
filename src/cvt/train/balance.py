"""Classes of different size: weights of the loss, balanced epochs, and advice after a run."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cvt.data import Images, LabelledImages
from cvt.train.best_epoch import result
from cvt.train.progress import Row
from cvt.train.recipe import Recipe

IMBALANCED = 2  # times as many images has the largest class as the smallest


def class_weights(images: LabelledImages) -> Tensor:
    """The weight of every class, inversely proportional to its number of images, (classes,).

    It is scikit-learn's "balanced": n / (k · n_c) for the n_c of n images of class c, where k
    classes have images. So the mean weight of an image is 1, and the loss keeps its scale.
    A class without images has weight 0.
    """
    counts = np.bincount(images.targets, minlength=len(images.classes))
    weights = len(images) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.tensor(np.where(counts, weights, 0), dtype=torch.float32)


def weighted_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float
) -> Tensor:
    """The cross-entropy of a batch, each image weighted by its class, ().

    It is 1/B · Σ_i w_i · CE(logits_i, t_i), where t_i is the smoothed and mixed target of image i
    and w_i = Σ_c m_ic · weights_c; m_i is the target without smoothing, one-hot or mixed. As the
    mean over all images of w_i is 1, it is not divided by the weights of the batch: so batches of
    a step, and those of several processes, add up to the loss of all their images.

    The terms of the classes are not weighted one by one, as `torch.nn.functional.cross_entropy`
    does with its `weight`: smoothing would then ask for a rare class in every image.

    Args:
        logits: (B, classes).
        targets: classes (B,), or mixed and smoothed ones (B, classes).
        weights: of the classes, (classes,).
        smoothing: the label smoothing; of mixed targets, that which they have. Below 1.
    """
    smoothed = smoothing if targets.ndim == 1 else 0.0  # mixed targets are smoothed already
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothed)
    return (image_weights(targets, weights, smoothing) * losses).mean()


def image_weights(targets: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """The weight of every image in `weighted_cross_entropy`, whose arguments these are, (B,)."""
    if targets.ndim == 1:
        return weights[targets]
    return (targets @ weights - smoothing * weights.mean()) / (1 - smoothing)


def balanced_order(classes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The images of an epoch that has every class equally often, give or take one, (images,).

    The epoch is as long as without balance. Of a class, all images come equally often, give or
    take one: those of a small class several times, of a large class a part.

    Args:
        classes: of every image, (images,).
        generator: draws the images and their order.
    """
    by_class = np.argsort(classes, kind="stable")
    _, starts = np.unique(classes[by_class], return_index=True)
    groups = np.split(by_class, starts[1:])
    share, rest = divmod(len(classes), len(groups))
    chosen = []
    for place, group in zip(generator.permutation(len(groups)), groups, strict=True):
        count = share + (place < rest)
        rounds = [generator.permutation(group) for _ in range(-(-count // len(group)))]
        chosen.append(np.concatenate(rounds)[:count])
    return generator.permutation(np.concatenate(chosen))


def advice(row: Row, recipe: Recipe, images: Images) -> str:
    """A sentence about settings for imbalanced data, if the best epoch misses a class; else "".

    Args:
        row: of the best epoch.
        recipe: of the run.
        images: that are trained on.
    """
    if result(row, "lowest_recall") != 0 or not isinstance(images, LabelledImages):
        return ""
    names, counts = np.unique(np.asarray(images.labels), return_counts=True)
    if counts.max() < IMBALANCED * counts.min():
        return ""
    settings = []
    if not (recipe.class_weights or recipe.sampler):
        settings += ["sampler=balanced", "class_weights=balanced"]
    if recipe.metric in ("top1", "top5", "loss"):
        settings += ["metric=balanced_accuracy"]
    if not settings:
        return ""
    return (
        f"epoch {row['epoch']:.0f}, the best by {recipe.metric}, recognises no validation image "
        f"of at least one class, and the smallest class, {names[counts.argmin()]}, has "
        f"{counts.min()} of {len(images):,} training images; try {' or '.join(settings)}"
    )
