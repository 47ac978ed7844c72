"""The benchmarks run and write their results; what they measure is read, not tested."""

import csv
import importlib
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from cvt import CvtConfig
from cvt.classifier import Classifier
from cvt.profile import profile

# Two images of 32 pixels: only the weights make work.
SMALL = ["--image-size=32", "--batch-size=2", "--steps=2", "--threads=1", "--device=cpu"]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def training(load):
    return load("training")


def fused_classifier(source, precision, threads):
    return Classifier(source, "fused", precision or "fp16", "cpu", threads)


@pytest.fixture
def inference(load, monkeypatch):
    module = load("inference")
    # Starting processes, converting and quantizing take long and are tested elsewhere.
    monkeypatch.setattr(module, "in_fresh_process", lambda function, *given: function(*given))
    monkeypatch.setattr(module, "write_export", module.write_model)
    monkeypatch.setattr(module, "open_runtime", partial(module.open_runtime, runtime="fused"))
    monkeypatch.setattr(module, "Classifier", fused_classifier)
    return module


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


# ------------------------------------------------------------------------------ inference


def asked(inference, folder, *arguments):
    """The rows of the result of a quick run, and its options."""
    few = ("--quick", "--image-size=64", "--threads=1", "--device=cpu", "--overwrite")
    options = inference.parse([*few, f"--results={folder}", *arguments])
    inference.run(options)
    (path,) = folder.glob("inference-*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def names(rows):
    return [" ".join(filter(None, (r["contestant"], r["runtime"], r["precision"]))) for r in rows]


def test_models_are_timed_beside_transformers_and_beside_the_machines_rate(
    inference, tmp_path, monkeypatch, capsys
):
    few = (inference.REFERENCE, inference.OURS, inference.OURS._replace(precision="bf16"))
    monkeypatch.setattr(inference, "CPU", few)
    rows = asked(inference, tmp_path, "--only=rate,model", "--batch-sizes=1,2")
    rates, models = rows[:2], rows[2:]
    assert sorted(names(rates)) == ["matrices of 64 oneDNN fp32", "matrices of 64 torch fp32"]
    assert float(rates[0]["gflops"]) >= float(rates[1]["gflops"]) > 0
    assert names(models) == 2 * [
        *("transformers torch fp32", "cvt fused fp32", "cvt fused bf16", "cvt openvino int8")
    ]
    assert [row["batch_size"] for row in models] == 4 * ["1"] + 4 * ["2"]
    for row in models:
        assert float(row["ms_per_image"]) > 0
        assert bool(row["matrix_share"]) == (row["precision"] == "fp32")
        assert (row["variant"], row["threads"]) == ("tiny", "1")
    assert models[0]["ratio"] == models[4]["ratio"] == "1.0"
    assert models[1]["ms_per_image"] in capsys.readouterr().out


def test_the_table_for_a_gpu_can_be_tried_on_a_cpu(inference, tmp_path, monkeypatch):
    gpu = inference.CUDA
    kept = [c for c in gpu if c.model in ("transformers", "cvt") and c.runtime != "compiled"]
    monkeypatch.setattr(inference, "CUDA", (*kept, gpu[-2]._replace(model="test_convnext")))
    rows = asked(inference, tmp_path, "--contestants=cuda", "--batch-sizes=2", "--no-compiled")
    assert len(gpu) == 11
    assert {row["question"] for row in rows} == {"model"}
    assert names(rows) == [
        *("transformers torch bf16", "cvt torch bf16", "cvt fused bf16"),
        "test_convnext torch bf16",
    ]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino of fixed shape"])
def test_exports_of_transformers_give_its_logits(load, inference, runtime):
    contestants = load("contestants")
    options = inference.parse(["--quick", "--image-size=64", "--threads=1", "--device=cpu"])
    reference = contestants.opened(inference.REFERENCE, options)
    export = contestants.opened(inference.REFERENCE._replace(runtime=runtime), options)
    for batch_size in (1, 3):
        pixels = torch.randn(batch_size, 3, 64, 64)
        torch.testing.assert_close(export(pixels), reference(pixels), atol=1e-4, rtol=0)


def test_only_the_fused_form_skips_operations(load, inference):
    options = inference.parse(["--device=cpu"])
    all_of_it = 2 * profile(CvtConfig.from_variant("cvt-13"), 224).macs
    theirs, ours, fused = (
        load("contestants").operations(contestant, options)
        for contestant in (
            *(inference.REFERENCE, inference.OURS._replace(runtime="torch"), inference.OURS),
        )
    )
    assert theirs == ours == all_of_it
    assert 0.9 * all_of_it < fused < 0.95 * all_of_it


def test_memory_and_folder_and_import_are_measured(inference, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(inference.subprocess, "run", lambda command, **_: commands.append(command))
    rows = asked(inference, tmp_path, "--only=memory,folder,import", "--image-size=64")
    assert names(rows) == [
        *("transformers torch fp32", "cvt fused fp32", "cvt openvino fp32", "cvt fused fp32"),
        *2 * ["transformers.pipeline torch fp32"],
        *(f"cvt.Classifier fused {precision}" for precision in ("fp32", "bf16", "fp16")),
        *("import transformers", "import cvt", "pass", "cvt --help"),
    ]
    for row in rows:
        assert bool(row["peak_memory_mib"]) == (row["question"] == "memory")
        assert bool(row["ms_per_image"]) == (row["question"] != "import")
    assert [row["image_size"] for row in rows[:4]] == ["128", "128", "128", "64"]
    assert max(float(row["ratio"]) for row in rows[4:6]) == 1
    assert [command[-1] for command in commands[:8:2]] == [
        *("import transformers", "import cvt", "pass", "--help")
    ]


def test_pictures_are_different_photographs_of_one_size(inference, tmp_path):
    folder = inference.write_pictures(inference.parse(["--quick", "--device=cpu"]), tmp_path)
    pictures = [Image.open(path) for path in sorted(folder.iterdir())]
    assert [picture.size for picture in pictures] == 4 * [(1024, 768)]
    assert len({picture.tobytes() for picture in pictures}) == 4


@pytest.mark.parametrize("arguments", [["--only=speed"], ["--device=tpu"], ["--batch-sizes=x"]])
def test_what_the_inference_benchmark_cannot_measure_is_wrong_usage(inference, arguments):
    with pytest.raises(SystemExit) as stop:
        inference.parse(arguments)
    assert stop.value.code == 2
