"""The images that look most alike to a model: nearest neighbours in a file of embeddings."""

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cvt.checkpoints import ModelSource, model_source
from cvt.data.decoding import ImageError, Source, StoredImage
from cvt.files import staged
from cvt.inference.embedding_file import Embeddings
from cvt.inference.page import SIDE, embedded_thumbnail, render, thumbnail, write_page
from cvt.inference.predict import Result
from cvt.libraries import require
from cvt.runtime import FeatureSettings
from cvt.text import csv_cell, utf8

EXACT_ROWS = 100_000  # up to here, queries are compared with all rows
RECALL = 0.95  # of a clustered index, at least
SAMPLE = 100  # rows, on which its recall is measured
TRAINING_ROWS = 64  # of each cluster
FEW = 250  # queries, for which clusters are not worth their time
TOP = 12  # neighbours
SUFFIXES = (".png", ".html", ".csv", ".json")  # of what `write_answers` writes
WIDTH = 18  # characters above a picture
SHOWN = 100  # queries on a sheet or a page


class Neighbour(NamedTuple):
    """A row that was found.

    Attributes:
        path: of its image.
        label: its class, None where that is unknown.
        similarity: the cosine of its features and the query's.
    """

    path: str
    label: str | None
    similarity: float


class Answer(NamedTuple):
    """What was found for an image.

    Attributes:
        query: its path.
        neighbours: the nearest first.
    """

    query: str
    neighbours: list[Neighbour]


class Index:
    """Finds the rows of a file of embeddings whose features have the largest cosine with a query's.

    With `exact`, by comparing with every row. Else rows are in clusters (`IndexIVFFlat` of faiss),
    of which the nearest are searched: as many as give 95 % of the right neighbours of a sample.
    Building clusters takes as long as about 250 exact queries.

    Args:
        embeddings: at least one row.
        exact: compare with every row; by default up to 100,000 of them.

    Attributes:
        embeddings: the rows.
        exact: whether queries are compared with every row.
        recall: the share of the `TOP` nearest rows that it finds, measured on a sample of the rows;
            1 if it is exact.

    Raises:
        ImportError: faiss is not installed.
        ValueError: there are no rows, or features that are not finite.

    Example:
        >>> import numpy as np
        >>> from cvt.inference.embedding_file import Embeddings
        >>> from cvt.inference.search import Index
        >>> values = np.array([[1, 0], [0, 1], [4, 3]], "float32")
        >>> index = Index(Embeddings(values, ["a.png", "b.png", "c.png"], ["cat", "dog", "cat"]))
        >>> [neighbour.path for neighbour in index(np.array([[2, 0]]), top=2)[0]]
        ['a.png', 'c.png']
    """

    def __init__(self, embeddings: Embeddings, exact: bool | None = None) -> None:
        require("a search", "faiss", extra="search")
        import faiss

        if not len(embeddings):
            raise ValueError("there are no rows to search")
        self.embeddings = embeddings
        rows, self.width = embeddings.values.shape
        directions = normalised(embeddings.values)
        flat = faiss.IndexFlatIP(self.width)
        self.recall = 1.0
        self.exact = rows <= EXACT_ROWS if exact is None else exact
        if self.exact:
            flat.add(directions)
            self._index: Any = flat
            return
        clusters = max(1, int(rows**0.5))
        self._index = faiss.IndexIVFFlat(flat, self.width, clusters, faiss.METRIC_INNER_PRODUCT)
        self._index.cp.min_points_per_centroid = 1  # few rows are no reason to print a warning
        draw = np.random.default_rng(0)
        sample = draw.permutation(rows)[: clusters * TRAINING_ROWS]
        self._index.train(directions[sample])
        self._index.add(directions)
        self._index.nprobe = 1
        queries = directions[sample[:SAMPLE]]
        top = min(TOP, rows)
        _, right = faiss.knn(queries, directions, top, metric=faiss.METRIC_INNER_PRODUCT)
        while (recall := self._recall(queries, right)) < RECALL and self._index.nprobe < clusters:
            self._index.nprobe *= 2
        self.recall = recall

    @property
    def describe(self) -> str:
        """How many rows there are, and how they are searched, as a text."""
        how = "all compared" if self.exact else f"by clusters, recall {self.recall:.3f}"
        return f"{len(self.embeddings):,} rows of {self.width} features, {how}"

    def _recall(self, queries: np.ndarray, right: np.ndarray) -> float:
        _, found = self._index.search(queries, right.shape[1])
        pairs = zip(found, right, strict=True)
        return float(np.mean([np.isin(of_query, nearest).mean() for of_query, nearest in pairs]))

    def __call__(self, queries: np.ndarray, top: int = TOP) -> list[list[Neighbour]]:
        """The nearest rows of each query, the nearest first.

        Args:
            queries: features, (Q, C).
            top: rows for each query; fewer where there are fewer.

        Raises:
            ValueError: the features have another width than the rows, or are not finite.
        """
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise ValueError(
                f"queries have shape {queries.shape}: expected (queries, {self.width}), as the "
                "rows of the index"
            )
        cosines, positions = self._index.search(normalised(queries), min(top, len(self.embeddings)))
        return [
            [self._neighbour(i, cosine) for i, cosine in zip(*of_query, strict=True) if i >= 0]
            for of_query in zip(positions.tolist(), cosines.tolist(), strict=True)
        ]

    def _neighbour(self, i: int, cosine: float) -> Neighbour:
        return Neighbour(self.embeddings.paths[i], self.embeddings.labels[i], cosine)


def normalised(values: np.ndarray) -> np.ndarray:
    """Features of length 1, (N, C) in float32; those of length 0 stay.

    Raises:
        ValueError: they are not finite.
    """
    values = np.asarray(values, np.float32)
    if not np.isfinite(values).all():
        raise ValueError("features must be finite")
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.ascontiguousarray(values / np.where(lengths > 0, lengths, 1))


def answers(index: Index, images: Sequence[Result], top: int = TOP) -> list[Answer]:
    """The neighbours of images; an image that is in the index does not find itself.

    Args:
        index: what is searched.
        images: with features, by the model of the index.
        top: neighbours of each.
    """
    paths = [str(each.path) for each in images]
    found = index(np.stack([np.asarray(each.features) for each in images]), top + 1)
    every = {*paths, *(each.path for neighbours in found for each in neighbours)}
    place = dict(zip(every, places(every), strict=True))
    return [
        Answer(path, [each for each in neighbours if place[each.path] != place[path]][:top])
        for path, neighbours in zip(paths, found, strict=True)
    ]


# ------------------------------------------------------------------------------ the model


def model_of(embeddings: Embeddings, path: Path, model: str | None = None) -> ModelSource:
    """The model that computed the rows of a file.

    Args:
        embeddings: what is in the file.
        path: of the file.
        model: its name, if that is not the one in the file.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the file names no model, or the model has other files than the one that computed
            the rows.
    """
    name = model or embeddings.about.get("model")
    if not name:
        raise ValueError(f"{path} does not name the model that computed it: give its --model")
    source = model_source(name)
    expected = embeddings.about.get("sha256")
    if expected and source.sha256 != expected:
        raise ValueError(
            f"{path} was computed by another model than {name}, by SHA-256 ({expected[:12]}, not "
            f"{source.sha256[:12]}): give the right --model, or embed the images again with {name}"
        )
    return source


def features_of(embeddings: Embeddings) -> FeatureSettings:
    """The settings by which the rows of a file were computed."""
    return FeatureSettings(embeddings.about.get("stage"), embeddings.about.get("pool"))


# ------------------------------------------------------------------------------ rows


def places(paths: Iterable[str | Path]) -> list[str]:
    """Where images lie: the same for every spelling of a path, relative or through a linked folder.

    Of an image in a table or an archive it is a name of its own.
    """
    folders: dict[str, str] = {}
    found = []
    for path in paths:
        folder, name = os.path.split(utf8(str(path)))  # as a file has it
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        found.append(os.path.join(folders[folder], name))
    return found


def distinct(paths: Iterable[Path]) -> list[Path]:
    """The paths without those that spell an earlier one in another way."""
    paths = list(paths)
    first: dict[str, Path] = {}
    for place, path in zip(places(paths), paths, strict=True):
        first.setdefault(place, path)
    return list(first.values())


def without(embeddings: Embeddings, patterns: Sequence[str]) -> Embeddings:
    """The rows whose path matches none of these patterns of the shell, such as `photos/old/*`.

    Raises:
        ValueError: a pattern matches no path, or no row would stay.

    Example:
        >>> import numpy as np
        >>> from cvt.inference.embedding_file import Embeddings
        >>> from cvt.inference.search import without
        >>> rows = Embeddings(np.eye(2, dtype="float32"), ["old/a.png", "b.png"], [None, None])
        >>> without(rows, ["old/*"]).paths
        ['b.png']
    """
    gone = np.zeros(len(embeddings), bool)
    for pattern in patterns:
        matching = np.array([fnmatchcase(path, pattern) for path in embeddings.paths])
        if not matching.any():
            raise ValueError(f"{pattern} matches no path of the {len(gone)} rows")
        gone |= matching
    if gone.all():
        raise ValueError("no row would stay")
    return _rows(embeddings, np.flatnonzero(~gone).tolist())


def with_rows(embeddings: Embeddings, images: Sequence[Result]) -> Embeddings:
    """The rows with those of other images behind them, which replace rows of the same image.

    An image is the same however its path is spelt; see `places`. An image in a folder that is
    named as a class of the rows gets this class.

    Args:
        embeddings: the rows.
        images: with features, by the model of the rows.
    """
    added = dict(zip(places([str(each.path) for each in images]), images, strict=True))
    of_rows = places(embeddings.paths)
    kept = _rows(embeddings, [i for i, place in enumerate(of_rows) if place not in added])
    classes = set(embeddings.labels)
    folders = (Path(place).parent.name for place in added)
    new = [np.asarray(each.features) for each in added.values()]
    return replace(
        kept,
        values=np.concatenate([kept.values, np.stack(new)]),
        paths=[*kept.paths, *(str(each.path) for each in added.values())],
        labels=[*kept.labels, *(name if name in classes else None for name in folders)],
    )


def _rows(embeddings: Embeddings, positions: Sequence[int]) -> Embeddings:
    return replace(
        embeddings,
        values=embeddings.values[list(positions)],
        paths=[embeddings.paths[i] for i in positions],
        labels=[embeddings.labels[i] for i in positions],
    )


# ------------------------------------------------------------------------------ files


def write_answers(
    answers: Sequence[Answer], path: str | Path, title: str, overwrite: bool = False
) -> None:
    """Write the neighbours of every query as a sheet of pictures or as a table.

    Args:
        answers: what was found.
        path: ends in .png or .html, for pictures, or in .csv or .json.
        title: of the sheet.
        overwrite: it may be replaced.

    Raises:
        FileExistsError: it is there already and may not be overwritten.
        ValueError: it has another suffix.
        ImportError: what draws the sheet is not installed.
    """
    path = Path(path)
    check_output(path)
    with staged(path, overwrite) as written:
        if path.suffix == ".csv":
            _write_csv(answers, written)
        elif path.suffix == ".json":
            _write_json(answers, written)
        else:
            if len(answers) > SHOWN:
                title += f"; the first {SHOWN} of {len(answers)} queries"
            draw = _write_sheet if path.suffix == ".png" else _write_page
            draw(answers[:SHOWN], written, title)


def check_output(path: Path) -> None:
    """Make sure that `write_answers` can write a file of this name.

    Raises:
        ValueError: it has another suffix.
        ImportError: what draws the sheet is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if path.suffix == ".png":
        require("a sheet of pictures", "matplotlib", extra="search")
    if path.suffix == ".html":
        require("a page of pictures", "jinja2", extra="search")


def _write_sheet(answers: Sequence[Answer], path: Path, title: str) -> None:
    from cvt.inference.report import Cell, plot_sheet, short

    cells = []
    for query, neighbours in answers:
        cells.append(Cell(_drawable(query), f"query\n{short(Path(query).name, WIDTH)}", None))
        for each in neighbours:
            name = each.label or Path(each.path).name
            caption = f"{each.similarity:.3f}\n{short(name, WIDTH)}"
            cells.append(Cell(_drawable(each.path), caption, None))
    plot_sheet(cells, title, path, columns=1 + len(answers[0].neighbours))


def _drawable(path: str) -> Source:
    """The image of a path; a grey one if it is no file, or cannot be decoded any more."""
    try:
        return StoredImage(path, thumbnail(Path(path)))
    except ImageError:
        return StoredImage(path, Image.new("L", (SIDE, SIDE), 230))


def _write_page(answers: Sequence[Answer], path: Path, title: str) -> None:
    @cache
    def picture(name: str) -> str:
        return embedded_thumbnail(_drawable(name))

    write_page(path, render("search.html.jinja", title=title, answers=answers, picture=picture))


def _write_csv(answers: Sequence[Answer], path: Path) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("query", "rank", "path", "label", "similarity"))
        for query, neighbours in answers:
            for rank, each in enumerate(neighbours, 1):
                names = csv_cell(each.path), csv_cell(each.label or "")
                writer.writerow((csv_cell(query), rank, *names, f"{each.similarity:.6f}"))


def _write_json(answers: Sequence[Answer], path: Path) -> None:
    found = [
        {"query": query, "neighbours": [each._asdict() for each in neighbours]}
        for query, neighbours in answers
    ]
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
