"""A file of results of images, which a run continues after an interruption."""

import json
import os
import textwrap
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import numpy as np

from cvt.files import full_disk_named, locked, sync
from cvt.runtime.base import Runtime

SETTINGS = "settings.json"
ROWS = 8192  # rows of a `RowFile` that are in memory at a time

Image = TypeVar("Image")
Record = dict[str, Any]


class ResultFile(ABC):
    """Results of images, in a file that appears when all are written.

    Until then they are in `TARGET.part`, a folder that appears with the first of them and stays
    when the run is interrupted, however that may be: the file so far, and the run's settings.

    Args:
        target: the file.
        resume: continue the file of an interrupted run, if there is one.
        overwrite: the file may be replaced, and what an interrupted run left may be dropped.
        beside: another file that appears with it.

    Attributes:
        count: images in the file.

    Raises:
        FileExistsError: the file, or what an interrupted run left, is there and may not be lost.
        NotADirectoryError: the file would be below another file.
    """

    def __init__(
        self,
        target: Path,
        resume: bool = False,
        overwrite: bool = False,
        beside: Sequence[Path] = (),
    ) -> None:
        self.target = target.resolve()
        self.targets = [self.target, *(path.resolve() for path in beside)]
        self.part = part_of(target)
        self.growing = self.part / self.target.name
        self.working = [self.part / name for name in (SETTINGS, ".lock")]
        self.resume, self.overwrite = resume, overwrite
        self._check_targets()
        if any(parent.is_file() for parent in self.target.parents):
            raise NotADirectoryError(f"{target} cannot be written: it has no folder to be in")
        if self.part.exists() and not (resume or overwrite):
            raise FileExistsError(
                f"{self.part} has the results of an interrupted run: --resume continues it, "
                "--force starts over"
            )
        self.count = 0
        self.end = 0  # of what is kept of the growing file, in bytes
        self.file: IO[str] | None = None
        self.is_claimed = False  # the folder was there before anything is written, and is locked
        self.claimed = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        # What a full disk left unwritten, closing the file tries to write again.
        with suppress(OSError) if exception[0] else nullcontext():
            self.claimed.close()

    def missing(
        self,
        images: Iterable[Image],
        settings: Mapping[str, Any],
        name: Callable[[Image], str] = str,
    ) -> Iterator[Image]:
        """Those of these images that are not in the file; to be called before anything is written.

        Of an interrupted run about 150 bytes are kept in memory for each image in the file.

        Args:
            images: of the run.
            settings: what the results depend on.
            name: of an image, as `write` gets its path.

        Raises:
            ValueError: the interrupted run had other settings; names them.
            FileExistsError: another process writes the file.
        """
        self.settings = dict(settings)
        self.is_claimed = self.part.exists()
        done: Counter[bytes] = Counter()
        if self.is_claimed:
            self.claimed.enter_context(locked(self.part))
        if self.is_claimed and self.resume:
            self._check_settings()
            self.growing.touch()
            with open(self.growing, "rb") as file:
                for path, end in self._records(file):
                    done[_key(path)] += 1
                    self.end = end
        self.count = done.total()

        def is_missing(image: Image) -> bool:
            key = _key(self._written(name(image)))
            if done[key]:  # an image that is named twice is run twice
                done[key] -= 1
                return False
            return True

        return filter(is_missing, images)

    def write(self, result: Any) -> None:
        """Add an image; it stays even if this process is killed now.

        Raises:
            OSError: the disk is full.
        """
        with full_disk_named(self.growing, self.target.parent):
            file = self.file or self._begin(result)
            self._write(file, result)
            file.flush()
        self.count += 1

    def finish(self) -> None:
        """Move the file to its place, complete."""
        (self.file or self._begin()).close()
        self._check_targets()
        with full_disk_named(self.target, self.target.parent):
            self._complete()
        for target in reversed(self.targets):
            written = self.part / target.name
            sync(written)
            os.replace(written, target)
        for path in self.working:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # it has files that are not ours
            self.part.rmdir()

    @abstractmethod
    def _write(self, file: IO[str], result: Any) -> None:
        """Write a result to the growing file."""

    @abstractmethod
    def _records(self, file: IO[bytes]) -> Iterator[tuple[str, int]]:
        """The path of each whole record, and where that ends; none behind a damaged one."""

    def _written(self, path: str) -> str:
        """A path as `_records` gives it."""
        return path

    def _head(self, first: Any) -> str:
        """What comes before the first result, which is given if there is one."""
        return ""

    def _complete(self) -> None:  # noqa: B027  (most have nothing to do)
        """Turn the growing file into the files that are to be moved."""

    def _check_targets(self) -> None:
        for target in self.targets:
            if target.is_dir() or (target.exists() and not self.overwrite):
                raise FileExistsError(f"{target} exists already; nothing was overwritten")

    def _check_settings(self) -> None:
        try:
            found = json.loads((self.part / SETTINGS).read_text(encoding="utf-8"))
            differing = {name for name in self.settings if found[name] != self.settings[name]}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self.part} is not what an interrupted run leaves; --force starts over"
            ) from error
        if differing:
            changed = (
                f"{name} {_short(found[name])}, not {_short(self.settings[name])}"
                for name in differing
            )
            raise ValueError(
                f"{self.part} was written with {'; '.join(sorted(changed))}: continue with the "
                "same, or start over with --force"
            )

    def _begin(self, first: Any = None) -> IO[str]:
        """Open the file behind what is kept of it."""
        if not self.is_claimed:
            try:
                self.part.mkdir(parents=True)
            except FileExistsError:  # since `missing`
                reason = "another process has created it meanwhile, for the same file"
                raise FileExistsError(f"{self.part} is in use: {reason}") from None
            self.claimed.enter_context(locked(self.part))
        (self.part / SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n")
        self.growing.touch()
        os.truncate(self.growing, self.end)
        self.file = open(  # noqa: SIM115
            self.growing, "a", encoding="utf-8", errors="backslashreplace", newline=""
        )
        self.claimed.callback(self.file.close)
        if not self.end:
            self.file.write(self._head(first))
        return self.file


class RowFile(ResultFile):
    """Results of images whose numbers are written in rows, and which become a file at the end.

    Until then records are lines of JSON, and numbers follow each other in a second file: both can
    be continued wherever they break off, unlike a table of columns.

    Args:
        target: as in `ResultFile`, and so are the rest.
    """

    def __init__(self, target: Path, *args: Any, **options: Any) -> None:
        super().__init__(target, *args, **options)
        self.growing = self.part / "rows.jsonl"
        self.numbers = self.part / "rows.float32"
        self.working += [self.growing, self.numbers]
        self.width = 0
        self.appended: IO[bytes] | None = None

    def missing(
        self,
        images: Iterable[Image],
        settings: Mapping[str, Any],
        name: Callable[[Image], str] = str,
    ) -> Iterator[Image]:
        """As in `ResultFile`; of the settings, `width` is how many numbers an image has."""
        self.width = settings["width"]
        return super().missing(images, settings, name)

    def rows(self) -> Iterator[tuple[list[Record], np.ndarray]]:
        """The records so far and their numbers, (n, width), some at a time."""
        with open(self.growing, encoding="utf-8") as lines, open(self.numbers, "rb") as numbers:
            while records := [json.loads(line) for line in islice(lines, ROWS)]:
                values = np.fromfile(numbers, np.float32, len(records) * self.width)
                yield records, values.reshape(len(records), self.width)

    @abstractmethod
    def _row(self, result: Any) -> tuple[Record, np.ndarray]:
        """The record of a result, with its `path`, and its numbers."""

    def _write(self, file: IO[str], result: Any) -> None:
        record, numbers = self._row(result)
        assert self.appended
        # Numbers first: a record that is whole has its own.
        self.appended.write(np.asarray(numbers, np.float32).tobytes())
        self.appended.flush()
        file.write(json.dumps(record) + "\n")

    def _records(self, file: IO[bytes]) -> Iterator[tuple[str, int]]:
        self.numbers.touch()
        whole = self.numbers.stat().st_size // (4 * self.width) if self.width else None
        return islice(json_records(file), whole)

    def _begin(self, first: Any = None) -> IO[str]:
        file = super()._begin(first)
        self.numbers.touch()
        os.truncate(self.numbers, 4 * self.width * self.count)
        self.appended = open(self.numbers, "ab")  # noqa: SIM115
        self.claimed.callback(self.appended.close)
        return file


def part_of(target: Path) -> Path:
    """The folder beside a file that whoever writes the file holds a lock on."""
    target = target.resolve()
    return target.with_name(f"{target.name}.part")


@contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Keep other processes that write a file out, while it is read and replaced.

    Raises:
        FileExistsError: another process writes the file.
        FileNotFoundError: there is no such file.
    """
    if not target.is_file():
        raise FileNotFoundError(f"{target} does not exist")
    part = part_of(target)
    part.mkdir(exist_ok=True)
    with locked(part):
        try:
            yield
        finally:
            (part / ".lock").unlink(missing_ok=True)
            with suppress(OSError):  # it has what an interrupted run left
                part.rmdir()


def run_settings(model: str, runtime: Runtime, **decoding: Any) -> dict[str, Any]:
    """What the results of a run depend on, for `ResultFile.missing` to compare.

    Args:
        model: its name.
        runtime: what runs it.
        decoding: further settings.
    """
    path = Path(model)
    files = filter(Path.is_file, path.iterdir() if path.is_dir() else [path])
    return {
        "model": str(path.resolve()) if path.exists() else model,
        "changed": max((file.stat().st_mtime for file in files), default=None),
        "runtime": runtime.name,
        "precision": runtime.precision,
        **decoding,
    }


def json_records(file: IO[bytes]) -> Iterator[tuple[str, int]]:
    """The path in each whole line of JSON, and where that ends; none behind a damaged one."""
    end = 0
    for line in file:
        end += len(line)
        try:
            path = json.loads(line)["path"]
        except (ValueError, LookupError, TypeError):
            return
        if not line.endswith(b"\n"):
            return
        yield path, end


def _key(path: str) -> bytes:
    """A path as the file has it, in few bytes."""
    return path.encode("utf-8", "backslashreplace")


def _short(value: Any) -> str:
    return textwrap.shorten(str(value), 200)
