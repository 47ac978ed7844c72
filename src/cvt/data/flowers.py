"""The Oxford Flowers-102 data set as it comes: `jpg/`, `imagelabels.mat` and `setid.mat`.

Source: M.-E. Nilsback and A. Zisserman, Automated Flower Classification over a Large Number of
Classes, ICVGIP 2008.
"""

from functools import partial
from pathlib import Path

import numpy as np

from cvt.data.folder import Files, refuse_missing
from cvt.data.labelled import LabelledImages, SplitReaders
from cvt.libraries import require

LABELS, SETS = "imagelabels.mat", "setid.mat"
SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}


def is_flowers(path: Path) -> bool:
    """Whether a folder has a file of labels as this data set has them."""
    return (path / LABELS).is_file() or (path / SETS).is_file()


def flowers_splits(path: Path, names: list[str] | None = None) -> SplitReaders:
    """The `train`, `val` and `test` images of `setid.mat`.

    Args:
        path: of the folder.
        names: of the classes in the order of their numbers, which the files do not have; without
            them, the numbers are the names.

    Raises:
        ValueError: a file is missing or damaged, or there is another number of names.
        OSError: an image is missing.
        ImportError: scipy is not installed, which scikit-learn brings.
    """
    if missing := [name for name in (LABELS, SETS, "jpg") if not (path / name).exists()]:
        raise ValueError(f"{path} is not all of Flowers-102: no {', '.join(missing)}")
    require(f"{path}: reading {LABELS}", "scipy", extra="train")
    (labels,) = _numbers(path / LABELS, ["labels"])
    sets = dict(zip(SPLITS, _numbers(path / SETS, list(SPLITS.values())), strict=True))
    if (last := max(numbers.max() for numbers in sets.values())) > len(labels):
        raise ValueError(f"{path / SETS}: image {last} has no label in {LABELS}")
    classes = names or [str(number + 1) for number in range(labels.max())]
    if len(classes) != labels.max():
        raise ValueError(
            f"{path} has {labels.max()} classes, and {len(classes)} names are given for them"
        )
    splits = {}
    for split, numbers in sets.items():
        files = Files(path / "jpg", [f"image_{number:05d}.jpg" for number in numbers])
        refuse_missing(path / SETS, files)
        of_images = [classes[label - 1] for label in labels[numbers - 1]]
        splits[split] = partial(LabelledImages, files, of_images, classes)
    return splits


def _numbers(path: Path, keys: list[str]) -> list[np.ndarray]:
    """The arrays of a file of MATLAB, whole numbers from 1 on, each flat."""
    from scipy.io import loadmat

    try:
        found = loadmat(path, variable_names=keys)
        arrays = [np.asarray(found[key]).ravel() for key in keys]
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f"{path} was not read: {error}") from error
    for key, array in zip(keys, arrays, strict=True):
        if not np.issubdtype(array.dtype, np.integer) or not array.size or array.min() < 1:
            raise ValueError(f"{path}: {key} must be whole numbers from 1 on")
    return [array.astype(np.int64) for array in arrays]
