import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from cvt.cli import verbs
from cvt.inference.predict import Prediction
from cvt.inference.prediction_file import PredictionFile
from cvt.inference.result_file import run_settings
from cvt.runtime import open_runtime

CVT = Path(sys.executable).with_name("cvt")
SETTINGS = {"topk": 2, "model": "mine"}
NAMES = ["a", 'a "quoted", b', "two\r\nlines", "café", "a", os.fsdecode(b"\xff")]
PATHS = [Path(name) for name in NAMES]
FORMATS = ["csv", "jsonl"]


def prediction(path):
    return Prediction(path, ["yes, of course", 'n"o'], [0.75, 0.25])


def write(target, paths, settings=SETTINGS, **options):
    """Write what is missing; answer which images that were."""
    with PredictionFile(target, **options) as results:
        missing = list(results.missing(paths, settings))
        for path in missing:
            results.write(prediction(path))
        results.finish()
    return missing


def interrupt(target, paths, settings=SETTINGS):
    """Leave what a run leaves that breaks off after these images."""
    with PredictionFile(target) as results:
        for path in results.missing(paths, settings):
            results.write(prediction(path))
    return target.with_name(f"{target.name}.part") / target.name


@pytest.mark.parametrize("suffix", FORMATS)
def test_malicious_names_are_written_safely_and_read_back(suffix, tmp_path):
    harmful = ["=1+1", "'=1+1", "-1", "\x1b[31mred", "\\x1b[31mred", "a\u202eb", "@SUM(A1)"]
    paths = [Path(name) for name in harmful]
    target = tmp_path / f"a.{suffix}"
    interrupt(target, paths[:5])
    assert write(target, paths, resume=True) == paths[5:]
    text = target.read_text("utf-8")
    assert not set("\x1b\u202e") & set(text)
    if suffix == "jsonl":
        assert [json.loads(line)["path"] for line in text.splitlines()] == harmful
    else:
        cells = [row[0] for row in csv.reader(text.splitlines()[1::2])]
        assert len(set(cells)) == len(harmful)
        assert not any(cell[0] in "=+-@" for cell in cells)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_cut_at_any_byte_is_completed_to_the_same_bytes(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "cvt.inference.result_file.sync", lambda path: None
    )  # it takes most of the time
    whole, target = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    assert write(whole, PATHS) == PATHS
    growing = interrupt(target, PATHS)
    shutil.copytree(growing.parent, tmp_path / "left")
    assert growing.read_bytes() == whole.read_bytes()
    done = []
    for cut in range(len(whole.read_bytes()) + 1):
        shutil.rmtree(growing.parent, ignore_errors=True)
        shutil.copytree(tmp_path / "left", growing.parent)
        os.truncate(growing, cut)
        done.append(len(PATHS) - len(write(target, PATHS, resume=True, overwrite=True)))
        assert target.read_bytes() == whole.read_bytes(), cut
        assert not growing.parent.exists()
    assert done == sorted(done)
    assert set(done) == set(range(len(PATHS) + 1))


@pytest.mark.parametrize("suffix", FORMATS)
def test_all_behind_a_damaged_record_is_recomputed(suffix, tmp_path):
    target = tmp_path / f"out.{suffix}"
    growing = interrupt(target, PATHS[:1] + PATHS[3:])
    content = bytearray(growing.read_bytes())
    at = content.index(b"caf")
    content[at : at + 40] = bytes(40)  # as after the loss of power
    growing.write_bytes(content)
    assert write(target, PATHS, resume=True) == PATHS[1:]


def test_without_an_interrupted_run_resuming_begins_one(tmp_path):
    assert write(tmp_path / "new" / "out.csv", PATHS, resume=True) == PATHS


def test_what_an_interrupted_run_left_is_not_lost_unasked(tmp_path):
    target = tmp_path / "out.jsonl"
    growing = interrupt(target, PATHS[:2])
    with pytest.raises(FileExistsError, match=r"out.jsonl.part has .* --resume .* --force"):
        PredictionFile(target)
    assert growing.read_text().count("\n") == 2
    assert write(target, PATHS[4:], overwrite=True) == PATHS[4:]
    assert len(target.read_text().splitlines()) == len(PATHS[4:])


def test_only_the_same_settings_go_on(tmp_path):
    target = tmp_path / "out.csv"
    interrupt(target, PATHS[:2])
    with (
        PredictionFile(target, resume=True) as results,
        pytest.raises(ValueError, match="written with model mine, not other; topk 2, not 3"),
    ):
        results.missing(PATHS, {"topk": 3, "model": "other"})


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_folder_of_the_user_is_not_resumed(tmp_path, content):
    part = tmp_path / "out.csv.part"
    part.mkdir()
    (part / "mine").touch()
    if content is not None:
        (part / "settings.json").write_text(content)
    with (
        PredictionFile(tmp_path / "out.csv", resume=True) as results,
        pytest.raises(ValueError, match="not what an interrupted run leaves"),
    ):
        results.missing(PATHS, SETTINGS)
    write(tmp_path / "out.csv", PATHS, overwrite=True)
    assert [path.name for path in part.iterdir()] == ["mine"]


def test_two_processes_do_not_write_one_file(tmp_path):
    growing = interrupt(tmp_path / "out.csv", PATHS[:2])
    script = (
        "import sys, pathlib; from cvt.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, growing.parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        with pytest.raises(FileExistsError, match="in use by another process"):
            write(tmp_path / "out.csv", PATHS, resume=True)
        other.stdin.close()
    assert write(tmp_path / "out.csv", PATHS, resume=True) == PATHS[2:]


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_runs_that_start_together_only_one_writes(tmp_path, overwrite):
    target = tmp_path / "out.csv"
    with PredictionFile(target, overwrite=overwrite) as first:
        with PredictionFile(target, overwrite=overwrite) as second:
            assert list(second.missing(PATHS, SETTINGS)) == PATHS
            missing = first.missing(PATHS, SETTINGS)
            first.write(prediction(next(missing)))
            with pytest.raises(FileExistsError, match=r"out.csv.part is in use: another process"):
                second.write(prediction(PATHS[0]))
            with pytest.raises(FileExistsError, match=r"out.csv.part is in use: another process"):
                second.finish()
        for path in missing:
            first.write(prediction(path))
        first.finish()
    assert write(tmp_path / "alone.csv", PATHS) == PATHS
    assert target.read_bytes() == (tmp_path / "alone.csv").read_bytes()


def test_a_file_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "out.csv"
    with PredictionFile(target) as results:
        for path in results.missing(PATHS, SETTINGS):
            results.write(prediction(path))
        target.write_text("mine")
        with pytest.raises(FileExistsError, match=r"out.csv exists already"):
            results.finish()
    assert target.read_text() == "mine"
    target.unlink()
    assert write(target, PATHS, resume=True) == []


def test_a_link_stays_one_and_the_file_behind_it_is_written(tmp_path):
    real, link = tmp_path / "real.csv", tmp_path / "link.csv"
    real.write_text("old")
    link.symlink_to(real.name)
    assert write(link, PATHS, overwrite=True) == PATHS
    assert link.is_symlink()
    assert write(tmp_path / "alone.csv", PATHS) == PATHS
    assert real.read_bytes() == (tmp_path / "alone.csv").read_bytes()


def test_a_place_that_cannot_be_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="has no folder to be in"):
        PredictionFile(tmp_path / "file" / "out.csv")
    (tmp_path / "out.csv").mkdir()
    with pytest.raises(FileExistsError):
        PredictionFile(tmp_path / "out.csv", overwrite=True)


# ------------------------------------------------------------------------------ cvt predict


@pytest.fixture
def cvt(model_folder):
    """Runs `cvt predict`."""

    def run(*arguments):
        command = ["predict", "--runtime", "torch", model_folder, *arguments]
        return CliRunner().invoke(verbs, [*map(str, command)])

    return run


def test_an_interrupted_run_that_writes_into_the_models_folder_goes_on(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    runtime = open_runtime(folder, "torch")
    before = run_settings(str(folder), runtime, topk=1)
    (folder / "out.csv.part").mkdir()
    os.utime(folder / "out.csv.part", (2**32, 2**32))
    assert run_settings(str(folder), runtime, topk=1) == before
    os.utime(folder / "config.json", (2**32, 2**32))
    assert run_settings(str(folder), runtime, topk=1) != before


def test_a_failure_before_the_first_result_leaves_nothing(cvt, photos, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("no")
        yield

    monkeypatch.setattr("cvt.inference.predict.classify", fail)
    assert cvt(photos, "--output", tmp_path / "out.csv").exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stop", "suffix"), [(signal.SIGINT, "csv"), (signal.SIGKILL, "jsonl")], ids=["ctrl-c", "kill"]
)
def test_an_interrupted_run_goes_on_where_it_was(cvt, model_folder, photos, tmp_path, stop, suffix):
    output, late = tmp_path / f"out.{suffix}", tmp_path / "late.png"
    late.write_bytes(b"not yet")
    images = [late, *[photos] * 4, "--topk", 2]
    command = [CVT, "predict", "--runtime", "torch", model_folder, *images]
    command += ["--output", output, "--batch-size", 1]
    growing = tmp_path / f"{output.name}.part" / output.name
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not growing.exists() or growing.stat().st_size < 500:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
    assert not output.exists()
    assert "Traceback" not in err
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert "--resume continues" in err

    again = cvt(*images, "--output", output)
    assert "--resume" in str(again.exception)
    other = cvt(*images, "--output", output, "--resume", "--exact-decoding")
    assert "exact_decoding False, not True" in str(other.exception)

    shutil.copy(photos / "red" / "00.png", late)  # what failed is tried again
    answer = cvt(*images, "--output", output, "--resume")
    assert answer.exit_code == 0, answer.output
    assert "images are classified already" in answer.output
    assert f"{output}: 145 images classified" in answer.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["late.png", output.name]

    assert cvt(*images, "--output", tmp_path / f"whole.{suffix}").exit_code == 0
    assert described(output) == described(tmp_path / f"whole.{suffix}")


def described(path):
    """Images and their labels, in an order of their own."""
    with open(path, newline="") as file:
        if path.suffix == ".csv":
            return sorted(row[:3] for row in csv.reader(file))
        records = [json.loads(line) for line in file]
    return sorted((r["path"], [p["label"] for p in r["predictions"]]) for r in records)
