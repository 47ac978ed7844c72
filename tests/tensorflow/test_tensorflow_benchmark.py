"""The benchmark of the Keras models runs and writes its results; our own stands in for its peer."""

import csv
import importlib
import sys
from pathlib import Path

import pytest
from helpers.small_models import tiny


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("keras_speed")


@pytest.mark.slow
def test_both_take_turns_in_processes_of_their_own(benchmark, monkeypatch, tmp_path, capsys):
    started = []

    def worker(python, model, *arguments, start=benchmark.Worker):
        started.append((python, model))
        return start(sys.executable, "cvt", *arguments)

    peer = (benchmark.Peer("transformers", False),)
    monkeypatch.setattr(benchmark, "Worker", worker)
    monkeypatch.setattr(benchmark, "shape", lambda options: tiny(depth=[1, 1, 1]))
    monkeypatch.setattr(benchmark, "OURS", (benchmark.Peer("cvt", False),))
    monkeypatch.setattr(benchmark, "PEERS", dict.fromkeys(("inference", "training"), peer))
    arguments = ["--peer=elsewhere", "--quick", "--threads=1", f"--results={tmp_path}"]
    options = benchmark.parse(arguments)
    options.batch_sizes = [2]
    benchmark.run(options)
    assert started == [("elsewhere", "transformers"), (sys.executable, "cvt")]
    (path,) = tmp_path.glob("keras-quick-*-tf2.*.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["question"], row["model"]) for row in rows] == [
        *(("inference", "transformers"), ("inference", "cvt")),
        *(("training", "transformers"), ("training", "cvt")),
    ]
    printed = capsys.readouterr().out
    for row in rows:
        assert float(row["ms_per_image"]) > 0
        assert float(row["ratio"]) == 1 or row["model"] == "cvt"
        assert row["ms_per_image"] in printed


def test_a_peer_that_does_not_run_ends_the_benchmark(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="the process of transformers has ended"):
        benchmark.run(benchmark.parse(["--peer=false", "--quick", f"--results={tmp_path}"]))
    with pytest.raises(SystemExit, match="2"):
        benchmark.parse(["--quick"])
