"""Class names: ImageNet's, and those a user brings in a file."""

import json
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path

from cvt.text import CLASSES, listed


@cache
def imagenet_classes() -> dict[str, str]:
    """The 1000 classes of ImageNet-1k in the order of the classifier: WordNet id to its lemmas.

    Source: WordNet 3.0 and the ILSVRC-2012 list of synsets. The two "crane" are distinguished.
    """
    lines = files("cvt.data").joinpath("imagenet1k.tsv").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


def distinct_names(names: Iterable[str]) -> list[str]:
    """Class names of which none stands for two classes: a repeated one gets the class's number.

    Example:
        >>> from cvt.data.class_names import distinct_names
        >>> distinct_names(["crane", "cat", "crane"])
        ['crane (0)', 'cat', 'crane (2)']
    """
    names = list(names)
    counts = Counter(names)
    return [f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(names)]


def read_labels(path: str | Path, classes: int | None = None) -> list[str]:
    """Class names in the order of the classifier, from a text file or a JSON list or id2label map.

    A text that begins with a bracket is JSON.

    Args:
        path: a text file with one name per line, or JSON.
        classes: how many there must be, if that is known.

    Raises:
        ValueError: the file does not hold that many different names.
        OSError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    # A list on one line is no name, whatever the file is called.
    if Path(path).suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        found = found.get("id2label", found) if isinstance(found, dict) else found
        if isinstance(found, dict):
            try:
                found = [found[str(i)] for i in range(len(found))]
            except KeyError as error:
                raise ValueError(f"{path} has no name for class {error}") from error
        labels = found
    else:
        labels = [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path} must hold a list of names or a map from class index to name")
    if classes is not None and len(labels) != classes:
        raise ValueError(f"{path} has {len(labels)} names; the classifier has {classes} classes")
    if repeated := sorted(label for label, count in Counter(labels).items() if count > 1):
        raise ValueError(f"{path} names classes twice: {listed(repeated, CLASSES)}")
    return labels
