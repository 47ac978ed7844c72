import csv
import signal
from dataclasses import asdict

import optuna
import pytest
import torch
from helpers.training_runs import equal
from helpers.watcher import Watcher, final_state
from sqlalchemy import URL

from cvt.train import load_recipe, trainer, tune, tuning
from cvt.train.recipe import FIELDS
from cvt.train.trainer import Stopped
from cvt.train.tuning import search_space

SEARCH = {"lr": "1e-4..1e-2:log", "optimizer": "adamw,lion", "epochs": "1..2"}


def study(output):
    url = URL.create("sqlite", database=str(output / "study.db")).render_as_string()
    return optuna.load_study(study_name="cvt", storage=url)


def known(output):
    return [
        (trial.state, trial.value, trial.params, trial.intermediate_values, trial.user_attrs)
        for trial in study(output).trials
    ]


def test_a_search_leaves_run_folders_a_table_and_the_recipe_of_the_best(recipe, tmp_path, cvt):
    output = tmp_path / "runs/100 % search?"  # a path that is no part of a URL as it is
    found = tune(recipe(), SEARCH, output, trials=3)
    assert [trial.value for trial in found] == sorted(
        (trial.value for trial in found), reverse=True
    )
    by_number = sorted(found, key=lambda trial: trial.number)
    assert len({tuple(trial.settings.values()) for trial in found}) == 3
    with open(output / "trials.csv") as file:
        table = list(csv.DictReader(file))
    for trial, row in zip(by_number, table, strict=True):
        assert trial.folder == output / f"trial-{trial.number:04d}"
        assert row["folder"] == trial.folder.name
        with open(trial.folder / "results.csv") as file:
            tops = [float(row["val_top1"]) for row in csv.DictReader(file)]
        assert len(tops) == trial.settings["epochs"]
        assert trial.value == tops[trial.epoch - 1] == max(tops) == float(row["top1"])
        of_run = load_recipe(trial.folder / "args.yaml")
        assert {name: getattr(of_run, name) for name in SEARCH} == trial.settings
        assert 1e-4 <= trial.settings["lr"] <= 1e-2
    best = load_recipe(output / "best.yaml")
    assert asdict(best) == asdict(recipe()) | found[0].settings
    assert (output / "best.yaml").read_text().startswith(f"# trial {found[0].number}: top-1 ")
    assert [trial.value for trial in study(output).trials] == [t.value for t in by_number]
    code, _, error = cvt("train", "--config", output / "best.yaml", "--output", tmp_path / "best")
    assert code == 0, error
    equal(final_state(tmp_path / "best")["model"], final_state(found[0].folder)["model"])


def test_an_interrupted_search_resumes_to_the_same(recipe, tmp_path):
    """Stopped within the second trial, and killed before its end is in the table."""
    settings = recipe(mixup=0.8)
    tune(settings, SEARCH, tmp_path / "whole", trials=4)
    output = tmp_path / "stopped"
    with pytest.raises(FileExistsError, match="with no search to resume"):
        tune(settings, SEARCH, tmp_path, trials=4)
    steps = sum(3 * trial.params["epochs"] for trial in study(tmp_path / "whole").trials[:1])
    with pytest.raises(Stopped) as stop:
        tune(settings, SEARCH, output, trials=4, progress=Watcher(stop_after=steps + 1))
    assert stop.value.code == 128 + signal.SIGTERM
    assert len(study(output).trials) == 1
    assert final_state(output / "trial-0001")["step"] == 2
    with pytest.raises(FileExistsError, match="--resume resumes the search"):
        tune(settings, SEARCH, output, trials=4)

    write = tuning._write

    def killed(trials, *_):
        if len(trials) == 2:
            raise KeyboardInterrupt
        write(trials, *_)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(settings, SEARCH, output, trials=4, resume=True)
    assert len(study(output).trials) == 2
    tune(settings, SEARCH, output, trials=4, resume=True)
    assert known(output) == known(tmp_path / "whole")
    for number in range(4):
        runs = [folder / f"trial-{number:04d}" for folder in (output, tmp_path / "whole")]
        equal(*map(final_state, runs))
    for name in ("trials.csv", "best.yaml"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ValueError, match="a search with another recipe: batch_size, flip differ"):
        tune(recipe(mixup=0.8, flip=0.1, batch_size=4), SEARCH, output, resume=True)
    with pytest.raises(ValueError, match="a search with another search: epochs differ"):
        tune(settings, SEARCH | {"epochs": "1..3"}, output, resume=True)


def test_a_trial_below_the_median_is_pruned_also_after_an_interruption(
    recipe, tmp_path, monkeypatch
):
    """Each trial is worse than those before; the sixth ends after its second epoch."""
    validate = trainer.Trainer.validate

    def rated(self, row):
        evaluation = validate(self, row)
        row["val_top1"] = 1 - int(self.output.name[-4:]) / 10
        return evaluation

    monkeypatch.setattr(trainer.Trainer, "validate", rated)
    settings, search, output = recipe(epochs=3), {"lr": "1e-4..1e-2:log"}, tmp_path / "x"
    with pytest.raises(Stopped):  # in the second epoch of the sixth, and as it is evaluated
        tune(settings, search, output, 6, progress=Watcher(stop_after=5 * 9 + 4))
    with pytest.raises(Stopped):
        tune(settings, search, output, 6, resume=True, progress=Watcher(2, during="validation"))
    found = tune(settings, search, output, 6, resume=True)
    assert [trial.state for trial in found] == [*5 * ["complete"], "pruned"]
    assert found[5].value == 0.5
    assert study(output).trials[5].intermediate_values == {1: 0.5, 2: 0.5}
    assert final_state(found[5].folder)["step"] == 6
    assert (found[5].folder / "best").is_dir()
    tune(settings, search, tmp_path / "y", 6, prune=False)
    assert final_state(tmp_path / "y/trial-0005")["step"] == 9


def test_a_search_ends_when_all_settings_were_tried(recipe, tmp_path):
    log = Watcher()
    found = tune(
        recipe(epochs=1), {"optimizer": "adamw,sgd", "flip": "0,0.5"}, tmp_path / "x", progress=log
    )
    assert sorted(tuple(trial.settings.values()) for trial in found) == [
        (0.0, "adamw"), (0.0, "sgd"), (0.5, "adamw"), (0.5, "sgd")
    ]  # fmt: skip
    assert log.lines[-1] == "ended after 4 trials: all settings seem to be tried"


def test_a_trial_that_fails_is_noted_and_the_search_continues(recipe, tmp_path):
    """Of two batch sizes one excludes mixup; a huge learning rate diverges."""
    output = tmp_path / "x"
    search = {"batch_size": "7,8", "lr": "1e-3,1e30"}
    *others, failed = tune(recipe(mixup=0.8, epochs=1), search, output, trials=4)
    assert [trial.state for trial in others] == ["complete", "failed", "failed"]
    assert others[0].settings == {"lr": 1e-3, "batch_size": 8}
    errors = " ".join(trial.error for trial in (*others, failed))
    assert "mixup and cutmix need an even one" in errors
    assert "in step" in errors
    with pytest.raises(ValueError, match="all 1 trials failed; the first: batch_size = 7: mixup"):
        tune(recipe(mixup=0.8), {"batch_size": "5,7"}, tmp_path / "y", trials=1)


def test_settings_that_do_not_fit_fail_their_trial_alone(recipe, tmp_path, monkeypatch):
    search = {"lr": "1e-4,1e-2", "min_lr": "0,1e-3"}
    found = tune(recipe(epochs=1, steps=1), search, tmp_path / "x", trials=4)
    assert [trial.state for trial in found] == [*3 * ["complete"], "failed"]
    assert found[3].settings == {"lr": 1e-4, "min_lr": 1e-3}
    assert "min_lr = 0.001" in found[3].error

    def train(chosen, folder, *others):
        if chosen.batch_size > 8:
            raise torch.OutOfMemoryError("out of memory")
        trainer.train(chosen, folder, *others)
        raise ValueError("too many images are unreadable")  # no fault of the settings

    monkeypatch.setattr(tuning, "train", train)
    for sizes, error in (
        ("16,32", "all 2 trials failed; the first: out of m"),
        ("4,6", "too many"),
    ):
        with pytest.raises(ValueError, match=error):
            tune(recipe(epochs=1, steps=1), {"batch_size": sizes}, tmp_path / sizes, trials=2)
    assert not study(tmp_path / "4,6").trials


def test_a_search_trains_no_folds(recipe, tmp_path):
    with pytest.raises(ValueError, match="folds = 2: a trial is one run; fold chooses one of them"):
        tune(recipe(folds=2), SEARCH, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_search_space_is_that_of_the_settings():
    space = search_space(
        {"lr": "1e-5..1e-3:log", "freeze_stages": "0..3", "clip_grad": "none,1", "flip": "0..0.5",
         "head_only": "no,true", "optimizer": "adamw, lion", "model": "../a,../b"}
    )  # fmt: skip
    assert space == {
        "lr": optuna.distributions.FloatDistribution(1e-5, 1e-3, log=True),
        "freeze_stages": optuna.distributions.IntDistribution(0, 3),
        "clip_grad": optuna.distributions.CategoricalDistribution([None, 1.0]),
        "flip": optuna.distributions.FloatDistribution(0.0, 0.5),
        "head_only": optuna.distributions.CategoricalDistribution([False, True]),
        "optimizer": optuna.distributions.CategoricalDistribution(["adamw", "lion"]),
        "model": optuna.distributions.CategoricalDistribution(["../a", "../b"]),
    }
    assert list(space) == [name for name in FIELDS if name in space]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [("optimiser", "adamw,sgd", "no setting optimiser; is it optimizer?"),
     ("optimizer", "adamw,adm", "optimizer = adm: must be one of adamw"),
     ("optimizer", "adamw", "needs at least two values, each once"),
     ("flip", "0.5,0.5", "needs at least two values, each once"),
     ("flip", "0..2", "flip = 2: must be at most 1"),
     ("lr", "0..1", "lr = 0: must be above 0"),
     ("lr", "1e-3..1e-5", "HIGH above LOW"),
     ("min_lr", "0..1:log", "with :log both above 0"),
     ("lr", "1e-5..1e-3:ln", "after the colon, there is only log"),
     ("epochs", "1..2.5", "epochs = 2.5: must be a whole number"),
     ("seed", "1,2", "seed: is the same in all trials, as all of Run is"),
     ("val_data", "a,b", "val_data: is the same in all trials, as all of Data is")],
)  # fmt: skip
def test_a_wrong_search_is_refused_before_the_first_trial(recipe, tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        tune(recipe(), {name: text}, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_command_searches_and_resumes(photos, config_folder, tmp_path, cvt):
    output = tmp_path / "search"
    words = ["tune", photos, "--model", config_folder, "--image-size", "32", "--epochs", "1",
             "batch_size=8", "--output", output, "--metric", "f1_macro"]  # fmt: skip
    search = ["--search", "lr=1e-4..1e-2:log", "--search", "class-weights=none,balanced"]
    code, out, error = cvt(*words, *search, "--trials", 1)
    assert code == 0, error
    code, out, error = cvt(*words, *search, "--trials", 2, "--resume")
    assert code == 0, error
    assert "trial 1 complete: macro F1 " in error
    assert out.splitlines()[-1] == f"next: cvt train --config {output / 'best.yaml'}"
    assert out.count("complete") == 2
    for faults, message in (
        (["--search", "lr"], "lr: must be KEY=VALUES"),
        ([*search, "--search", "lr=1,2"], "lr=1,2: is given twice"),
        ([], "give at least one setting"),
        (["--search", "lr=1,2", "--resume"], "another search"),
    ):
        code, _, error = cvt(*words, *faults)
        assert code > 0
        assert message in error
