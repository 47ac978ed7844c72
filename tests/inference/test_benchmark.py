import csv
import functools
import itertools

import pytest
from click.testing import CliRunner
from PIL import Image

from cvt.cli.benchmark import benchmark as command
from cvt.export import export
from cvt.inference import benchmark as timing
from cvt.inference.benchmark import Measurement, benchmark, in_turns, middle, speed_ratios


@pytest.fixture
def hasty(monkeypatch):
    """Two turns of one call: enough to see that it works."""
    monkeypatch.setattr(timing, "in_turns", functools.partial(in_turns, least=2, turn=0))


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `sleep` moves; the names of those that slept, in their order."""

    class Clock:
        now, slept = 0.0, []

        def perf_counter(self):
            return self.now

        def sleep(self, name, seconds):
            self.now += seconds
            self.slept.append(name)

    clock = Clock()
    clock.slept = []
    monkeypatch.setattr(timing, "time", clock)
    return clock


def run(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


# ------------------------------------------------------------------------------ turns


def sleepers(clock, **seconds):
    return {name: functools.partial(clock.sleep, name, s) for name, s in seconds.items()}


def test_contestants_take_turns_after_a_warm_up(clock):
    times = in_turns(sleepers(clock, a=1.0, b=0.25), least=3, turn=0)
    assert "".join(clock.slept) == "aabb" + 3 * "ab"
    assert times == {"a": [[1.0]] * 3, "b": [[0.25]] * 3}


def test_a_turn_is_filled_with_short_calls(clock):
    times = in_turns(sleepers(clock, a=1.0, b=0.0625), least=2, turn=0.25)
    assert times == {"a": [[1.0]] * 2, "b": [[0.0625] * 4] * 2}


def test_turns_go_on_for_the_seconds_of_each_contestant(clock):
    times = in_turns(sleepers(clock, a=0.5, b=0.5), seconds=4, least=2, turn=0)
    assert [len(turns) for turns in times.values()] == [8, 8]


def test_a_machine_that_slows_down_does_not_change_the_ratio():
    slow, fast = ([[pace * load] for load in (1, 2, 7, 3)] for pace in (1.5, 0.5))
    assert speed_ratios(slow, fast) == [3, 3, 3]
    assert middle(fast) == 1.25


# ------------------------------------------------------------------------------ benchmark


def test_every_combination_is_measured_or_has_a_reason(hasty, model_folder):
    done = itertools.count()
    rows = benchmark(
        model_folder,
        ["torch", "fused"],
        ["fp32", "bf16", "int8"],
        batch_sizes=[1, 3],
        threads=1,
        device="cpu",
        seconds=0,
        step=lambda: next(done),
    )
    combinations = itertools.product([1, 3], ["torch", "fused"], ["fp32", "bf16", "int8"])
    assert [(r.batch_size, r.runtime, r.precision) for r in rows] == list(combinations)
    assert next(done) == len(rows) == 12
    for row in rows:
        assert row.image_size == 32  # as in the folder's preprocessing
        if row.precision == "int8":
            assert row.median_ms is row.p95_ms is row.images_per_second is row.ratio is None
            assert "int8" in row.reason
        else:
            assert 0 < row.median_ms <= row.p95_ms
            assert row.images_per_second == pytest.approx(
                1000 * row.batch_size / row.median_ms, 0.01
            )
            assert (row.calls, row.reason) == (2, "")
    assert [row.ratio for row in rows[::6]] == [1, 1]


def test_a_size_that_the_model_cannot_do_leaves_the_others(hasty, model_folder):
    small, large = benchmark(
        model_folder, ["torch"], ["fp32"], [1], [1, 16], threads=1, device="cpu", seconds=0
    )
    assert "this model needs at least" in small.reason
    assert large.calls


def test_a_model_that_is_only_named_is_not_downloaded(hasty):
    (row,) = benchmark("cvt-13", ["torch"], ["fp32"], [1], [32], threads=1, device="cpu", seconds=0)
    assert row.calls


def test_an_exported_folder_runs_as_what_it_is(hasty, model_folder, tmp_path):
    folder = tmp_path / "export"
    export(model_folder, folder, "torch-export", dynamic=())
    (row,) = benchmark(folder, batch_sizes=[1], threads=1, device="cpu", seconds=0)
    assert (row.runtime, row.precision, row.image_size) == ("torch", "fp32", 32)
    assert row.calls
    _, other = benchmark(folder, ["torch", "fused"], batch_sizes=[1], seconds=0)
    assert "is an export for torch" in other.reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "cvt-99"}, "no model cvt-99"),
        ({"runtimes": ["fused", "onyx"]}, "runtimes: onyx is none of auto, torch, fused"),
        ({"precisions": ["fp8"]}, "precisions: fp8 is none of fp32, bf16"),
        ({"batch_sizes": []}, r"batch_sizes = \[\]"),
        ({"batch_sizes": [0]}, r"batch_sizes = \[0\]"),
        ({"image_sizes": [32, 0]}, r"image_sizes = \[32, 0\]"),
        ({"precisions": ["int8"]}, "nothing could be measured: precision = int8"),
    ],
)
def test_bad_arguments_are_named(model_folder, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        benchmark(**{"source": model_folder, "runtimes": ["torch"], **arguments})


# ------------------------------------------------------------------------------ command line


def test_the_command_prints_a_table_and_writes_csv_and_plot(hasty, model_folder, tmp_path):
    folder = tmp_path / "speed"
    arguments = (
        *(model_folder, "--runtimes", "torch,fused", "--precisions", "fp32,int8"),
        *("--batch-sizes", "1,2", "--threads", 1, "--device", "cpu", "--seconds", 0),
        *("--output", folder),
    )
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("torch fp32") == result.stdout.count("fused fp32") == 2
    assert result.stderr.count("skipped fused int8: precision = int8") == 1
    assert f"written to {folder}" in result.stdout.replace("\n", "")
    with open(folder / "benchmark.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["batch_size"], row["runtime"]) for row in rows if row["calls"] != "0"] == [
        *(("1", "torch"), ("1", "fused"), ("2", "torch"), ("2", "fused"))
    ]
    for row in rows:
        assert (row["model"], row["threads"]) == (str(model_folder), "1")
        assert row["torch"]
        assert bool(row["reason"]) == (row["precision"] == "int8") == (not row["median_ms"])
    with Image.open(folder / "benchmark.png") as picture:
        assert picture.width > picture.height

    written = (folder / "benchmark.csv").read_bytes()
    again = run(*arguments)
    assert "exists already" in str(again.exception)
    assert (folder / "benchmark.csv").read_bytes() == written
    assert run(*arguments, "--force").exit_code == 0


def test_the_plot_has_a_panel_for_each_size_and_a_bar_for_each_measurement(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [
        Measurement("torch", "fp32", 1, 224, 10.0, 11.0, 100.0, 1.0, 9),
        Measurement("openvino", "int8", 1, 224, 2.0, 2.1, 500.0, 5.0, 9),
        Measurement("openvino", "fp16", 1, 224, reason="cannot"),
        Measurement("torch", "fp32", 8, 384, 80.0, 81.0, 100.0, 1.0, 9),
    ]
    timing.plot_benchmark(rows, tmp_path / "a.png", "model")
    left, right = drawn[0].axes
    assert [axes.get_title() for axes in (left, right)] == [
        "batch 1, 224 pixels",
        "batch 8, 384 pixels",
    ]
    assert [bar.get_width() for bar in left.patches] == [100, 500]
    assert [text.get_text() for text in right.texts] == ["100.0  (1.00×)"]


@pytest.mark.parametrize("sizes", ["0", "1,-2", "1,,2", "many", ""])
def test_sizes_that_are_no_numbers_are_wrong_usage(model_folder, sizes):
    result = run(model_folder, "--batch-sizes", sizes)
    assert result.exit_code == 2
    assert "whole numbers" in result.stderr
