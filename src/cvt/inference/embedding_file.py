"""The file of embeddings: a row of features for each image, beside its path and its class.

| suffix | what is in it |
|---|---|
| `.parquet` | columns `path`, `label` and `features`, a list of as many float32 in each row |
| `.npz` | arrays `features` (N, C), `path`, `label` (empty where there is none), `about` as JSON |
| `.npy` | the array (N, C); beside it a `.json` of the same name with `about`, `path` and `label` |

What computed the features, `about`, is JSON in the schema's metadata of a parquet file, as `cvt`.
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy

from cvt.checkpoints import ModelSource
from cvt.files import read_json, staged
from cvt.inference.predict import Result
from cvt.inference.result_file import ROWS, Record, RowFile
from cvt.libraries import require
from cvt.runtime.base import Runtime
from cvt.text import utf8

SUFFIXES = (".parquet", ".npz", ".npy")
ABOUT = b"cvt"  # the key in a parquet file's metadata


@dataclass(frozen=True)
class Embeddings:
    """Features of images.

    Attributes:
        values: (N, C) in float32, a row for each image.
        paths: of the images; of an image in a table or an archive, its name there.
        labels: the class of each image, None where it is unknown.
        about: what computed them, see `about_run`; empty where other software wrote the file.
        unread: names of what else the file has, such as a column that was added to it.

    Example:
        >>> import numpy as np
        >>> from cvt.inference.embedding_file import Embeddings
        >>> len(Embeddings(np.zeros((2, 8), "float32"), ["a.png", "b.png"], ["cat", None]))
        2
    """

    values: np.ndarray
    paths: list[str]
    labels: list[str | None]
    about: dict[str, Any] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)


def about_run(
    source: ModelSource, runtime: Runtime, processor: Any, normalize: bool = False
) -> dict[str, Any]:
    """What `Embeddings` and `EmbeddingFile` keep of what computes features.

    Args:
        source: the model.
        runtime: opened with features.
        processor: the image processor.
        normalize: whether the features of an image have length 1.
    """
    features = runtime.feature_settings
    assert features
    return {
        "model": source.name,
        "sha256": source.sha256,
        "stage": features.stage,
        "pool": features.pool,
        "normalize": normalize,
        "width": features.width(runtime.config),
        "image_size": getattr(processor, "image_size", None),
        "runtime": runtime.name,
        "precision": runtime.precision,
    }


class Rows(NamedTuple):
    """Some rows of a file.

    Attributes:
        paths: of the images.
        labels: their classes.
        values: their features, (n, C).
    """

    paths: list[str]
    labels: list[str | None]
    values: np.ndarray


def check_suffix(path: Path) -> None:
    """Make sure that embeddings can be in a file of this name.

    Raises:
        ValueError: it has another suffix.
        ImportError: what reads and writes it is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    if path.suffix == ".parquet":
        require(f"{path}", "pyarrow", extra="search")


def files_of(path: Path) -> list[Path]:
    """The files that hold the embeddings of this name: of an array alone, two."""
    return [path, path.with_suffix(".json")] if path.suffix == ".npy" else [path]


# ------------------------------------------------------------------------------ reading


def read_embeddings(path: str | Path) -> Embeddings:
    """Read a file of `cvt embed`.

    Args:
        path: ends in .parquet, .npz or .npy.

    Raises:
        FileNotFoundError: there is no such file, or no .json beside an .npy.
        ValueError: it is no such file, or damaged; names what is wrong.
        ImportError: pyarrow, for a parquet file, is not installed.

    Example:
        >>> import numpy as np
        >>> from cvt.inference.embedding_file import (
        ...     Embeddings, read_embeddings, write_embeddings
        ... )
        >>> rows = Embeddings(np.eye(2, dtype="float32"), ["a.png", "b.png"], ["cat", None])
        >>> write_embeddings(rows, "features.npz")
        >>> read_embeddings("features.npz").labels
        ['cat', None]
    """
    path = Path(path)
    check_suffix(path)
    readers = {".parquet": _read_parquet, ".npz": _read_npz, ".npy": _read_npy}
    for file in files_of(path):
        if not file.is_file():
            beside = "" if file == path else f", which names the rows of {path}"
            raise FileNotFoundError(f"{file} does not exist{beside}")
    try:
        found = readers[path.suffix](path)
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not what cvt embed writes, or damaged: {error}") from error
    values, count = found.values, len(found.paths)
    if values.dtype != np.float32 or values.ndim != 2:
        raise ValueError(
            f"{path} has features of {values.dtype} and shape {values.shape}: expected (images, "
            "numbers) of float32"
        )
    if not all(isinstance(text, str) for text in (*found.paths, *filter(None, found.labels))):
        raise ValueError(f"{path} has paths or labels that are no texts")
    if not len(values) == count == len(found.labels):
        raise ValueError(
            f"{path} has {len(values)} rows of features, {count} paths and {len(found.labels)} "
            "labels: expected as many of each"
        )
    return found


def _read_parquet(path: Path) -> Embeddings:
    from pyarrow import parquet
    from pyarrow.types import is_fixed_size_list, is_large_list, is_list

    table = parquet.read_table(path)
    if missing := {"path", "features"} - set(table.column_names):
        raise ValueError(f"it has no column {' and '.join(sorted(missing))}")
    column = table["features"].combine_chunks()
    if not any(is_kind(column.type) for is_kind in (is_list, is_large_list, is_fixed_size_list)):
        raise ValueError(f"its features are of {column.type}, not lists of numbers")
    if column.null_count:
        raise ValueError(f"{column.null_count} rows have no features")
    if is_fixed_size_list(column.type):
        widths = {column.type.list_size}
    else:  # of other software
        widths = set(column.value_lengths().to_pylist())
    if len(widths) != 1:
        raise ValueError(f"its features have {len(widths)} different lengths")
    values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, *widths)
    about = json.loads((table.schema.metadata or {}).get(ABOUT, b"{}"))
    has_labels = "label" in table.column_names
    labels = table["label"].to_pylist() if has_labels else [None] * len(column)
    unread = [name for name in table.column_names if name not in ("path", "label", "features")]
    return Embeddings(values, table["path"].to_pylist(), labels, about, unread)


def _read_npz(path: Path) -> Embeddings:
    with np.load(path, allow_pickle=False) as arrays:
        labels = [label or None for label in arrays["label"].tolist()]
        about = json.loads(str(arrays["about"]))
        unread = sorted(set(arrays) - {"features", "path", "label", "about"})
        return Embeddings(arrays["features"], arrays["path"].tolist(), labels, about, unread)


def _read_npy(path: Path) -> Embeddings:
    _, beside = files_of(path)
    rows = read_json(beside)
    values = np.load(path, allow_pickle=False)
    unread = sorted(rows.keys() - {"about", "path", "label"})
    return Embeddings(values, list(rows["path"]), list(rows["label"]), dict(rows["about"]), unread)


# ------------------------------------------------------------------------------ writing


class EmbeddingFile(RowFile):
    """The file of a run's embeddings, which a run continues after an interruption.

    The settings that `missing` gets become `about`.

    Args:
        target: ends in .parquet, .npz or .npy.
        resume: as in `cvt.inference.result_file.ResultFile`.
        overwrite: likewise.

    Raises:
        ValueError: it has another suffix.
        ImportError: pyarrow, for a parquet file, is not installed.
        FileExistsError: as in `ResultFile`.
    """

    def __init__(self, target: Path, resume: bool = False, overwrite: bool = False) -> None:
        check_suffix(target)
        super().__init__(target, resume, overwrite, files_of(target)[1:])

    def _row(self, result: "tuple[Result, str | None]") -> tuple[Record, np.ndarray]:
        found, label = result
        assert found.features is not None
        return {"path": str(found.path), "label": label}, found.features

    def _complete(self) -> None:
        def rows() -> Iterator[Rows]:
            for records, values in self.rows():
                paths, labels = ([record[name] for record in records] for name in ("path", "label"))
                yield Rows(paths, labels, values)

        files = [self.part / target.name for target in self.targets]
        write_rows(files, self.settings, (self.count, self.width), rows)


def write_embeddings(embeddings: Embeddings, path: str | Path, overwrite: bool = False) -> None:
    """Write a file that `read_embeddings` reads; it appears when it is complete.

    Args:
        embeddings: what is written.
        path: ends in .parquet, .npz or .npy.
        overwrite: it may be replaced.

    Raises:
        FileExistsError: it is there already and may not be overwritten.
        ValueError: it has another suffix.
        ImportError: pyarrow, for a parquet file, is not installed.

    Example:
        >>> import numpy as np
        >>> from cvt.inference.embedding_file import Embeddings, write_embeddings
        >>> rows = Embeddings(np.eye(2, dtype="float32"), ["a.png", "b.png"], ["cat", None])
        >>> write_embeddings(rows, "features.npy")  # and features.json
        >>> np.load("features.npy").shape
        (2, 2)
    """
    path = Path(path)
    check_suffix(path)

    def rows() -> Iterator[Rows]:
        for start in range(0, len(embeddings), ROWS):
            part = slice(start, start + ROWS)
            yield Rows(embeddings.paths[part], embeddings.labels[part], embeddings.values[part])

    with ExitStack() as stack:  # of two files, the second is moved into place first
        files = [stack.enter_context(staged(file, overwrite)) for file in files_of(path)]
        write_rows(files, embeddings.about, embeddings.values.shape, rows)


def write_rows(
    files: list[Path],
    about: dict[str, Any],
    shape: tuple[int, ...],
    rows: Callable[[], Iterator[Rows]],
) -> None:
    """Write rows as they come.

    Args:
        files: to write, as `files_of` gives them.
        about: what computed the features.
        shape: of all features, (N, C).
        rows: returns the rows from the first on; called as often as they are needed.
    """
    {".parquet": _write_parquet, ".npz": _write_npz, ".npy": _write_npy}[files[0].suffix](
        files, about, shape, rows
    )


def _write_parquet(
    files: list[Path],
    about: dict[str, Any],
    shape: tuple[int, ...],
    rows: Callable[[], Iterator[Rows]],
) -> None:
    import pyarrow
    from pyarrow import parquet

    text, features = pyarrow.string(), pyarrow.list_(pyarrow.float32(), shape[1])
    columns = [("path", text), ("label", text), ("features", features)]
    schema = pyarrow.schema(columns, {ABOUT: json.dumps(about).encode()})
    with parquet.ParquetWriter(files[0], schema) as writer:
        for paths, labels, values in rows():
            numbers = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
            of_rows = [
                pyarrow.array(map(utf8, paths), text),
                pyarrow.array([label and utf8(label) for label in labels], text),
                pyarrow.FixedSizeListArray.from_arrays(numbers, shape[1]),
            ]
            writer.write_table(pyarrow.table(of_rows, schema=schema))


def _write_npz(
    files: list[Path],
    about: dict[str, Any],
    shape: tuple[int, ...],
    rows: Callable[[], Iterator[Rows]],
) -> None:
    def texts(column: int) -> Iterator[list[str]]:
        for row in rows():
            yield [utf8(text or "") for text in row[column]]

    with zipfile.ZipFile(files[0], "w") as archive:
        with _member(archive, "features", np.dtype(np.float32), shape) as file:
            for _, _, values in rows():
                file.write(values.tobytes())
        for column, name in enumerate(("path", "label")):
            longest = max((len(text) for part in texts(column) for text in part), default=0)
            dtype = np.dtype((np.str_, max(1, longest)))
            with _member(archive, name, dtype, shape[:1]) as file:
                for part in texts(column):
                    file.write(np.array(part, dtype).tobytes())
        described = np.array(json.dumps(about))
        with _member(archive, "about", described.dtype, ()) as file:
            file.write(described.tobytes())


@contextmanager
def _member(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...]
) -> Iterator[IO[bytes]]:
    """An array of an .npz file, behind its header; its time is none, so that bytes are stable."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        _write_header(file, dtype, shape)
        yield file


def _write_npy(
    files: list[Path],
    about: dict[str, Any],
    shape: tuple[int, ...],
    rows: Callable[[], Iterator[Rows]],
) -> None:
    array, beside = files
    with open(array, "wb") as file:
        _write_header(file, np.dtype(np.float32), shape)
        for _, _, values in rows():
            file.write(values.tobytes())
    with open(beside, "w", encoding="utf-8") as table:
        table.write(f'{{"about": {json.dumps(about)}')
        for column, name in enumerate(("path", "label")):
            table.write(f', "{name}": [')
            between = ""
            for row in rows():
                table.write(
                    between + json.dumps([text and utf8(text) for text in row[column]])[1:-1]
                )
                between = ", "
            table.write("]")
        table.write("}\n")


def _write_header(file: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """The header of an array in numpy's format."""
    described = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, described)
