import csv
import math

import numpy as np
import pytest
import yaml
from helpers.training_runs import equal
from helpers.watcher import Watcher, final_state
from PIL import Image

from cvt.train import resume, train
from cvt.train.lr_find import STEPS, RangeTest
from cvt.train.trainer import Stopped


def test_the_suggestion_is_where_the_smoothed_loss_falls_fastest():
    rates = np.geomspace(1e-5, 1, 100)
    places = np.linspace(0, 1, 100)
    losses = 2 - 1 / (1 + np.exp(-(places - 0.5) * 30)) + 20 * np.maximum(places - 0.9, 0)
    found = RangeTest(rates.tolist(), losses.tolist())
    average = np.array([  # the definition of a corrected moving average
        sum(0.9 ** (i - j) * losses[j] for j in range(i + 1)) / sum(0.9**j for j in range(i + 1))
        for i in range(100)
    ])  # fmt: skip
    np.testing.assert_allclose(found.smoothed, average)
    falls = [average[i - 3] - average[i + 3] for i in range(3, 97)]
    assert found.steepest == 3 + np.argmax(falls)
    assert 50 <= found.steepest <= 60  # the average lags
    assert not found.has_exploded
    assert RangeTest(found.rates, [*found.losses, math.nan]).has_exploded
    assert RangeTest(found.rates, [*found.losses, 1e3]).has_exploded


def test_a_loss_that_does_not_fall_is_refused():
    with pytest.raises(ValueError, match="lr = find: the loss falls at no rate from 1e-06 to 3"):
        _ = RangeTest([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]).steepest


@pytest.mark.parametrize("changes", [{}, {"head_only": True, "views": 2}], ids=["whole", "head"])
def test_a_run_with_a_search_is_the_run_with_the_rate_that_it_found(recipe, tmp_path, changes):
    settings = {"optimizer": "sgd", "ema_decay": 0.8, "save_steps": 2, "warmup_epochs": 2}
    watcher, run = Watcher(stop_after=4), tmp_path / "found"
    with pytest.raises(Stopped):
        train(recipe(lr="find", **settings, **changes), run, watcher)
    (line,) = [line for line in watcher.lines if line.startswith("lr = ")]
    rate = yaml.safe_load((run / "args.yaml").read_text())["lr"]
    assert line.startswith(f"lr = {rate:g}: ")
    assert not (run / ".lr_find").exists()
    with open(run / "lr_find.csv") as file:
        rows = list(csv.DictReader(file))
    assert 20 < len(rows) <= STEPS
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[0] < rate < rates[-1]
    np.testing.assert_allclose(np.diff(np.log(rates)), np.log(1e7) / (STEPS - 1))
    with Image.open(run / "lr_find.png") as picture:
        assert picture.size == (720, 432)
    watcher = Watcher()
    resume(run, {"lr": "find"}, watcher)  # the command that began it
    assert not any("range test" in line for line in watcher.lines)
    train(recipe(lr=rate, **settings, **changes), tmp_path / "given")
    equal(final_state(run), final_state(tmp_path / "given"))
    assert (run / "results.csv").read_text() == (tmp_path / "given/results.csv").read_text()
