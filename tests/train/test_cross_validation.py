import csv
import json
import shutil

import numpy as np
import pytest
from helpers.training_runs import equal
from helpers.watcher import Watcher, final_state

from cvt import find_label_errors
from cvt.checkpoints import load_classifier, load_processor
from cvt.data import open_training
from cvt.inference.evaluate import evaluate
from cvt.train import cross_validate, load_recipe, resume, resume_folds, train, trainer
from cvt.train.trainer import Stopped

FILES = ("folds.csv", "out_of_fold/predictions.csv", "out_of_fold/label_errors.csv",
         "out_of_fold/metrics.json")  # fmt: skip


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_image_is_predicted_by_the_fold_that_did_not_see_it(photos, recipe, tmp_path):
    output = tmp_path / "folds"
    settings = recipe(folds=3, epochs=2, metric="loss")
    found = cross_validate(settings, output)
    folds, by_fold = rows_of(output / "folds.csv"), {}
    for number in (1, 2, 3):
        run = output / f"fold-{number}"
        assert load_recipe(run / "args.yaml").fold == number
        _, held_out, _ = open_training(photos, folds=3, fold=number)
        assert sorted(held_out.labels) == sorted(["blue", "green", "red"] * 4)
        model = load_classifier(run / "best")
        processor = load_processor(run / "best", model.config)
        again = evaluate(model, processor, held_out, batch_size=8, keep_scores=True)
        row = folds[number - 1]
        assert float(row["top1"]) == again.top1
        assert float(row["loss"]) == again.loss == min(
            float(epoch["val_loss"]) for epoch in rows_of(run / "results.csv")
        )  # fmt: skip
        by_fold |= dict(zip(again.counted["name"], again.scores, strict=True))
    assert found.mean("loss") == pytest.approx(np.mean([float(row["loss"]) for row in folds]))
    deviation = np.std([float(row["loss"]) for row in folds]) * np.sqrt(3 / 2)
    assert found.deviation("loss") == pytest.approx(deviation)
    assert found.best == 1 + np.argmin([float(row["loss"]) for row in folds])

    predictions = rows_of(output / "out_of_fold/predictions.csv")
    assert [row["name"] for row in predictions] == sorted(map(str, photos.rglob("*.png")))
    classes = ["blue", "green", "red"]
    scores = np.array([[row[name] for name in classes] for row in predictions], np.float32)
    assert np.array_equal(scores, [by_fold[row["name"]] for row in predictions])
    assert all(row["true"] in row["name"] for row in predictions)
    labels = np.array([classes.index(row["true"]) for row in predictions])
    assert found.label_errors == find_label_errors(labels, scores)
    listed = [row["name"] for row in rows_of(output / "out_of_fold/label_errors.csv")]
    assert listed == [predictions[error.index]["name"] for error in found.label_errors]
    metrics = json.loads((output / "out_of_fold/metrics.json").read_text())
    assert metrics["images"] == 36
    assert metrics["top1"] == np.mean([row["true"] == row["predicted"] for row in predictions])
    assert "36" in (output / "out_of_fold/report.html").read_text()


def test_folds_that_are_stopped_and_resumed_end_as_folds_that_were_not(recipe, tmp_path):
    """Fold 2 is trained as a run of its own; fold 1 and then fold 3 are stopped and resumed."""
    settings = {"folds": 3, "epochs": 2, "ema_decay": 0.9, "head_only": True, "views": 2}
    cross_validate(recipe(**settings), tmp_path / "whole")
    output = tmp_path / "stopped"
    train(recipe(**settings, fold=2), output / "fold-2")
    given = {name: value for name, value in vars(recipe(**settings)).items() if value is not None}
    for steps in (2, 6):
        with pytest.raises(Stopped):
            resume_folds(output, given, Watcher(stop_after=steps))
        given = {}
    assert not (output / "folds.csv").exists()
    assert (output / "fold-3/checkpoints").exists()
    resume_folds(output)
    for name in FILES:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for number in (1, 2, 3):
        runs = (folder / f"fold-{number}" for folder in (output, tmp_path / "whole"))
        equal(*({k: v for k, v in final_state(run).items() if k != "recipe"} for run in runs))


def test_folds_of_other_found_values_are_joined_and_a_killed_one_starts_again(
    recipe, tmp_path, monkeypatch
):
    settings, output = {"folds": 3, "epochs": 1, "steps": 1}, tmp_path / "folds"
    for fold, lr in ((1, 1e-3), (2, 3e-3)):  # as lr=find may set them
        train(recipe(**settings, fold=fold, lr=lr), output / f"fold-{fold}")

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "save", kill)
        with pytest.raises(KeyboardInterrupt):
            resume_folds(output)
    assert (output / "fold-3/args.yaml").exists()
    watcher = Watcher()
    assert resume_folds(output, progress=watcher).evaluation.images == 36
    assert "the folds have different values of lr: 0.001, 0.003, 0.001" in watcher.lines
    rates = [load_recipe(output / f"fold-{fold}/args.yaml").lr for fold in (1, 2, 3)]
    assert rates == [1e-3, 3e-3, 1e-3]


def test_what_folds_cannot_do_is_refused_by_name(recipe, tmp_path, monkeypatch):
    settings = recipe(folds=2, epochs=1, steps=1)
    with pytest.raises(ValueError, match="folds = 2: cross_validate trains all of them"):
        train(settings, tmp_path / "run")
    with pytest.raises(ValueError, match="folds = None, fold = None: give folds alone"):
        cross_validate(recipe(), tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes train one fold at a time, with fold=1"):
        cross_validate(settings, tmp_path / "run")
    monkeypatch.delenv("WORLD_SIZE")
    assert not (tmp_path / "run").exists()

    cross_validate(settings, tmp_path / "run")
    with pytest.raises(FileExistsError, match="--resume resumes the folds"):
        cross_validate(settings, tmp_path / "run")
    with pytest.raises(ValueError, match=r"lr = 0.1, but the run has 0.003"):
        resume_folds(tmp_path / "run", {"lr": 0.1})
    with pytest.raises(ValueError, match="folds = 3, but the run has 2"):
        resume(tmp_path / "run/fold-1", {"folds": 3})
    shutil.copy(tmp_path / "run/fold-1/split.csv", tmp_path / "run/fold-2")
    with pytest.raises(ValueError, match="not split as it was"):
        resume_folds(tmp_path / "run")
