"""Tables of images and webdataset shards, local or the hub's, as the library `datasets` reads them.

It runs no code of a data set's. What it downloads or converts is kept in its own cache.
"""

import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvt import hub
from cvt.data.columns import Columns
from cvt.data.decoding import Source
from cvt.data.labelled import (
    SPLIT_NAMES,
    Images,
    LabelledImages,
    SplitReaders,
    StreamedImages,
    resembles_splits,
    split_name,
)
from cvt.text import listed

if TYPE_CHECKING:
    from datasets import Dataset, Features, IterableDataset

HUB_NAME = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[^:@]+))?(@(?P<split>[^:@]+))?")
SAVED = ("state.json", "dataset_dict.json")  # one of them is in what `save_to_disk` wrote
ROWS_AT_ONCE = 10_000
FindColumns = Callable[["Features", str], Columns]


def files_of(suffix: str, name: str) -> list[Path]:
    """The files of a kind that are in a folder (or `data` in it), or that a pattern names.

    Args:
        suffix: their suffix, `parquet` or `tar`.
        name: a folder; or a file, a glob pattern or one with a range, as `train-{000..012}.tar`.

    Returns:
        The files; none for a folder that has other folders, and a name that is of another kind.

    Raises:
        FileNotFoundError: files of a range are missing, or no file fits a pattern.
    """
    path = Path(name)
    if path.is_dir():
        folders = {below.name for below in path.iterdir() if below.is_dir()}
        if {folder for folder in folders if folder[0] != "."} - {"data"}:
            return []
        return next(filter(None, (_having(suffix, folder) for folder in (path, path / "data"))), [])
    if not name.lower().endswith(f".{suffix}"):
        return []
    files = [path]
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", name):
        first, last = numbers.groups()
        before, after = name[: numbers.start()], name[numbers.end() :]
        chosen = range(int(first), int(last) + 1)
        files = [Path(f"{before}{i:0{len(first)}}{after}") for i in chosen]
    elif not path.exists():
        files = [Path(file) for file in sorted(glob.glob(name))]
    if not files:
        raise FileNotFoundError(f"{name} matches no file")
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{len(missing)} files of {name} do not exist: {listed(missing)}")
    return files


def _having(suffix: str, folder: Path) -> list[Path]:
    """The files of a folder with a suffix, in small or capital letters, sorted."""
    return sorted(path for path in folder.glob("*") if path.suffix.lower() == f".{suffix}")


def by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files by the split that their names give; by the one split "" if no name gives one.

    Raises:
        ValueError: only some names give a split, or some resemble names of splits.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(split_name(file.stem) or "", []).append(file)
    if len(splits) > 1 and "" in splits:
        raise ValueError(
            f"{splits[''][0]}: its name gives no split ({', '.join(SPLIT_NAMES)}), "
            "as those of other files beside it do"
        )
    if unclear := resembles_splits([file.stem for file in splits.get("", [])]):
        raise ValueError(
            f"{files[0].parent}: {', '.join(unclear)} may be splits or not; call them train-..., "
            "val-... and test-..., or name each file, the second as val_data"
        )
    return splits


def saved_splits(folder: Path, find: FindColumns) -> SplitReaders:
    """The splits of a folder that `save_to_disk` wrote, or what is in it if it has none."""
    from datasets import load_from_disk

    with _loading(str(folder)):
        return _splits(load_from_disk(folder), str(folder), find)


def file_splits(
    kind: str, files: Mapping[str, Sequence[Path]], find: FindColumns, streaming: bool
) -> SplitReaders:
    """The contents of `parquet` files or `webdataset` shards, by split.

    Raises:
        ValueError: a file is not of this kind, or damaged.
    """
    from datasets import load_dataset
    from pyarrow.parquet import read_metadata

    lengths: dict[str, int] = {}
    if kind == "parquet":
        for split, paths in files.items():
            for path in paths:
                with _loading(str(path)):
                    lengths[split] = lengths.get(split, 0) + read_metadata(path).num_rows
    every = [path for paths in files.values() for path in paths]
    name = ", ".join(sorted({str(path if len(every) < 3 else path.parent) for path in every}))
    patterns = {
        split or "whole": [glob.escape(str(path.absolute())) for path in paths]
        for split, paths in files.items()
    }
    with _loading(name):
        found = load_dataset(kind, data_files=patterns, streaming=streaming)
    return {
        split: partial(
            _images, found[split or "whole"], f"{name} {split}".rstrip(), find, lengths.get(split)
        )
        for split in files
    }


def hub_splits(name: str, find: FindColumns, streaming: bool) -> SplitReaders:
    """The splits of a data set of the hub, OWNER/NAME, perhaps with :CONFIG or @SPLIT behind.

    Raises:
        UnavailableError: it is neither on this machine nor within reach.
        ValueError: there is no such data set, configuration or split, or it cannot be read.
    """
    from datasets import load_dataset, load_dataset_builder
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError

    asked = HUB_NAME.fullmatch(name)
    if not asked:
        raise ValueError(
            f"hub:{name}: a data set of the hub is written hub:OWNER/NAME, and :CONFIG or @SPLIT "
            "behind it choose one of its splits"
        )
    silence: Exception | None = hub.unreachable()
    try:
        if silence and streaming:
            raise silence
        with _loading(f"hub:{name}", offline=silence is not None):
            path = f"hf://datasets/{asked['id']}"  # never a folder of that name
            if streaming:
                builder = load_dataset_builder(path, asked["config"])
                builder.config.decode_num_threads = 0  # of loose image files
                found = builder.as_streaming_dataset(asked["split"])
            else:
                found = load_dataset(path, asked["config"], split=asked["split"])
    except (OSError, HTTPError) as error:
        kept = "and a stream is not kept on this machine" if streaming else "nor is it in the cache"
        reason = " ".join(str(silence or error).split())
        raise hub.UnavailableError(
            f"the data set {asked['id']} could not be read from {constants.ENDPOINT}, {kept}. "
            f"Behind a mirror, set HF_ENDPOINT. The hub library reported: {reason}"
        ) from error
    return _splits(found, f"hub:{name}", find)


@contextmanager
def _loading(name: str, offline: bool = False) -> Iterator[None]:
    """Keeps the library quiet, off the network where asked to, and its errors to one sentence."""
    import datasets
    from huggingface_hub import utils as hub_utils
    from huggingface_hub.errors import HTTPError

    libraries = (datasets, hub_utils)
    verbosities = [library.logging.get_verbosity() for library in libraries]
    with_bars = [library for library in libraries if not library.are_progress_bars_disabled()]
    was_offline = datasets.config.HF_HUB_OFFLINE
    try:
        for library in libraries:
            library.logging.set_verbosity_error()
            library.disable_progress_bars()
        datasets.config.HF_HUB_OFFLINE = was_offline or offline  # else it tries for 23 seconds
        yield
    except (ConnectionError, TimeoutError, HTTPError):
        raise
    except Exception as error:  # damaged files raise nearly everything
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise ValueError(f"{name} cannot be read: {reason}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        for library, verbosity in zip(libraries, verbosities, strict=True):
            library.logging.set_verbosity(verbosity)
        for library in with_bars:
            library.enable_progress_bars()


def _splits(found: Any, name: str, find: FindColumns) -> SplitReaders:
    splits = found if isinstance(found, dict) else {"": found}
    return {
        split: partial(_images, rows, f"{name} {split}".rstrip(), find)
        for split, rows in splits.items()
    }


def _images(
    rows: "Dataset | IterableDataset", table: str, find: FindColumns, length: int | None = None
) -> Images:
    from datasets import Dataset, Image

    if rows.features is None:
        raise ValueError(f"{table} does not describe its columns; only parquet and shards do")
    columns = find(rows.features, table)
    if isinstance(rows.features[columns.image], Image):
        rows = rows.cast_column(columns.image, Image(decode=False))
    stored = {name if name in rows.features else name.split(".")[0] for name in columns.labels}
    if isinstance(rows, Dataset):
        cells = [rows[name][:] for name in stored]
        labels = [
            columns.label_of(dict(zip(stored, row, strict=True)), f"{table}#{i}")
            for i, row in enumerate(zip(*cells, strict=True))
        ]
        return LabelledImages(
            _Rows(rows.select_columns(columns.image), columns),
            labels,
            columns.names,
            columns.task,
            _groups(rows, columns),
        )
    if not columns.task.has_one_class:
        raise ValueError(
            f"problem_type = {columns.task.problem_type}: {table} is a stream, whose images have "
            "one class each"
        )
    if columns.group:
        raise ValueError(f"{table}: a stream is not split; leave group_column out")
    if columns.names is None:
        raise ValueError(
            f"{table} does not list the names of its classes, in {columns.labels[0]}: give a file "
            "of them, one per line, as classes"
        )
    kept = {columns.image, *stored, "__key__", "__url__"} & set(rows.features)
    rows = rows.select_columns(sorted(kept))
    splits = rows.info.splits or {}  # of a data set that describes itself
    if rows.split in splits:
        length = splits[rows.split].num_examples or length
    return StreamedImages(columns.names, length, rows, columns.sample)


def _groups(rows: "Dataset", columns: Columns) -> list[str] | None:
    if columns.group is None:
        return None
    values = rows[columns.group][:]
    if (empty := next((i for i, value in enumerate(values) if value in (None, "")), None)) is None:
        return [str(value) for value in values]
    raise ValueError(f"{columns.table}#{empty}: has no {columns.group}")


@dataclass(frozen=True)
class _Rows(Sequence[Source]):
    """The images of a table, each read on access."""

    rows: "Dataset"
    columns: Columns

    def name(self, index: int) -> str:
        """The same wherever the table is."""
        return f"{Path(self.columns.table).name}#{index}"

    def sizes(self) -> list[int | None]:
        """The bytes of every image, which are not read for it; None of one that is a file."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found: list[int | None] = []
        for batch in self.rows.with_format("arrow").iter(ROWS_AT_ONCE):
            column = batch[self.columns.image]
            if pa.types.is_struct(column.type):
                column = pc.struct_field(column, "bytes")
            found += pc.binary_length(column).to_pylist()
        return found

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.columns.source(self.rows[int(index)], f"{self.columns.table}#{index}")
