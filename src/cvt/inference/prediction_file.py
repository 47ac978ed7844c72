"""The file of a run's predictions, which a run continues after an interruption."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

from cvt.files import full_disk_named, locked, sync
from cvt.inference.predict import Prediction
from cvt.runtime.base import Runtime
from cvt.text import UNSAFE, csv_cell

HEADER = ["path", "rank", "label", "score"]  # of the csv file, which has a row per class
PREDICTED = "predicted"  # a further column where the model has thresholds
SETTINGS = "settings.json"


class PredictionFile:
    """Predictions, in a .csv or .jsonl file that appears when all are written.

    Until then they are in `TARGET.part`, a folder that appears with the first of them and stays
    when the run is interrupted, however that may be: the file so far, and the run's settings.

    Args:
        target: the file.
        resume: continue the file of an interrupted run, if there is one.
        overwrite: the file may be replaced, and what an interrupted run left may be dropped.

    Raises:
        FileExistsError: the file, or what an interrupted run left, is there and may not be lost.
        NotADirectoryError: the file would be below another file.
    """

    def __init__(self, target: Path, resume: bool = False, overwrite: bool = False) -> None:
        self.target = target.resolve()
        self.part = self.target.with_name(f"{target.name}.part")
        self.growing = self.part / target.name
        self.resume, self.overwrite = resume, overwrite
        self._check_target()
        if any(parent.is_file() for parent in self.target.parents):
            raise NotADirectoryError(f"{target} cannot be written: it has no folder to be in")
        if self.part.exists() and not (resume or overwrite):
            raise FileExistsError(
                f"{self.part} has the results of an interrupted run: --resume continues it, "
                "--force starts over"
            )
        self.count = 0  # images in the file
        self.end = 0  # of what is kept of the file, in bytes
        self.file: IO[str] | None = None
        self.claimed = ExitStack()

    def __enter__(self) -> "PredictionFile":
        return self

    def __exit__(self, *exception: object) -> None:
        # What a full disk left unwritten, closing the file tries to write again.
        with suppress(OSError) if exception[0] else nullcontext():
            self.claimed.close()

    def missing(self, paths: Iterable[Path], settings: Mapping[str, Any]) -> Iterator[Path]:
        """Those of these images that are not in the file; to be called before anything is written.

        Of an interrupted run about 150 bytes are kept in memory for each image in the file.

        Args:
            paths: the images.
            settings: what the results depend on, among it `topk`, the classes of each image.

        Raises:
            ValueError: the interrupted run had other settings; names them.
            FileExistsError: another process writes the file.
        """
        self.settings = dict(settings)
        done: Counter[bytes] = Counter()
        if self.part.exists():
            self.claimed.enter_context(locked(self.part))
        if self.part.exists() and self.resume:
            self._check_settings()
            for path, end in self._records():
                done[_key(path)] += 1
                self.end = end
        self.count = done.total()

        def is_missing(path: Path) -> bool:
            key = _key(str(path) if self.target.suffix == ".jsonl" else csv_cell(str(path)))
            if done[key]:  # an image that is named twice is classified twice
                done[key] -= 1
                return False
            return True

        return filter(is_missing, paths)

    def write(self, prediction: Prediction) -> None:
        """Add an image; it stays even if this process is killed now.

        Raises:
            OSError: the disk is full.
        """
        with full_disk_named(self.growing, self.target.parent):
            self._write(prediction)

    def _write(self, prediction: Prediction) -> None:
        file = self.file or self._begin([] if prediction.has is None else [PREDICTED])
        if self.target.suffix == ".jsonl":
            file.write(json_line(prediction) + "\n")
        else:
            form = ".9g" if prediction.are_values else ".6f"  # of a value all that float32 has
            has = prediction.has
            csv.writer(file).writerows(
                (
                    csv_cell(str(prediction.path)),
                    rank,
                    csv_cell(record["label"]),
                    f"{record['score']:{form}}",
                    *([str(record[PREDICTED]).lower()] if has else []),
                )
                for rank, record in enumerate(prediction.records, start=1)
            )
        file.flush()
        self.count += 1

    def finish(self) -> None:
        """Move the file to its place, complete."""
        (self.file or self._begin()).close()
        self._check_target()
        sync(self.growing)
        os.replace(self.growing, self.target)
        for name in (SETTINGS, ".lock"):
            (self.part / name).unlink(missing_ok=True)
        with suppress(OSError):  # it has files that are not ours
            self.part.rmdir()

    def _check_target(self) -> None:
        if self.target.is_dir() or (self.target.exists() and not self.overwrite):
            raise FileExistsError(f"{self.target} exists already; nothing was overwritten")

    def _check_settings(self) -> None:
        try:
            found = json.loads((self.part / SETTINGS).read_text(encoding="utf-8"))
            differing = {name for name in self.settings if found[name] != self.settings[name]}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self.part} is not what an interrupted run leaves; --force starts over"
            ) from error
        if differing:
            changed = (f"{name} {found[name]}, not {self.settings[name]}" for name in differing)
            raise ValueError(
                f"{self.part} was written with {'; '.join(sorted(changed))}: continue with the "
                "same, or start over with --force"
            )

    def _begin(self, further: Sequence[str] = ()) -> IO[str]:
        """Open the file behind what is kept of it; `further` columns are in its header."""
        if not self.part.exists():
            self.part.mkdir(parents=True)
            self.claimed.enter_context(locked(self.part))
        (self.part / SETTINGS).write_text(json.dumps(self.settings, indent=2) + "\n")
        self.growing.touch()
        os.truncate(self.growing, self.end)
        self.file = open(  # noqa: SIM115
            self.growing, "a", encoding="utf-8", errors="backslashreplace", newline=""
        )
        self.claimed.callback(self.file.close)
        if not self.end and self.target.suffix == ".csv":
            csv.writer(self.file).writerow([*HEADER, *further])
        return self.file

    def _records(self) -> Iterator[tuple[str, int]]:
        """The path of each whole record, and where that ends; none behind a damaged one."""
        self.growing.touch()
        with open(self.growing, "rb") as file:
            if self.target.suffix == ".jsonl":
                yield from _json_records(file)
            else:
                yield from _csv_records(file, self.settings["topk"])


def run_settings(model: str, runtime: Runtime, topk: int, **decoding: Any) -> dict[str, Any]:
    """What the predictions of a run depend on, for `PredictionFile.missing` to compare.

    Args:
        model: its name.
        runtime: what runs it.
        topk: the classes of each image.
        decoding: further settings.
    """
    path = Path(model)
    files = filter(Path.is_file, path.iterdir() if path.is_dir() else [path])
    return {
        "model": str(path.resolve()) if path.exists() else model,
        "changed": max((file.stat().st_mtime for file in files), default=None),
        "runtime": runtime.name,
        "precision": runtime.precision,
        "topk": topk,
        **decoding,
    }


def _json_records(file: IO[bytes]) -> Iterator[tuple[str, int]]:
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


def _csv_records(file: IO[bytes], topk: int) -> Iterator[tuple[str, int]]:
    end, line = 0, b""

    def lines() -> Iterator[str]:
        nonlocal end, line
        for line in file:
            end += len(line)
            yield line.decode("utf-8", "replace")

    rows = csv.reader(lines())
    with suppress(csv.Error):
        header = next(rows, None)
        if header not in (HEADER, [*HEADER, PREDICTED]):
            return
        while record := list(islice(rows, topk)):
            ranks = [(row[0], row[1]) for row in record if len(row) == len(header)]
            whole = [(record[0][0], str(rank)) for rank in range(1, topk + 1)]
            if ranks != whole or not line.endswith(b"\r\n"):
                return
            yield record[0][0], end


def _key(path: str) -> bytes:
    """A path as the file has it, in few bytes."""
    return path.encode("utf-8", "backslashreplace")


def json_line(prediction: Prediction) -> str:
    """A prediction as a line of JSON."""
    record = {"path": str(prediction.path), "predictions": prediction.records}
    return UNSAFE.sub(
        lambda found: f"\\u{ord(found[0]):04x}", json.dumps(record, ensure_ascii=False)
    )
