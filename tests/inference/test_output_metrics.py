"""Figures of several classes per image, and of values: equal to scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    log_loss,
    mean_absolute_error,
    r2_score,
    root_mean_squared_error,
)

from cvt.data.decoding import StoredImage
from cvt.inference.output_metrics import (
    MultiLabelEvaluation,
    RegressionEvaluation,
    Worst,
    best_threshold,
)


def evaluation(kind, targets, outputs, **fields):
    """An evaluation of images 0 to N - 1."""
    count, width = targets.shape
    labels = [f"c{k}" for k in range(width)]
    names = np.array([f"{i}.png" for i in range(count)], object)
    arrays = targets.astype(np.float32), outputs.astype(np.float32)
    return kind(labels, np.arange(count), names, *arrays, [], [], **fields)


def several(images=200, classes=5, seed=0):
    """Targets, the last class of which no image has, and logits with equal values among them."""
    generator = np.random.default_rng(seed)
    targets = generator.random((images, classes)) < np.linspace(0.6, 0, classes)
    return targets, np.round(generator.normal(3 * targets - 2, 1.5), 1)


def test_the_figures_of_several_classes_are_those_of_scikit_learn():
    targets, logits = several()
    thresholds = [0.3, 0.5, 0.7, 0.2, 0.9]
    found = evaluation(MultiLabelEvaluation, targets, logits, thresholds=thresholds)
    scores = 1 / (1 + np.exp(-logits.astype(np.float32).astype(float)))
    predicted = scores >= thresholds
    expected = average_precision_score(targets[:, :4], scores[:, :4], average=None)
    per_class = [each.average_precision for each in found.per_class.values()]
    np.testing.assert_allclose(per_class[:4], expected, rtol=1e-12)
    assert np.isnan(per_class[4])
    assert found.mean_average_precision == pytest.approx(expected.mean(), rel=1e-12)
    assert predicted[:, 4].any()  # so that scikit-learn counts its F1 of 0, too
    assert found.f1_macro == pytest.approx(f1_score(targets, predicted, average="macro"))
    assert found.f1_micro == pytest.approx(f1_score(targets, predicted, average="micro"))
    losses = [log_loss(targets[:, k], scores[:, k], labels=[0, 1]) for k in range(5)]
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_chosen_thresholds_are_the_best_of_all():
    targets, logits = several(images=60)
    found = evaluation(MultiLabelEvaluation, targets, logits, thresholds=[0.5] * 5)
    chosen = found.at_best_thresholds()
    for k in range(4):
        scores = found.scores[:, k]
        every = [f1_score(targets[:, k], scores >= t) for t in np.append(scores, 0)]
        f1 = list(chosen.per_class.values())[k].f1
        assert f1 == pytest.approx(max(every))
        assert f1 >= list(found.per_class.values())[k].f1
        assert chosen.thresholds[k] not in scores
    assert chosen.thresholds[4] == 0.5  # without images
    # Of equal ones that nearest to 1/2: between 0.9 and 0.2, not between 0.2 and 0.1.
    assert best_threshold(np.array([True, False]), np.array([0.9, 0.2])) == pytest.approx(0.55)


@pytest.mark.parametrize("values", [1, 3])
def test_the_figures_of_values_are_those_of_scikit_learn(values):
    generator = np.random.default_rng(1)
    targets = generator.normal(50, 20, (40, values)).astype(np.float32)
    outputs = (targets + generator.normal(2, 8, targets.shape)).astype(np.float32)
    found = evaluation(RegressionEvaluation, targets, outputs)
    assert found.mae == pytest.approx(mean_absolute_error(targets, outputs), rel=1e-6)
    assert found.rmse == pytest.approx(root_mean_squared_error(targets, outputs), rel=1e-6)
    assert found.r2 == pytest.approx(r2_score(targets, outputs), rel=1e-6)
    assert found.loss == pytest.approx(1 - r2_score(targets, outputs), rel=1e-6)
    constant = evaluation(RegressionEvaluation, np.ones((3, 1)), np.full((3, 1), 2.0))
    assert constant.r2 == r2_score([1, 1, 1], [2, 2, 2]) == 0


def test_shares_of_processes_give_the_evaluation_of_one():
    targets, logits = several(images=31)
    whole = evaluation(MultiLabelEvaluation, targets, logits, thresholds=[0.4] * 5)
    parts = []
    for rank in (0, 1):
        mine = np.arange(rank, 31, 2)
        worst = [Worst(float(i), int(i), StoredImage(str(i), b"")) for i in mine]
        arrays = {
            name: getattr(whole, name)[mine]
            for name in ("positions", "names", "targets", "outputs")
        }
        parts.append(MultiLabelEvaluation(whole.labels, **arrays, worst=worst, failures=[],
                                          thresholds=whole.thresholds))  # fmt: skip
    joined = MultiLabelEvaluation.joined(parts[::-1])
    assert joined.metrics == whole.metrics
    assert joined.names.tolist() == whole.names.tolist()
    assert [each.position for each in joined.worst[:2]] == [30, 29]
    with pytest.raises(ValueError, match="there are no images to evaluate with"):
        MultiLabelEvaluation.joined([evaluation(MultiLabelEvaluation, targets[:0], logits[:0],
                                                thresholds=[0.4] * 5)])  # fmt: skip
