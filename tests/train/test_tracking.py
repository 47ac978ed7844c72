import csv
import json
from functools import partial

import pytest
from accelerate import tracking as accelerate_tracking
from helpers.training_runs import equal
from helpers.watcher import Watcher, final_state

from cvt import libraries
from cvt.train import load_recipe, resume, train
from cvt.train.recipe import TRACKERS
from cvt.train.tracking import LIBRARIES
from cvt.train.trainer import Stopped


def test_a_resumed_run_is_one_run_of_each_tracker(recipe, tmp_path, monkeypatch):
    """Stopped after the second of six steps; its local stores have recipe, steps and epochs."""
    import mlflow
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run, lr = tmp_path / "run", 0.0031
    with pytest.raises(Stopped):
        train(recipe(track="wandb, mlflow,trackio", epochs=2, lr=lr), run, Watcher(stop_after=1))
    ids = json.loads((run / "trackers.json").read_text())
    resume(run)
    assert json.loads((run / "trackers.json").read_text()) == ids
    assert not (run / "tensorboard").exists()
    with open(run / "results.csv") as file:
        accuracies = [float(row["val_top1"]) for row in csv.DictReader(file)]

    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'cvt'")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.run_name) == (ids["mlflow"], "run")
    assert found.data.params["lr"] == str(lr)
    losses = client.get_metric_history(ids["mlflow"], "train/loss")
    assert sorted(metric.step for metric in losses) == [1, 2, 3, 4, 5, 6]
    tops = client.get_metric_history(ids["mlflow"], "epoch/val_top1")
    assert [metric.value for metric in sorted(tops, key=lambda m: m.step)] == accuracies

    assert SQLiteStorage.get_runs("cvt").count(ids["trackio"]) == 1
    assert SQLiteStorage.get_run_config("cvt", ids["trackio"])["lr"] == lr
    logs = SQLiteStorage.get_logs("cvt", ids["trackio"])
    assert [log["step"] for log in logs if "train/loss" in log] == [1, 2, 3, 4, 5, 6]
    assert [log["epoch/val_top1"] for log in logs if "epoch/val_top1" in log] == accuracies
    same = {metric.step: metric.value for metric in losses}
    assert {log["step"]: log["train/loss"] for log in logs if "train/loss" in log} == same

    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == 2 * [f"run-{ids['wandb']}.wandb"]
    first, second = (file.read_bytes() for file in files)
    assert b"lr_base_size" in first
    counts = first.count(b"train/loss"), second.count(b"train/loss")
    assert counts == (2 * 2, 2 * 4)  # of each step, in the history and in the summary
    assert b"epoch/val_top1" in second


def test_tensorboard_gets_the_recipe_at_each_start(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe(epochs=1), tmp_path / "run")
    resume(tmp_path / "run", {"track": "tensorboard", "keep": 5})
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    texts = [
        event.tensor_proto.string_val[0].decode() for event in events.Tensors("recipe/text_summary")
    ]
    assert ["    keep: 2" in text for text in texts] == [True, False]
    assert "    keep: 5" in texts[1]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_tracker_is_refused_before_anything_is_done(recipe, tmp_path, monkeypatch, name):
    library, extra = LIBRARIES[name][0][-1], LIBRARIES[name][1]
    monkeypatch.setattr(libraries, "is_installed", lambda *names: library not in names)
    message = rf"track = {name} needs {library}: pip install 'cvt-vision\[{extra}\]'"
    with pytest.raises(ImportError, match=message):
        train(recipe(track=name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused_with_the_recipe():
    for track in ("wanbd", "wandb,", "tensorboard, none"):
        with pytest.raises(ValueError, match=f"track = {track}: must be of tensorboard, wandb, "):
            load_recipe(None, {"track": track})
    assert load_recipe(None, {"track": "none"}).trackers == []
    assert load_recipe(None, {"track": "mlflow, wandb,mlflow"}).trackers == ["mlflow", "wandb"]


def raising(error, *_, **__):
    raise error


def test_a_tracker_that_cannot_be_started_is_named_and_another_may_be_taken(
    recipe, tmp_path, monkeypatch
):
    broken = partial(raising, OSError("no key"))
    monkeypatch.setattr(accelerate_tracking.WandBTracker, "start", broken)
    with pytest.raises(RuntimeError, match=r"^track = wandb cannot be started: no key$"):
        train(recipe(track="wandb"), tmp_path / "run")
    assert final_state(tmp_path / "run")["step"] == 0
    resume(tmp_path / "run", {"track": "none"})
    assert final_state(tmp_path / "run")["step"] == 9


def test_a_tracker_that_fails_is_named_and_ends_no_run(recipe, tmp_path, monkeypatch, caplog):
    train(recipe(track=None), tmp_path / "whole")
    broken = partial(raising, OSError("no disk"))
    monkeypatch.setattr(accelerate_tracking.TensorBoardTracker, "log", broken)
    started = accelerate_tracking.TensorBoardTracker.start

    def start(self):
        started(self)
        self.log = lambda values, step: self.__dict__.pop("log")  # the recipe is logged

    monkeypatch.setattr(accelerate_tracking.TensorBoardTracker, "start", start)
    train(recipe(), tmp_path / "run")
    messages = [record.message for record in caplog.records if "track = " in record.message]
    assert messages == ["track = tensorboard failed; the run continues without it: no disk"]
    assert final_state(tmp_path / "run")["step"] == final_state(tmp_path / "whole")["step"]
    equal(final_state(tmp_path / "run")["model"], final_state(tmp_path / "whole")["model"])
