import contextlib
import csv
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.training_runs import equal
from helpers.watcher import Watcher, final_state
from PIL import Image
from torch import nn

from cvt import CvtConfig, CvtForImageClassification, image_processor
from cvt.architecture import VARIANTS
from cvt.checkpoints import load_classifier, load_processor, transformers_to_authors
from cvt.data import image_folder, open_training
from cvt.data.class_names import imagenet_classes
from cvt.inference.evaluate import evaluate
from cvt.train import Recipe, corrupt, load_recipe, resume, run_folder, step, train, trainer
from cvt.train.augmentation import augmentation
from cvt.train.checkpointing import newest_checkpoint, save_checkpoint
from cvt.train.models import classifier_for, regularised
from cvt.train.recipe import METRICS
from cvt.train.setup import chosen_precision
from cvt.train.trainer import Stopped

EVERYTHING_RANDOM = {
    "batch_size": 4,
    "accumulate": 2,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_prob": 0.9,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erase": 0.25,
    "repeats": 2,
    "ema_decay": 0.8,
    "clip_grad": 1.0,
    "layer_decay": 0.9,
}


# ------------------------------------------------------------------------------ the run folder


@pytest.mark.pictures
def test_training_learns_and_leaves_a_run_folder(photos, recipe, tmp_path):
    run = tmp_path / "run"
    best = train(recipe(epochs=8), run)
    assert best["val_top1"] > 0.9
    assert {path.name for path in run.iterdir()} == {
        ".lock", "best", "last", "checkpoints", "args.yaml", "environment.json", "results.csv",
        "speed.csv", "split.csv", "learning_curve.png", "confusion_matrix.png", "mistakes.png",
        "tensorboard",
    }  # fmt: skip
    with open(run / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == list("12345678")
    assert max(float(row["val_top1"]) for row in rows) == best["val_top1"]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    for picture in run.glob("*.png"):
        with Image.open(picture) as opened:
            assert min(opened.size) > 200

    # What training reports is what evaluating the model folder gives.
    model = load_classifier(run / "best")
    assert model.config.class_names == ["blue", "green", "red"]
    _, held_out, _ = open_training(photos)
    again = evaluate(model, load_processor(run / "best", model.config), held_out, batch_size=8)
    assert (again.top1, again.loss) == (best["val_top1"], best["val_loss"])
    assert "# CvT, trained from `config`" in (run / "best/README.md").read_text()
    assert load_classifier(run / "last").config.class_names == model.config.class_names


def test_a_run_folder_tells_how_the_run_was_started(recipe, tmp_path):
    settings = recipe(epochs=1, ema_decay=0.5)
    train(settings, tmp_path / "run")
    assert load_recipe(tmp_path / "run/args.yaml") == replace(settings, precision="fp32", views=0)
    resume(tmp_path / "run")
    starts = json.loads((tmp_path / "run/environment.json").read_text())
    assert len(starts) == 2
    assert starts[0]["packages"]["torch"] == version("torch")
    assert (starts[0]["images_per_step"], starts[0]["lr"]) == (8, 3e-3)


def test_tensorboard_reads_the_events(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe(epochs=2), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    top1 = [event.value for event in events.Scalars("epoch/val_top1")]
    history = final_state(tmp_path / "run")["history"]
    assert top1 == pytest.approx([row["val_top1"] for row in history])


def test_a_run_logs_the_batch_and_the_learning_rate(recipe, tmp_path):
    watcher = Watcher()
    settings = recipe(epochs=1, accumulate=2, lr=None, lr_base=0.01, lr_base_size=128)
    train(settings, tmp_path / "run", progress=watcher)
    message = " ".join(watcher.lines)
    assert "30 images of 3 classes" in message
    assert "1 steps of 16 images = 8 x 2 x 1 (batch_size, accumulate, processes)" in message
    assert "learning rate 0.00125 = 0.01 x 16 / 128" in message


def test_speed_is_logged_for_every_epoch_and_advice_once(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "MAX_WAITING_SHARE", 0.0)
    watcher = Watcher()
    with pytest.raises(Stopped):
        train(recipe(), tmp_path / "run", progress=Watcher(stop_after=4))
    resume(tmp_path / "run", progress=watcher)
    with open(tmp_path / "run/speed.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert all(0 < float(row["waiting"]) < 1 for row in rows)
    (advice,) = [line for line in watcher.lines if "waiting for images" in line]
    assert "of the time in epoch 2 " in advice
    assert advice.endswith(f"more workers help (now 0, on {os.cpu_count()} cores)")


def test_steps_end_the_run_instead_of_epochs(recipe, tmp_path):
    best = train(recipe(steps=5, epochs=99), tmp_path / "run")
    state = final_state(tmp_path / "run")
    assert state["step"] == 5
    assert [row["step"] for row in state["history"]] == [3, 5]
    assert best in state["history"]


def test_evaluations_can_be_rarer_than_epochs(recipe, tmp_path):
    train(recipe(epochs=4, eval_every=3), tmp_path / "run")
    history = final_state(tmp_path / "run")["history"]
    assert [row["val_top1"] is None for row in history] == [True, True, False, False]


def test_averaged_weights_are_evaluated_beside_the_others_and_handed_out(photos, recipe, tmp_path):
    best = train(recipe(epochs=2, ema_decay=0.9), tmp_path / "run")
    assert best["ema_loss"] != best["val_loss"]
    state = final_state(tmp_path / "run")
    last = load_classifier(tmp_path / "run/last").state_dict()
    equal(last, state["ema"])
    assert not torch.equal(last["classifier.weight"], state["model"]["classifier.weight"])


# ------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("changes", [{}, {"workers": 2}], ids=str)
def test_a_run_stopped_anywhere_resumes_to_the_bit(recipe, tmp_path, changes):
    settings = recipe(epochs=4, save_steps=2, **EVERYTHING_RANDOM, **changes)
    train(settings, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    # Three steps an epoch: within the first, at the end of the second, within the third.
    for at in (1, 4, 2):
        begin = partial(resume, stopped) if stopped.exists() else partial(train, settings, stopped)
        with pytest.raises(Stopped) as stop:
            begin(progress=Watcher(stop_after=at))
        assert stop.value.code == 143
    resume(stopped)
    equal(final_state(tmp_path / "whole"), final_state(stopped))
    for name in ("results.csv", "best/model.safetensors", "last/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (stopped / name).read_bytes()


def test_a_run_stopped_while_accumulating_finishes_the_step(recipe, tmp_path, monkeypatch):
    settings = recipe(**EVERYTHING_RANDOM)
    train(settings, tmp_path / "whole")
    forward, calls = CvtForImageClassification.forward, []

    def forward_and_stop(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:  # the first half of the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(CvtForImageClassification, "forward", forward_and_stop)
        with pytest.raises(Stopped):
            train(settings, tmp_path / "stopped")
    assert len(calls) == 4
    assert final_state(tmp_path / "stopped")["step"] == 2
    resume(tmp_path / "stopped")
    equal(final_state(tmp_path / "whole"), final_state(tmp_path / "stopped"))


def test_a_run_stopped_between_an_epochs_last_step_and_its_end_resumes(recipe, tmp_path):
    train(recipe(), tmp_path / "whole")
    with pytest.raises(Stopped):  # the signal comes during the evaluation of the first epoch
        train(recipe(), tmp_path / "stopped", progress=Watcher(stop_after=2, during="validation"))
    resume(tmp_path / "stopped")
    equal(final_state(tmp_path / "whole"), final_state(tmp_path / "stopped"))


def test_a_run_whose_metrics_are_read_a_step_later_as_on_a_gpu_is_the_same(
    recipe, tmp_path, monkeypatch
):
    train(recipe(save_steps=2), tmp_path / "whole")
    monkeypatch.setattr(trainer, "READ_BEHIND", {"cpu": 1})
    with pytest.raises(Stopped):
        train(recipe(save_steps=2), tmp_path / "late", progress=Watcher(stop_after=1))
    assert final_state(tmp_path / "late")["step"] == 2  # one more had begun
    resume(tmp_path / "late")
    equal(final_state(tmp_path / "whole"), final_state(tmp_path / "late"))
    results = [(tmp_path / name / "results.csv").read_bytes() for name in ("whole", "late")]
    assert results[0] == results[1]


def test_ctrl_c_saves_too_and_exits_130(recipe, tmp_path):
    watcher = Watcher(stop_after=1, signal=signal.SIGINT)
    with pytest.raises(Stopped) as stop:
        train(recipe(), tmp_path / "run", progress=watcher)
    assert stop.value.code == 130
    assert 0 < final_state(tmp_path / "run")["step"] <= 2
    assert "--resume continues" in watcher.lines[-1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_workers_change_nothing(recipe, tmp_path):
    for workers in (0, 1, 3):
        train(recipe(epochs=1, workers=workers, **EVERYTHING_RANDOM), tmp_path / str(workers))
    states = [final_state(tmp_path / name) for name in ("0", "1", "3")]
    for state in states:
        state.pop("recipe")
    equal(states[0], states[1])
    equal(states[0], states[2])


def test_seeds_differ(recipe, tmp_path):
    losses = [train(recipe(epochs=1, seed=s), tmp_path / str(s))["train_loss"] for s in (0, 1)]
    assert losses[0] != losses[1]


def test_a_finished_run_resumes_to_itself(recipe, tmp_path):
    first = train(recipe(epochs=1), tmp_path / "run")
    before = final_state(tmp_path / "run")
    assert resume(tmp_path / "run") == first
    equal(before, final_state(tmp_path / "run"))


def test_a_run_resumes_only_on_its_own_images(photos, recipe, tmp_path):
    train(recipe(epochs=1), tmp_path / "run")
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    resume(tmp_path / "run", {"data": moved, "workers": 1})
    assert load_recipe(tmp_path / "run/args.yaml").data == str(moved)
    (moved / "blue/00.png").rename(moved / "blue/new.png")
    with pytest.raises(ValueError, match=r"images in .*moved are not those of the run"):
        resume(tmp_path / "run", {"data": moved})
    with pytest.raises(ValueError, match=r"lr = 1.0, but the run has 0.003: a resumed run keeps"):
        resume(tmp_path / "run", {"lr": 1.0, "epochs": "1"})


def test_a_resumed_run_keeps_its_split_however_one_is_drawn_now(
    photos, recipe, tmp_path, monkeypatch
):
    """As a run that began before images of equal content were kept on one side."""
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    for i in range(4):
        shutil.copy(data / "red/00.png", data / f"red/again{i}.png")
    with monkeypatch.context() as patch:
        patch.setattr("cvt.data.labelled.equal_groups", lambda _: [])
        train(recipe(epochs=1, data=str(data), seed=3), tmp_path / "run")
    split_file = tmp_path / "run/split.csv"
    drawn = split_file.read_text()
    red = [line for line in drawn.splitlines() if line.startswith(("red/00", "red/again"))]
    assert {line.rpartition(",")[2] for line in red} == {"train", "validation"}
    resume(tmp_path / "run")
    assert split_file.read_text() == drawn
    split_file.unlink()
    with pytest.raises(ValueError, match=r"not split as it was: .*split\.csv is missing"):
        resume(tmp_path / "run")


def test_a_test_folder_is_held_out_and_evaluated_once_at_the_end(recipe, tmp_path, photos):
    for i, path in enumerate(sorted(photos.glob("*/*.png"))):
        split = ("train", "val", "test")[i % 3] if path.name != "02.png" else "test"
        (tmp_path / "data" / split / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "data" / split / path.parent.name / path.name)
    seen = Watcher()
    train(recipe(data=str(tmp_path / "data"), epochs=2), tmp_path / "run", seen)
    metrics = json.loads((tmp_path / "run/test/metrics.json").read_text())
    model = load_classifier(tmp_path / "run/best")
    images = image_folder(tmp_path / "data/test")
    found = evaluate(model, load_processor(tmp_path / "run/best", model.config), images)
    assert (metrics["images"], metrics["top1"]) == (len(images), found.top1)
    assert [line for line in seen.lines if "held-out" in line] == [
        f"12 held-out test images: top-1 {100 * found.top1:.2f} %, loss {found.loss:.4f}; "
        f"more in {tmp_path / 'run/test'}"
    ]
    assert not (tmp_path / "run/split.csv").exists()
    again = Watcher()
    resume(tmp_path / "run", progress=again)
    assert not any("held-out" in line for line in again.lines)


def test_a_split_that_the_run_draws_is_kept(recipe, tmp_path, photos, cvt):
    train(recipe(epochs=1, steps=1), tmp_path / "run")
    rows = list(csv.DictReader((tmp_path / "run/split.csv").read_text().splitlines()))
    assert {row["split"] for row in rows} == {"train", "validation"}
    assert len({row["path"] for row in rows}) == len(rows) == 36
    code, _, err = cvt("evaluate", tmp_path / "run/best", photos)
    assert (code, "the 6 validation images of 36" in err) == (0, True)


def test_the_same_command_starts_and_resumes(photos, config_folder, tmp_path, cvt):
    settings = {"model": config_folder, "batch-size": 8, "image-size": 32, "epochs": 1, "steps": 2}
    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    command = ["train", photos, *options, "--output", tmp_path / "run", "--resume"]
    assert cvt(*command)[0] == 0
    before = final_state(tmp_path / "run")
    code, _, err = cvt(*command, "precision=auto")
    assert (code, "2 steps done" in err) == (0, True)
    equal(before, final_state(tmp_path / "run"))
    code, _, err = cvt(*command, "lr=1")
    assert (code, "lr = 1, but the run has None" in " ".join(err.split())) == (1, True)
    assert cvt(*[word for word in command if word != "--resume"])[0] == 1


@pytest.mark.parametrize(
    ("run", "more"),
    [({"cooldown_epochs": 1, "min_lr": 1e-3}, {"cooldown_epochs": 2}),
     ({"min_lr": 3e-3}, {"epochs": 5})],
)  # fmt: skip
def test_a_finished_run_is_trained_longer_where_the_steps_done_stay_the_same(
    recipe, tmp_path, run, more
):
    train(recipe(**run), tmp_path / "run")
    resume(tmp_path / "run", more)
    train(recipe(**run | more), tmp_path / "whole")
    for name in ("results.csv", "last/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_is_not_trained_longer_on_another_cosine(recipe, tmp_path):
    train(recipe(epochs=2), tmp_path / "run")
    before = final_state(tmp_path / "run")
    with pytest.raises(ValueError, match=r"epochs = 4: the 6 steps done .*raise cooldown_epochs"):
        resume(tmp_path / "run", {"epochs": 4})
    equal(before, final_state(tmp_path / "run"))


def test_an_edited_args_yaml_is_noticed(recipe, tmp_path):
    train(recipe(epochs=1), tmp_path / "run")
    args = tmp_path / "run/args.yaml"
    text = args.read_text()
    args.write_text(text.replace("lr: 0.003", "lr: 0.1"))
    with pytest.raises(ValueError, match=r"args.yaml: lr = 0.1, but the run has 0.003"):
        resume(tmp_path / "run")
    args.write_text(text.replace("workers: 0", "workers: 1"))
    resume(tmp_path / "run")
    assert final_state(tmp_path / "run")["recipe"]["workers"] == 0  # nothing was left to save
    assert load_recipe(args).workers == 1


def test_a_run_is_neither_overwritten_nor_invented(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"run exists already, with no run to resume"):
        train(recipe(), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no checkpoint; there is no run to resume"):
        resume(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "changes", [{}, {"lr": "find", "head_only": True, "views": 1, "seed": 5}], ids=["plain", "find"]
)
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    recipe, tmp_path, changes, monkeypatch
):
    def kill(*_):
        raise KeyboardInterrupt

    run, settings = tmp_path / "run", recipe(epochs=1, head_only=True, views=1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            train(replace(settings, **changes), run)
    assert {"args.yaml", "split.csv"} < {path.name for path in run.iterdir()}
    (run / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="with no run to resume"):
        train(settings, run)
    (run / "notes.txt").unlink()
    code = (
        "import sys, pathlib; from cvt.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(run)], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FileExistsError, match="in use by another process"):
            train(settings, run)
        other.stdin.close()
    train(settings, run)
    train(settings, tmp_path / "other")
    equal(final_state(run), final_state(tmp_path / "other"))
    assert not (run / "lr_find.csv").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "args.yaml").write_text("epochs: 1")  # no run wrote it: there is no environment.json
    with pytest.raises(FileExistsError, match="with no run to resume"):
        train(settings, mine)


def test_data_that_cannot_be_used_leaves_no_run(recipe, tmp_path):
    with pytest.raises(FileNotFoundError):
        train(recipe(data=str(tmp_path / "nowhere")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------ ending early


class Clock:
    """What a run takes for the time: every batch takes an hour."""

    def __init__(self, monkeypatch):
        self.hours = 0.0
        seed_all = step.seed_all

        def batch(*numbers):
            self.hours += 1
            seed_all(*numbers)

        monkeypatch.setattr(step, "seed_all", batch)
        times = {"monotonic": lambda: 3600 * self.hours, "perf_counter": time.perf_counter}
        monkeypatch.setattr(trainer, "time", SimpleNamespace(**times))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


RESULTS = ("results.csv", "best/model.safetensors", "last/model.safetensors")


def same_ends(run, whole):
    equal(final_state(run), final_state(whole))
    for name in RESULTS:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (run / "checkpoints/best").exists()


@pytest.mark.parametrize(
    ("hours", "changes", "epoch"),
    [(1, {}, 1), (3, {}, 1), (4, {"ema_decay": 0.8}, 2), (6, {"eval_every": 3}, 2),
     (7, {"eval_every": 3}, 3)],
    ids=str,
)  # fmt: skip
def test_a_run_out_of_time_ends_whole_and_resumes_to_the_bit(
    recipe, tmp_path, clock, hours, changes, epoch
):
    """Three steps an epoch, an hour a step: at the end of epochs, validated or not, and within."""
    settings = recipe(max_hours=99, mixup=0.8, **changes)
    train(settings, tmp_path / "whole")
    run, log = tmp_path / "run", Watcher()
    best = train(replace(settings, max_hours=hours), run, log)
    assert final_state(run)["step"] == hours
    assert log.lines[-1] == (
        f"ended after {hours} of 9 steps: max_hours = {hours} is over; --resume with more continues"
    )
    with open(run / "results.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert (last["epoch"], last["step"]) == (str(epoch), str(hours))
    model = load_classifier(run / "last")
    images = open_training(settings.data).validation
    found = evaluate(model, load_processor(run / "last", model.config), images, batch_size=8)
    assert float(last["ema_top1" if changes.get("ema_decay") else "val_top1"]) == found.top1
    clock.hours += 1000  # between the sessions
    before = final_state(run), [(run / name).read_bytes() for name in RESULTS]
    assert resume(run) == best
    equal((final_state(run), [(run / name).read_bytes() for name in RESULTS]), before)
    resume(run, {"max_hours": hours + 1})
    assert final_state(run)["step"] == hours + 1
    resume(run, {"max_hours": 99})
    same_ends(run, tmp_path / "whole")


@pytest.fixture
def rated(monkeypatch):
    """Has epochs rated by top-1 as given, by their step."""

    def rate(tops):
        validate = trainer.Trainer.validate

        def rated(self, row):
            evaluation = validate(self, row)
            row |= {"val_top1": tops[self.step], "val_loss": 1.0}
            return evaluation

        monkeypatch.setattr(trainer.Trainer, "validate", rated)

    return rate


@pytest.mark.usefixtures("clock")
def test_the_best_epoch_is_kept_where_a_run_out_of_time_was_better_within_one(
    recipe, tmp_path, rated
):
    rated({3: 0.5, 4: 0.9, 6: 0.4, 9: 0.3})
    best = train(recipe(max_hours=99), tmp_path / "whole")
    within = train(recipe(max_hours=4), tmp_path / "run")
    assert (best["step"], within["step"]) == (3, 4)
    weights = [(tmp_path / name / RESULTS[1]).read_bytes() for name in ("whole", "run")]
    assert weights[0] != weights[1]
    assert resume(tmp_path / "run", {"max_hours": 99}) == best
    same_ends(tmp_path / "run", tmp_path / "whole")


def test_pictures_of_the_best_epoch_are_kept_with_its_model(tmp_path):
    for name in ("confusion_matrix.png", "best/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("first")
    run_folder.keep_best(tmp_path)
    for name in ("confusion_matrix.png", "best/config.json"):
        (tmp_path / name).write_text("second")
    for _ in range(2):
        run_folder.restore_best(tmp_path)
        assert (tmp_path / "confusion_matrix.png").read_text() == "first"
        assert (tmp_path / "best/config.json").read_text() == "first"
        assert {path.name for path in tmp_path.iterdir()} == {
            "confusion_matrix.png", "best", "checkpoints",
        }  # fmt: skip
        assert not any((tmp_path / "checkpoints").iterdir())


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("during", ["validation", "test"])
def test_a_signal_while_a_run_out_of_time_is_evaluated_changes_nothing(
    recipe, tmp_path, photos, during
):
    for i, path in enumerate(sorted(photos.glob("*/*.png"))):
        copy = tmp_path / "data" / ("train", "train", "val", "test")[i % 4] / path.parent.name
        copy.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    settings = recipe(data=str(tmp_path / "data"), epochs=2, max_hours=99)
    train(settings, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(
            replace(settings, max_hours=1), tmp_path / "run", Watcher(stop_after=2, during=during)
        )
    resume(tmp_path / "run")
    of_one_step = json.loads((tmp_path / "run/test/metrics.json").read_text())
    resume(tmp_path / "run", {"max_hours": 99})
    same_ends(tmp_path / "run", tmp_path / "whole")
    metrics = [(tmp_path / name / "test/metrics.json").read_text() for name in ("whole", "run")]
    assert metrics[0] == metrics[1]
    assert json.loads(metrics[1])["loss"] != of_one_step["loss"]


def test_a_run_out_of_patience_ends_and_resumes_to_the_same(recipe, tmp_path, rated):
    rated({3: 0.5, 6: 0.4, 9: 0.6, 12: 0.6, 15: 0.3})
    settings = recipe(epochs=6, patience=1)
    log = Watcher()
    assert train(settings, tmp_path / "whole", log)["epoch"] == 1
    assert log.lines[-1] == (
        "ended after 6 of 18 steps: patience = 1 is over, epoch 1 stays the best by top1; "
        "--resume with more continues"
    )
    run = tmp_path / "run"
    for stop_after in (4, 1):  # in the second epoch, and between its last step and its end
        start = partial(resume, run) if run.exists() else partial(train, settings, run)
        with pytest.raises(Stopped):
            start(progress=Watcher(stop_after=stop_after))
    for _ in range(2):  # the second time it has ended
        assert resume(run)["epoch"] == 1
        same_ends(run, tmp_path / "whole")
    train(replace(settings, patience=2), tmp_path / "patient")
    assert resume(run, {"patience": 2})["epoch"] == 3
    assert final_state(run)["step"] == 15
    same_ends(run, tmp_path / "patient")


def test_the_metric_of_the_recipe_chooses_the_best_epoch(recipe, tmp_path, cvt):
    run = tmp_path / "run"
    train(recipe(epochs=5, lr=0.05, metric="loss"), run)
    rows = final_state(run)["history"]
    model = load_classifier(run / "best")
    images = open_training(recipe().data).validation
    found = evaluate(model, load_processor(run / "best", model.config), images, batch_size=8)
    assert found.loss == min(row["val_loss"] for row in rows)
    for metric in METRICS:
        assert all(row[f"val_{metric}"] is not None for row in rows)
    code, out, _ = cvt("train", "--resume", "--output", run)
    assert (code, f"best loss {found.loss:.4f}, after epoch " in out) == (0, True)


def test_a_run_of_before_some_metrics_is_resumed(recipe, tmp_path):
    with pytest.raises(Stopped):
        train(recipe(), tmp_path / "run", Watcher(stop_after=4))
    path, state = newest_checkpoint(tmp_path / "run/checkpoints")
    for row in state["history"]:
        del row["val_f1_macro"], row["val_lowest_recall"]
    save_checkpoint(path.parent, state["step"], state, 2)
    resume(tmp_path / "run")
    with open(tmp_path / "run/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["val_f1_macro"] == "" for row in rows] == [True, False, False]


# ------------------------------------------------------------------------------ going wrong


def test_weights_that_are_not_finite_are_never_saved(recipe, tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def overflow(self, *arguments):
        step(self, *arguments)
        if self.param_groups[0]["lr"] == 1e-3:  # the first step of the second epoch
            self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    settings = recipe(keep=1, save_steps=1, lr=1e-3, min_lr=1e-3, warmup_epochs=1, warmup_lr=0)
    with pytest.raises(
        FloatingPointError, match=r"weights became NaN .* step 4, epoch 2.*step-.*3"
    ):
        train(settings, tmp_path / "run")
    assert final_state(tmp_path / "run")["step"] == 3


def test_a_run_that_evaluates_to_nothing_finite_names_what_to_try(recipe, tmp_path):
    with pytest.raises(FloatingPointError, match=r"\.png: .* in step 1, epoch 1.*Try a lower lr"):
        train(recipe(steps=1, lr=1e18, warmup_epochs=0), tmp_path / "run")


def test_a_loss_that_is_not_finite_names_the_step_and_what_to_try(recipe, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+, epoch 1, at learning rate .*lower lr"):
        train(recipe(lr=1e30, warmup_epochs=0), tmp_path / "run")
    state = final_state(tmp_path / "run")  # the last good state is kept
    assert all(weight.isfinite().all() for weight in state["model"].values())


@pytest.fixture
def damaged(photos, tmp_path):
    """The photos, two of them damaged."""
    for file in photos.rglob("*.png"):
        copy = tmp_path / "damaged" / file.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    train_images, _, _ = open_training(tmp_path / "damaged")
    broken = [train_images[i][0] for i in (3, 17)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    return tmp_path / "damaged", broken


@pytest.mark.parametrize("changes", [{}, {"workers": 2}], ids=str)
def test_an_unreadable_image_is_left_out_counted_and_named(damaged, recipe, tmp_path, changes):
    data, broken = damaged
    watcher = Watcher()
    settings = recipe(data=str(data), mixup=0.5, **changes)
    train(settings, tmp_path / "run", progress=watcher)
    for path in broken:
        assert sum(f"skipped: {path}" in line for line in watcher.lines) == 1
        assert str(path) in (tmp_path / "run/corrupt.txt").read_text()
    names = {str(path.relative_to(data)) for path in broken}
    assert final_state(tmp_path / "run")["corrupt"].keys() == names


@pytest.mark.parametrize(("share", "stops"), [(0.01, True), (0.05, True), (0.07, False)])
def test_a_share_of_unreadable_images_stops_the_run(
    damaged, recipe, tmp_path, monkeypatch, share, stops
):
    monkeypatch.setattr(corrupt, "ALWAYS_ALLOWED", 1)
    settings = recipe(data=str(damaged[0]), max_corrupt=share, epochs=1)
    expected = pytest.raises(
        ValueError,
        match=f"2 of 30 training images cannot be read, more than max_corrupt = {share} and more",
    )
    with expected if stops else contextlib.nullcontext():
        train(settings, tmp_path / "run")


def test_a_few_unreadable_images_never_stop_the_run(damaged, recipe, tmp_path):
    train(recipe(data=str(damaged[0]), max_corrupt=0, epochs=1), tmp_path / "run")


def test_an_unreadable_image_is_counted_once_though_the_data_moves(damaged, recipe, tmp_path):
    data, broken = damaged
    with pytest.raises(Stopped):
        train(recipe(data=str(data)), tmp_path / "run", progress=Watcher(stop_after=4))
    moved = data.rename(tmp_path / "moved")
    resume(tmp_path / "run", {"data": str(moved)})
    names = {str(path.relative_to(data)) for path in broken}
    assert final_state(tmp_path / "run")["corrupt"].keys() == names
    assert len((tmp_path / "run/corrupt.txt").read_text().splitlines()) == len(names)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_names_of_files_need_not_be_utf_8(photos, recipe, tmp_path):
    data = tmp_path / os.fsdecode(b"caf\xe9")
    break_images(photos, data, 0)
    for number in range(12):
        (data / f"red/{number:02d}.png").rename(
            data / "red" / os.fsdecode(b"\xe9%02d.png" % number)
        )
    (data / "red" / os.fsdecode(b"\xe903.png")).write_bytes(b"no image")
    with pytest.raises(Stopped):
        train(recipe(data=str(data)), tmp_path / "run", progress=Watcher(stop_after=4))
    resume(tmp_path / "run")
    assert load_recipe(tmp_path / "run/args.yaml").data == str(data)
    state = final_state(tmp_path / "run")
    if state["corrupt"]:  # else it was drawn for validation
        assert (
            rb"caf\udce9/red/\udce903.png: is not an image"
            in (tmp_path / "run/corrupt.txt").read_bytes()
        )


def break_images(photos, folder, count=None):
    """A copy of the photos; the first images of each class are no images, by default all."""
    for file in photos.rglob("*.png"):
        copy = folder / file.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        number = int(file.stem)
        copy.write_bytes(b"no image" if count is None or number < count else file.read_bytes())
    return str(folder)


def test_a_batch_without_a_readable_image_counts_nothing(photos, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(corrupt, "ALWAYS_ALLOWED", 100)
    data = break_images(photos, tmp_path / "some", 5)
    norms = []
    kept = step.statistics_kept

    @contextlib.contextmanager
    def watched(model):
        with kept(model):
            before = [buffer.clone() for buffer in model.buffers()]
            yield
            norms.append(all(map(torch.equal, before, model.buffers())))

    monkeypatch.setattr(step, "statistics_kept", watched)
    train(recipe(data=data, batch_size=2, image_size=48, epochs=1), tmp_path / "run")
    state = final_state(tmp_path / "run")
    assert norms
    assert all(norms)
    assert 0.5 < state["history"][0]["train_loss"] < 3  # no batch of loss 0 in the mean
    with pytest.raises(ValueError, match=r"no training image of epoch 1 can be read; .*corrupt"):
        train(recipe(data=break_images(photos, tmp_path / "broken")), tmp_path / "none")


def test_images_of_too_many_pixels_are_named_before_the_first_epoch(photos, recipe, tmp_path):
    data = break_images(photos, tmp_path / "data", 0)
    image = Image.new("RGB", (100, 100))
    for name in ("red/00.png", "green/00.png", "blue/00.png", "blue/01.png"):
        image.save(tmp_path / "data" / name)
    watcher = Watcher()
    train(recipe(data=data, max_pixels=9999, epochs=1), tmp_path / "run", progress=watcher)
    named = [line for line in watcher.lines if line.startswith("not used in ")]
    assert len(named) == 4
    assert f"{data}/red/00.png: is 100 x 100 pixels; at most 9999 are decoded" in "".join(named)
    assert watcher.lines.index(named[-1]) < watcher.lines.index(
        next(line for line in watcher.lines if line.startswith("skipped"))
    )


# ------------------------------------------------------------------------------ on what and how


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"optimizer": "sgd", "momentum": 0.5},
        {"gradient_checkpointing": True},
        {"batch_size": 64},  # more than there are images
        {"data": "digits", "steps": 3},
    ],
    ids=str,
)
def test_every_way_of_training_trains(recipe, tmp_path, changes):
    best = train(recipe(**{"epochs": 2, **changes}), tmp_path / "run")
    assert math.isfinite(best["train_loss"])
    assert best["val_top1"] is not None


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"precision": "fp16"}, {"compile": True}], ids=str)
def test_a_gpu_learns_too_and_a_stopped_run_goes_on(recipe, tmp_path, changes):
    settings = recipe(epochs=8, workers=2, **changes)
    with pytest.raises(Stopped):
        train(settings, tmp_path / "run", Watcher(stop_after=4))
    assert resume(tmp_path / "run")["val_top1"] > 0.9


def test_gradient_checkpointing_changes_no_loss(recipe, tmp_path):
    losses = [
        train(recipe(epochs=2, gradient_checkpointing=on), tmp_path / str(on))["train_loss"]
        for on in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_accumulated_batches_are_one_step(recipe, tmp_path):
    """With batch statistics per batch, only what is normalised differs: here, nothing."""
    config = CvtConfig(
        embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 1, 1],
        qkv_projection_method=["linear"] * 3, drop_path_rate=[0.0] * 3,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "plain")
    plain = {"model": str(tmp_path / "plain"), "crop_scale": 1.0, "flip": 0.0}
    losses = [
        train(recipe(**plain, batch_size=8 // n, accumulate=n), tmp_path / str(n))["train_loss"]
        for n in (1, 2, 4)
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)


@pytest.mark.slow
def test_a_compiled_run_follows_the_plain_one(recipe, tmp_path):
    plain, compiled = (
        train(recipe(compile=on, drop_rate=0, drop_path=0), tmp_path / str(on))
        for on in (False, True)
    )
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], abs=1e-3)


def test_half_precision_needs_a_gpu():
    with pytest.raises(ValueError, match="precision = fp16: needs a GPU"):
        chosen_precision("fp16", torch.device("cpu"))
    assert chosen_precision("auto", torch.device("cpu")) == "fp32"
    assert chosen_precision("bf16", torch.device("cpu")) == "bf16"


# ------------------------------------------------------------------------------ the model


def changed_weights(recipe, run, **changes):
    """The names of the weights and statistics that a short run moves."""
    train(recipe(epochs=1, **changes), run)
    first = torch.load(
        next((run / "checkpoints").glob("step-00000000")) / "state.pt", weights_only=True
    )["model"]
    last = final_state(run)["model"]
    counters = {name for name in last if name.endswith("num_batches_tracked")}
    return {name for name in last.keys() - counters if not torch.equal(first[name], last[name])}


def test_only_what_is_not_frozen_is_trained(recipe, tmp_path):
    every = changed_weights(recipe, tmp_path / "all")
    frozen_stages = changed_weights(recipe, tmp_path / "stages", freeze_stages=2)
    assert frozen_stages == {name for name in every if not name.startswith(
        ("cvt.encoder.stages.0", "cvt.encoder.stages.1"))}  # fmt: skip
    head = changed_weights(recipe, tmp_path / "head", head_only=True)
    assert head == {"layernorm.weight", "layernorm.bias", "classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match="freeze_stages = 4: there are 3 stages"):
        train(recipe(freeze_stages=4), tmp_path / "run")


def test_adapters_are_trained_alone_and_handed_out_merged_and_apart(photos, recipe, tmp_path):
    from peft import PeftModel

    moved = changed_weights(recipe, tmp_path / "run", lora_r=2)
    assert moved
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    best = load_classifier(tmp_path / "run/best").eval()
    start = torch.load(tmp_path / "run/checkpoints/step-00000000/state.pt", weights_only=True)
    base = CvtForImageClassification(best.config)
    weights = base.state_dict()
    for name, weight in start["model"].items():
        for part in ("base_model.model.", ".base_layer", ".original_module"):
            name = name.replace(part, "")
        if name in weights:
            weights[name].copy_(weight)
    adapted = PeftModel.from_pretrained(base, tmp_path / "run/best/adapter").eval()
    assert adapted.peft_config["default"].lora_alpha == 2 * adapted.peft_config["default"].r == 4
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.allclose(best(pixels).logits, adapted(pixels).logits, atol=1e-5)


def test_adapters_open_with_the_base_that_they_name(recipe, model_folder, tmp_path):
    before = os.umask(0o027)
    try:
        settings = {"lora_r": 2, "epochs": 1, "steps": 2, "lr": 0.1}
        train(recipe(model=str(model_folder), **settings), tmp_path / "run")
    finally:
        os.umask(before)
    adapter = tmp_path / "run/best/adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == os.path.relpath(model_folder, adapter)
    for file in (file for file in adapter.iterdir() if file.suffix != ".safetensors"):
        assert str(tmp_path) not in file.read_text(), file
    card = (adapter / "README.md").read_text()
    assert "3 classes: blue, green, red" in card
    assert "More Information Needed" not in card
    best, opened = load_classifier(tmp_path / "run/best"), load_classifier(adapter)
    assert opened.config.class_names == best.config.class_names == ["blue", "green", "red"]
    assert load_processor(adapter, opened.config).size == {"shortest_edge": 32}
    for name, weight in best.state_dict().items():
        torch.testing.assert_close(opened.state_dict()[name], weight)
    start = load_classifier(model_folder).state_dict()
    assert not torch.equal(best.state_dict()["classifier.weight"], start["classifier.weight"])
    for path in (tmp_path / "run").rglob("*"):
        wanted = 0o750 if path.is_dir() else 0o640
        assert path.stat().st_mode & 0o777 == wanted, path


def test_adapters_of_random_weights_name_no_base(recipe, model_folder, tmp_path):
    settings = {"lora_r": 2, "epochs": 1, "steps": 1}
    runs = {"config": {}, "scratch": {"model": str(model_folder), "from_scratch": True}}
    for name, changes in runs.items():
        train(recipe(**settings, **changes), tmp_path / "runs" / name)
        with pytest.raises(ValueError, match="an adapter that does not name its base"):
            load_classifier(tmp_path / "runs" / name / "best/adapter")


def test_a_model_that_answers_with_tuples_is_trained_and_evaluated(recipe, model_folder, tmp_path):
    model = CvtForImageClassification.from_pretrained(model_folder, return_dict=False)
    model.save_pretrained(tmp_path / "tuples")
    settings = {"epochs": 1, "steps": 2, "ema_decay": 0.5}
    train(recipe(model=str(tmp_path / "tuples"), **settings), tmp_path / "run")
    best = CvtForImageClassification.from_pretrained(tmp_path / "run/best")
    assert isinstance(best(torch.randn(1, 3, 32, 32)), tuple)


def test_dropout_and_drop_path_are_the_recipes(model_folder):
    trained = CvtForImageClassification.from_pretrained(model_folder)
    model = regularised(trained, Recipe(drop_rate=0.2, drop_path=0.4))
    assert model.config.drop_path_rate == [0.0, 0.0, 0.4]
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.2}
    equal(trained.state_dict(), model.state_dict())
    assert regularised(trained, Recipe()) is trained


def test_a_fine_tuned_resolution_has_its_preprocessing_on_both_sides(recipe, tmp_path):
    train(recipe(epochs=1, image_size=384, batch_size=2, steps=1), tmp_path / "run")
    processor = load_processor(
        tmp_path / "run/best", CvtConfig.from_pretrained(tmp_path / "run/best")
    )
    assert processor.size == {"shortest_edge": 384}
    wide = Image.new("RGB", (500, 300))
    wide.paste("white", (250, 0, 500, 300))
    pixels = processor(wide, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 384, 384)
    # Squashed, not cropped: the edge in the middle stays there, and both ends are seen.
    assert pixels[0, 0, 0, 188] < 0 < pixels[0, 0, 0, 196]


def test_fine_tuning_keeps_the_body_and_creates_a_new_head(model_folder):
    trained = CvtForImageClassification.from_pretrained(model_folder)
    model, sentence = classifier_for(model_folder, ["ant", "bee"])
    assert sentence == "a new, random classifier: the start has none of the 2 classes"
    assert model.config.class_names == ["ant", "bee"]
    assert model.config.label2id == {"ant": 0, "bee": 1}
    assert torch.equal(model.layernorm.weight, trained.layernorm.weight)
    name = "cvt.encoder.stages.2.layers.0.intermediate.dense.weight"
    assert torch.equal(model.state_dict()[name], trained.state_dict()[name])
    assert model.classifier.weight.shape == (2, 32)
    assert model.classifier.bias.abs().max() <= 32**-0.5
    assert model(torch.zeros(1, 3, 32, 32), labels=torch.tensor([1])).logits.shape == (1, 2)
    fresh, sentence = classifier_for(model_folder, ["ant", "bee"], from_scratch=True)
    assert not sentence
    assert not torch.equal(fresh.state_dict()[name], trained.state_dict()[name])


@pytest.mark.parametrize(
    ("classes", "rows", "sentence"),
    [
        (["blue", "green", "red"], [0, 1, 2], "3 classes is that of the starting model"),
        (["red", "blue", "green"], [2, 0, 1], "starting model, its 3 rows ordered by class name"),
        (["red", "blue"], [2, 0], "starting model, its 2 rows ordered by class name"),
        (["ant", "red", "bee", "blue"], [None, 2, None, 0],
         "2 of 4 rows .* by class name; new, random rows: ant, bee"),
        (["ant", "bee", "cow"], [None] * 3, "a new, random classifier"),
    ],
)  # fmt: skip
def test_a_head_is_reused_by_class_name(model_folder, classes, rows, sentence):
    trained = CvtForImageClassification.from_pretrained(model_folder).classifier
    model, message = classifier_for(model_folder, classes)
    assert re.search(sentence, message), message
    assert (model.config.class_names, model.config.num_labels) == (classes, len(classes))
    for i, row in enumerate(rows):
        same = (model.classifier.weight[i] == trained.weight).all(dim=1).tolist()
        assert same == [j == row for j in range(3)]
        assert row is None or model.classifier.bias[i] == trained.bias[row]


def test_imagenets_head_is_reused_by_wordnet_id(model_folder, tmp_path):
    config = CvtConfig.from_pretrained(model_folder)
    config.class_names = list(imagenet_classes().values())
    trained = CvtForImageClassification(config)
    trained.save_pretrained(tmp_path / "imagenet")
    names = list(imagenet_classes())
    model, _ = classifier_for(tmp_path / "imagenet", [names[7], "bee", names[3]])
    assert torch.equal(model.classifier.weight[[0, 2]], trained.classifier.weight[[7, 3]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_start_in_half_precision_is_trained_in_fp32(recipe, model_folder, tmp_path, dtype):
    half = CvtForImageClassification.from_pretrained(model_folder).to(dtype)
    half.save_pretrained(tmp_path / "half")
    image_processor(half.config, image_size=32).save_pretrained(tmp_path / "half")
    start = {"model": str(tmp_path / "half"), "steps": 1, "epochs": 1, "lr": 2e-5}
    train(recipe(**start, head_only=True), tmp_path / "run")
    state = final_state(tmp_path / "run")
    assert {weight.dtype for weight in state["model"].values() if weight.is_floating_point()} == {
        torch.float32
    }
    assert torch.equal(state["model"]["layernorm.bias"], half.layernorm.bias.float()) is False
    best = CvtForImageClassification.from_pretrained(tmp_path / "run/best")
    assert best.dtype == torch.float32


def test_the_starts_preprocessing_is_kept_unless_it_is_set(recipe, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "start")
    own = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "crop_pct": 0.5, "resample": 2}
    processor = image_processor(model_folder, **own)
    processor.save_pretrained(tmp_path / "start")
    start = {"model": str(tmp_path / "start"), "epochs": 1, "steps": 1, "warmup_epochs": 0,
             "min_lr": 3e-3}  # fmt: skip

    def kept(run):
        found = json.loads((run / "best/preprocessor_config.json").read_text())
        return {name: found[name] for name in own}

    train(recipe(**start), tmp_path / "run")
    assert kept(tmp_path / "run") == own
    shutil.rmtree(tmp_path / "start")  # the run has all that it needs
    resume(tmp_path / "run", {"steps": 2})
    assert kept(tmp_path / "run") == own
    shutil.copytree(model_folder, tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    train(recipe(**start, crop_pct=0.75), tmp_path / "set")
    assert kept(tmp_path / "set") == own | {"crop_pct": 0.75}
    view = augmentation(recipe(**start, flip=0), processor)(Image.new("RGB", (40, 40), "white"))
    assert view.unique().tolist() == [2.0]
    assert interpolations(recipe(), processor) == {"bilinear"}
    assert interpolations(recipe(interpolation="bicubic"), processor) == {"bicubic"}


def interpolations(recipe, processor):
    crop = augmentation(recipe, processor).transforms[0]
    return {crop.interpolation.value}


def test_training_leaves_the_callers_state_alone(recipe, tmp_path):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    caller = Accelerator(cpu=True, gradient_accumulation_steps=7)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    try:
        train(recipe(epochs=1, steps=1), tmp_path / "run")
        assert before == (
            random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        )  # fmt: skip
        assert caller.gradient_accumulation_steps == 7
        assert caller.state.num_processes == 1
        assert Accelerator(cpu=True).state.__dict__ == caller.state.__dict__
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_an_architecture_changes_random_weights(model_folder):
    recipe = Recipe(architecture="position_embedding=learned stride_kv=1", image_size=48)
    model, _ = classifier_for("cvt-digits", ["ant", "bee"], recipe=recipe)
    assert model.config.stride_kv == [1, 1, 1]
    assert model.config.image_size == 48  # the recipe's
    assert model.cvt.encoder.stages[0].position_embedding.shape == (1, 24 * 24, 32)
    given = Recipe(architecture="position_embedding=learned image_size=64", image_size=48)
    assert classifier_for("cvt-digits", ["ant", "bee"], recipe=given)[0].config.image_size == 64
    with pytest.raises(ValueError, match=r"has trained weights, .* add from_scratch=true"):
        classifier_for(model_folder, ["ant", "bee"], recipe=recipe)
    scratch, _ = classifier_for(model_folder, ["ant", "bee"], from_scratch=True, recipe=recipe)
    assert scratch.config.stride_kv == [1, 1, 1]
    with pytest.raises(ValueError, match=r"architecture = num_heads=5: stage 1: embed_dim\[0\]"):
        classifier_for("cvt-digits", ["a", "b"], recipe=Recipe(architecture="num_heads=5"))


def test_a_variant_starts_from_scratch():
    model, _ = classifier_for("cvt-13", ["ant", "bee"], from_scratch=True)
    assert model.config.depth == [1, 2, 10]
    assert model.config.hidden_act == "quick_gelu"
    with pytest.raises(FileNotFoundError, match="no model cvt-99"):
        classifier_for("cvt-99", ["ant", "bee"])


def test_training_starts_from_an_authors_file_too(model_folder, tmp_path, monkeypatch):
    trained = CvtForImageClassification.from_pretrained(model_folder)
    fields = {name: getattr(trained.config, name) for name in ("embed_dim", "num_heads", "depth")}
    monkeypatch.setitem(VARIANTS, "cvt-tiny", fields)
    torch.save(transformers_to_authors(trained.state_dict()), tmp_path / "weights.pth")
    model, _ = classifier_for(tmp_path / "weights.pth", ["ant", "bee"])
    assert model.config.class_names == ["ant", "bee"]
    assert torch.equal(model.layernorm.weight, trained.layernorm.weight)


def test_a_recipe_alone_loads_no_torch():
    code = "import sys, cvt.train.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
