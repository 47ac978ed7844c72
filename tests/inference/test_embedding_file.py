import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from cvt.inference.embedding_file import (
    SUFFIXES,
    EmbeddingFile,
    Embeddings,
    read_embeddings,
    write_embeddings,
)
from cvt.inference.predict import Result

ABOUT = {"model": "mine", "sha256": "0" * 64, "stage": 3, "width": 4}
NAMES = ["a.png", 'a "quoted", b', "two\r\nlines", "café", "a.png", os.fsdecode(b"\xff")]
LABELS = ["red", None, "light red", "é", "red", None]
VALUES = np.random.default_rng(0).standard_normal((6, 4), np.float32)
STORED = [*NAMES[:5], "\\udcff"]  # what is no UTF-8 is escaped
ROWS = [*zip(NAMES, LABELS, VALUES, strict=True)]


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    for module in ("embedding_file", "result_file"):
        monkeypatch.setattr(f"cvt.inference.{module}.ROWS", 4)


def run(target, rows=ROWS, *, until=None, **options):
    """Write what is missing, or only its first rows, as a run does that breaks off."""
    with EmbeddingFile(target, **options) as file:
        missing = list(file.missing(rows, ABOUT, lambda row: row[0]))
        for name, label, values in missing[:until]:
            file.write((Result(Path(name), features=values), label))
        if until is None:
            file.finish()
    return len(missing)


def files(target):
    """The bytes of all files of the name."""
    return {path.suffix: path.read_bytes() for path in target.parent.glob(f"{target.stem}.*")}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_written_is_read(suffix, tmp_path):
    target = tmp_path / f"a{suffix}"
    assert run(target) == 6
    found = read_embeddings(target)
    np.testing.assert_array_equal(found.values, VALUES)
    assert (found.paths, found.labels, found.about) == (STORED, LABELS, ABOUT)
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.npy": {"a.npy", "a.json"},
        "a.npz": {"a.npz"},
        "a.parquet": {"a.parquet"},
    }[target.name]
    beside = tmp_path / "beside"
    beside.mkdir()
    write_embeddings(found, beside / f"a{suffix}")
    assert files(beside / f"a{suffix}") == files(target)
    with pytest.raises(FileExistsError):
        write_embeddings(found, target)


def test_other_software_reads_the_files(tmp_path):
    for suffix in SUFFIXES:
        run(tmp_path / f"a{suffix}")
    table = parquet.read_table(tmp_path / "a.parquet")
    assert str(table.schema.field("features").type) == "fixed_size_list<element: float>[4]"
    assert table.to_pandas()["label"][2] == "light red"
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), VALUES)
    assert json.loads((tmp_path / "a.json").read_text("utf-8"))["path"] == STORED
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["path"].tolist() == STORED


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_run_cut_anywhere_is_completed_to_the_same_bytes(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("cvt.inference.result_file.sync", lambda path: None)
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole" / f"a{suffix}")
    target = tmp_path / "cut" / f"a{suffix}"
    run(target, until=5)
    part = target.with_name(f"{target.name}.part")
    shutil.copytree(part, tmp_path / "left")
    lines, numbers = (part / name for name in ("rows.jsonl", "rows.float32"))
    sizes, done = (lines.stat().st_size, numbers.stat().st_size), set()
    for of_lines, of_numbers in ((0, sizes[1]), (sizes[0] // 2, sizes[1]), (sizes[0], 23), sizes):
        shutil.rmtree(target.parent)
        shutil.copytree(tmp_path / "left", part)
        os.truncate(lines, of_lines)
        os.truncate(numbers, of_numbers)
        done.add(6 - run(target, resume=True))
        assert files(target) == files(tmp_path / "whole" / f"a{suffix}")
        assert not part.exists()
    assert done == {0, 1, 2, 5}


def test_another_model_does_not_continue_a_run(tmp_path, monkeypatch):
    run(tmp_path / "a.npz", until=2)
    monkeypatch.setitem(ABOUT, "sha256", "1" * 64)
    with pytest.raises(ValueError, match=r"was written with sha256 0+, not 1+: continue with"):
        run(tmp_path / "a.npz", resume=True)


def test_an_empty_run_is_a_file_without_rows(tmp_path):
    for suffix in SUFFIXES:
        run(tmp_path / f"a{suffix}", rows=[])
        found = read_embeddings(tmp_path / f"a{suffix}")
        assert (found.values.shape, found.paths, found.labels) == ((0, 4), [], [])


def test_what_is_no_file_of_embeddings_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt must end in \.parquet, \.npz or \.npy"):
        read_embeddings(tmp_path / "a.txt")
    np.save(tmp_path / "alone.npy", VALUES)
    with pytest.raises(
        FileNotFoundError, match=r"alone\.json does not exist, which names the rows"
    ):
        read_embeddings(tmp_path / "alone.npy")
    for suffix in SUFFIXES:
        (tmp_path / f"bad{suffix}").write_bytes(b"no")
        (tmp_path / "bad.json").write_text("{}")
        with pytest.raises(ValueError, match=rf"bad\{suffix} is not what cvt embed writes"):
            read_embeddings(tmp_path / f"bad{suffix}")
    for column, message in (
        (pyarrow.array(["x"]), "its features are of string, not lists"),
        (pyarrow.array([1.0]), "its features are of double, not lists"),
        (pyarrow.array([["x"]]), "has features of object"),
    ):
        table = pyarrow.table({"path": ["a"], "features": column})
        parquet.write_table(table, tmp_path / "other.parquet")
        with pytest.raises(ValueError, match=rf"other\.parquet .*{message}"):
            read_embeddings(tmp_path / "other.parquet")
    for columns in ({"path": [1]}, {"path": ["a"], "label": [1]}):
        features = pyarrow.array([[1.0]], pyarrow.list_(pyarrow.float32()))
        table = pyarrow.table({**columns, "features": features})
        parquet.write_table(table, tmp_path / "other.parquet")
        with pytest.raises(ValueError, match=r"other\.parquet has paths or labels that are no"):
            read_embeddings(tmp_path / "other.parquet")
    write_embeddings(Embeddings(VALUES, NAMES, LABELS), tmp_path / "few.npy")
    np.save(tmp_path / "few.npy", VALUES[:5])
    with pytest.raises(ValueError, match=r"few\.npy has 5 rows of features, 6 paths"):
        read_embeddings(tmp_path / "few.npy")
