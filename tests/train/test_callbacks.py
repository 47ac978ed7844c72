import csv
import random
import traceback
from functools import partial

import numpy as np
import pytest
import torch
from helpers.training_runs import equal
from helpers.watcher import Watcher, final_state

from cvt.train import Callback, resume, train
from cvt.train.trainer import Stopped

EVENTS = ("on_train_begin", "on_step_end", "on_epoch_end", "on_train_end")


class Recorder(Callback):
    """Notes every event, and draws from all generators as it does."""

    def __init__(self):
        self.events = []

    def note(self, event, run):
        random.random(), np.random.rand(), torch.rand(1)
        self.events.append((event, run))


for event in EVENTS:
    setattr(Recorder, event, lambda self, run, event=event: self.note(event, run))


class At(Callback):
    """Calls a function at an event of a step."""

    def __init__(self, event, step, function):
        setattr(self, event, lambda run: function(run) if run.step == step else None)


def rows(run):
    with open(run / "results.csv") as file:
        return list(csv.DictReader(file))


def test_the_events_of_a_run_and_what_they_receive(recipe, tmp_path):
    """Three steps an epoch; the second epoch is not validated."""
    recorder = Recorder()
    settings = recipe(eval_every=3)
    best = train(settings, tmp_path / "run", callbacks=[recorder])
    names = [event for event, _ in recorder.events]
    assert names == ["on_train_begin", *3 * [*3 * ["on_step_end"], "on_epoch_end"], "on_train_end"]
    begin, *others, end = [run for _, run in recorder.events]
    assert (begin.step, begin.steps, begin.epoch, begin.metrics) == (0, 9, 0, {})
    assert begin.recipe.lr == settings.lr
    assert begin.output == tmp_path / "run"
    steps = [run for event, run in recorder.events if event == "on_step_end"]
    assert [(run.step, run.epoch) for run in steps] == [(i + 1, i // 3 + 1) for i in range(9)]
    found = rows(tmp_path / "run")
    for i, run in enumerate(run for event, run in recorder.events if event == "on_epoch_end"):
        losses = [run.metrics["loss"] for run in steps[3 * i : 3 * i + 3]]
        assert float(found[i]["train_loss"]) == sum(losses) / 3
        assert steps[3 * i + 2].metrics["learning_rate"] == float(found[i]["learning_rate"])
        shown = {name: "" if value is None else str(value) for name, value in run.metrics.items()}
        assert found[i].items() <= shown.items()
        assert shown.keys() - found[i] == {"images_per_second", "waiting"}
        assert [row["epoch"] for row in run.history] == list(range(1, i + 2))
    assert end.metrics == best
    for run in (*others, end):
        with pytest.raises(TypeError):
            run.metrics["loss"] = 0
        with pytest.raises(AttributeError):
            run.step = 0


def test_a_callback_ends_a_run_which_resumes_to_the_bit(recipe, tmp_path):
    """Within an epoch, where the step under way is taken too, and at the end of one."""
    settings = recipe(mixup=0.8, cutmix=1.0, ema_decay=0.8)
    train(settings, tmp_path / "whole")
    run, log = tmp_path / "run", Watcher()
    stop = At("on_step_end", 4, lambda run: run.stop("seen enough"))
    train(settings, run, log, [Recorder(), stop])
    assert log.lines[-1] == "ended after 5 of 9 steps: seen enough"
    assert [row["step"] for row in rows(run)] == ["3", "5"]
    at_end = At("on_epoch_end", 6, lambda run: run.stop("again"))
    recorder = Recorder()
    resume(run, None, log, [recorder, at_end])
    assert log.lines[-1] == "ended after 6 of 9 steps: again"
    names = [event for event, _ in recorder.events]
    assert names == ["on_train_begin", "on_step_end", "on_epoch_end", "on_train_end"]
    assert [row["step"] for row in recorder.events[0][1].history] == [3]
    best = resume(run, callbacks=[Recorder()])
    assert best == train(settings, tmp_path / "again", callbacks=[Recorder()])
    equal(final_state(run), final_state(tmp_path / "whole"))
    for name in ("results.csv", "best/model.safetensors", "last/model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [("on_train_begin", 0, 0), ("on_step_end", 4, 5), ("on_epoch_end", 3, 3),
     ("on_epoch_end", 9, 9), ("on_train_end", 9, 9)],
)  # fmt: skip
def test_a_callback_that_raises_ends_the_run_with_a_checkpoint(
    recipe, tmp_path, event, step, saved
):
    def broken(run):
        raise KeyError("of the callback")

    settings, recorder, log = recipe(), Recorder(), Watcher()
    with pytest.raises(KeyError) as caught:
        train(settings, tmp_path / "run", log, [At(event, step, broken), recorder])
    assert traceback.extract_tb(caught.tb)[-1].name == "broken"
    assert recorder.events[-1][0] == "on_train_end"
    assert recorder.events[-1][1].step == saved
    if event != "on_train_end":
        assert log.lines[-1] == f"At.{event} failed; saved after {saved} steps; --resume continues"
        assert not recorder.events[-1][1].metrics
    assert final_state(tmp_path / "run")["step"] == saved
    train(settings, tmp_path / "whole")
    resume(tmp_path / "run")
    equal(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


def test_a_signal_is_followed_by_the_end_of_the_callbacks(recipe, tmp_path):
    recorder = Recorder()
    begin = partial(train, recipe(), tmp_path / "run", Watcher(stop_after=1), [recorder])
    with pytest.raises(Stopped):
        begin()
    assert recorder.events[-1][0] == "on_train_end"
    assert recorder.events[-1][1].metrics == {}
