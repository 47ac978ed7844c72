"""Pictures to try the page with."""

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from cvt.data import LabelledImages, StoredImage, images_below, open_labelled, without_trained
from cvt.data.decoding import Source
from cvt.data.split_file import run_of
from cvt.libraries import is_installed

logger = logging.getLogger(__name__)
MAX_EXAMPLES = 12  # examples on the page
REMOTE = ("hub:", "stream:")  # data that is not on this machine
CREDITS = {  # of scikit-learn's photographs, as their licence demands
    "china.jpg": "© danielbuechele, CC BY 2.0",
    "flower.jpg": "© vultilion, CC BY 2.0",
}


class Example(NamedTuple):
    """A picture to try, what the page calls it, and whom it owes a mention."""

    name: str
    source: Source
    credit: str = ""


def find_examples(model: str, folder: Path | None, private: bool) -> list[Example]:
    """Up to `MAX_EXAMPLES` pictures to try.

    Args:
        model: the name, folder or file of the model.
        folder: of the pictures; without one, the validation images of the model's run are taken,
            of each class the first, else the photographs that scikit-learn brings along.
        private: whether nobody but this machine sees the page. To others, no images are shown that
            nobody has chosen for them.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
    """
    if folder is not None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder of examples")
        found = [Example(path.name, path) for path in islice(images_below(folder), MAX_EXAMPLES)]
        if not found:
            raise FileNotFoundError(f"{folder} has no images in it")
        return found
    own = list(islice(run_examples(Path(model)), MAX_EXAMPLES)) if private else []
    return own or scikit_learn_examples()


def run_examples(model: Path) -> Iterator[Example]:
    """The first validation image of each class, of the run that a model folder is in."""
    import yaml

    settings, split = (run_of(model) / name for name in ("args.yaml", "split.csv"))
    if not settings.is_file():
        return
    recipe = yaml.safe_load(settings.read_text("utf-8"))
    data = str(recipe.get("val_data") or recipe.get("data") or "")
    if not data or data.startswith(REMOTE):
        return
    how = {name: recipe.get(name) for name in ("classes", "image_column", "label_column")}
    try:
        images = open_labelled(data, **how)
    except (ImportError, OSError, ValueError) as error:
        logger.warning(f"no examples, as the data of the run cannot be opened: {error}")
        return
    if not isinstance(images, LabelledImages):
        return
    if split.is_file():
        images, _ = without_trained(images, split)
    for name in images.classes:
        if name in images.labels:
            yield Example(name, images[images.labels.index(name)][0])


def scikit_learn_examples() -> list[Example]:
    """Its two photographs, a temple and a flower; none where it is not installed."""
    if not is_installed("sklearn"):
        return []
    from importlib.resources import files

    pictures = files("sklearn.datasets.images")
    return [
        Example(name, StoredImage(name, pictures.joinpath(name).read_bytes()), credit)
        for name, credit in CREDITS.items()
    ]
