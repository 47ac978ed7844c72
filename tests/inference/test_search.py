"""Nearest neighbours in a file of embeddings, and `cvt search`, against numpy and by hand."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from cvt.inference import embed as embedding
from cvt.inference.embedding_file import Embeddings, read_embeddings, write_embeddings
from cvt.inference.predict import Result
from cvt.inference.result_file import claimed
from cvt.inference.search import Index, answers, distinct, with_rows, without, write_answers

NAMES = ["a/0.png", "a/1.png", "b/2.png", "b/3.png"]


def embeddings(count, width=8, seed=0):
    """Features of different lengths, around ten directions."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(10, width))
    values = centres[draw.integers(0, 10, count)] + 0.3 * draw.normal(size=(count, width))
    values *= draw.uniform(0.1, 9, (count, 1))
    return Embeddings(values.astype("float32"), [f"{i}.png" for i in range(count)], ["a"] * count)


@pytest.fixture
def four():
    values = np.array([[1, 0], [2, 0.1], [0, 3], [-1, 0]], "float32")
    return Embeddings(values, list(NAMES), ["cat", "cat", "dog", None], {"sha256": "x"})


def test_the_neighbours_are_those_of_all_cosines():
    rows, queries = embeddings(300), embeddings(20, seed=1).values
    unit, wanted = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (rows.values, queries))
    cosines = wanted.astype("float64") @ unit.T
    expected = np.argsort(-cosines, axis=1)[:, :12]
    index = Index(rows)
    found = index(queries, 12)
    assert [[each.path for each in of] for of in found] == [
        [f"{i}.png" for i in r] for r in expected
    ]
    similarities = [[each.similarity for each in of_query] for of_query in found]
    np.testing.assert_allclose(similarities, np.take_along_axis(cosines, expected, 1), atol=1e-6)
    assert (index.recall, index.describe) == (1.0, "300 rows of 8 features, all compared")
    assert len(index(queries, 1000)[0]) == 300


def test_clusters_find_nearly_the_same_rows_and_say_how_many(monkeypatch):
    rows = embeddings(3000)
    queries = rows.values[::60] + 0.1 * embeddings(50, seed=2).values
    exact, clustered = Index(rows), Index(rows, exact=False)
    assert 0.95 <= clustered.recall <= 1
    assert clustered._index.nprobe < clustered._index.nlist
    pairs = zip(exact(queries), clustered(queries), strict=True)
    shared = [len({each.path for each in a} & {each.path for each in b}) / 12 for a, b in pairs]
    assert np.mean(shared) > 0.9
    monkeypatch.setattr("cvt.inference.search.EXACT_ROWS", 2999)
    assert Index(rows).recall == clustered.recall


def test_what_cannot_be_searched_is_refused(four):
    with pytest.raises(ValueError, match=r"queries have shape \(1, 3\): expected \(queries, 2\)"):
        Index(four)(np.ones((1, 3)))
    with pytest.raises(ValueError, match="there are no rows"):
        Index(Embeddings(np.empty((0, 2), "float32"), [], []))
    with pytest.raises(ValueError, match="features must be finite"):
        Index(Embeddings(np.array([[np.nan, 1]], "float32"), ["a"], [None]))


def test_rows_are_removed_by_pattern_and_added_or_replaced(four):
    left = without(four, ["a/*"])
    assert (left.paths, left.labels, left.about) == (NAMES[2:], ["dog", None], {"sha256": "x"})
    assert left.values.tolist() == [[0, 3], [-1, 0]]
    for pattern, message in (("c/*", "c/\\* matches no path of the 4 rows"), ("*", "no row would")):
        with pytest.raises(ValueError, match=message):
            without(four, [pattern])
    new = [Result(path, features=np.array([7, 8], "float32")) for path in ("dog/x.png", "a/1.png")]
    more = with_rows(four, new)
    assert more.paths == ["a/0.png", "b/2.png", "b/3.png", "dog/x.png", "a/1.png"]
    assert more.labels == ["cat", "dog", None, "dog", None]
    assert more.values.tolist()[2:] == [[-1, 0], [7, 8], [7, 8]]


def test_an_image_does_not_find_itself(four):
    (found,) = answers(Index(four), [Result("a/0.png", features=four.values[0])], top=2)
    assert (found.query, [each.path for each in found.neighbours]) == ("a/0.png", NAMES[1:3])


def test_an_image_is_the_same_however_its_path_is_spelt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "linked").symlink_to("a")
    spellings = ["a/0.png", f"{tmp_path}/a/0.png", "./a/../a/0.png", "linked/0.png"]
    assert distinct(map(Path, [*spellings, "a/1.png"])) == [Path("a/0.png"), Path("a/1.png")]
    rows = Embeddings(np.eye(3, 2, dtype="float32"), ["a/0.png", "t.tar#0", "b/2.png"], ["b"] * 3)
    for path in spellings:
        (found,) = answers(Index(rows), [Result(path, features=np.array([1, 0], "float32"))])
        assert {each.path for each in found.neighbours} == {"t.tar#0", "b/2.png"}
    new = [Result(Path(path), features=np.full(2, 7, "float32")) for path in spellings]
    more = with_rows(rows, [*new, Result(Path("b/3.png"), features=np.ones(2, "float32"))])
    assert more.paths == ["t.tar#0", "b/2.png", "linked/0.png", "b/3.png"]
    assert more.labels == ["b", "b", None, "b"]
    assert more.values.tolist()[2:] == [[7, 7], [1, 1]]


def test_sheets_and_tables_have_every_neighbour(four, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    Image.new("RGB", (40, 30), "red").save("a/0.png")  # the others are no files any more
    images = [
        Result(name, features=np.array(v)) for name, v in (("q<b>.png", [1, 0]), ("=q", [0, 1]))
    ]
    found = answers(Index(four), images, top=3)
    for suffix in ("png", "html", "csv", "json"):
        write_answers(found, f"sheet.{suffix}", "nearest")
        with pytest.raises(FileExistsError):
            write_answers(found, f"sheet.{suffix}", "nearest")
    sheet = Image.open("sheet.png")
    assert sheet.width == 4 * 144
    colours = {colour for _, colour in sheet.convert("RGB").getcolors(2**24)}
    assert {(255, 0, 0), (230, 230, 230)} <= colours
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("<img") == 8
    assert "q&lt;b&gt;.png" in page
    assert "://" not in page
    with open("sheet.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[1] == ["q<b>.png", "1", "a/0.png", "cat", "1.000000"]
    assert rows[4][:4] == ["'=q", "1", "b/2.png", "dog"]
    assert json.loads((tmp_path / "sheet.json").read_text())[0]["neighbours"][0] == {
        "path": "a/0.png", "label": "cat", "similarity": 1.0
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"sheet.jpg must end in .png, .html, .csv or .json"):
        write_answers(found, "sheet.jpg", "nearest")


def test_search_finds_adds_and_removes(cvt, model_folder, photos, tmp_path, monkeypatch):
    shutil.copytree(photos, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    options = ("--runtime", "fused", "--workers", 0)
    assert cvt("embed", model_folder, "photos", "--output", "all.npz", *options)[0] == 0
    (tmp_path / "broken.png").write_bytes(b"?")
    words = ("search", "all.npz", "photos/red/03.png", "broken.png", "--top", 3, *options)
    code, out, err = cvt(*words, "--output", "found.json")
    assert (code, "skipped broken.png" in err) == (3, True)
    assert "36 rows of 32 features, all compared" in out
    (found,) = json.loads((tmp_path / "found.json").read_text())
    rows = read_embeddings("all.npz")
    unit = rows.values / np.linalg.norm(rows.values, axis=1, keepdims=True)
    cosines = unit @ unit[rows.paths.index("photos/red/03.png")]
    expected = [rows.paths[i] for i in np.argsort(-cosines)[1:4]]
    assert [each["path"] for each in found["neighbours"]] == expected
    assert all(path in out for path in expected)

    words = ("search", "all.npz", "--remove", "photos/red/0*", "--remove", "*/blue/*", *options)
    code, out, err = cvt(*words, "--add", "photos/red/03.png")
    assert (code, re.findall(r"(\d+) (\w+ ?\w*)", out)) == (
        0, [("22", "rows removed"), ("1", "images added"), ("15", "rows now")]
    )  # fmt: skip
    after = read_embeddings("all.npz")
    assert (after.paths[-1], after.labels[-1], after.about) == (
        "photos/red/03.png",
        "red",
        rows.about,
    )
    np.testing.assert_allclose(after.values[-1], rows.values[rows.paths.index("photos/red/03.png")])

    words = ("search", "all.npz", *options, "--add", "photos/red", "--add", "photos/red/01.png")
    code, out, err = cvt(*words, "--add", tmp_path / "photos/red/02.png")
    assert (code, re.findall(r"(\d+) (\w+ ?\w*)", out)) == (
        0, [("0", "rows removed"), ("12", "images added"), ("24", "rows now")]
    )  # fmt: skip


def test_queries_are_decoded_as_the_rows_were(cvt, model_folder, photos, tmp_path, monkeypatch):
    index, settings = tmp_path / "all.npz", []
    options = ("--runtime", "torch", "--workers", 0)
    how = ("--exact-decoding", "--max-pixels", 5000)
    assert cvt("embed", model_folder, photos, "--output", index, *options, *how)[0] == 0
    embed = embedding.embed

    def recorded(*arguments, **named):
        settings.append(arguments[5:7])
        return embed(*arguments, **named)

    monkeypatch.setattr(embedding, "embed", recorded)
    for words in ((), ("--max-pixels", 4000)):
        assert cvt("search", index, photos / "red" / "03.png", *options, *words)[0] == 0
    assert settings == [(True, 5000), (True, 4000)]


def test_a_file_that_another_process_writes_is_not_changed(cvt, model_folder, photos, tmp_path):
    index, options = tmp_path / "all.npz", ("--runtime", "torch", "--workers", 0)
    assert cvt("embed", model_folder, photos / "red", "--output", index, *options)[0] == 0
    before = index.read_bytes()
    script = (
        "import sys, pathlib; from cvt.inference.result_file import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, index], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        code, _, err = cvt("search", index, "--add", photos / "blue", *options)
        assert (code, "all.npz.part is in use by another process" in err) == (1, True)
        assert index.read_bytes() == before
        other.stdin.close()
    assert cvt("search", index, "--add", photos / "blue", *options)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == [index.name]
    part = tmp_path / "all.npz.part"  # of an interrupted run
    part.mkdir()
    (part / "settings.json").write_text("{}")
    with claimed(index):
        pass
    assert [path.name for path in part.iterdir()] == ["settings.json"]


def test_a_column_that_was_added_is_not_lost(cvt, tmp_path, four):
    path = tmp_path / "all.parquet"
    write_embeddings(four, path)
    table = parquet.read_table(path).append_column("split", pyarrow.array([*"xyxy"]))
    parquet.write_table(table, path)
    assert read_embeddings(path).unread == ["split"]
    code, _, err = cvt("search", path, "--remove", "a/*")
    assert code == 1
    assert "all.parquet has split beside what cvt embed writes, which would be lost" in err
    assert parquet.read_table(path).column_names[-1] == "split"


def test_search_with_another_model_is_refused_by_its_hash(cvt, model_folder, photos, tmp_path):
    path = tmp_path / "all.npz"
    about = {"model": str(model_folder), "sha256": 64 * "0", "stage": 3, "pool": "mean"}
    rows = Embeddings(np.eye(3, 32, dtype="float32"), ["a", "b", "c"], [None] * 3, about)
    write_embeddings(rows, path)
    code, _, err = cvt("search", path, photos / "red")
    assert code == 1
    assert (
        f"was computed by another model than {model_folder}, by SHA-256 (000000000000, not" in err
    )
    write_embeddings(Embeddings(rows.values, rows.paths, rows.labels), path, overwrite=True)
    code, _, err = cvt("search", path, photos / "red")
    assert (code, "does not name the model that computed it: give its --model" in err) == (1, True)
    for words in ((), ("--output", "sheet.png", "--add", photos)):
        assert cvt("search", path, *words)[0] == 2
