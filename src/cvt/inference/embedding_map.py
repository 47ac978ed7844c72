"""A map of images: their features in two dimensions, as a page on which every point is a picture.

Positions are those of PCA or of t-SNE, both by scikit-learn. The page needs no other file: its
pictures are parts of a few WebP sheets within it.
"""

import base64
import io
import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cvt.data.decoding import ImageError, Source, decode
from cvt.files import staged
from cvt.inference.embedding_file import Embeddings
from cvt.inference.page import render, write_page
from cvt.inference.search import normalised
from cvt.libraries import require
from cvt.text import printable, utf8

METHODS = ("tsne", "pca")
MOST_TSNE = 10_000  # images, which take it a minute or two
COMPONENTS = 50  # of PCA, which t-SNE starts from
THUMBNAIL, COLUMNS = 64, 20  # pixels of a picture; pictures in a row of a sheet
QUALITY = 70  # of the sheets
COLOURED = 24  # classes with a colour of their own, the largest


def positions(values: np.ndarray, method: str | None = None) -> np.ndarray:
    """Where images lie on a map, (N, 2), from -1 to 1.

    Args:
        values: their features, (N, C).
        method: "pca" or "tsne"; by default t-SNE up to 10,000 images. Both see directions: features
            of length 1.

    Raises:
        ValueError: there are fewer than three images, or the method is another one.
        ImportError: scikit-learn is not installed.

    Example:
        >>> import numpy as np
        >>> from cvt.inference.embedding_map import positions
        >>> values = np.random.default_rng(0).normal(size=(20, 8)).astype("float32")
        >>> positions(values, "pca").shape
        (20, 2)
    """
    require("a map", "sklearn", extra="search")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method not in (None, *METHODS):
        raise ValueError(f"method = {method!r}: must be one of {', '.join(METHODS)}")
    count = len(values)
    if count < 3:
        raise ValueError(f"a map needs at least three images, and there are {count}")
    if method is None:
        method = "tsne" if count <= MOST_TSNE else "pca"
    kept = min(COMPONENTS if method == "tsne" else 2, *values.shape)
    places = PCA(kept, random_state=0).fit_transform(normalised(values))  # (N, kept)
    if method == "tsne":
        tsne = TSNE(perplexity=min(30, (count - 1) / 3), random_state=0)
        places = tsne.fit_transform(places)
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))  # of a single feature
    middle = (places.max(axis=0) + places.min(axis=0)) / 2
    return (places - middle) / max(np.ptp(places, axis=0).max() / 2, 1e-12)


def write_map(
    embeddings: Embeddings,
    path: str | Path,
    title: str,
    method: str | None = None,
    images: Iterable[Source] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a map as one HTML page. A point has the colour of its class, and shows its picture.

    Args:
        embeddings: at least three rows.
        path: the page, which ends in .html.
        title: its heading.
        method: as in `positions`.
        images: of the rows, in any order, and others; read once. A row whose image is not among
            them is drawn from the file of its path, and so are all by default.
        overwrite: it may be replaced.

    Raises:
        FileExistsError: it is there already and may not be overwritten.
        ValueError: there are fewer than three rows, the method is another one, or the page has
            another suffix.
        ImportError: scikit-learn or jinja2 is not installed.
    """
    check_output(Path(path))
    with staged(path, overwrite) as written:
        places = positions(embeddings.values, method)
        counts = Counter(label for label in embeddings.labels if label is not None)
        classes = [label for label, _ in counts.most_common(COLOURED)]
        number = {label: i for i, label in enumerate(classes)}
        points = {
            "x": places[:, 0].round(4).tolist(),
            "y": places[:, 1].round(4).tolist(),
            "label": [number.get(label or "", -1) for label in embeddings.labels],
            "text": [
                printable(f"{label}\n{name}" if label else name, keep="\n")
                for name, label in zip(embeddings.paths, embeddings.labels, strict=True)
            ],
        }
        page = render(
            "map.html.jinja",
            title=title,
            classes=[(label, counts[label]) for label in classes],
            others=len(embeddings) - sum(counts[label] for label in classes),
            points=json.dumps(points).replace("<", "\\u003c"),
            sheets=_sheets(_in_order(embeddings.paths, images or ())),
            side=THUMBNAIL,
            columns=COLUMNS,
        )
        write_page(written, page)


def check_output(path: Path) -> None:
    """Make sure that `write_map` can write a page of this name.

    Raises:
        ValueError: it has another suffix.
        ImportError: scikit-learn or jinja2 is not installed.
    """
    if path.suffix != ".html":
        raise ValueError(f"{path} must end in .html")
    require("a map", "sklearn", "jinja2", extra="search")


def _in_order(names: Sequence[str], images: Iterable[Source]) -> Iterator[Source]:
    """The images of these names, in this order; only those that come too early are kept."""
    remaining = iter(images)
    early: defaultdict[str, deque[Source]] = defaultdict(deque)
    for name in names:
        while not early[name] and (image := next(remaining, None)) is not None:
            early[utf8(str(image))].append(image)
        yield early[name].popleft() if early[name] else Path(name)


def _sheets(images: Iterator[Source]) -> list[str]:
    """The pictures, `COLUMNS` in each row of a square sheet, as URLs of data."""
    sheets = []
    while some := list(islice(images, COLUMNS**2)):
        rows = -(-len(some) // COLUMNS)
        sheet = Image.new("RGB", (COLUMNS * THUMBNAIL, rows * THUMBNAIL), (230, 230, 230))
        for i, image in enumerate(some):
            place = i % COLUMNS * THUMBNAIL, i // COLUMNS * THUMBNAIL
            try:
                small = decode(image, least=THUMBNAIL, least_of_large=THUMBNAIL)
            except ImageError:  # it is no file any more
                continue
            tiny = min(small.size) < THUMBNAIL / 2
            method = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
            sheet.paste(ImageOps.pad(small, (THUMBNAIL,) * 2, method, color="white"), place)
        file = io.BytesIO()
        sheet.save(file, "WEBP", quality=QUALITY)
        sheets.append("data:image/webp;base64," + base64.b64encode(file.getvalue()).decode())
    return sheets
