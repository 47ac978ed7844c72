"""The benchmarks run and write their results; what they measure is read, not tested."""

import csv
import dataclasses
import importlib
import itertools
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openvino
import pytest
import torch
from helpers.pictures import photo
from PIL import Image

from cvt import Classifier, CvtConfig, CvtForImageClassification, image_processor
from cvt.kernels.qkv_projection import OnePassAttention
from cvt.kernels.recompute import RecomputingBlock
from cvt.modeling import Block, SelfAttention
from cvt.profile import profile

SMALL = ["--variant=tiny", "--image-size=32", "--batch-size=2", "--steps=2", "--threads=1"]


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


@pytest.mark.slow
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


def test_both_peers_of_the_training_benchmark_have_the_same_weights(training):
    config = training.shape("cvt-13")
    with torch.device("meta"):
        models = [training.build(peer, config) for peer in training.PEERS]
    ours, theirs = ({k: v.shape for k, v in model.state_dict().items()} for model in models)
    assert ours == theirs


# ------------------------------------------------------------------------------ inference


def results(program, folder, *arguments):
    """The rows that a quick run of a program writes."""
    program.run(program.parse(["--quick", f"--results={folder}", *arguments]))
    return written(folder)


def written(folder):
    (path,) = folder.glob("*-quick-*.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def asked(inference, folder, *arguments):
    return results(inference, folder, "--image-size=64", "--threads=1", *arguments)


def names(rows):
    return [" ".join(filter(None, (r["peer"], r["runtime"], r["precision"]))) for r in rows]


@pytest.mark.slow
def test_models_are_timed_beside_transformers_and_beside_the_machines_rate(
    inference, tmp_path, monkeypatch, capsys
):
    few = (inference.REFERENCE, inference.OURS, inference.OURS._replace(precision="bf16"))
    monkeypatch.setattr(inference, "CPU", few)
    rows = asked(inference, tmp_path, "--only=rate,model")
    rates = [row for row in rows if row["question"] == "rate"]
    models = rows[len(rates) :]
    engines = {"oneDNN fp32", "torch fp32", "openvino fp32", "openvino int8"}
    assert engines <= {f"{row['runtime']} {row['precision']}" for row in rates}
    assert {row["peer"] for row in rates} == {"matrices of 64"}
    speeds = [float(row["gflops"]) for row in rates]
    assert speeds == sorted(speeds, reverse=True)
    assert speeds[-1] > 0
    measured = {row["precision"] for row in rates}
    assert names(models) == 2 * [
        *("transformers torch fp32", "cvt fused fp32", "cvt fused bf16", "cvt openvino int8")
    ]
    assert [row["batch_size"] for row in models] == 4 * ["1"] + 4 * ["2"]
    for row in models:
        assert float(row["ms_per_image"]) > 0
        assert bool(row["matrix_share"]) == (row["precision"] in measured)
        assert (row["variant"], row["threads"]) == ("tiny", "1")
    assert models[0]["ratio"] == models[4]["ratio"] == "1.0"
    assert models[1]["ms_per_image"] in capsys.readouterr().out


@pytest.mark.slow
def test_what_an_expert_builds_of_transformers_is_a_peer(inference, tmp_path, monkeypatch):
    given = {}

    def by_hand_in_int8(pictures, options):
        given["pictures"] = pictures
        return inference.opened(inference.REFERENCE, options)

    by_hand = inference.BY_HAND["int8"]
    monkeypatch.setattr(inference, "OPENVINO", (inference.REFERENCE, by_hand))
    monkeypatch.setattr(inference, "by_hand_in_int8", by_hand_in_int8)
    rows = asked(inference, tmp_path, "--only=openvino")
    assert len(given["pictures"]) == 4
    assert all(path.suffix == ".jpg" for path in given["pictures"])
    rows = [row for row in rows if row["question"] == "openvino"]
    assert names(rows) == 2 * [
        *("transformers torch fp32", "transformers openvino of fixed shape int8"),
        "cvt openvino int8",
    ]
    assert [row["ratio_to_by_hand"] for row in rows[:2]] == ["", "1.0"]
    assert float(rows[2]["ratio_to_by_hand"]) > 0
    assert float(rows[2]["matrix_share"]) > 0


def test_int8_is_compared_with_fp32_on_labelled_images(load, tmp_path, monkeypatch):
    """Every row has its own runtime; here, one of them gives the same class to all images."""
    quantization = load("quantization")
    config = CvtConfig.from_variant("cvt-digits", depth=[1, 1, 1])
    config.class_names = ["dark", "light"]
    model = CvtForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "run" / "best")
    image_processor(config, image_size=16).save_pretrained(tmp_path / "run" / "best")
    for name, level in (("dark", 10), ("light", 240)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            picture = Image.new("RGB", (16, 16), (level, level, 10 * i))
            picture.save(tmp_path / "images" / name / f"{i}.png")

    def light(*_):
        return lambda pixels: torch.tensor([[0.0, 1.0]]).expand(len(pixels), -1)

    def by_level(*_, **__):
        return lambda pixels: torch.stack([torch.zeros(len(pixels)), pixels.mean((1, 2, 3))], 1)

    monkeypatch.setattr(quantization, "export", lambda *_, **__: SimpleNamespace(file="model.xml"))
    monkeypatch.setattr(quantization, "core", lambda: SimpleNamespace(read_model=lambda path: path))
    monkeypatch.setattr(quantization, "open_runtime", by_level)
    monkeypatch.setattr(quantization, "in_openvino", light)
    monkeypatch.setattr(quantization, "full_integer", lambda *_: tmp_path / "full.tflite")
    monkeypatch.setattr(quantization, "LiteRtRuntime", light)
    (tmp_path / "full.tflite").write_bytes(bytes(2**20))
    images = str(tmp_path / "images")
    arguments = [str(tmp_path / "run" / "best"), images, images, f"--results={tmp_path / 'csv'}"]
    quantization.run(quantization.parse(arguments))
    (path,) = (tmp_path / "csv").iterdir()
    with path.open() as file:
        rows = {row["precision"]: row for row in csv.DictReader(file)}
    wrong = [rows.pop(name) for name in ("int8 as computed in 8 bits", "LiteRT full integer")]
    for row in wrong:
        assert (row["top1"], row["points_lost"], row["agreement"]) == ("50.0", "50.0", "50.0")
        assert row["images"] == "6"
    assert wrong[1]["mib"] == "1.0"
    assert [*rows] == [
        *("fp32", "int8 as exports run here", "LiteRT fp32", "LiteRT fp16", "LiteRT int8")
    ]
    for row in rows.values():
        assert (row["top1"], row["points_lost"], row["agreement"]) == ("100.0", "0.0", "100.0")
        assert (row["largest_difference"], float(row["ms"]) > 0) == ("0", True)


def write_clipart(folder):
    """Two classes of 14 pictures, and what a clean set does not have."""
    draw = np.random.default_rng(0)
    for label, level in (("dark", 60), ("light", 190)):
        (folder / label).mkdir(parents=True)
        for i in range(14):
            pixels = draw.integers(level - 60, level + 60, (4, 4, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((90, 70), Image.Resampling.NEAREST)
            picture.save(folder / label / f"{'abcdefghijklmn'[i]}_{i}.png")
    shutil.copy(folder / "dark" / "a_0.png", folder / "dark" / "copy.png")  # one of the two stays
    shutil.copy(folder / "dark" / "b_1.png", folder / "light" / "other label.png")  # neither does
    (folder / "dark" / "link.png").symlink_to(folder / "dark" / "c_2.png")
    Image.new("RGB", (90, 70), "white").save(folder / "dark" / "blank.png")
    (folder / "light" / "broken.png").write_bytes(b"no picture")
    (folder / "rare").mkdir()
    Image.effect_noise((90, 70), 90).save(folder / "rare" / "alone.png")


@pytest.fixture
def small_training(load, monkeypatch):
    """What trains small models, in threads: a process would take seconds to start."""
    module = load("small_training")
    threads = SimpleNamespace(Pool=ThreadPool)
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda _: threads)
    return module


def test_clip_art_is_cleaned_and_divided(small_training, tmp_path, capsys):
    write_clipart(tmp_path / "pictures")
    pictures = small_training.clip_art(tmp_path / "pictures", quick=True)
    assert np.bincount(pictures.classes).tolist() == [13, 14]
    assert pictures.pixels.shape == (27, 80, 80, 3)
    assert sorted(set(pictures.folds)) == list(range(6))
    assert capsys.readouterr().out.startswith("27 of 34 pictures, 2 classes, 27 series; ")
    few = pictures.some(9)
    assert few.pixels.shape == (9, 80, 80, 3)
    assert few.classes.tolist() == [0] * 5 + [1] * 4


def test_the_models_for_clip_art_are_compared_with_cvt_on_the_same_folds(
    load, small_training, tmp_path, monkeypatch, capsys
):
    clipart = load("clipart")
    write_clipart(tmp_path / "pictures")
    arguments = [str(tmp_path / "pictures"), "--quick", "--peers=cvt,resnet", "--processes=1"]
    arguments += [f"--results={tmp_path / 'csv'}", f"--prepared={tmp_path / 'prepared'}"]
    clipart.run(clipart.parse(arguments))
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "csv").iterdir()
    rows = small_training.rows_of(path)
    assert [(row["peer"], row["fold"]) for row in rows] == [
        *(("cvt", "0"), ("resnet", "0")),
        *(("cvt", "1"), ("resnet", "1"), ("cvt", "2"), ("resnet", "2")),
    ]
    assert all(len(row["top1_curve"].split()) == 5 for row in rows)
    assert all(row["top1_curve"].endswith(row["top1"]) for row in rows)
    monkeypatch.setattr(small_training, "train", None)  # what the file has is not trained again
    path = path.rename(tmp_path / "yesterday.csv")
    options = clipart.parse([*arguments, f"--resume={path}"])
    clipart.run(options)
    again = capsys.readouterr().out
    assert again.splitlines()[-3:-1] == printed.splitlines()[-3:-1]
    longer = dataclasses.replace(clipart.load_recipe(clipart.RECIPE), epochs=2)
    with pytest.raises(SystemExit, match=r"yesterday\.csv has trainings of 1 epochs, not of 2"):
        small_training.file_of("clipart", options, longer)
    figures = {(row["peer"], row["fold"]): float(row["top1"]) for row in rows}
    gaps = [figures["resnet", fold] - figures["cvt", fold] for fold in "12"]
    mean, error = sum(gaps) / 2, abs(gaps[0] - gaps[1]) / 2
    assert f"{mean:+.1f} ± {error:.1f}" in printed
    path.write_text("peer,fold\n")  # of another version
    with pytest.raises(SystemExit, match="has other columns, peer,fold; pass --overwrite"):
        small_training.add_rows(path, rows)


def test_a_training_is_kept_for_another_question(load, small_training, tmp_path, monkeypatch):
    small_training.digits().some(60).save(tmp_path / "work")
    recipe = small_training.shortened(load("ablations").load_recipe("digits"), 1)

    def build(name, classes, recipe):
        side = recipe.image_size
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * side**2, classes))

    job = small_training.Job("linear", 1, "first", {"lr": 0.1})
    model, row = small_training.train(job, build, tmp_path / "work", recipe)
    monkeypatch.setattr(small_training, "_trained", None)
    same = job._replace(name="second")
    kept, again = small_training.train(same, build, tmp_path / "work", recipe)
    assert torch.equal(kept[1].weight, model[1].weight)
    assert again == row | {"recipe": "second"}
    for other in (job._replace(fold=2), job._replace(settings={"lr": 0.2})):
        with pytest.raises(TypeError):
            small_training.train(other, build, tmp_path / "work", recipe)


def test_of_the_rates_the_best_on_the_kept_fold_is_taken(small_training, tmp_path):
    seen = []

    def measure(job):
        seen.append((job.peer, job.fold, job.settings["lr"]))
        top1 = {
            "a": {0.1: 50, 0.2: 60, 0.4: 55},
            "b": {0.05: 60, 0.1: 70, 0.2: 70},
            "c": {0.1: 50, 0.2: 40, 0.05: 60, 0.025: 60},
        }
        found = {"top1": top1[job.peer][job.settings["lr"]], "lr": job.settings["lr"]}
        return [{"peer": job.peer, "fold": job.fold, "recipe": job.name} | found]

    options = SimpleNamespace(quick=False, folds=[3, 1], processes=1)
    path = tmp_path / "rows.csv"
    rows = small_training.compared(["a", "b", "c"], (0.1, 0.2), measure, path, options)
    assert seen[:6] == [(peer, 0, rate) for peer in "abc" for rate in (0.1, 0.2)]
    assert seen[6:10] == [("a", 0, 0.4), ("b", 0, 0.05), ("c", 0, 0.05), ("c", 0, 0.025)]
    best = [("a", 0.2), ("b", 0.1), ("c", 0.05)]
    assert seen[10:] == [(peer, fold, rate) for fold in (3, 1) for peer, rate in best]
    found = [(row["peer"], row["fold"]) for row in rows]
    assert found == [(peer, fold) for fold in "31" for peer in "abc"]


# ------------------------------------------------------------------------------ ablations


def test_each_ablation_changes_what_it_names(load):
    ablations = load("ablations")
    for variant, side in (("cvt-13", 224), ("cvt-7", 64), ("cvt-digits", 16)):
        of = {name: ablations.config_of(name, variant, 5, side) for name in ablations.NAMES}
        plain = of[ablations.BASE]
        assert plain.to_dict() | {"image_size": None} == CvtConfig.from_variant(
            variant, num_labels=5
        ).to_dict() | {"image_size": None}
        every, first, last = (of[f"positions-{place}"] for place in ("every", "first", "last"))
        assert every.position_embedding == ["learned"] * 3
        assert first.position_embedding == ["learned", "none", "none"]
        assert last.position_embedding == ["none", "none", "learned"]
        for name in ("patches", "patches-positions"):
            assert of[name].patch_sizes == of[name].patch_stride == plain.patch_stride
            assert of[name].patch_padding == [0] * 3
        assert of["patches-positions"].position_embedding == ["learned"] * 3
        convolved = {name: config.qkv_projection_method for name, config in of.items()}
        assert convolved["projection-linear"] == ["linear"] * 3
        assert convolved["projection-stage-1"] == ["dw_bn", "linear", "linear"]
        assert convolved["projection-stages-1-2"] == ["dw_bn", "dw_bn", "linear"]
        assert convolved["stride-1"] == ["dw_bn"] * 3
        for name in ("projection-stage-1", "projection-stages-1-2", "stride-1"):
            assert of[name].stride_kv == [1] * 3


def test_ablations_are_compared_fold_by_fold_and_drawn(
    load, small_training, tmp_path, monkeypatch, capsys
):
    ablations = load("ablations")
    monkeypatch.setattr(ablations, "at_the_papers_size", lambda: None)
    monkeypatch.setattr(ablations, "QUICK_IMAGES", 60)
    kept = {
        name: (models[0], models[-1])
        for name, models in ablations.ABLATIONS.items()
        if name != "token embedding"
    }
    names = list(dict.fromkeys(model.name for models in kept.values() for model in models))
    monkeypatch.setattr(ablations, "ABLATIONS", kept)
    monkeypatch.setattr(ablations, "NAMES", names)
    arguments = ["--data=digits", "--quick", "--processes=1"]
    arguments += [f"--results={tmp_path / 'csv'}", f"--figure={tmp_path / 'figure.png'}"]
    ablations.run(ablations.parse(arguments))
    printed = capsys.readouterr().out
    assert Image.open(tmp_path / "figure.png").format == "PNG"
    (path,) = (tmp_path / "csv").iterdir()
    assert path.name.startswith("ablations-digits-quick-")
    rows = small_training.rows_of(path)
    assert len(rows) == 3 * len(ablations.NAMES)
    top1 = {(row["peer"], row["fold"]): float(row["top1"]) for row in rows}
    for name, reference in (("positions-every", ablations.BASE), ("projection-linear", "stride-1")):
        gaps = [top1[name, fold] - top1[reference, fold] for fold in "12"]
        assert f"{sum(gaps) / 2:+.1f} ± {abs(gaps[0] - gaps[1]) / 2:.1f}" in printed
    macs = {row["peer"]: int(row["macs"]) for row in rows}
    assert macs["stride-1"] > macs[ablations.BASE] > 0
    assert macs["positions-every"] == macs[ablations.BASE]
    parameters = {row["peer"]: int(row["parameters"]) for row in rows}
    assert parameters["positions-every"] > parameters[ablations.BASE]


@pytest.mark.parametrize(
    ("paper", "mean", "margin", "expected"),
    [
        ("loss", -3.0, 1.0, "agrees"),
        ("loss", -1.0, 2.0, "cannot tell"),
        ("loss", 3.0, 1.0, "disagrees"),
        ("no gain", -1.0, 2.0, "no gain seen"),
        ("no gain", 1.0, 2.0, "cannot tell"),
        ("no gain", 3.0, 1.0, "disagrees"),
        ("loss", -3.0, float("nan"), "cannot tell"),
    ],
)
def test_a_claim_is_seen_only_beyond_the_error(load, paper, mean, margin, expected):
    assert load("ablations").verdict(paper, mean, margin) == expected


# ------------------------------------------------------------------------------ invariance


def test_pictures_are_moved_scaled_and_turned(load):
    invariance = load("invariance")
    picture = Image.new("RGB", (80, 80), "black")
    right = np.asarray(invariance.shifted(picture, 64, 5, 0))[..., 0]
    assert (right[:, :5] == 255).all()
    assert (right[:, 5:] == 0).all()
    up = np.asarray(invariance.shifted(picture, 64, 0, -2))[..., 0]
    assert (up[-2:] == 255).all()
    assert (up[:-2] == 0).all()
    half = np.asarray(invariance.scaled(picture, 64, 0.5))[..., 0]
    assert (half[16:48, 16:48] == 0).all()
    assert (half == 0).sum() == 32 * 32
    assert (np.asarray(invariance.scaled(picture, 64, 1.5)) == 0).all()
    drawn = Image.fromarray(photo(80, 80))
    plain = np.asarray(invariance.resized(drawn, 64))
    turned = np.asarray(invariance.rotated(drawn, 64, 90))
    np.testing.assert_allclose(turned, np.rot90(plain), atol=3)
    for question, value, side, changes in invariance.cases(64):
        assert all(change(drawn).size == (side, side) for change in changes), (question, value)


def test_models_are_evaluated_on_changed_pictures(load, small_training, tmp_path, monkeypatch):
    invariance = load("invariance")
    monkeypatch.setattr(invariance, "SIDES", (48, 64, 96))
    for name, values in {"SHIFTS": (0, 4), "SCALES": (1.0, 0.5), "ANGLES": (0, 90)}.items():
        monkeypatch.setattr(invariance, name, values)
    write_clipart(tmp_path / "pictures")
    arguments = [str(tmp_path / "pictures"), "--quick", "--processes=1"]
    arguments += [f"--results={tmp_path / 'csv'}", f"--figure={tmp_path / 'figure.png'}"]
    invariance.run(invariance.parse(arguments))
    assert Image.open(tmp_path / "figure.png").format == "PNG"
    (path,) = (tmp_path / "csv").iterdir()
    rows = [row for row in small_training.rows_of(path) if row["question"] != "choice"]
    assert len(rows) == 3 * 2 * 9
    assert {row["peer"] for row in rows} == {"cvt", "vit", "resnet"}
    as_it_is = {"resolution": "64", "shift": "0", "scale": "1.0", "rotation": "0"}
    for peer, fold in {(row["peer"], row["fold"]) for row in rows}:
        of_model = [row for row in rows if (row["peer"], row["fold"]) == (peer, fold)]
        kept = [row for row in of_model if row["value"] == as_it_is[row["question"]]]
        assert len(kept) == 4
        assert {row["unchanged"] for row in kept} == {"100.0"}
        assert len({row["top1"] for row in kept}) == 1


# ------------------------------------------------------------------------------ scale


def test_training_stops_scaling_where_the_all_reduce_is_longer_than_the_backward_pass(load):
    scale = load("scale")
    options = scale.parse(["--rate=1e12", "--bandwidth=1e9", "--latency=0"])
    # 6 * 1e8 FLOP an image: 1.2288 s for 2048; 4e7 bytes: 0.04 s for two, 0.08 s at most.
    alone, nothing = scale.step_seconds(10**8, 10**7, 1, options)
    assert (alone, nothing) == (pytest.approx(1.2288), 0)
    two, reduce = scale.step_seconds(10**8, 10**7, 2, options)
    assert (two, reduce) == (pytest.approx(alone / 2), pytest.approx(0.04))
    many, reduce = scale.step_seconds(10**8, 10**7, 64, options)
    assert reduce == pytest.approx(0.08 * 63 / 64)
    assert many == pytest.approx(alone / 64 / 3 + reduce)
    options.models = {"tiny": 64}
    options.latency = 1e-3  # from some number on, more processes are slower
    (row,) = scale.process_rows(options)
    found = profile(scale.shape("tiny"), 64)
    assert row["all-reduce MB"] == round(4 * found.parameters / 1e6, 1)
    fastest = row["fastest with"]
    assert 1 < fastest < 2048
    times = [
        scale.step_seconds(found.macs, found.parameters, n, options)[0]
        for n in (fastest // 2, fastest, 2 * fastest)
    ]
    assert times[1] == min(times)


@pytest.mark.slow
def test_core_hours_are_those_of_the_steps(load, tmp_path):
    rows = results(load("scale"), tmp_path, "--no-int8")
    steps = {row["step"]: float(row["ms of a core"]) for row in rows if row["step"]}
    total = sum(steps[name] for name in ("decode 1024 x 768", "preprocess", "Ray Data"))
    costs = [row for row in rows if row["question"] == "pictures"]
    assert [row["precision"] for row in costs] == ["fp32", "bf16"]
    total += steps["tiny 64 fp32"]
    assert float(costs[0]["core-hours, 10^6"]) == pytest.approx(total / 3.6, abs=0.06)


@pytest.mark.slow
def test_a_large_job_labels_each_row_once(load, tmp_path):
    (row,) = results(load("large_job"), tmp_path)
    assert (row["rows"], row["once"]) == ("2000", "2000")
    assert {row[name] for name in ("never", "several times", "other answers", "errors")} == {"0"}


@pytest.mark.slow
def test_an_engine_is_measured_beside_files(load, tmp_path):
    (row,) = results(load("serving"), tmp_path, "--engines=cvt serve")
    assert float(row["p99 ms"]) >= float(row["p50 ms"]) > 0
    assert int(row["answered"]) + int(row["rejected (503)"]) == 50
    assert row["failed"] == "0"
    assert float(row["images/s"]) > 0


def test_rows_that_are_missing_or_double_or_differ_are_counted(load, tmp_path):
    import pyarrow
    from pyarrow import dataset, parquet

    large_job = load("large_job")
    large_job.write_inputs(tmp_path, 40)
    pictures = dataset.dataset(tmp_path / "pictures").to_table()["image"].to_pylist()
    numbers = [0, 1, 1, 4]
    classifier = Classifier(tmp_path / "model", "torch", features=True)
    of_rows = [pictures[number]["bytes"] for number in numbers]
    labels = [best[0]["label"] for best in classifier(of_rows, top_k=1)]
    features = list(classifier.embed(of_rows))
    labels[1], features[3] = "another", features[3] + 1
    errors = pyarrow.array(["x", None, None, None], pyarrow.string())
    columns = {"number": numbers, "label": labels, "features": features, "error": errors}
    (tmp_path / "labels").mkdir()
    parquet.write_table(pyarrow.table(columns), tmp_path / "labels/0.parquet")
    found = large_job.checked(tmp_path, SimpleNamespace(rows=40, embed=True))
    expected = {"rows": 40, "once": 2, "never": 37, "several times": 1}
    assert found == expected | {"other answers": 2, "errors": 1}


def test_a_peer_that_the_processor_cannot_run_has_a_row_with_the_reason(
    inference, tmp_path, monkeypatch, capsys
):
    lacking = [inference.Peer(name, "openvino", "bf16") for name in ("transformers", "cvt")]
    monkeypatch.setattr(inference, "CPU", (inference.REFERENCE, *lacking))
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    rows = asked(inference, tmp_path, "--only=model")
    assert names(rows) == [
        *("transformers openvino bf16", "cvt openvino bf16"),
        *2 * ["transformers torch fp32", "cvt openvino int8"],
    ]
    for row in rows:
        left_out = row["precision"] == "bf16"
        assert ("left out: precision = bf16: OpenVINO does not compute" in row["note"]) == left_out
        assert bool(row["ms_per_image"]) != left_out
    assert "left out: precision = bf16" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino of fixed shape"])
def test_exports_of_transformers_give_its_logits(load, inference, runtime):
    peers = load("peers")
    options = inference.parse(["--quick", "--image-size=64", "--threads=1"])
    reference = peers.opened(inference.REFERENCE, options)
    export = peers.opened(inference.REFERENCE._replace(runtime=runtime), options)
    for batch_size in (1, 3):
        pixels = torch.randn(batch_size, 3, 64, 64)
        torch.testing.assert_close(export(pixels), reference(pixels), atol=1e-4, rtol=0)


def test_only_the_fused_form_skips_operations(load, inference):
    options = inference.parse(["--quick", "--image-size=64"])
    all_of_it = 2 * profile(inference.shape("tiny"), 64).macs
    theirs, ours, fused = (
        load("peers").operations(peer, options)
        for peer in (
            *(inference.REFERENCE, inference.OURS._replace(runtime="torch"), inference.OURS),
        )
    )
    assert theirs == ours == all_of_it
    assert 0.9 * all_of_it < fused < 0.95 * all_of_it


@pytest.mark.slow
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
    paths = inference.write_pictures(tmp_path / "new", 4, 500, 375, quality=90)
    assert sorted((tmp_path / "new").iterdir()) == paths
    pictures = [Image.open(path) for path in paths]
    assert [picture.size for picture in pictures] == 4 * [(500, 375)]
    assert len({picture.tobytes() for picture in pictures}) == 4


@pytest.mark.parametrize("arguments", [["--only=speed"], ["--batch-sizes=x"]])
def test_what_the_inference_benchmark_cannot_measure_is_wrong_usage(inference, arguments):
    with pytest.raises(SystemExit) as stop:
        inference.parse(arguments)
    assert stop.value.code == 2


# ------------------------------------------------------------------------------ gpu


@pytest.fixture
def gpu(load, monkeypatch):
    module = load("gpu")
    monkeypatch.setattr(module, "BURST", 0)
    # Compiling takes minutes: the slow test does it.
    monkeypatch.setattr(torch, "compile", lambda model, dynamic, mode: model)
    return module


def table(gpu, folder, *arguments):
    return results(gpu, folder, "--device=cpu", "--turns=2", *arguments)


def label(row):
    return " ".join(filter(None, (row["task"], row["model"], row["form"], row["run"])))


TABLE = [
    "matrix product",
    *("inference transformers eager", "inference cvt eager", "inference cvt fused eager"),
    *("training transformers eager", "training cvt eager"),
    *("inference test_convnext eager", "training test_convnext eager"),
    *("inference transformers compiled", "inference cvt compiled", "inference cvt fused compiled"),
    *("training transformers compiled", "training cvt compiled"),
    *("training cvt triton eager", "training cvt triton compiled"),
    "inference cvt fused CUDA graph",
]


def test_every_model_is_measured_beside_transformers_eager_one(gpu, tmp_path, capsys):
    matrices, *rows = table(gpu, tmp_path)
    assert [label(row) for row in (matrices, *rows)] == TABLE
    printed = capsys.readouterr().out
    for row in rows:
        assert (row["variant"], row["batch_size"], row["note"]) == ("one-block", "2", "")
        assert row["memory_mib"] == ""  # of a GPU only
        for column in ("images_per_second", "ms_per_step", "speed_ratio"):
            assert float(row[column]) > 0
            assert row[column] in printed
        share = float(row["tflops"]) / float(matrices["tflops"])
        assert float(row["matrix_share"]) == pytest.approx(share, rel=2e-3)
    assert {row["speed_ratio"] for row in rows if label(row) in (TABLE[1], TABLE[4])} == {"1"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.cuda.is_available(), reason="`make gpu` runs the tests marked gpu on it")
def test_make_gpu_takes_the_same_path_on_a_cpu(tmp_path):
    words = [f"BIN={Path(sys.executable).parent}", "DEVICE=cpu", "QUICK=1", "BUDGET=1500"]
    process = subprocess.run(
        ["make", "gpu", *words, f"OPTIONS=--results {tmp_path}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(r"^=* *\d+ skipped, \d+ deselected", process.stdout, re.MULTILINE)
    rows = written(tmp_path)
    assert [label(row) for row in rows] == TABLE
    for row in rows:
        assert (row["note"], float(row["tflops"]) > 0) == ("", True)


def test_what_matters_most_and_needs_no_compilation_comes_first(gpu, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    gpu.run(gpu.parse(["--list", "--batch-size=8", f"--results={tmp_path}"]))
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "inference cvt-13 224 8 transformers eager"
    for timm in ("swin_tiny_patch4_window7_224", "convnext_tiny", "pvt_v2_b2"):
        assert f"training cvt-13 224 8 {timm} eager" in rows
    assert "training cvt-13 384 8 cvt eager" in rows
    compiled = [i for i, row in enumerate(rows) if row.endswith("compiled")]
    assert all(row.endswith("eager") for row in rows[: compiled[0]])
    assert [row.split(maxsplit=4)[4] for row in rows[-3:]] == [
        *("cvt triton eager", "cvt triton compiled", "cvt fused CUDA graph")
    ]
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_run_has_a_row_with_the_reason(gpu, tmp_path, monkeypatch):
    def compiled(model, dynamic, mode):
        if mode == "reduce-overhead":
            raise RuntimeError("out of memory\nfor the graph")
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    *rows, failed = table(gpu, tmp_path)
    assert (failed["note"], failed["ms_per_step"]) == ("RuntimeError: out of memory", "")
    assert {row["note"] for row in rows} == {""}


def test_without_transformers_model_ours_has_no_ratio(gpu, tmp_path, monkeypatch):
    build = gpu.build
    monkeypatch.setattr(
        gpu, "build", lambda name, config: build({"transformers": ""}.get(name, name), config)
    )
    rows = table(gpu, tmp_path)
    for row in rows[1:]:
        fails = row["model"] == "transformers"
        assert (bool(row["note"]), bool(row["ms_per_step"])) == (fails, not fails)
        assert row["speed_ratio"] == ""


def test_after_the_budget_nothing_starts_and_every_row_has_the_reason(gpu, tmp_path):
    rows = table(gpu, tmp_path, "--budget=0")
    assert [label(row) for row in rows] == TABLE
    for row in rows:
        assert row["note"] == "skipped: the budget of 0 s is spent"
        assert row["ms_per_step"] == row["tflops"] == ""


def test_at_the_end_of_the_budget_a_compilation_is_cut(gpu, tmp_path, monkeypatch):
    def compiled(model, dynamic, mode):
        with suppress(Exception):  # as compilers do that have another way
            time.sleep(300)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(gpu, "matrix_product", lambda options: {"tflops": "1"})
    compile_first = lambda options: [(gpu.Case("inference", *gpu.QUICK), gpu.REFERENCE)]  # noqa: E731
    monkeypatch.setattr(gpu, "plan", compile_first)
    monkeypatch.setattr(gpu, "prepare", lambda *_: torch.compile(None, False, None))
    first, *rest = table(gpu, tmp_path, "--budget=1")
    assert (first["tflops"], rest[0]["note"]) == ("1", "cut: the budget of 1 s is spent")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_what_was_measured_before_a_kill_is_kept(gpu, tmp_path, monkeypatch):
    def killed_in_training(case, *_):
        if case.task == "training":
            raise KeyboardInterrupt
        return {"ms_per_step": "3"}

    monkeypatch.setattr(gpu, "measure", killed_in_training)
    with pytest.raises(KeyboardInterrupt):
        table(gpu, tmp_path)
    assert [row["ms_per_step"] for row in written(tmp_path)] == ["", "3", "3", "3"]


@pytest.mark.parametrize(
    ("task", "form", "attention", "block"),
    [
        ("inference", "", SelfAttention, Block),
        ("inference", "fused", None, None),
        ("training", "", SelfAttention, RecomputingBlock),
        ("training", "triton", OnePassAttention, RecomputingBlock),
    ],
)
def test_a_step_has_the_kernels_and_the_precision_of_its_peer(
    gpu, monkeypatch, task, form, attention, block
):
    seen, chosen = [], {attention, block} - {None}

    def compiled(model, dynamic, mode):
        model.register_forward_pre_hook(note)
        return model

    def note(model, pixels):
        kinds = {type(module) for module in model.modules()}
        assert {kind for kind in kinds if issubclass(kind, SelfAttention | Block)} == chosen
        seen.append((torch.is_autocast_enabled("cpu"), model.training, pixels[0].dtype))

    monkeypatch.setattr(torch, "compile", compiled)
    step = gpu.prepare(gpu.Case(task, *gpu.QUICK), gpu.Peer("cvt", form, "compiled"), "cpu")
    step()
    trains = task == "training"
    assert seen == [(trains, trains, torch.float32 if trains else torch.bfloat16)]


def test_the_operations_of_a_step_are_those_of_the_profile(gpu):
    def operations(task, model, form=""):
        return gpu.operations(gpu.Case(task, "tiny", 64, 2), gpu.Peer(model, form, "eager"))

    answer = 2 * 2 * profile(importlib.import_module("peers").shape("tiny"), 64).macs
    assert operations("inference", "cvt") == operations("inference", "transformers") == answer
    assert 0.9 * answer < operations("inference", "cvt", "fused") < 0.95 * answer
    assert operations("training", "cvt") == 3 * answer


@pytest.mark.parametrize("arguments", [["--device=cpu"], ["--quick", "--batch-size=0"]])
def test_what_the_gpu_benchmark_cannot_measure_is_wrong_usage(gpu, arguments):
    with pytest.raises(SystemExit) as stop:
        gpu.parse(arguments)
    assert stop.value.code == 2


# ------------------------------------------------------------------------------ feeding


WAYS = ["decode", "crop", "recipe"]


def test_as_many_workers_are_advised_as_deliver_what_the_step_takes(load, tmp_path, capsys):
    rows = results(load("feeding"), tmp_path, "--device=cpu", "--rate=1000")
    assert [row["way"] for row in rows] == WAYS
    printed = capsys.readouterr().out
    for row in rows:
        assert float(row["step_images_per_second"]) == 1000
        worker = float(row["worker_images_per_second"])
        assert int(row["workers"]) == pytest.approx(1000 / worker, abs=1.01)
        assert row["worker_images_per_second"] in printed


def test_the_step_is_measured(load, tmp_path, monkeypatch):
    feeding = load("feeding")
    monkeypatch.setattr(feeding, "from_a_worker", lambda *_: iter([None] * 10))
    rows = results(feeding, tmp_path, "--device=cpu")
    assert all(float(row["step_images_per_second"]) > 0 for row in rows)


def test_caches_are_compared_with_none(load, tmp_path):
    rows = results(load("feeding"), tmp_path, "--device=cpu", "--large")
    assert [row["cache"] for row in rows] == ["none", "ram", "disk"]
    for row in rows:
        assert float(row["second_epoch_images_per_second"]) > 0


def test_the_benchmark_of_the_projections_tells_bandwidth_and_gain(load, tmp_path, monkeypatch):
    projections = load("projections")
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(projections, "COPIED", 2**10)
    turns = partial(projections.in_turns, turn=0)
    monkeypatch.setattr(projections, "in_turns", turns)
    projections.run(projections.parse(["--quick", "--device=cpu", f"--results={tmp_path}"]))
    with next(tmp_path.iterdir()).open() as file:
        rows = list(csv.DictReader(file))
    ways = ["modules eager", "modules compiled", "triton eager", "triton compiled"]
    one_stage = ["forward ", "backward ", *(f"projections {way}" for way in ways), "copy "]
    assert [f"{row['what']} {row['how']}" for row in rows] == 3 * one_stage
    for row in rows:
        assert float(row["ms"]) > 0
        assert bool(row["copy_share"]) == (row["what"] != "projections")
        assert bool(row["ratio"]) == (row["what"] == "projections")
    assert {row["copy_share"] for row in rows[6::7]} == {row["ratio"] for row in rows[2::7]}
    # Queries are as large as the tokens, keys and values a quarter: bytes are 2.5 and 8 units.
    forward, backward = (float(rows[i]["gb_per_second"]) * float(rows[i]["ms"]) for i in (0, 1))
    assert backward / forward == pytest.approx(8 / 2.5, rel=0.01)
    with pytest.raises(SystemExit):
        projections.parse(["--device=cpu"])


# ------------------------------------------------------------------------------ browser


def test_pages_are_compared_turn_by_turn_with_the_same_threads(load, tmp_path, monkeypatch):
    browser = load("browser")
    monkeypatch.setattr(browser, "launched", lambda: nullcontext(None))
    turns = iter(range(1, 100))

    def timed(_, address, name):  # each turn is slower than the one before
        return 1.0, next(turns) * {"fp32": 1.0, "int8": 0.5, browser.PEER: 2.0}[name], 1

    monkeypatch.setattr(browser, "timed", timed)
    rows = browser.measure(tmp_path, ["fp32", "int8", browser.PEER], 1)
    assert [(row["what"], row["precision"]) for row in rows[:3]] == [
        ("cvt export --to web", "fp32"),
        ("cvt export --to web", "int8"),
        ("transformers.js", "fp32"),
    ]
    assert [row["ms_per_picture"] for row in rows] == ["1", "1", "6", "4", "2", "12"]
    assert [row["times_fp32"] for row in rows] == ["1.00", "1.00", "6.00", "1.00", "0.62", "3.00"]


# ------------------------------------------------------------------------------ start


def test_the_start_of_each_process_is_compared_turn_by_turn(load, tmp_path, monkeypatch):
    start = load("start")
    calls, caches = itertools.count(-1), []  # the first fills the warm cache

    def timed(command, cache):
        caches.append((command, cache.name))
        slow = 1 + next(calls) // 9  # the machine gets slower with each turn
        return slow * (8.0 if start.PIPELINE_CODE in command else 2.0), 1.0

    monkeypatch.setattr(start, "timed", timed)
    rows = start.measure(tmp_path, tmp_path / "picture.jpg", 3)
    names = [row["process"] for row in rows]
    assert names == list(start.processes(tmp_path, tmp_path / "picture.jpg"))
    ratios = {row["process"]: row["times transformers.pipeline"] for row in rows}
    assert ratios.pop(start.PIPELINE) == "1.00"
    assert set(ratios.values()) == {"0.25"}
    folder = [cache for command, cache in caches if str(tmp_path / "model") in command]
    assert folder == ["warm", *["cold", "warm"] * 4]


def test_a_process_that_fails_ends_the_benchmark(load, tmp_path):
    start = load("start")
    with pytest.raises(SystemExit, match="no such thing"):
        start.timed((sys.executable, "-c", "import sys; sys.exit('no such thing')"), tmp_path)
    seconds, of_cpu = start.timed((sys.executable, "-c", "pass"), tmp_path)
    assert of_cpu > 0
    assert seconds > 0


# ------------------------------------------------------------------------------ memory


def test_the_memory_of_a_step_is_counted_for_all(load, tmp_path, monkeypatch, capsys):
    memory = load("memory")
    sizes = {"transformers": 2**22, "cvt": 3 * 2**20}

    def peak(size, precision, name, form):
        return sizes.get(name, 2**20)

    monkeypatch.setattr(memory, "peak", peak)
    memory.run(memory.parse([f"--results={tmp_path}", "--variants=cvt-13,cvt-21"]))
    with next(tmp_path.iterdir()).open() as file:
        rows = list(csv.DictReader(file))
    ours = [("cvt", form) for form in memory.FORMS]
    others = [(name, "") for name in memory.YARDSTICKS]
    of_cvt_13, of_cvt_21 = [("transformers", ""), *others, *ours], [("transformers", ""), *ours]
    assert [(row["model"], row["form"]) for row in rows] == 2 * of_cvt_13 + 2 * of_cvt_21
    assert {row["variant"] for row in rows[:16]} == {"cvt-13"}
    assert [row["precision"] for row in rows[:16]] == [*["fp32"] * 8, *["bf16"] * 8]
    assert {(row["image_size"], row["batch_size"]) for row in rows} == {("224", "256")}
    for row in rows:
        expected = {"transformers": ("4.0", "1.000"), "cvt": ("3.0", "0.750")}
        found = row["peak_memory_mib"], row["share"]
        assert found == expected.get(row["model"], ("1.0", "0.250"))
    assert "0.750" in capsys.readouterr().out


@pytest.mark.slow
def test_the_memory_of_our_step_is_that_of_its_profile(load):
    memory = load("memory")
    size = ("tiny", 64, 32)  # so many images that their activations are most of it
    counted = memory.peak(size, "fp32", "cvt", "")
    assert counted < memory.peak(size, "fp32", "transformers", "")
    expected = profile(memory.shape("tiny"), 64, batch_size=32).training_bytes
    assert counted == pytest.approx(expected, rel=0.02)
    assert memory.peak(size, "bf16", "cvt", "") < 0.7 * counted
    assert memory.peak(size, "fp32", "cvt", "triton") < 0.98 * counted
    assert memory.peak(size, "fp32", "cvt", "plain") > 1.05 * counted
    assert memory.peak(size, "fp32", "cvt", "gradient checkpointing") < 0.7 * counted


# ------------------------------------------------------------------------------ gelu


@pytest.mark.slow
def test_both_activations_are_trained_and_evaluated(load, tmp_path):
    rows = results(load("gelu"), tmp_path, "--threads=1", "--only=accuracy")
    pairs = [(row["trained_with"], row["evaluated_with"]) for row in rows]
    assert sorted(pairs) == sorted(itertools.product(("gelu", "quick_gelu"), repeat=2))
    for row, (trained, evaluated) in zip(rows, pairs, strict=True):
        assert (float(row["largest_logit_difference"]) == 0) == (trained == evaluated)
        assert float(row["largest_logit_difference"]) < 0.1 * float(row["logit_deviation"])
        assert float(row["top1"]) > 0.2  # of ten classes, after one epoch


@pytest.mark.slow
def test_both_activations_are_timed_in_every_form(load, tmp_path):
    rows = results(load("gelu"), tmp_path, "--threads=1", "--only=speed")
    timed = [(row["form"], row["hidden_act"]) for row in rows]
    forms = ("eager", "fused", "training step")
    assert timed == list(itertools.product(forms, ("gelu", "quick_gelu")))
    assert all(float(row["ms_per_image"]) > 0 for row in rows)


def test_the_model_that_is_timed_has_the_activation(load):
    gelu = load("gelu")
    models = [gelu.model_with(name, "tiny") for name in gelu.ACTIVATIONS]
    pixels = torch.randn(2, 3, 32, 32)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(*(model(pixels).logits for model in models))


# ------------------------------------------------------------------------------ wrong usage


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("gpu", ["--quick", "--device=cuda"], "--device: there is no GPU"),
        ("gpu", ["--quick", "--budget=-1"], "--budget: '-1' is no number from 0 on"),
        ("gpu", ["--quick", "--budget=nan"], "--budget: 'nan' is no number from 0 on"),
        ("memory", ["--variants=cvt-1"], "--variants: 'cvt-1' is none of cvt-13,"),
        ("memory", ["--results=pyproject.toml"], "--results: pyproject.toml is no folder"),
        ("training", ["--variant=cvt-1"], "--variant: invalid choice: 'cvt-1'"),
        ("training", ["--batch-size=0"], "--batch-size: '0' is no whole number from 1 on"),
        ("projections", ["--turns=two"], "--turns: 'two' is no whole number from 1 on"),
        ("inference", ["--batch-sizes=1,,2"], "--batch-sizes: '' is no whole number from 1 on"),
        ("feeding", ["--rate=0"], "--rate: '0' is no whole number from 1 on"),
        ("gelu", ["--epochs=0"], "--epochs: '0' is no whole number from 1 on"),
    ],
)
def test_wrong_usage_is_answered_by_the_name_of_the_option(
    load, monkeypatch, capsys, program, arguments, message
):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        load(program).parse(arguments)
    assert end.value.code == 2
    assert f"error: argument {message}" in capsys.readouterr().err
