import csv

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cvt import CvtConfig, CvtForImageClassification, image_processor, libraries
from cvt.checkpoints import load_classifier, load_processor
from cvt.data import (
    LabelledImages,
    Splits,
    StreamedImages,
    decode,
    image_folder,
    open_training,
    read_split,
)
from cvt.inference.evaluate import evaluate
from cvt.inference.features import features
from cvt.inference.predict import classify, scores
from cvt.inference.probe import C_GRID, K_GRID, best, cross_validation, probe, write_probe


@pytest.fixture(scope="module")
def model():
    """A small classifier of two other classes, with random weights, that transformers runs too."""
    torch.manual_seed(0)
    return CvtForImageClassification(
        CvtConfig(
            embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3], num_labels=2,
            hidden_act="gelu", layer_norm_eps=1e-5,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def sizes(model):
    return image_processor(model.config, image_size=32)


@pytest.fixture(scope="module")
def digits():
    train, validation, _ = open_training("digits")
    return Splits(train.select(range(400)), validation.select(range(150)), None)


@pytest.fixture(scope="module")
def found(model, sizes, digits):
    return probe(model, digits, processor=sizes)


def values_of(model, sizes, images):
    """Features and labels of a split."""
    values = features(model, sizes, images.sources, exact=True).values
    return values, np.array([images.classes.index(label) for label in images.labels])


@pytest.fixture
def pictures(tmp_path):
    """Writes an image folder of so many pictures of each colour; returns it."""

    def write(**counts):
        generator = np.random.default_rng(0)
        for channel, (name, count) in enumerate(counts.items()):
            (tmp_path / "data" / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (24, 24, 3))
                pixels[..., channel] += 120
                Image.fromarray(pixels.astype("uint8")).save(tmp_path / "data" / name / f"{i}.png")
        return tmp_path / "data"

    return write


# ------------------------------------------------------------------------------ the methods


def test_the_linear_probe_is_that_of_scikit_learn(found, model, sizes, digits):
    (x, y), (x_val, y_val) = (values_of(model, sizes, images) for images in digits[:2])
    folds = cross_validation(y, seed=0)
    images = [len(held) for _, held in folds]
    for C, figures in found.linear.tried.items():
        direct = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
        for name, scoring in (("top1", "accuracy"), ("loss", "neg_log_loss")):
            by_fold = abs(cross_val_score(direct, x, y, cv=folds, scoring=scoring))
            mean = np.average(by_fold, weights=images)
            assert mean == pytest.approx(figures[name], abs=3e-3)
    assert list(found.linear.tried) == list(C_GRID)
    direct = make_pipeline(
        StandardScaler(), LogisticRegression(C=found.linear.value, max_iter=1000)
    ).fit(x, y)
    counted = found.linear.evaluation.counted
    assert (counted["predicted"] == direct.predict(x_val)).mean() > 0.99
    np.testing.assert_allclose(counted["score"], direct.predict_proba(x_val).max(axis=1), atol=2e-3)
    assert found.linear.evaluation.top1 == pytest.approx(direct.score(x_val, y_val), abs=0.01)
    assert found.linear.evaluation.top1 > 0.8  # the features separate the digits
    assert found.linear.evaluation.f1_macro == pytest.approx(
        f1_score(counted["true"], counted["predicted"], average="macro")
    )


def test_the_neighbours_are_those_of_a_search_by_hand(found, model, sizes, digits):
    (x, y), (x_val, _) = (values_of(model, sizes, images) for images in digits[:2])
    k = int(found.knn.value)
    unit, unit_val = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (x, x_val))
    nearest = np.argsort(-unit_val @ unit.T, axis=1)[:, :k]
    votes = np.stack([np.bincount(row, minlength=10) for row in y[nearest]])
    counted = found.knn.evaluation.counted
    assert counted["predicted"].tolist() == votes.argmax(axis=1).tolist()
    np.testing.assert_allclose(counted["score"], (votes.max(axis=1) + 1) / (k + 10), rtol=1e-5)
    folds = cross_validation(y, seed=0)
    images = [len(held) for _, held in folds]
    for k, figures in found.knn.tried.items():
        direct = KNeighborsClassifier(k, metric="cosine")
        mean = np.average(cross_val_score(direct, x, y, cv=folds), weights=images)
        assert mean == pytest.approx(figures["top1"])
    assert list(found.knn.tried) == list(K_GRID)
    assert found.knn.evaluation.top1 > 0.8


def test_the_best_value_is_chosen(found):
    for method in (found.linear, found.knn):
        top1 = max(figures["top1"] for figures in method.tried.values())
        assert method.tried[method.value]["top1"] == top1
    assert best({1: {"top1": 0.5}, 3: {"top1": 0.7}, 5: {"top1": 0.7}}) == 3
    equal = {0.1: 0.9, 1.0: 0.2, 10.0: 0.4}
    assert best({C: {"top1": 1.0, "loss": loss} for C, loss in equal.items()}) == 1.0


def test_the_sole_image_of_a_class_is_never_held_out():
    labels = np.array([0] * 12 + [1] * 2 + [2])
    folds = cross_validation(labels, seed=3)
    assert len(folds) == 5
    for kept, held in folds:
        assert set(labels[kept]) == {0, 1, 2}
        assert sorted([*kept, *held]) == list(range(15))
    assert sorted(i for _, held in folds for i in held) == list(range(14))
    assert [held.tolist() for _, held in cross_validation(labels, 3)] == [
        held.tolist() for _, held in folds
    ]
    with pytest.raises(ValueError, match="no class has two training images"):
        cross_validation(np.arange(3), seed=0)


@pytest.mark.parametrize("counts", [{"red": 12, "green": 2}, {"red": 7, "green": 2, "blue": 9}])
def test_a_class_may_have_two_images(model, sizes, pictures, counts):
    found = probe(model, pictures(**counts), processor=sizes)
    assert found.model.config.class_names == sorted(counts)
    assert found.linear.evaluation.top1 == 1.0
    assert found.linear.evaluation.per_class["green"][:2] == (1, 1.0)
    assert max(found.knn.tried) <= len(found.train.values)


# ------------------------------------------------------------------------------ the model


def test_the_model_answers_as_the_probe(found, model, digits, tmp_path):
    write_probe(found, tmp_path / "probe")
    saved = load_classifier(tmp_path / "probe" / "model").eval()
    processor = load_processor(tmp_path / "probe" / "model", saved.config)
    assert saved.config.class_names == digits.train.classes
    again = evaluate(saved, processor, digits.validation)
    assert again.top1 == found.linear.evaluation.top1
    for name in ("predicted", "true", "name"):
        assert list(again.counted[name]) == list(found.linear.evaluation.counted[name])
    np.testing.assert_allclose(
        again.counted["score"], found.linear.evaluation.counted["score"], rtol=0, atol=1e-5
    )
    assert model.config.num_labels == 2


@pytest.mark.parametrize("counts", [{"red": 12, "green": 10}, {"red": 9, "green": 8, "blue": 7}])
def test_scikit_learn_and_transformers_give_the_models_scores(
    model, sizes, pictures, tmp_path, counts
):
    """Of two classes, scikit-learn has one row of weights."""
    found = probe(model, pictures(**counts), processor=sizes)
    write_probe(found, tmp_path / "probe")
    paths = list(found.splits.validation.sources)
    own = load_classifier(tmp_path / "probe" / "model").eval()
    results = classify(own, sizes, paths)
    answers = np.stack([scores(result.logits, own.config) for result in results])

    (x, y), (x_val, _) = (values_of(model, sizes, images) for images in found.splits[:2])
    regression = LogisticRegression(C=found.linear.value, max_iter=1000)
    direct = make_pipeline(StandardScaler(), regression).fit(x, y)
    np.testing.assert_allclose(answers, direct.predict_proba(x_val), rtol=0, atol=1e-3)

    theirs = transformers.CvtForImageClassification.from_pretrained(tmp_path / "probe" / "model")
    pixels = sizes([decode(path) for path in paths], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        ported = theirs.eval()(pixels).logits.softmax(dim=-1).numpy()
    np.testing.assert_allclose(ported, answers, rtol=0, atol=1e-4)
    assert theirs.config.id2label == dict(enumerate(sorted(counts)))


# ------------------------------------------------------------------------------ data and files


def test_images_that_cannot_be_decoded_are_skipped(model, sizes, pictures):
    images = image_folder(pictures(red=6, green=6))
    broken = images.sources[0].with_name("broken.png")
    broken.write_bytes(b"no image")
    train, validation = images.select([0, 1, 2, 3, 6, 7, 8, 9]), images.select([4, 5, 10, 11])
    plain = probe(model, Splits(train, validation, None), processor=sizes)

    def with_broken(images):
        return LabelledImages([broken, *images.sources], ["red", *images.labels])

    splits = Splits(with_broken(train), with_broken(validation), None)
    found = probe(model, splits, processor=sizes)
    assert [failure.name for failure in found.train.failures] == [str(broken)]
    for method, expected in ((found.linear, plain.linear), (found.knn, plain.knn)):
        assert [failure.position for failure in method.evaluation.failures] == [0]
        assert method.evaluation.counted["position"].tolist() == [1, 2, 3, 4]
        assert method.evaluation.top1 == expected.evaluation.top1
        assert method.tried == expected.tried


def test_streams_and_lists_give_the_same(model, sizes, digits, found):
    streams = [StreamedImages(i.classes, None, list(i), lambda row: row) for i in digits[:2]]
    streamed = probe(model, Splits(*streams, None), processor=sizes, batch_size=32)
    for method in ("linear", "knn"):
        assert getattr(streamed, method).row == getattr(found, method).row


def test_the_files_of_a_probe(found, tmp_path):
    write_probe(found, tmp_path / "probe")
    written = {p.relative_to(tmp_path / "probe").as_posix() for p in tmp_path.rglob("*.*")}
    tables = {"metrics.json", "per_class.csv", "confusion_matrix.csv", "predictions.csv"}
    tables |= {"confusion_matrix.png"}
    expected = {f"{method}/{name}" for method in ("linear", "knn") for name in tables}
    expected |= {"results.csv", "grid.csv", "model/config.json", "model/model.safetensors"}
    assert written == expected | {"model/preprocessor_config.json", "model/checksums.json"}
    with open(tmp_path / "probe" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["linear", "knn"]
    assert float(rows[0]["top1"]) == found.linear.evaluation.top1
    assert float(rows[1]["f1_macro"]) == found.knn.evaluation.f1_macro
    with open(tmp_path / "probe" / "grid.csv") as file:
        grid = list(csv.DictReader(file))
    assert len(grid) == len(C_GRID) + len(K_GRID)
    with pytest.raises(FileExistsError):
        write_probe(found, tmp_path / "probe")


def test_a_split_that_was_drawn_is_written(model, sizes, pictures, tmp_path):
    found = probe(model, pictures(red=5, green=5), processor=sizes)
    write_probe(found, tmp_path / "probe")
    splits = read_split(tmp_path / "probe" / "split.csv")
    assert sorted(splits.values()) == ["train"] * 8 + ["validation"] * 2


# ------------------------------------------------------------------------------ what is refused


def test_what_cannot_be_probed_is_refused(model, sizes, pictures, tmp_path, monkeypatch):
    data = pictures(red=5, green=5)
    with pytest.raises(ValueError, match="give its processor"):
        probe(model, data)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "export.json").write_text("{}")
    with pytest.raises(ValueError, match="exported is an export"):
        probe(tmp_path / "exported", data)
    for path in (data / "green").iterdir():
        path.write_bytes(b"no image: " + path.name.encode())  # equal ones cannot be split
    with pytest.raises(ValueError, match=r"no training image of these classes .*green"):
        probe(model, data, processor=sizes)
    monkeypatch.setattr(libraries, "is_installed", lambda name: name != "sklearn")
    with pytest.raises(ImportError, match=r"a probe needs sklearn: pip install .*\[train\]"):
        probe(model, data, processor=sizes)
