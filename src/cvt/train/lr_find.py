"""The learning rate range test: `lr: find`.

L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3 (arXiv
1506.01186): train for some steps while the learning rate rises, and look at the loss. The rate
rises exponentially here, as in fastai's `lr_find`, and the suggestion is that one's "steep": the
rate at which the smoothed loss falls fastest.
"""

import csv
import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from cvt.files import staged
from cvt.inference.report import plot_rates
from cvt.train.frozen_features import FOLDER
from cvt.train.models import set_training
from cvt.train.optim import LearningRates
from cvt.train.progress import NullProgress, Progress
from cvt.train.recipe import Recipe
from cvt.train.setup import Setup, set_up
from cvt.train.step import TrainingStep

FIRST, LAST = 1e-6, 10.0  # learning rates
STEPS = 100  # from the first to the last
EXPLODED = 3.0  # times the lowest smoothed loss
SPAN = 3  # steps before and after one, over which the fall of the loss is taken
MEMORY = 0.9  # of the average that smooths the losses
NAME = "lr_find"


class Ramp(LearningRates):
    """Learning rates that rise exponentially."""

    def rate(self, step: int) -> float:
        """See `LearningRates`."""
        return FIRST * (LAST / FIRST) ** (step / (STEPS - 1))


@dataclass(frozen=True)
class RangeTest:
    """The steps of a range test so far.

    Attributes:
        rates: their learning rates.
        losses: their losses, before their updates.
    """

    rates: list[float]
    losses: list[float]

    @property
    def smoothed(self) -> np.ndarray:
        """The moving average of the losses, (steps,), its start corrected."""
        average, found = 0.0, []
        for step, loss in enumerate(self.losses, start=1):
            average = MEMORY * average + (1 - MEMORY) * loss
            found.append(average / (1 - MEMORY**step))
        return np.array(found)

    @property
    def has_exploded(self) -> bool:
        """Whether the last loss is so high that no higher rate is worth a step."""
        smoothed = self.smoothed
        return not (math.isfinite(smoothed[-1]) and smoothed[-1] <= EXPLODED * smoothed.min())

    @property
    def steepest(self) -> int:
        """The step at whose rate the smoothed loss falls fastest, before it is at its lowest.

        Raises:
            ValueError: the loss falls at no rate.
        """
        smoothed = self.smoothed[np.isfinite(self.smoothed)]
        until_lowest = smoothed[: smoothed.argmin() + 1]
        falls = until_lowest[: -2 * SPAN] - until_lowest[2 * SPAN :]
        if not len(falls) or falls.max() <= 0:
            raise ValueError(
                f"lr = find: the loss falls at no rate from {FIRST:g} to {self.rates[-1]:.2g}; set "
                "a number"
            )
        return SPAN + int(falls.argmax())


def found_rate(
    recipe: Recipe, output: Path, accelerator: Accelerator, progress: Progress
) -> Recipe:
    """The recipe with the learning rate that a range test suggests.

    The test builds a run of its own from the recipe, so that nothing of it is left but
    `lr_find.csv`, `lr_find.png` and the features of frozen stages in the run folder.

    Args:
        recipe: how to train; its `lr` is "find".
        output: the run folder.
        accelerator: the processes and their device.
        progress: receives the progress and the suggestion.

    Raises:
        OSError: as `set_up`.
        ValueError: the loss falls at no rate, or as `set_up`.
    """
    ramped = replace(recipe, lr=FIRST, steps=STEPS, warmup_epochs=0, min_lr=0, ema_decay=0)
    beside = output / f".{NAME}"  # a new run may begin in a folder of hidden files
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
    setup = set_up(ramped, beside, {}, accelerator, NullProgress(), lambda: False)
    setup.schedule = Ramp()
    if features := setup.features:
        epochs = range(setup.plan.epochs_in(STEPS))
        for view in sorted({view for epoch in epochs for view in features.views_in(epoch)}):
            name = f"frozen stages, view {view + 1}/{setup.recipe.views}"
            features.compute_view(view, progress.stage(name, setup.plan.images))
    found = _tested(setup, progress)
    del setup.batches  # ends its workers
    rate = float(f"{found.rates[found.steepest]:.2g}")
    if setup.is_main:
        output.mkdir(parents=True, exist_ok=True)
        with staged(output / f"{NAME}.csv", overwrite=True) as path:
            _write(found, path)
        with staged(output / f"{NAME}.png", overwrite=True) as path:
            plot_rates(found.rates, found.losses, found.smoothed.tolist(), path, rate)
        if features:
            os.replace(beside / FOLDER, output / FOLDER)
        shutil.rmtree(beside, ignore_errors=True)
    progress.log(
        f"lr = {rate:g}: the smoothed loss falls fastest there, in a range test of "
        f"{len(found.rates)} steps from {FIRST:g} to {found.rates[-1]:.2g} (Smith 2017; "
        f"{output / NAME}.png)"
    )
    return replace(recipe, lr=rate, batch_size=setup.plan.batch_size)


def _tested(setup: Setup, progress: Progress) -> RangeTest:
    shown = progress.stage("learning rate range test", STEPS)
    take_step = TrainingStep(setup, lambda: False, lambda: False)
    set_training(setup.model, setup.recipe)
    found = RangeTest([], [])
    for step in range(STEPS):
        metrics = take_step(step)
        loss, *_, blank_share, _ = metrics.tensor.tolist()
        if blank_share < 1:
            found.rates.append(setup.schedule.rate(step))
            found.losses.append(loss / (1 - blank_share))
            if found.has_exploded:
                break
        shown(loss=loss, lr=setup.schedule.rate(step))
    return found


def _write(found: RangeTest, path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("learning_rate", "loss", "smoothed_loss"))
        writer.writerows(zip(found.rates, found.losses, found.smoothed, strict=True))
