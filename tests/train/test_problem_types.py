"""Runs on images that have several classes, and on values: trained, written, resumed, predicted."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, List
from datasets import Image as ImageFeature
from helpers.training_runs import equal
from helpers.watcher import Watcher, final_state
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, mean_absolute_error, r2_score

from cvt import Classifier
from cvt.checkpoints import load_classifier, load_processor
from cvt.data import LabelledImages, Task, open_labelled, open_splits, without_trained
from cvt.inference.evaluate import evaluate, write_evaluation
from cvt.train import Recipe, cross_validate, resume, train
from cvt.train.loss import batch_loss
from cvt.train.target_scale import StandardisedLinear, TargetScale, in_units
from cvt.train.trainer import Stopped

SEVERAL = {"label_column": "tags", "label_separator": ";"}
VALUES = {"label_column": "light,red", "problem_type": "regression"}
COLUMNS = {"label_column": "r,g,b", "problem_type": "multi_label_classification"}
PROBLEMS = {"several": SEVERAL, "values": VALUES}


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """A csv file of 60 images of bright and dark channels: tags, and two values of large scale."""
    folder = tmp_path_factory.mktemp("channels")
    generator = np.random.default_rng(0)
    with open(folder / "all.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "tags", "light", "red", *"rgb"))
        for i in range(60):
            bright = generator.random(3) < (0.6, 0.4, 0.3)
            pixels = generator.normal(60, 20, (32, 32, 3)) + bright * generator.uniform(40, 150)
            Image.fromarray(np.clip(pixels, 0, 255).astype("uint8")).save(folder / f"{i}.png")
            tags = ";".join(c for c, has in zip("rgb", bright, strict=True) if has)
            light, red = 200_000 + 90 * pixels.mean(), pixels[..., 0].mean() / 1e4
            rows.writerow((f"{i}.png", tags, light, red, *bright.astype(int)))
    return folder / "all.csv"


@pytest.fixture
def make(recipe, table):
    return partial(recipe, data=str(table), batch_size=8, epochs=3)


def validated(run, table, **how):
    """The evaluation of the written model on the images that the run validated with."""
    kept, trained = without_trained(open_labelled(table, **how), run / "split.csv")
    assert not trained
    assert len(kept) < 20
    model = load_classifier(run / "best")
    return evaluate(model, load_processor(run / "best", model.config), kept), kept


@pytest.mark.pictures
@pytest.mark.parametrize("how", [SEVERAL, COLUMNS], ids=["separator", "columns"])
def test_several_classes_are_learned_and_written_with_their_thresholds(
    make, table, tmp_path, how, cvt
):
    run = tmp_path / "run"
    best = train(make(epochs=6, **how), run)
    assert best["val_mean_average_precision"] > 0.9
    found, kept = validated(run, table, **how)
    config = json.loads((run / "best/config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["thresholds"] == found.thresholds
    for name in ("mean_average_precision", "f1_macro", "f1_micro", "loss"):
        assert getattr(found, name) == pytest.approx(best[f"val_{name}"], abs=1e-6)
    targets, scores = kept.targets, found.scores
    predicted = scores >= config["thresholds"]
    mean = average_precision_score(targets, scores, average="macro")
    assert best["val_mean_average_precision"] == pytest.approx(mean, abs=1e-6)
    macro = f1_score(targets, predicted, average="macro", zero_division=0)
    assert best["val_f1_macro"] == pytest.approx(macro, abs=1e-6)
    assert all((run / name).exists() for name in ("predictions.png", "mistakes.png"))
    for records, row in zip(map(written_classifier(run), kept.sources), predicted, strict=True):
        has = [each["predicted"] for each in records]
        assert has == sorted(has, reverse=True)
        names = {each["label"] for each in records if each["predicted"]}
        assert names == {name for name, of in zip(kept.classes, row, strict=True) if of}
    options = [word for name, value in how.items()
               for word in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    page, output = tmp_path / "page.html", tmp_path / "evaluated"
    code, printed, errors = cvt(
        "evaluate", run / "best", table, *options, "--report", page, "--output", output
    )
    assert code == 0, errors
    assert f"mAP {100 * mean:.2f} %" in printed
    assert "mAP" in page.read_text()
    assert "data:image/png" in page.read_text()
    assert (output / "predictions.csv").read_text().startswith("name,true,predicted,")
    code, _, errors = cvt("evaluate", run / "best", table, "--label-column", "tags")
    assert code == 1
    assert "has no label" in errors
    assert cvt("evaluate", run / "best", table, "--label-column", "red")[0] == 1
    code, printed, _ = cvt("predict", run / "best", kept.sources[0], "--output", tmp_path / "p.csv")
    header, *rows = (tmp_path / "p.csv").read_text().splitlines()
    assert header == "path,rank,label,score,predicted"
    assert len(rows) == 3


def written_classifier(run):
    return Classifier(run / "best", runtime="torch", exact=True)


def test_held_out_images_are_evaluated_at_the_thresholds_of_the_model(make, table, tmp_path):
    header, *lines = table.read_text().splitlines()
    splits = [f"{line},{('train', 'val', 'test')[i % 3]}" for i, line in enumerate(lines)]
    divided = table.with_name("divided.csv")
    divided.write_text("\n".join([f"{header},split", *splits]))
    train(make(data=str(divided), **SEVERAL), tmp_path / "run")
    model = load_classifier(tmp_path / "run/best")
    assert model.config.thresholds != [0.5] * 3
    processor = load_processor(tmp_path / "run/best", model.config)
    expected = evaluate(model, processor, open_splits(divided, **SEVERAL)["test"])
    metrics = json.loads((tmp_path / "run/test/metrics.json").read_text())
    assert not metrics.pop("failures")
    assert metrics == pytest.approx(expected.metrics, abs=1e-6)
    with open(tmp_path / "run/test/per_class.csv", newline="") as file:
        assert [float(row["threshold"]) for row in csv.DictReader(file)] == expected.thresholds


def test_thresholds_are_those_of_their_classes_however_validation_data_orders_them(
    make, table, tmp_path
):
    lines = list(csv.DictReader(table.read_text().splitlines()))
    for file, names, rows in (("t", "rgb", lines[:40]), ("v", "bgr", lines[40:])):
        columns = {
            "image": [str(table.parent / row["path"]) for row in rows],
            "tags": [
                [names.index(name) for name in row["tags"].split(";") if name] for row in rows
            ],
        }
        types = {"image": ImageFeature(), "tags": List(ClassLabel(names=list(names)))}
        Dataset.from_dict(columns, Features(types)).to_parquet(tmp_path / f"{file}.parquet")
    how = {"problem_type": "multi_label_classification"}
    data = {"data": str(tmp_path / "t.parquet"), "val_data": str(tmp_path / "v.parquet")}
    best = train(make(**data, **how, metric="f1_macro"), tmp_path / "run")
    model = load_classifier(tmp_path / "run/best")
    processor = load_processor(tmp_path / "run/best", model.config)
    found = evaluate(model, processor, open_labelled(data["val_data"], **how))
    assert len(set(model.config.thresholds)) == 3
    assert found.f1_macro == pytest.approx(best["val_f1_macro"], abs=1e-6)


@pytest.mark.pictures
def test_values_are_learned_and_written_in_their_units(make, table, tmp_path, cvt):
    run = tmp_path / "run"
    best = train(make(epochs=8, **VALUES), run)
    found, kept = validated(run, table, **VALUES)
    for name in ("mae", "rmse", "r2", "loss"):
        assert getattr(found, name) == pytest.approx(best[f"val_{name}"], rel=1e-3)
    assert best["val_r2"] > 0.5
    classify = written_classifier(run)
    values = np.array(
        [{each["label"]: each["score"] for each in classify(source)} for source in kept.sources]
    )
    predicted = np.array([[row["light"], row["red"]] for row in values])
    assert mean_absolute_error(kept.targets, predicted) == pytest.approx(best["val_mae"], rel=1e-3)
    assert r2_score(kept.targets, predicted) == pytest.approx(best["val_r2"], rel=1e-3)
    model = load_classifier(run / "best")
    assert type(model.classifier) is torch.nn.Linear
    rows = list(csv.DictReader((run / "results.csv").read_text().splitlines()))
    assert best["val_mae"] == pytest.approx(min(float(row["val_mae"]) for row in rows))
    page = tmp_path / "page.html"
    code, printed, errors = cvt(
        *("evaluate", run / "best", table, "--label-column", "light,red"),
        *("--problem-type", "regression", "--report", page),
    )
    assert code == 0, errors
    assert "R²" in printed
    assert "R²" in page.read_text()
    # A run from it starts where it ended: the head is scaled back.
    more = train(make(epochs=1, model=str(run / "best"), lr=1e-9, **VALUES), tmp_path / "more")
    assert more["val_mae"] == pytest.approx(best["val_mae"], rel=0.02)
    # Other values have another head.
    watcher = Watcher()
    other = make(epochs=1, model=str(run / "best"), label_column="red", problem_type="regression")
    train(other, tmp_path / "other", watcher)
    assert any("a new, random classifier" in line for line in watcher.lines)


@pytest.mark.parametrize(
    "changes",
    [{"ema_decay": 0.8, "repeats": 2, "workers": 1}, {"head_only": True, "views": 2}],
    ids=["average", "features"],
)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_such_a_run_resumes_to_the_bit(make, tmp_path, problem, changes):
    settings = make(save_steps=2, **PROBLEMS[problem], **changes)
    train(settings, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    for at in (1, 7):
        begin = partial(resume, stopped) if stopped.exists() else partial(train, settings, stopped)
        with pytest.raises(Stopped):
            begin(progress=Watcher(stop_after=at))
    resume(stopped)
    equal(final_state(tmp_path / "whole"), final_state(stopped))
    for name in ("results.csv", "best/model.safetensors", "best/config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (stopped / name).read_bytes()


def test_an_adapter_gives_values_in_their_units(make, table, tmp_path):
    train(make(epochs=1, **VALUES), tmp_path / "base")
    start = str(tmp_path / "base/best")
    best = train(make(lora_r=2, model=start, **VALUES), tmp_path / "run")
    _, kept = validated(tmp_path / "run", table, **VALUES)
    merged = load_classifier(tmp_path / "run/best")
    adapter = load_classifier(tmp_path / "run/best/adapter")
    processor = load_processor(tmp_path / "run/best", merged.config)
    found = [evaluate(model, processor, kept).mae for model in (merged, adapter)]
    assert found == pytest.approx([best["val_mae"]] * 2, rel=1e-3)


def test_unreadable_images_leave_a_step_of_such_a_run_without_weight(make, table, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    lines = table.read_text().splitlines()
    for i in range(60):
        (broken / f"{i}.png").write_bytes(
            b"none %d" % i if i < 9 else (table.parent / f"{i}.png").read_bytes()
        )
    (broken / "all.csv").write_text("\n".join(lines) + "\n")
    for name, how in PROBLEMS.items():
        run = tmp_path / name
        settings = make(data=str(broken / "all.csv"), batch_size=1, epochs=1, image_size=64, **how)
        assert np.isfinite(train(settings, run)["train_loss"])
        assert (run / "corrupt.txt").exists()


def test_the_loss_is_that_of_the_problem():
    torch.manual_seed(0)
    logits, hot = torch.randn(6, 3), (torch.rand(6, 3) > 0.5).float()
    several = batch_loss(logits, hot, "multi_label_classification", 0.1)
    by_hand = -(hot * logits.sigmoid().log() + (1 - hot) * (1 - logits.sigmoid()).log()).mean()
    torch.testing.assert_close(several, by_hand)
    values = 1000 + 50 * torch.randn(6, 3)
    scale = TargetScale(values.mean(0), values.std(0, correction=0))
    standardised = (values - values.mean(0)) / values.std(0, correction=0)
    found = batch_loss(logits, values, "regression", 0.1, None, scale)
    torch.testing.assert_close(found, F.mse_loss(logits, standardised))


def test_the_head_of_values_is_scaled_and_scaled_back():
    images = LabelledImages([], [], ["a", "b"], Task("regression"))
    images.labels = ["10.0;-3.0", "30.0;1.0", "50.0;2.0"]
    scale = TargetScale.of(images)
    torch.testing.assert_close(scale.mean, torch.tensor([30.0, 0.0]))
    model = torch.nn.Module()
    model.classifier = torch.nn.Linear(4, 2)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    features = torch.randn(5, 4)
    expected = model.classifier(features)
    scale.put_on(model, are_in_units=True)
    assert isinstance(model.classifier, StandardisedLinear)
    assert model.state_dict().keys() == plain.keys()
    trained = model.classifier(features)
    torch.testing.assert_close(trained, scale.standardised(expected))
    torch.testing.assert_close(model.classifier.eval()(features), expected)
    torch.testing.assert_close(in_units(model).classifier.train()(features), expected)
    images.labels = ["10.0;-3.0", "30.0;-3.0"]
    with pytest.raises(ValueError, match="b is -3 in all training images"):
        TargetScale.of(images)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({**SEVERAL, "metric": "top1"}, "metric = top1: of multi_label_classification, one of"),
        ({"metric": "mae"}, "metric = mae: of single_label_classification, one of loss, top1"),
        ({**VALUES, "label_separator": ";"}, "label_separator = ;: means several classes"),
        ({**VALUES, "mixup": 0.2}, "mixup and cutmix: for images of one class each"),
        ({**SEVERAL, "sampler": "balanced"}, "sampler: for images of one class each"),
        ({**SEVERAL, "class_weights": "balanced"}, "class_weights: for images of one class each"),
        ({**VALUES, "label_smoothing": 0.2}, "label_smoothing: for images of one class each"),
    ],
    ids=str,
)
def test_settings_of_another_problem_are_refused(changes, fault):
    with pytest.raises(ValueError, match=fault):
        Recipe(**changes)


def test_the_metric_follows_the_problem():
    found = [Recipe(**changes).metric for changes in ({}, SEVERAL, VALUES)]
    assert found == ["top1", "mean_average_precision", "mae"]
    assert Recipe(metric="r2", **VALUES).metric == "r2"


def test_a_model_is_evaluated_on_labels_of_its_own_problem(make, table, tmp_path):
    train(make(epochs=1, **VALUES), tmp_path / "run")
    model = load_classifier(tmp_path / "run/best")
    processor = load_processor(tmp_path / "run/best", model.config)
    with pytest.raises(ValueError, match="problem_type = regression of the model, and the labels"):
        evaluate(model, processor, open_labelled(table, **COLUMNS))
    found = evaluate(model, processor, open_labelled(table, **VALUES))
    write_evaluation(found, tmp_path / "out")
    assert json.loads((tmp_path / "out/metrics.json").read_text())["images"] == 60
    header = (tmp_path / "out/predictions.csv").read_text().splitlines()[0]
    assert header == "name,true light,predicted light,true red,predicted red"


@pytest.mark.parametrize("problem", PROBLEMS)
def test_folds_predict_several_classes_and_values_of_every_image(make, tmp_path, problem):
    settings = make(**PROBLEMS[problem], folds=2, epochs=1, seed=3)
    output = tmp_path / "folds"
    found = cross_validate(settings, output)
    assert found.evaluation.images == 60
    assert sum(row["images"] for row in found.folds) == 60
    assert found.mean("loss") == np.mean([row["loss"] for row in found.folds])
    with open(output / "out_of_fold/predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["name"] for row in rows}) == 60
    if problem == "values":
        errors = [
            mean_absolute_error([float(row[f"true {name}"]) for row in rows],
                                [float(row[f"predicted {name}"]) for row in rows])
            for name in ("light", "red")
        ]  # fmt: skip
        assert found.evaluation.mae == pytest.approx(np.mean(errors))
    else:
        models = [load_classifier(output / f"fold-{number}/best") for number in (1, 2)]
        both = [model.config.thresholds for model in models]
        assert found.evaluation.thresholds == pytest.approx(np.mean(both, axis=0))
    assert not (output / "out_of_fold/label_errors.csv").exists()
