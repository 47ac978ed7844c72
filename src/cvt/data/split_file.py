"""The split that a run has drawn, as a file: which images it was trained on, which validate it."""

import csv
from pathlib import Path

from cvt.data.labelled import LabelledImages, divide
from cvt.files import ADAPTER, model_folder, staged

COLUMNS = ["path", "split"]
TRAIN, VALIDATION = "train", "validation"


def run_of(model: str | Path) -> Path:
    """The folder of a run: itself, or where its model folder is, or the adapter in that."""
    folder = model_folder(Path(model)).resolve()
    return folder.parent.parent if (folder / ADAPTER).is_file() else folder.parent


def write_split(path: str | Path, train: LabelledImages, validation: LabelledImages) -> None:
    """Write which images are trained on and which validate, where both were drawn from one source.

    Args:
        path: a csv file with the columns path and split; one that is there is replaced. Paths are
            relative to the folder of the data; images that are no files have their names.
        train: the images to train on.
        validation: those that validate.

    Raises:
        OSError: the file cannot be written.

    Example:
        >>> from pathlib import Path
        >>> from cvt.data import open_labelled, split, write_split
        >>> write_split("split.csv", *split(open_labelled("digits"), seed=0))
        >>> Path("split.csv").read_text().splitlines()[0]
        'path,split'
    """
    with (
        staged(path, overwrite=True) as beside,
        open(beside, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for split, images in ((TRAIN, train), (VALIDATION, validation)):
            writer.writerows((images.name(i), split) for i in range(len(images)))


def read_split(path: str | Path) -> dict[str, str]:
    """The splits, `train` or `validation`, by the names of the images, as `write_split` wrote them.

    Raises:
        ValueError: it is no such file; names the line.
        OSError: the file cannot be read.

    Example:
        >>> from cvt.data import open_labelled, read_split, split, write_split
        >>> write_split("drawn.csv", *split(open_labelled("digits"), seed=0))
        >>> sorted(set(read_split("drawn.csv").values()))
        ['train', 'validation']
    """
    found: dict[str, str] = {}
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, None)
            if header != COLUMNS:
                raise ValueError(f"{path}, line 1: must be {','.join(COLUMNS)}")
            for row in reader:
                if len(row) != 2 or row[1] not in (TRAIN, VALIDATION):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: must be a path and {TRAIN} or "
                        f"{VALIDATION}"
                    )
                found[row[0]] = row[1]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return found


def recorded_split(
    images: LabelledImages, path: str | Path
) -> tuple[LabelledImages, LabelledImages] | None:
    """The training and the validation images, as a file has them; None if it is of other images.

    Raises:
        ValueError: the file is malformed.
        OSError: it cannot be read.
    """
    return _divided(images, read_split(path))


def _divided(
    images: LabelledImages, splits: dict[str, str]
) -> tuple[LabelledImages, LabelledImages] | None:
    names = [images.name(i) for i in range(len(images))]
    if splits.keys() != set(names):
        return None
    return divide(images, {i for i, name in enumerate(names) if splits[name] == VALIDATION})


def without_trained(images: LabelledImages, path: str | Path) -> tuple[LabelledImages, int]:
    """The images to evaluate a run with, by the split that it has drawn.

    Args:
        images: those of the data.
        path: the file that `write_split` wrote.

    Returns:
        The validation images alone, and 0, if the images are those of the split; else all, and how
        many of them have the name of an image that the run was trained on.

    Raises:
        ValueError: the file is malformed.
        OSError: it cannot be read.

    Example:
        >>> from cvt.data import open_labelled, split, without_trained, write_split
        >>> images = open_labelled("digits")
        >>> train, validation = split(images, seed=0)
        >>> write_split("of-run.csv", train, validation)
        >>> left, trained = without_trained(images, "of-run.csv")
        >>> len(left) == len(validation), trained
        (True, 0)
    """
    splits = read_split(path)
    if recorded := _divided(images, splits):
        return recorded[1], 0
    return images, sum(splits.get(images.name(i)) == TRAIN for i in range(len(images)))
