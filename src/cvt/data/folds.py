"""The folds of a cross-validation."""

import random
from collections import Counter, defaultdict

import numpy as np

from cvt.data.labelled import LabelledImages, divide, kept_together
from cvt.libraries import require


def fold(
    images: LabelledImages, folds: int, number: int, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """The images of all folds but one, and those of this one.

    Every image is in one fold, every class in each fold as nearly equally often as images that are
    kept together allow: those of equal content, and those of one group. Of images of several
    classes, the rarest class is divided first. Images with values are divided into folds of nearly
    equal size.

    Args:
        images: to divide.
        folds: how many there are.
        number: the one that validates, from 1.
        seed: draws the folds.

    Raises:
        ValueError: there is no such fold, or a class has too few images for so many.
        ImportError: scikit-learn is not installed.

    Example:
        >>> from cvt.data import fold, open_labelled
        >>> digits = open_labelled("digits")
        >>> sum(len(fold(digits, 5, number, seed=0)[1]) for number in range(1, 6)) == len(digits)
        True
    """
    if not 1 <= number <= folds:
        raise ValueError(f"fold = {number}: there are the folds 1 to {folds}")
    numbers = fold_numbers(images, folds, seed)
    return divide(images, set(np.flatnonzero(numbers == number).tolist()))


def fold_numbers(images: LabelledImages, folds: int, seed: int) -> np.ndarray:
    """The number of every image's fold, (N,), from 1 on.

    Raises:
        ValueError: a class has too few images for so many folds.
        ImportError: scikit-learn is not installed.
    """
    require("folds", "sklearn", extra="train")
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    together = kept_together(images)
    groups = np.array([together.get(i, [i])[0] for i in range(len(images))])
    _check(images, groups, folds, "those of equal content, or of one group, are kept together")
    settings = {"n_splits": folds, "shuffle": True, "random_state": seed % 2**32}
    if not images.task.has_one_class:
        numbers = _iteratively_stratified(images, groups, folds, seed)
    else:
        if together:
            drawn = StratifiedGroupKFold(**settings).split(groups, images.labels, groups)
        else:
            drawn = StratifiedKFold(**settings).split(groups, images.labels)
        numbers = np.zeros(len(images), int)
        for number, (_, held) in enumerate(drawn, start=1):
            numbers[held] = number
    _check(images, numbers, folds, "as far as images of several classes, or kept together, allow")
    return numbers


def _iteratively_stratified(
    images: LabelledImages, groups: np.ndarray, folds: int, seed: int
) -> np.ndarray:
    """The number of every image's fold, (N,), where images may have several classes, or none.

    K. Sechidis, G. Tsoumakas, I. Vlahavas, "On the Stratification of Multi-Label Data", 2011,
    algorithm 1, with what is kept together in the place of an example: of the class of which the
    fewest are left, each goes into the fold that lacks most of this class, then of all.
    """
    classes: dict[int, Counter[str]] = {}  # the images of each class, by group
    for label, group in zip(images.labels, groups.tolist(), strict=True):
        classes.setdefault(group, Counter()).update(images.task.classes_of(label) or [""])
    members = defaultdict(list)
    order = sorted(classes)
    random.Random(seed).shuffle(order)
    for group in sorted(order, key=lambda each: -classes[each].total()):  # the large ones first
        for name in classes[group]:
            members[name].append(group)
    lacking = {
        name: np.full(folds, sum(classes[group][name] for group in found) / folds)
        for name, found in members.items()
    }
    of_all = np.sum(list(lacking.values()), axis=0)
    left = {name: len(found) for name, found in sorted(members.items())}
    fold_of: dict[int, int] = {}
    while left:
        rarest = min(left, key=left.__getitem__)
        for group in members[rarest]:
            if group not in fold_of:
                chosen = fold_of[group] = int(np.lexsort((of_all, lacking[rarest]))[-1])
                of_all[chosen] -= classes[group].total()
                for name, count in classes[group].items():
                    lacking[name][chosen] -= count
                    if name in left:
                        left[name] -= 1
        del left[rarest]
    return 1 + np.array([fold_of[group] for group in groups.tolist()])


def _check(images: LabelledImages, groups: np.ndarray, folds: int, reason: str) -> None:
    """Raise a ValueError if a class, or all images, are in fewer groups than there are folds."""
    found: dict[str, set[int]] = {"the data": set(groups.tolist())}
    for label, group in zip(images.labels, groups.tolist(), strict=True):
        for name in images.task.classes_of(label):
            found.setdefault(f"class {name}", set()).add(group)
    for name, of_class in found.items():
        if len(of_class) < folds:
            raise ValueError(
                f"folds = {folds}: {name} has images for {len(of_class)} folds ({reason}); take "
                "fewer folds"
            )
