import csv

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from cvt import find_label_errors
from cvt.inference.label_errors import confident_classes, write_label_errors
from cvt.inference.metrics import COUNTED, Evaluation


def reference(labels, scores):
    """The paper's confident joint, entry by entry, and what is off its diagonal."""
    classes = range(len(scores[0]))
    thresholds = {}
    for j in classes:
        own = [float(row[j]) for row, label in zip(scores, labels, strict=True) if label == j]
        thresholds[j] = sum(own) / len(own) if own else np.inf
    found, confident = [], []
    for i, (row, label) in enumerate(zip(scores, labels, strict=True)):
        above = [j for j in classes if row[j] >= thresholds[j] - 1e-6]
        confident.append(max(above, key=lambda j: (row[j], -j)) if above else -1)
        if above and confident[-1] != label and row[label] < max(row):
            found.append((row[label], i, label, confident[-1]))
    return confident, [(i, label, other) for _, i, label, other in sorted(found)]


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("sharpness", [0.3, 3.0])
def test_label_errors_are_those_of_the_definition(classes, sharpness):
    """Of random scores, of equal ones too, and with a class that no label has."""
    generator = np.random.default_rng(classes)
    for seed in range(20):
        labels = generator.integers(0, classes - seed % 2, 40)
        logits = sharpness * generator.normal(size=(40, classes)).round(seed % 3)
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        confident, expected = reference(labels.tolist(), scores.tolist())
        assert confident_classes(labels, scores).tolist() == confident
        errors = find_label_errors(labels, scores)
        assert [(e.index, e.label, e.suggestion) for e in errors] == expected
        assert all(e.label_score == scores[e.index, e.label] for e in errors)
        assert all(e.suggestion_score == scores[e.index, e.suggestion] for e in errors)


def test_planted_label_errors_are_found():
    """One label in twenty of the digits is made wrong; a linear model is right on 97 %."""
    pixels, true = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    planted = generator.choice(len(true), len(true) // 20, replace=False)
    labels = true.copy()
    labels[planted] = (true[planted] + generator.integers(1, 10, len(planted))) % 10
    model = LogisticRegression(max_iter=300)
    scores = cross_val_predict(model, pixels / 16, labels, cv=5, method="predict_proba")
    errors = find_label_errors(labels, scores)
    found = {error.index for error in errors} & set(planted.tolist())
    assert len(found) > 0.7 * len(planted)
    assert len(found) > 0.85 * len(errors)
    suggested = {error.index: error.suggestion for error in errors}
    assert np.mean([suggested[i] == true[i] for i in found]) > 0.95
    assert {error.index for error in errors[:20]} <= set(planted.tolist())  # the clearest first


def test_labels_that_a_confident_model_shares_are_no_errors():
    """Scores of all equal confidence: the mean of equal numbers may be rounded above them."""
    labels = np.arange(3).repeat(1000)
    scores = np.full((3000, 3), 0.1 / 2)
    scores[np.arange(3000), labels] = 0.9
    assert not find_label_errors(labels, scores)
    assert (confident_classes(labels, scores) == labels).all()


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [[0.5, 0.5]], "labels .2,., scores .1, 2.: their shapes must be"),
        ([0, 2], [[0.5, 0.5]] * 2, "labels: must be indices of the 2 classes"),
        ([0.0, 1.0], [[0.5, 0.5]] * 2, "labels: must be indices of the 2 classes"),
        ([0, 1], [[0.5, np.nan]] * 2, "scores: must be finite"),
    ],
)
def test_what_does_not_fit_is_named(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        find_label_errors(np.array(labels), np.array(scores))


def test_the_files_list_the_errors(tmp_path, photos):
    pictures = sorted(photos.rglob("*.png"))[:4]
    rows = [(i, str(path), i % 2, 0, 0.9, True, 0.1, np.nan) for i, path in enumerate(pictures)]
    scores = np.array([[0.9, 0.1], [0.95, 0.05], [0.8, 0.2], [0.3, 0.7]], np.float32)
    evaluation = Evaluation(["cat", "=dog"], np.array(rows, COUNTED), [], [], scores)
    errors = find_label_errors(evaluation.counted["true"], scores)
    write_label_errors(evaluation, errors, tmp_path / "new", "pets", lambda i: pictures[i])
    with open(tmp_path / "new/label_errors.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["name"] == str(pictures[1])
    assert (row["label"], row["suggestion"]) == ("'=dog", "cat")
    assert [float(row[key]) for key in ("label_score", "suggestion_score")] == pytest.approx(
        [0.05, 0.95]
    )
    page = (tmp_path / "new/label_errors.html").read_text()
    assert page.count("<img") == 1
    assert "label <b>=dog</b> 5 %" in page
    with pytest.raises(FileExistsError):
        write_label_errors(evaluation, errors, tmp_path / "new", "pets", lambda i: None)
