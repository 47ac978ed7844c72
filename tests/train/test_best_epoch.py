import itertools

import pytest

from cvt.train import Recipe
from cvt.train.best_epoch import best, early_end, result


def epoch(number, top1, loss=1.0, ema=None, **metrics):
    row = {"epoch": number, "val_top1": top1, "val_loss": loss}
    row |= {f"val_{name}": value for name, value in metrics.items()}
    return row if ema is None else row | {"ema_top1": ema[0], "ema_loss": ema[1]}


def test_the_best_epoch_has_the_highest_top1_and_among_equals_the_lowest_loss():
    assert best([epoch(1, 0.4), epoch(2, 0.6), epoch(3, 0.6), epoch(4, 0.5)])["epoch"] == 2
    assert best([epoch(1, 0.6, 0.9), epoch(2, 0.6, 0.7), epoch(3, 0.6, 0.8)])["epoch"] == 2
    assert best([epoch(1, None, None), epoch(2, 0.0), epoch(3, None, None)])["epoch"] == 2
    averaged = [
        epoch(1, 0.9, 0.1, (0.3, 1)),
        epoch(2, 0.5, 1, (0.8, 2)),
        epoch(3, 0.7, 1, (0.8, 3)),
    ]
    assert best(averaged)["epoch"] == 2
    assert [result(row, "top1") for row in averaged] == [0.3, 0.8, 0.8]


def test_the_best_epoch_is_that_of_the_metric():
    history = [
        epoch(1, 0.9, 0.9, f1_macro=0.3, balanced_accuracy=0.4, top5=0.9),
        epoch(2, 0.8, 0.8, f1_macro=0.6, balanced_accuracy=0.4, top5=0.9),
        epoch(3, 0.7, 0.5, f1_macro=0.5, balanced_accuracy=0.3, top5=1.0),
        epoch(4, None, None, f1_macro=None, balanced_accuracy=None, top5=None),
    ]
    expected = {"top1": 1, "f1_macro": 2, "balanced_accuracy": 2, "top5": 3, "loss": 3}
    assert {metric: best(history, metric)["epoch"] for metric in expected} == expected


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_counts_the_validations_since_the_best_epoch(patience):
    """Over all runs of six epochs with top-1 of 0, 1, or none: the run as it would be by hand."""
    recipe = Recipe(patience=patience)
    for values in itertools.product([None, 0.0, 1.0], repeat=6):
        history, highest, without = [], None, 0
        for number, top1 in enumerate(values, start=1):
            history.append(epoch(number, top1, None if top1 is None else 1.0))
            if top1 is not None:
                without = 0 if highest is None or top1 > highest else without + 1
                highest = top1 if highest is None else max(highest, top1)
            assert bool(early_end(history, recipe, False)) is (without >= patience), values
        assert not early_end(history, Recipe(), False)
    assert not early_end([], recipe, False)


def test_an_equal_metric_with_a_lower_loss_is_a_new_best_epoch():
    falling = [epoch(i, 0.5, 1 / i) for i in range(1, 6)]
    assert not early_end(falling, Recipe(patience=1), False)
    assert early_end([*falling, epoch(6, 0.5, 0.2)], Recipe(patience=1), False)
