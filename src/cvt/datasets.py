"""Labelled image files: folders of one class each, and scikit-learn's digits written as such."""

import random
from dataclasses import dataclass
from pathlib import Path

from cvt.files import staged
from cvt.images import IMAGE_SUFFIXES

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("val", "valid", "validation", "test")


@dataclass(frozen=True)
class LabelledImages:
    """Image files, each with the name of its class."""

    samples: list[tuple[Path, str]]

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [path for path, _ in self.samples]

    @property
    def labels(self) -> list[str]:
        """The name of the class of each file."""
        return [label for _, label in self.samples]

    @property
    def classes(self) -> list[str]:
        """The names of the classes, sorted."""
        return sorted(set(self.labels))

    def __len__(self) -> int:
        return len(self.samples)


def images_below(folder: Path) -> list[Path]:
    """The image files in a folder and in the folders in it, told by suffix, sorted; none hidden."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." and path.is_file()
    )


def image_folder(root: str | Path) -> LabelledImages:
    """The images of a folder that has one sub-folder per class, named like it.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no class folders, or some without images; names all of those.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")
    if not folders:
        raise ValueError(f"{root} has no folder per class in it")
    samples = [(path, folder.name) for folder in folders for path in images_below(folder)]
    if empty := {folder.name for folder in folders} - {label for _, label in samples}:
        raise ValueError(f"{root} has classes without images: {', '.join(sorted(empty))}")
    return LabelledImages(samples)


def train_and_test(root: str | Path, seed: int = 0) -> tuple[LabelledImages, LabelledImages]:
    """Its `train` and `val` (or `test`) folders, or a stratified 80/20 split of its class folders.

    Raises:
        ValueError: there is only one class, the halves differ in their classes, or a class is too
            small to split.
    """
    root = Path(root)
    names = {path.name: path for path in root.iterdir()} if root.is_dir() else {}
    train_root = next((names[name] for name in TRAIN_NAMES if name in names), None)
    test_root = next((names[name] for name in TEST_NAMES if name in names), None)
    if train_root and not test_root and any(path.is_dir() for path in train_root.iterdir()):
        raise ValueError(
            f"{root} has a {train_root.name} folder and none of {', '.join(TEST_NAMES)}"
        )
    if train_root is None or test_root is None:
        train, test = split(image_folder(root), seed)
    else:
        train, test = image_folder(train_root), image_folder(test_root)
        if differing := set(train.classes) ^ set(test.classes):
            raise ValueError(
                f"only one of {train_root} and {test_root} has {', '.join(sorted(differing))}"
            )
    if len(train.classes) < 2:
        raise ValueError(f"{root} has a single class, {train.classes[0]}; at least two are needed")
    return train, test


def split(images: LabelledImages, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Four fifths and one fifth of every class, drawn by `seed`, at least one image in each.

    Raises:
        ValueError: a class has a single image.
    """
    train, test = [], []
    for name in images.classes:
        samples = [sample for sample in images.samples if sample[1] == name]
        if len(samples) < 2:
            raise ValueError(f"class {name} has one image, {samples[0][0]}: too few to split")
        random.Random(f"{seed} {name}").shuffle(samples)
        cut = max(1, round(len(samples) / 5))
        test += sorted(samples[:cut])
        train += sorted(samples[cut:])
    return LabelledImages(train), LabelledImages(test)


def write_digits(root: str | Path, seed: int = 0) -> None:
    """Write scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, as PNG files.

    They are split 80/20 into `train` and `test`, stratified, by `seed`. Source: E. Alpaydin and
    C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.

    Raises:
        FileExistsError: `root` is there already.
        ImportError: scikit-learn is not installed.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    split = train_test_split(
        range(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=seed
    )
    with staged(root) as folder:
        for name, indices in zip(("train", "test"), split, strict=True):
            for i in indices:
                path = folder / name / str(digits.target[i]) / f"{i:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                # The grey values are counts from 0 to 16.
                Image.fromarray((digits.images[i] * (255 / 16)).round().astype("uint8")).save(path)
