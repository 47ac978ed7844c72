import csv
import json
import logging
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from cvt import CvtForImageClassification, explain
from cvt.checkpoints import transformers_to_authors
from cvt.cli import console, progress, rich_console, verbs
from cvt.cli.explain import cold
from cvt.cli.progress import TrainingBars
from cvt.cli.train import default_output
from cvt.data import open_training, read_split
from cvt.runtime import factory
from cvt.train.recipe import FIELDS

CVT = Path(sys.executable).with_name("cvt")


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 this is no photo")
    return path


TORCH = ("--runtime", "torch")  # starts at once

# A change here is a change for everybody's scripts.
SETTINGS = [
    "--val-data", "--classes", "--image-column", "--label-column", "--label-separator",
    "--problem-type", "--group-column", "--folds", "--fold", "--epoch-images",
    "--max-corrupt", "--max-pixels", "--cache", "--workers",
    "--model", "--from-scratch", "--architecture", "--drop-rate", "--drop-path",
    "--freeze-stages", "--head-only", "--views", "--lora-r",
    "--teacher", "--teacher-weight", "--temperature",
    "--image-size", "--crop-pct", "--crop-scale", "--crop-ratio", "--interpolation", "--flip",
    "--vertical-flip", "--auto-augment", "--color-jitter", "--random-erase", "--repeats",
    "--mixup", "--cutmix", "--mixup-prob", "--mixup-switch", "--mixup-mode",
    "--mixup-off-epoch", "--label-smoothing", "--sampler", "--class-weights",
    "--epochs", "--steps", "--batch-size", "--accumulate", "--optimizer", "--lr", "--lr-base",
    "--lr-base-size", "--weight-decay", "--momentum", "--layer-decay", "--clip-grad",
    "--warmup-epochs", "--warmup-lr", "--min-lr", "--cooldown-epochs", "--lr-updates",
    "--ema-decay",
    "--precision", "--compile", "--recompute-activations", "--gradient-checkpointing", "--device",
    "--sync-batchnorm", "--fsdp", "--triton",
    "--seed", "--eval-every", "--metric", "--patience", "--max-hours", "--save-steps", "--keep",
    "--track",
]  # fmt: skip
COMMANDS = {
    "search": [
        "index", "images", "--top", "--output", "--add", "--remove", "--model", "--batch-size",
        "--workers", "--runtime", "--precision", "--device", "--threads", "--exact-decoding",
        "--max-pixels", "--no-verify", "--force",
    ],
    "check": [
        "data", "--output", "--groups", "--distance", "--model", "--similarity", "--device",
        "--threads", "--no-verify", "--min-images", "--max-pixels", "--workers", "--classes",
        "--image-column", "--label-column", "--label-separator", "--problem-type", "--force",
    ],
    "predict": [
        "model", "images", "--topk", "--batch-size", "--workers", "--runtime", "--precision",
        "--device", "--threads", "--exact-decoding", "--max-pixels", "--tta", "--output",
        "--logits", "--json", "--resume", "--no-verify", "--verbose", "--force",
    ],
    "embed": [
        "model", "data", "--output", "--stage", "--pool", "--normalize", "--plot",
        "--plot-method", "--batch-size", "--workers", "--runtime", "--precision", "--device",
        "--threads", "--exact-decoding", "--max-pixels", "--classes", "--image-column",
        "--label-column", "--label-separator", "--problem-type", "--resume", "--no-verify",
        "--verbose", "--force",
    ],
    "train": [
        "words", "--config", "--output", "--resume", "--schema",
        *SETTINGS,
    ],
    "tune": [
        "words", "--config", "--search", "--trials", "--prune", "--output", "--resume", *SETTINGS,
    ],
    "show": ["words", "--config", "--output", "--images", "--force", *SETTINGS],
    "probe": [
        "model", "data", "--val-data", "--classes", "--image-column", "--label-column",
        "--label-separator", "--problem-type", "--group-column", "--seed", "--batch-size",
        "--workers", "--device", "--threads", "--max-pixels", "--output", "--no-verify", "--force",
    ],
    "evaluate": [
        "model", "data", "--batch-size", "--workers", "--runtime", "--precision", "--device",
        "--threads", "--max-pixels", "--tta", "--output", "--report", "--label-errors",
        "--class-map",
        "--subset", "--real-labels", "--classes", "--image-column", "--label-column",
        "--label-separator", "--problem-type", "--no-verify", "--verbose", "--force",
    ],
    "app": [
        "model", "--port", "--host", "--lang", "--examples", "--device", "--threads",
    ],
    "serve": [
        "models", "--host", "--port", "--runtime", "--precision", "--device", "--threads",
        "--max-batch", "--batch-wait-ms", "--max-queue", "--max-mib", "--max-pixels", "--timeout",
        "--api-key-file", "--write-config", "--no-verify", "--verbose", "--force",
    ],
    "explain": [
        "model", "images", "--class", "--method", "--stage", "--output", "--device", "--threads",
        "--max-pixels", "--no-verify", "--force",
    ],
    "convert": [
        "source", "dest", "--to", "--image-size", "--labels", "--num-labels", "--config",
        "--key", "--hidden-act", "--allow-nonfinite", "--no-verify", "--force",
    ],
    "export": [
        "model", "output", "--to", "--precision", "--dynamic", "--image-size", "--features",
        "--calibration", "--min-agreement", "--lang", "--runtime-files", "--no-verify", "--force",
    ],
    "benchmark": [
        "model", "--runtimes", "--precisions", "--batch-sizes", "--image-sizes", "--threads",
        "--device", "--seconds", "--output", "--no-verify", "--force",
    ],
    "push": [
        "folder", "name", "--private", "--license", "--with-code", "--dry-run", "--force",
    ],
    "info": ["model", "--image-size", "--batch-size", "--json"],
    "cache": ["action"],
    "recipes": ["name"],
    "demo": ["--output", "--epochs"],
}  # fmt: skip


def test_the_command_line_is_what_it_was():
    commands = {name: verbs.get_command(None, name) for name in verbs.list_commands(None)}
    assert {
        name: [parameter.opts[-1] for parameter in command.params]
        for name, command in commands.items()
    } == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_names_every_parameter(cvt, command):
    code, out, _ = cvt(command, "--help")
    assert code == 0
    rows = re.findall(r"^  (?:-v, )?(\S+)", out.replace("[no-]", ""), re.MULTILINE)
    options = re.findall(r"--[a-z-]+(?=,| PATH|$)", out, re.MULTILINE)
    rows = {row.strip("[].") for row in rows} | set(options)
    shown = ["data" if name == "words" else name for name in COMMANDS[command]]
    assert {name if name.startswith("-") else name.upper() for name in shown} <= rows


def test_the_help_of_train_groups_the_settings(cvt):
    _, out, _ = cvt("train", "--help")
    sections = re.findall(r"^(\w+):$", out, re.MULTILINE)
    groups = [spec.metadata["group"] for spec in FIELDS.values() if spec.metadata["group"]]
    assert sections == ["Arguments", "Options", *groups]
    assert len(out.splitlines()) <= 120  # three screens of 40 lines
    assert "\nAdvanced, described by cvt train --schema:\n  --fold, --epoch-images, " in out
    machine = out.partition("\nMachine:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^  --([a-z-]+)", machine, re.MULTILINE)[0] == "precision"


def test_the_help_lists_the_first_sentence_of_each_command(cvt):
    _, out, _ = cvt("--help")
    listed = " ".join(out.partition("Commands:")[2].split())
    commands = [verbs.get_command(None, name) for name in verbs.list_commands(None)]
    assert listed == " ".join(f"{each.name} {each.get_short_help_str(200)}" for each in commands)


LOADED = """
import sys
from cvt.__main__ import main
sys.argv = ["cvt", *sys.argv[1].split()]
try:
    main()
finally:
    heavy = {"rich", "typer", "pydantic", "torch", "transformers", "keras", "tensorflow", "yaml"}
    print(*sorted((heavy | {"numpy", "PIL"}) & set(sys.modules)))
"""


def loaded_by(arguments):
    """The exit code of a command, what it prints, and the libraries that it has loaded."""
    command = [sys.executable, "-c", LOADED, arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    *printed, loaded = done.stdout.split("\n")[:-1]
    return done.returncode, printed, set(loaded.split())


@pytest.mark.parametrize("many", ["", *COMMANDS])
def test_help_loads_only_click(many):
    """So it answers in a fraction of a second."""
    code, printed, loaded = loaded_by(f"{many} --help")
    assert code == 0
    assert printed[0].startswith("Usage: ")
    assert loaded == set()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        *((f"{name} nowhere", "data") for name in ("check", "show", "train")),
        ("tune nowhere --search lr=1e-4..1e-3:log", "data"),
        ("probe cvt-13 nowhere", "data"),
        ("evaluate cvt-13 nowhere", "data"),
        ("train digits --val-data nowhere", "data"),
        ("train digits --model nowhere", "model"),
        ("show digits teacher=nowhere", "model"),
        *((f"{name} nowhere", "model") for name in ("app", "benchmark", "info")),
        *((f"{name} nowhere {{tmp}}", "model") for name in ("convert", "evaluate", "probe")),
        *((f"{name} nowhere {{tmp}}/a.png", "model") for name in ("explain", "predict")),
        ("embed nowhere {tmp}/a.png --output {tmp}/a.npz", "model"),
        ("export nowhere {tmp}/onnx --to onnx", "model"),
        ("push nowhere someone/model", "folder"),
    ],
)
def test_a_typing_error_is_reported_before_pytorch_is_imported(arguments, fault, tmp_path):
    code, printed, loaded = loaded_by(arguments.format(tmp=tmp_path))
    assert code == 1
    messages = {
        "data": "nowhere is not a folder, nor a file",
        "model": "no model nowhere: ",
        "folder": "nowhere is no folder here",
    }
    assert any(messages[fault] in line for line in printed), printed
    assert not {"torch", "transformers", "keras", "tensorflow"} & loaded


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, ""),
        (EOFError("the file ends"), 1, "Error: EOFError: the file ends\nRun again with --debug"),
    ],
)
def test_what_ends_a_command_has_an_exit_code(cvt, monkeypatch, error, code, message):
    def fail(**_):
        raise error

    monkeypatch.setattr(verbs.get_command(None, "recipes"), "callback", fail)
    ended, _, err = cvt("recipes")
    assert ended == code
    assert err.lstrip().startswith(message)
    assert "Abort" not in err


def test_version_and_bare_call(cvt):
    assert cvt("--version")[:2] == (0, "cvt-vision 0.2.0\n")
    code, out, err = cvt()
    assert code == 2
    assert "Usage" in out + err


# ------------------------------------------------------------------------------ predict


def test_predict_prints_a_line_per_image(cvt, model_folder, photos):
    code, out, _ = cvt("predict", *TORCH, model_folder, photos / "red", "--topk", 2)
    assert code == 0
    assert len(out.splitlines()) == 12
    assert out.splitlines()[3].startswith(f"{photos / 'red' / '03.png'}: ")


def test_predict_prints_json(cvt, model_folder, photos):
    code, out, _ = cvt("predict", *TORCH, model_folder, f"{photos}/*/00.png", "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert len(records) == 3
    assert sorted(p["label"] for p in records[0]["predictions"]) == ["blue", "green", "red"]


def test_predict_writes_the_same_to_csv_and_jsonl(cvt, model_folder, photos, tmp_path):
    for name in ("preds.csv", "preds.jsonl"):
        code, out, err = cvt("predict", *TORCH, model_folder, photos, "--output", tmp_path / name)
        assert (code, out) == (0, "")
        assert f"{name}: 36 images classified" in err
    with open(tmp_path / "preds.csv") as file:
        rows = list(csv.DictReader(file))
    records = [json.loads(line) for line in (tmp_path / "preds.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * len(records) == 108
    for record in records:
        of_image = [row for row in rows if row["path"] == record["path"]]
        assert [row["label"] for row in of_image] == [p["label"] for p in record["predictions"]]
        assert [row["rank"] for row in of_image] == ["1", "2", "3"]


def test_predict_skips_and_reports_broken_images(cvt, model_folder, photos, broken, tmp_path):
    output = tmp_path / "preds.csv"
    code, _, err = cvt("predict", *TORCH, model_folder, photos / "red", broken, "--output", output)
    assert code == 3
    assert "broken.jpg" in err
    assert "1 of 13 images skipped" in err
    assert len(output.read_text().splitlines()) == 1 + 12 * 3


def test_probe_writes_a_model_that_predict_and_evaluate_take(
    cvt, model_folder, photos, broken, tmp_path
):
    data, output = tmp_path / "data", tmp_path / "probe"
    shutil.copytree(photos, data)
    code, out, err = cvt("probe", model_folder, data, "--seed", "1", "--output", output)
    assert (code, err) == (0, "")
    assert re.search(r"^32 features of 36 images in .* \(fused fp32 on cpu\)$", out, re.MULTILINE)
    assert "5-fold cross-validation on 30 training images" in out
    printed = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines()]
    with open(output / "results.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        figures = [f"{100 * float(row[name]):.2f}" for name in ("cv_top1", "top1", "f1_macro")]
        chosen = f"{row['parameter']} = {float(row['value']):g}"
        assert [row["method"], chosen, *figures, row["images"]] in printed
    code, out, err = cvt("evaluate", *TORCH, output / "model", data)
    assert code == 0
    assert "the 6 validation images of 36" in err
    assert f"top-1 {100 * float(rows[0]['top1']):.2f} %" in out
    code, out, _ = cvt("predict", *TORCH, output / "model", photos / "red" / "00.png")
    assert (code, "red" in out) == (0, True)
    code, _, err = cvt("probe", model_folder, data, "--output", output)
    assert (code, "probe exists already" in err) == (1, True)
    shutil.copy(broken, data / "red")
    code, _, err = cvt("probe", model_folder, data)
    assert code == 3
    assert "broken.jpg" in err
    assert "1 of 37 images skipped" in err


def test_explain_writes_pictures_arrays_and_a_sheet(cvt, model_folder, photos, broken, tmp_path):
    output, first = tmp_path / "maps", sorted((photos / "red").iterdir())[:2]
    shutil.copy(first[1], tmp_path / f"{first[0].stem}.png")  # of the same name
    images = (*first, tmp_path / f"{first[0].stem}.png", broken)
    arguments = ("explain", model_folder, *images, "--class", "green", "--output", output)
    code, out, err = cvt(*arguments)
    assert code == 3
    assert out.count("green  ") == 3
    assert "broken.jpg" in err
    assert "1 of 4 images skipped" in err
    stems = [first[0].stem, first[1].stem, f"{first[0].stem}-2"]
    files = {f"{stem}.{kind}" for stem in stems for kind in ("png", "npz")} | {"sheet.png"}
    assert {path.name for path in output.iterdir()} == files
    code, _, err = cvt(*arguments)
    assert code == 1
    assert "maps exists already" in err
    assert cvt(*arguments, "--method", "attention", "--force")[0] == 3
    assert Path(output, f"{first[1].stem}-heads.png").is_file()


def test_explain_remarks_on_a_map_of_zeros(cvt, model_folder, photos, tmp_path):
    image = next((photos / "red").iterdir())
    arguments = ("explain", model_folder, image, "--stage", "2", "--output")
    remark = "no place raises this class in stage 2"
    printed = cvt(*arguments, tmp_path / "maps")[1]
    found = explain(model_folder, image, stage=2)
    assert (remark in printed) == (not found.grid.any())
    found.grid[:] = 0
    assert remark in cold(found)
    found.grid[:] = 1
    assert not cold(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--class", "grene"), "does not know these classes: 'grene' (is it 'green'?)"),
        (("--stage", "9"), "stage = 9: must be a whole number from 1 to 3"),
        (("--method", "rollout", "--stage", "1"), "which only stage 3 has"),
    ],
)
def test_explain_writes_nothing_for_what_the_model_lacks(
    cvt, model_folder, photos, options, message, tmp_path
):
    code, _, err = cvt("explain", model_folder, photos, "--output", tmp_path / "maps", *options)
    assert code == 1
    assert message in err
    assert not (tmp_path / "maps").exists()


def test_predict_overwrites_only_by_force(cvt, model_folder, photos, tmp_path):
    output = tmp_path / "preds.csv"
    output.write_text("mine")
    arguments = ("predict", *TORCH, model_folder, photos / "red", "--output", output)
    code, _, err = cvt(*arguments)
    assert code == 1
    assert "preds.csv exists already" in err
    assert output.read_text() == "mine"
    assert cvt(*arguments, "--force")[0] == 0
    assert output.read_text() != "mine"


def test_predict_takes_an_authors_file(cvt, model_folder, photos, tmp_path):
    model = CvtForImageClassification.from_pretrained(model_folder)
    model.config.save_pretrained(tmp_path)
    torch.save(transformers_to_authors(model.state_dict()), tmp_path / "a.pth")
    folder = tmp_path / "folder"
    config = tmp_path / "config.json"
    assert (
        cvt("convert", tmp_path / "a.pth", folder, "--config", config, "--image-size", 32)[0] == 0
    )
    assert cvt("predict", *TORCH, folder, photos / "red")[0] == 0


# ------------------------------------------------------------------------------ the other commands


def test_train_evaluate_predict_agree(cvt, photos, model_folder, tmp_path):
    run = tmp_path / "run"
    settings = ("--image-size", 32, "--batch-size", 8, "--lr", 3e-3)
    code, out, err = cvt(
        "train", photos, "--output", run, "--model", model_folder, "--epochs", 3, *settings
    )
    assert code == 0, err
    assert f"cvt predict {run / 'best'}" in out
    assert "epoch   3" in err

    code, out, _ = cvt("evaluate", *TORCH, run / "best", photos, "--output", tmp_path / "metrics")
    assert code == 0
    metrics = json.loads((tmp_path / "metrics/metrics.json").read_text())
    assert f"top-1 {100 * metrics['top1']:.2f} %" in out

    _, out, _ = cvt("predict", *TORCH, run / "best", photos, "--topk", 1, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    right = [Path(r["path"]).parent.name == r["predictions"][0]["label"] for r in records]
    assert sum(right) / len(right) == pytest.approx(metrics["top1"])

    code, _, err = cvt("train", photos, "--output", run)
    assert code == 1
    assert "--resume" in err
    assert cvt("train", "--output", run, "--resume")[0] == 0


def test_a_recipe_is_a_file_words_and_flags(cvt, photos, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"model: {model_folder}\nimage_size: 32\nepochs: 9\nsteps: 9\n")
    code, _, err = cvt("train", photos, "--config", "mine.yaml", "epochs=2", "--steps", 1)
    assert code == 0, err
    assert yaml.safe_load(Path("runs/mine/args.yaml").read_text())["steps"] == 1
    code, _, err = cvt("train", "--config", "mine.yaml", "epoch=2", photos)
    assert code == 2
    assert "no setting epoch; is it epochs?" in err


def test_progress_on_a_pipe_is_plain_lines(cvt, photos, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingBars, "EVERY", 0.0)
    settings = ("image_size=32", "batch_size=8", "epochs=1", f"model={model_folder}")
    code, _, err = cvt("train", photos, "--output", tmp_path / "run", *settings)
    assert code == 0, err
    step = r"epoch 1/1  loss \d+\.\d+  lr \d\.\d\de-\d\d  \d+ images/s  \d/3  0:\d\d:\d\d left"
    assert len(re.findall(step, err)) == 3


def test_evaluate_reports_broken_images(cvt, model_folder, photos, tmp_path):
    data = tmp_path / "data" / "red"
    data.mkdir(parents=True)
    (data / "good.png").write_bytes((photos / "red" / "00.png").read_bytes())
    (data / "bad.png").write_bytes(b"no")
    code, out, err = cvt("evaluate", *TORCH, model_folder, tmp_path / "data")
    assert code == 3
    assert "1 images" in out
    assert "bad.png" in err


def test_folds_print_a_table_and_what_to_do_next(cvt, photos, model_folder, tmp_path):
    output = tmp_path / "folds"
    settings = (f"model={model_folder}", "image_size=32", "batch_size=8", "epochs=1", "lr=3e-3")
    assert cvt("check", photos, "--groups", tmp_path / "groups.csv")[0] == 0
    words = ("train", tmp_path / "groups.csv", "--group-column", "group", "--folds", 2, *settings)
    code, out, err = cvt(*words, "--output", output)
    assert code == 0, err
    assert "fold 2 of 2" in err
    with open(output / "folds.csv") as file:
        top1 = [float(row["top1"]) for row in csv.DictReader(file)]
    mean, deviation = 50 * sum(top1), 100 * abs(top1[0] - top1[1]) / 2**0.5
    for name, value in (("1", 100 * top1[0]), ("mean", mean), ("deviation", deviation)):
        assert re.search(rf"^│ {name} .*│ +{value:.2f} % │", out, re.MULTILINE), out
    assert "36 images; all of it in" in out
    assert re.search(r"\d+ of 36 labels are probably wrong: .*label_errors.html", out)
    best = re.search(r"best model by top1 is (\S+)", out)[1]
    code, out, err = cvt("evaluate", *TORCH, best, tmp_path / "groups.csv", "--label-errors",
                         tmp_path / "errors")  # fmt: skip
    assert code == 0, err
    assert "labels are probably wrong" in out
    assert (tmp_path / "errors/label_errors.html").exists()

    code, again, err = cvt("train", "--resume", "--output", output)
    assert code == 0, err
    # What the output names as the next command runs.
    command = shlex.split(again.rpartition(": ")[2])[1:]
    assert cvt(*command)[0] == 0
    assert (tmp_path / "folds-all/last/model.safetensors").exists()
    trained = read_split(output / "fold-1/split.csv")
    with open(tmp_path / "groups.csv") as file:
        groups = {row["path"]: row["group"] for row in csv.DictReader(file)}
    sides = {name: set() for name in groups.values()}
    for path, side in trained.items():
        sides[groups[path]].add(side)
    assert all(len(found) == 1 for found in sides.values())


def test_evaluate_takes_the_validation_images_of_the_run(cvt, model_folder, photos, tmp_path):
    run = tmp_path / "run"
    settings = ("lora_r=2", "steps=1", "batch_size=4", "image_size=32", "track=none")
    assert cvt("train", photos, "--model", model_folder, *settings, "--output", run)[0] == 0
    train, _, _ = open_training(photos)
    for folder in ("best", "best/adapter", "."):
        code, out, err = cvt("evaluate", *TORCH, run / folder, photos)
        assert code == 0, err
        assert "6 images" in out
        assert f"the 6 validation images of 36, by {run / 'split.csv'}" in err
    data = tmp_path / "data"
    for name in ("red/00.png", "red/01.png", "red/02.png", "red/new.png"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes((photos / "red/00.png").read_bytes())
    names = [train.name(i) for i in range(len(train))]
    trained = len({"red/00.png", "red/01.png", "red/02.png"} & set(names))
    code, out, err = cvt("evaluate", *TORCH, run / "best", data)
    assert code == 0
    assert "4 images" in out
    assert (
        f"{trained} of the 4 images have the names of images that the model was trained on" in err
    )


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_images_of_too_many_pixels_are_skipped(cvt, model_folder, photos, command):
    code, _, err = cvt(command, *TORCH, model_folder, photos, "--max-pixels", 1000)
    assert code == 3
    assert f"{photos / 'red/02.png'}: is 40 x 26 pixels; at most 1000 are decoded" in err
    assert "30 of 36 images skipped" in err


def test_convert_prints_what_it_wrote(cvt, model_folder, tmp_path):
    code, out, _ = cvt("convert", model_folder, tmp_path / "a.pth", "--to", "authors")
    assert code == 0
    assert "largest difference after reading it back: 0" in out
    code, out, err = cvt("convert", tmp_path / "a.pth", tmp_path / "folder")
    assert code == 1
    assert "--config" in err
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    "name", ["cvt-13", pytest.param("cvt-w24", marks=pytest.mark.slow), "folder"]
)
def test_info_needs_no_weights(cvt, model_folder, name):
    model = model_folder if name == "folder" else name
    code, out, err = cvt("info", model, "--json", "--image-size", 64)
    assert code == 0, err
    numbers = json.loads(out)
    expected = {"cvt-13": 19_997_480, "cvt-w24": 277_196_392}
    assert numbers["parameters"] == expected.get(name, numbers["parameters"])
    code, out, _ = cvt("info", model)
    assert f"{numbers['parameters']:,}" in out
    assert "stage3" in out


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("many", [5, 1000])
def test_auto_chooses_by_the_number_of_images(cvt, photos, model_folder, monkeypatch, many):
    counted = []

    def fastest(device, precision, images, is_converted):
        counted.append(images)
        return "fused"

    monkeypatch.setattr(factory, "fastest", fastest)
    monkeypatch.setattr(factory, "MANY_IMAGES", many)
    code, out, _ = cvt("predict", model_folder, photos, "--workers", "0", "--json")
    assert (code, len(out.splitlines()), counted) == (0, 36, [min(36, many)])
    assert cvt("evaluate", model_folder, photos)[0] == 0
    assert counted[1:] == [36]


@pytest.mark.parametrize(
    "arguments",
    [
        ("fly",),
        ("predict",),
        ("predict", "cvt-13"),
        ("predict", "cvt-13", "a.png", "--topk", "0"),
        ("predict", "cvt-13", "a.png", "--topk", "many"),
        ("predict", "cvt-13", "a.png", "--output", "preds.xml"),
        ("predict", "cvt-13", "a.png", "--colour"),
        ("predict", "cvt-13", "a.png", "--runtime", "jax"),
        ("predict", "cvt-13", "a.png", "--precision", "fp8"),
        ("predict", "cvt-13", "a.png", "--threads", "0"),
        ("predict", "cvt-13", "a.png", "--workers", "-1"),
        ("predict", "cvt-13", "a.png", "--threads", "1000000"),
        ("predict", "cvt-13", "a.png", "--workers", "1000000"),
        ("predict", "cvt-13", "a.png", "--batch-size", "1000000000"),
        ("predict", "cvt-13", "a.png", "--device", "abacus"),
        ("predict", "cvt-13", "a.png", "--resume"),
        ("predict", "cvt-13", "a.png", "--json", "--output", "b.csv"),
        ("serve", "cvt-13", "--timeout", "inf"),
        ("serve", "cvt-13", "--batch-wait-ms", "nan"),
        ("benchmark", "cvt-13", "--seconds", "inf"),
        ("export", "cvt-13", "b", "--to", "onnx", "--min-agreement", "nan"),
        ("check", "photos", "--similarity", "nan"),
        ("evaluate", "cvt-13", "photos", "--workers", "1000000"),
        ("benchmark", "cvt-13", "--threads", "1000000"),
        ("info", "cvt-13", "--batch-size", "1000000000"),
        ("benchmark", "cvt-13", "--batch-sizes", "1,1000000000"),
        ("train", "photos", "--workers", "1000000"),
        ("train", "photos", "--batch-size", "1000000000"),
        ("evaluate", "cvt-13", "photos", "--runtime", "jax"),
        ("convert", "a.pth", "b", "--to", "onnx"),
        ("train", "photos", "--epochs", "0"),
        ("train", "photos", "--lr", "-1"),
        ("train", "--resume", "--lr", "0.1"),
        ("train", "photos", "batch_size=1000000000"),
        ("train", "photos", "lora_r=1000000"),
        ("train", "photos", "model="),
        *(
            (command, *words)
            for words in (("",), ("", "a"), ("a", ""), ("a", "b", "--output="), ("--device", ""))
            for command in ("predict", "train", "evaluate", "export", "benchmark", "convert")
        ),
        ("info", ""),
        ("recipes", ""),
        ("demo", "--output", ""),
        ("train", "photos", "birds"),
        ("train", "photos", "data=birds"),
        ("train", "photos", "lr=1", "--lr", "2"),
        ("train",),
    ],
)
def test_wrong_usage_exits_with_2(cvt, arguments):
    code, _, err = cvt(*arguments)
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            (name, "--output", "a.png")
            for name, options in COMMANDS.items()
            if "--output" in options and name not in ("predict", "embed", "search")
        ),
        ("evaluate", "--label-errors", "a.png"),
        ("serve", "--write-config", "a.png"),
        ("export", "cvt-13", "a.png"),
    ],
)
def test_a_new_folder_has_no_name_of_a_file(cvt, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = cvt(*arguments)
    assert code == 2
    assert "a.png is the name of a file, but a folder is written: leave .png out" in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("predict", "{model}", "nowhere.png"), "nowhere.png does not exist"),
        (("predict", "cvt-99", "{photos}"), "no model cvt-99"),
        (("predict", "{photos}", "{photos}"), "has no config.json"),
        (("evaluate", "{model}", "nowhere"), "nowhere is not a folder"),
        (("evaluate", "{model}", "{photos}/red"), "no folder per class"),
        (("convert", "nowhere.pth", "{tmp}/out"), "no model nowhere.pth"),
        (("train", "nowhere", "--output", "{tmp}/run"), "nowhere is not a folder"),
        (("info", "{model}", "--image-size", "2"), "at least 3"),
        (("info", "cvt-14"), "cvt-13"),
    ],
)
def test_failures_exit_with_1_and_a_sentence(
    cvt, model_folder, photos, tmp_path, arguments, message
):
    places = {"model": model_folder, "photos": photos, "tmp": tmp_path}
    code, _, err = cvt(*(argument.format(**places) for argument in arguments))
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback():
    command = [CVT, "predict", "cvt-99", "x.png", "--debug"]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert "Traceback" in answer.stderr
    assert "FileNotFoundError" in answer.stderr


# ------------------------------------------------------------------------------ recipes


def test_recipes_are_listed_with_what_they_are_for(cvt):
    code, out, _ = cvt("recipes")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert names == sorted(names)
    assert re.search(r"^photos  +Fine-tune CvT-13 on your own photos", out, re.MULTILINE)
    assert re.search(r"^digits  +A small CvT", out, re.MULTILINE)


def test_a_recipe_is_printed_to_be_edited(cvt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos.yaml").touch()  # the shell has created it, for `cvt recipes photos > photos.yaml`
    code, out, _ = cvt("recipes", "photos")
    assert code == 0
    assert yaml.safe_load(out)["model"] == "cvt-13"
    code, out, err = cvt("recipes", "photo")
    assert (code, out) == (1, "")
    assert err.startswith("Error: no packaged recipe is called photo; there are ablations/patches")
    assert err.endswith("; is it photos?\n")


# ------------------------------------------------------------------------------ malicious names


def test_names_reach_the_terminal_without_what_it_obeys(capsys):
    from rich.table import Table

    table = Table("class", title="[red]\u202e")
    table.add_row("\x1b]0;owned\x07")
    table.add_row("[red]cat[/red]")
    rich_console.SafeConsole(markup=False, highlight=False, width=100).print(table)
    console.out.print("a\x9b\nb [bold]", bold=True)
    shown = capsys.readouterr().out
    assert not set("\x1b\x07\x9b\u202e") & set(shown)
    assert r"[red]\u202e" in shown
    assert r"\x1b]0;owned\x07" in shown
    assert "[red]cat[/red]" in shown
    assert "a\\x9b\nb [bold]" in shown
    record = logging.LogRecord("cvt", logging.WARNING, "", 0, "a\x1b[2J", (), None)
    assert console.SafeFormatter().format(record) == r"a\x1b[2J"


def test_an_error_names_a_file_without_what_a_terminal_obeys(cvt, model_folder):
    code, _, err = cvt("predict", model_folder, "\x1b[2Jnowhere.png")
    assert (code, err) == (1, "Error: \\x1b[2Jnowhere.png does not exist\n")


def test_a_usage_error_repeats_a_word_without_what_a_terminal_obeys(cvt):
    code, _, err = cvt("\x1b[2Jfly")
    assert code == 2
    assert "No such command '\\x1b[2Jfly'" in err
    assert "\x1b" not in err


# ------------------------------------------------------------------------------ terminals


def test_a_bar_on_a_terminal_leaves_the_output_where_it_goes():
    """Standard output is a pipe here, standard error a terminal."""
    code = """
from cvt.cli.console import err
from cvt.cli.progress import bar
with bar("predict", 2) as step:
    step()
    print("a.png: cat")
    err.print("skipped b.png", fg="yellow")
"""
    terminal, error_stream = pty.openpty()
    answer = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=error_stream
    )
    os.close(error_stream)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert answer.stdout == b"a.png: cat\n"
    assert "skipped b.png" in shown
    assert "predict" in shown
    assert "a.png" not in shown


def test_without_rich_there_is_no_bar(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)  # what Python takes for missing
    monkeypatch.setattr(progress, "is_installed", lambda name: name != "rich")
    with progress.bar("predict", 2) as step:
        step()
        console.err.print("skipped b.png", fg="yellow")
    assert capsys.readouterr().err == "skipped b.png\n"


@pytest.mark.parametrize("data", [".", "../photos", "{}"])
def test_a_run_is_written_beside_data_that_it_would_be_in(tmp_path, monkeypatch, data):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    data = data.format(tmp_path / "photos")
    assert default_output(data, "train") == tmp_path / "runs/train"
    for elsewhere in ("digits", "hub:owner/name", "photos.csv", ""):
        assert default_output(elsewhere, "train") == Path("runs/train")


# ------------------------------------------------------------------------------ check


def test_check_reports_what_is_wrong_and_exits_with_3(photos, broken, tmp_path, cvt):
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    shutil.copy(broken, data / "red/broken.jpg")
    shutil.copy(data / "blue/00.png", data / "red/blue.png")
    options = ("--output", tmp_path / "out", "--groups", tmp_path / "groups.csv", "--workers", 0)
    code, out, _ = cvt("check", data, *options)
    assert code == 3
    numbers = dict(re.findall(r"^│ (\w+) +│ +(\d+) │", out, re.MULTILINE))
    classes = {"blue": "12", "green": "12", "red": "14"}
    assert numbers == classes | {"unreadable": "1", "two_labels": "2", "exact_duplicate": "2"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"findings.csv", "report.html"}
    assert (tmp_path / "groups.csv").read_text().startswith("path,label,group\nphotos/blue/00.png")
    code, _, err = cvt("check", data, *options)
    assert (code, "out exists already" in err) == (1, True)
    assert cvt("check", data, *options, "--force")[0] == 3


def test_check_of_clean_data_exits_with_0(photos, cvt):
    code, out, _ = cvt("check", photos, "--distance", 0, "--workers", 0)
    assert (code, "nothing was found" in out) == (0, True)
