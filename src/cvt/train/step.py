"""One step of the optimizer: batches, forward and backward passes, update."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from cvt.train.balance import image_weights
from cvt.train.loader import Batch, seed_all
from cvt.train.loss import batch_loss
from cvt.train.models import DTYPES
from cvt.train.setup import Setup


class StepMetrics(NamedTuple):
    """The metrics of a step.

    Attributes:
        step: its number, from 0.
        lr: learning rate of the last group of parameters.
        tensor: (5,), means over the processes: the loss; whether the process is to stop; whether
            its time is over; the share of batches without an image; the number of unreadable
            images.
        failures: errors of this process's unreadable images, by their path.
    """

    step: int
    lr: float
    tensor: Tensor
    failures: dict[str, str]


class TrainingStep:
    """Takes the steps of a run.

    Args:
        setup: what the run is built of.
        interrupted: whether the run is to stop after the step.
        is_late: whether its time is over.

    Attributes:
        waited: seconds that were spent on waiting for batches.
    """

    def __init__(
        self, setup: Setup, interrupted: Callable[[], bool], is_late: Callable[[], bool]
    ) -> None:
        self.setup, self.interrupted, self.is_late = setup, interrupted, is_late
        self.dtype = DTYPES[setup.recipe.precision]
        self.waited = 0.0

    def __call__(self, step: int) -> StepMetrics:
        """Take step number `step`, on this process's batches of it.

        Raises:
            cvt.data.workers.Interrupted: the run is to stop, and no batch came.
        """
        setup, recipe, plan = self.setup, self.setup.recipe, self.setup.plan
        optimizer, scaler, device = setup.optimizer, setup.scaler, setup.device
        setup.schedule.set(optimizer, step)
        losses: list[Tensor] = []
        failures: dict[str, str] = {}
        blanks = 0  # batches of which no image can be read
        for turn in range(plan.accumulate):
            batch = self._next_batch()
            seed_all(recipe.seed, plan.batch_number(step, turn))
            failures |= batch.failures
            is_blank = not len(batch.targets)
            blanks += is_blank
            with self._synchronised(turn == plan.accumulate - 1):
                losses.append(self._backward(batch, step, is_blank))
        if recipe.clip_grad is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(setup.model.parameters(), recipe.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if setup.ema:
            setup.ema.update(setup.model, step=step + 1)
        # Created on the device: a copy to a GPU would wait until all its work is done.
        flags = (self.interrupted(), self.is_late())
        counts = [
            torch.full((), float(count), device=device)
            for count in (*flags, blanks / plan.accumulate, len(failures))
        ]
        metrics = torch.stack([torch.stack(losses).mean(), *counts])
        metrics = setup.accelerator.reduce(metrics, "mean")
        return StepMetrics(step, optimizer.param_groups[-1]["lr"], metrics, failures)

    def _next_batch(self) -> Batch:
        began = time.perf_counter()
        batch = next(self.setup.batches)
        self.waited += time.perf_counter() - began
        return batch

    def _backward(self, batch: Batch, step: int, is_blank: bool) -> Tensor:
        """Add the gradients of a batch to those of the step; returns its loss."""
        setup, recipe = self.setup, self.setup.recipe
        used = blank(setup.input_shape, setup.target_shape) if is_blank else batch
        pixels, targets = self._mixed(used, step)
        kept = statistics_kept(setup.model) if is_blank else contextlib.nullcontext()
        with kept:
            with torch.autocast(setup.device.type, self.dtype, self.dtype != torch.float32):
                logits = setup.forward(pixels, return_dict=True).logits
            weights = setup.class_weights
            loss = batch_loss(
                *(logits.float(), targets, recipe.problem, recipe.label_smoothing),
                *(weights, setup.scale),
            )
            if setup.teacher is not None:
                of_images = None
                if weights is not None:
                    of_images = image_weights(targets, weights, recipe.label_smoothing)
                soft = setup.teacher.loss(logits.float(), pixels, of_images)
                loss = torch.lerp(loss, soft, recipe.teacher_weight)
            if is_blank:  # without weight in the step, but other processes wait for its gradient
                loss = 0 * loss
            setup.scaler.scale(loss / setup.plan.accumulate).backward()
        return loss.detach()

    def _mixed(self, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """Images and targets on the device, mixed; not if an unreadable image left an odd batch."""
        device, off = self.setup.device, self.setup.recipe.mixup_off_epoch
        layout = torch.channels_last if batch.pixels.ndim == 4 else torch.preserve_format
        pixels = batch.pixels.to(device, non_blocking=True, memory_format=layout)
        targets = batch.targets.to(device, non_blocking=True)
        if len(targets) % 2 or (off and step // self.setup.plan.steps_per_epoch >= off):
            return pixels, targets
        return self.setup.mix(pixels, targets)

    def _synchronised(self, last: bool) -> Any:
        """Gradients are summed over the processes in the last batch of a step only."""
        if self.setup.is_sharded:
            self.setup.model.set_requires_gradient_sync(last)
        elif not last:
            return self.setup.accelerator.no_sync(self.setup.wrapped)
        return contextlib.nullcontext()


def blank(shape: tuple[int, ...], target: tuple[int, ...] = ()) -> Batch:
    """A batch of one image of zeros, in the place of one of which no image can be read.

    Args:
        shape: of the image.
        target: shape of its target; () is that of the index of a class.
    """
    targets = torch.zeros(1, *target, dtype=torch.float32 if target else torch.int64)
    return Batch(torch.zeros(1, *shape), targets, {})


@contextlib.contextmanager
def statistics_kept(model: torch.nn.Module) -> Iterator[None]:
    """Batch normalisation by its running statistics, which do not change."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
