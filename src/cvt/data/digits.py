"""scikit-learn's 1,797 handwritten digits, 8 x 8 pixels: a data set that needs no download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998.
"""

from functools import partial
from pathlib import Path

from PIL import Image

from cvt.data.decoding import StoredImage
from cvt.data.labelled import LabelledImages, SplitReaders
from cvt.files import staged


def digits_splits() -> SplitReaders:
    """The digits, in memory, split 80/20 into `train` and `test`, stratified, always alike.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    pictures, labels, splits = _digits()
    stored = [StoredImage(f"digit#{i}", picture) for i, picture in enumerate(pictures)]
    images = LabelledImages(stored, labels)
    return {name: partial(images.select, indices) for name, indices in splits.items()}


def write_digits(root: str | Path) -> None:
    """Write the digits as PNG files: an image folder, with the splits of `digits_splits`.

    Raises:
        FileExistsError: `root` is there already.
        ImportError: scikit-learn is not installed.

    Example:
        >>> from pathlib import Path
        >>> from cvt.data import write_digits
        >>> write_digits("digits-png")
        >>> sorted(each.name for each in Path("digits-png").iterdir())
        ['test', 'train']
    """
    pictures, labels, splits = _digits()
    with staged(root) as folder:
        for name, indices in splits.items():
            for i in indices:
                path = folder / name / labels[i] / f"{i:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pictures[i].save(path)


def _digits() -> tuple[list[Image.Image], list[str], dict[str, list[int]]]:
    """The pictures, their labels, and which belong to which split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = (digits.images * (255 / 16)).round().astype("uint8")  # they are counts from 0 to 16
    train, test = train_test_split(
        range(len(grey)), test_size=0.2, stratify=digits.target, random_state=0
    )
    labels = [str(digit) for digit in digits.target]
    return [Image.fromarray(pixels) for pixels in grey], labels, {"train": train, "test": test}
