"""The benchmarks run and write their results; what they measure is read, not tested."""

import csv
import importlib
from pathlib import Path

import pytest
import torch

# Two images of 32 pixels: only the weights make work.
SMALL = ["--image-size=32", "--batch-size=2", "--steps=2", "--threads=1", "--device=cpu"]


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("training")


def test_the_training_benchmark_writes_what_it_prints_but_not_over_a_result(
    training, tmp_path, capsys
):
    options = training.parse([*SMALL, f"--results={tmp_path}"])
    training.run(options)
    printed = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    with path.open() as file:
        ours, theirs = csv.DictReader(file)
    assert (ours["model"], theirs["model"]) == ("cvt", "transformers")
    for row in (ours, theirs):
        for column in ("images_per_second", "ms_per_image", "speed_ratio", "peak_memory_mib"):
            assert float(row[column]) > 0
            assert row[column] in printed
        assert (row["batch_size"], row["image_size"], row["precision"]) == ("2", "32", "bf16")

    written = path.read_bytes()
    with pytest.raises(SystemExit, match=r"training-.+\.csv exists; pass --overwrite"):
        training.run(options)
    assert path.read_bytes() == written


def test_both_contestants_of_the_training_benchmark_have_the_same_weights(training):
    config = training.CvtConfig.from_variant("cvt-13", drop_path_rate=[0.0] * 3)
    with torch.device("meta"):
        models = [training.build(contestant, config) for contestant in training.CONTESTANTS]
    ours, theirs = ({k: v.shape for k, v in model.state_dict().items()} for model in models)
    assert ours == theirs
