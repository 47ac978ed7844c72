"""The file of a run's predictions: text that grows line by line, or a table of parquet."""

import csv
import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from cvt.architecture import Architecture
from cvt.inference.predict import Prediction
from cvt.inference.result_file import Record, ResultFile, RowFile, json_records
from cvt.libraries import require
from cvt.problem_type import MULTI_LABEL, REGRESSION
from cvt.text import UNSAFE, csv_cell, utf8

SUFFIXES = (".csv", ".jsonl", ".parquet")
HEADER = ["path", "rank", "label", "score"]  # of the csv file, which has a row per class
PREDICTED = "predicted"  # a further column where the model has thresholds


def open_predictions(
    target: Path, resume: bool = False, overwrite: bool = False, with_logits: bool = False
) -> "PredictionFile | PredictionTable":
    """The file of predictions, by its suffix, one of `SUFFIXES`.

    Args:
        target: as in `ResultFile`.
        resume: likewise.
        overwrite: likewise.
        with_logits: a table has the logits and the probabilities of all classes, too.

    Raises:
        ImportError: pyarrow, for a table, is not installed.
    """
    if target.suffix == ".parquet":
        return PredictionTable(target, resume, overwrite, with_logits=with_logits)
    return PredictionFile(target, resume, overwrite)


class PredictionFile(ResultFile):
    """Predictions in a .csv or .jsonl file.

    Of the settings that `missing` gets, `topk` is how many classes each image has.
    """

    def settings_of(self, config: Architecture) -> dict[str, Any]:
        """What `missing` needs of a classifier: nothing."""
        return {}

    def _head(self, first: Prediction | None) -> str:
        if self.target.suffix == ".jsonl":
            return ""
        further = [] if first is None or first.has is None else [PREDICTED]
        return ",".join([*HEADER, *further]) + "\r\n"

    def _write(self, file: IO[str], prediction: Prediction) -> None:
        if self.target.suffix == ".jsonl":
            file.write(json_line(prediction) + "\n")
            return
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

    def _written(self, path: str) -> str:
        return path if self.target.suffix == ".jsonl" else csv_cell(path)

    def _records(self, file: IO[bytes]) -> Iterator[tuple[str, int]]:
        if self.target.suffix == ".jsonl":
            return json_records(file)
        return _csv_records(file, self.settings["topk"])


class PredictionTable(RowFile):
    """Predictions in a .parquet file, a row for each image.

    Its columns are `path`, `label` and `score` of the best class, and `predictions`, a list of what
    a line of JSON has. With logits also `logits` and `probabilities`, a number for each class, in
    the order of `classes` in the schema's metadata; a regression, whose logits are values, has no
    probabilities.

    The settings that `missing` gets have those of `settings_of`.
    """

    def __init__(
        self,
        target: Path,
        resume: bool = False,
        overwrite: bool = False,
        with_logits: bool = False,
    ) -> None:
        require(str(target), "pyarrow", extra="search")
        super().__init__(target, resume, overwrite)
        self.with_logits = with_logits

    def settings_of(self, config: Architecture) -> dict[str, Any]:
        """What `missing` needs of a classifier: its classes, and how many numbers an image has."""
        columns = 1 if config.problem_type == REGRESSION else 2  # logits, probabilities
        return {
            "classes": config.class_names,
            "width": columns * len(config.class_names) if self.with_logits else 0,
            "has_thresholds": config.problem_type == MULTI_LABEL and bool(config.thresholds),
        }

    def _row(self, prediction: Prediction) -> tuple[Record, np.ndarray]:
        record = {"path": str(prediction.path), "predictions": prediction.records}
        numbers = np.ravel([prediction.logits, prediction.probabilities])
        return record, numbers[: self.width]  # of a regression, both are the same

    def _complete(self) -> None:
        import pyarrow
        from pyarrow import parquet

        text, score = pyarrow.string(), pyarrow.float64()
        classes = self.settings["classes"]
        names = ["logits", "probabilities"][: self.width // len(classes)]
        of_class = {"label": text, "score": score, PREDICTED: pyarrow.bool_()}
        if not self.settings["has_thresholds"]:
            del of_class[PREDICTED]
        columns = [("path", text), ("label", text), ("score", score)]
        columns += [("predictions", pyarrow.list_(pyarrow.struct(of_class.items())))]
        columns += [(name, pyarrow.list_(pyarrow.float32(), len(classes))) for name in names]
        schema = pyarrow.schema(columns, {"classes": json.dumps(classes)})
        with parquet.ParquetWriter(self.part / self.target.name, schema) as writer:
            for records, numbers in self.rows():
                best = [record["predictions"][0] for record in records]
                table: list[Any] = [
                    [utf8(record["path"]) for record in records],
                    [each["label"] for each in best],
                    [each["score"] for each in best],
                    [record["predictions"] for record in records],
                ]
                table += np.split(numbers, len(names), axis=1) if names else []
                arrays = [
                    pyarrow.array(list(column), field.type)
                    for column, field in zip(table, schema, strict=True)
                ]
                writer.write_table(pyarrow.table(arrays, schema=schema))


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


def json_line(prediction: Prediction) -> str:
    """A prediction as a line of JSON."""
    record = {"path": str(prediction.path), "predictions": prediction.records}
    return UNSAFE.sub(
        lambda found: f"\\u{ord(found[0]):04x}", json.dumps(record, ensure_ascii=False)
    )
