"""The training loop, on one process or many, from wherever it was stopped."""

import contextlib
import hashlib
import json
import logging
import math
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.batchnorm import _BatchNorm

from cvt.checkpoints import load_classifier
from cvt.data import (
    Images,
    LabelledImages,
    StreamedImages,
    open_training,
    oversized,
    write_split,
)
from cvt.data.preprocessing import processor_of
from cvt.data.workers import Interrupted
from cvt.files import check_path, locked
from cvt.inference.evaluate import evaluate, write_evaluation
from cvt.inference.metrics import Evaluation
from cvt.kernels import apply_cpu_bf16, apply_triton, recompute_activations
from cvt.modeling import Block
from cvt.train import run_folder
from cvt.train.augmentation import augmentation, mixing
from cvt.train.checkpointing import (
    check_state,
    check_weights,
    checkpoints,
    newest_checkpoint,
    save_checkpoint,
)
from cvt.train.loader import Batch, Plan, batches, seed_all
from cvt.train.models import (
    classifier_for,
    frozen,
    merged,
    processor_for,
    rebuilt,
    regularised,
    trainable,
)
from cvt.train.optim import Schedule, optimizer_for
from cvt.train.progress import NullProgress, Progress, Row
from cvt.train.recipe import LENGTH, Recipe, load_recipe, read_settings, resumed_recipe

logger = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_WAITING_SHARE = 0.2  # of an epoch's time
CORRUPT_ALWAYS_ALLOWED = 10  # images, however few there are
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole, under sharding too


class Stopped(SystemExit):
    """A signal ended the run and its state is saved; the exit code is 128 + the signal's number."""


class StepMetrics(NamedTuple):
    """What the processes tell each other of a step, as a tensor (3,) of means over them."""

    step: int
    lr: float
    # Loss; shares of processes that are to stop and of batches without an image; unreadable images.
    tensor: Tensor
    failures: dict[str, str]


def train(recipe: Recipe, output: str | Path, progress: Progress | None = None) -> Row:
    """Train a classifier and leave a run folder; `cvt.train.run_folder` lists what is in it.

    Start it in several processes with `torchrun` or `accelerate launch` and they share the work.

    Args:
        recipe: how to train.
        output: the run folder.
        progress: hears of the progress, in the first process only.

    Returns:
        The row of `results.csv` of the best epoch, whose model is `output/best`.

    Raises:
        FileExistsError: `output` has something in it.
        OSError: there is no such data, or something cannot be written.
        ValueError: the data or the recipe cannot be used, or too many images are unreadable.
        FloatingPointError: the loss became NaN or infinite; says when and what to try.
        Stopped: SIGTERM or SIGINT; the state is saved.
    """
    check_path(output, "output")
    output = Path(output)
    if checkpoints(output / "checkpoints"):
        raise FileExistsError(f"{output} exists already; --resume goes on with the run in it")
    if output.is_file() or any(path.name[0] != "." for path in output.glob("*")):
        raise FileExistsError(f"{output} exists already, with no run to resume; take another")
    return _run(recipe, output, {}, progress)


def resume(
    output: str | Path,
    changes: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Row:
    """Go on with a run, from its newest checkpoint that verifies, as if it had not been stopped.

    On another number of processes, each takes so many batches a step that the steps stay the same;
    but a stream's images are shared in another way then.

    Args:
        output: the run folder.
        changes: settings. Those of `cvt.train.recipe.RESUME_OVERRIDES` may differ from the run's,
            such as where the images are now; or the number of epochs, if the learning rate of the
            steps done would have been the same.
        progress: as in `train`.

    Returns:
        As `train`.

    Raises:
        FileNotFoundError: there is no run in `output`.
        ValueError: no checkpoint is whole, the images are not the run's, a setting may not differ
            or was edited in args.yaml; else as `train`.
    """
    check_path(output, "output")
    output = Path(output)
    path, state = newest_checkpoint(output / "checkpoints")
    check_state(state, path)
    recipe = load_recipe(None, state["recipe"])
    if (output / "args.yaml").is_file():  # what was edited in it counts, or is refused
        edited = read_settings(output / "args.yaml")
        recipe = resumed_recipe(recipe, edited, f"{output / 'args.yaml'}: ")
    recipe = resumed_recipe(recipe, changes or {})
    opening = f"going on from {path}, {state['step']} steps done"
    return _run(recipe, output, state, progress, opening)


def _run(
    recipe: Recipe,
    output: Path,
    state: dict[str, Any],
    progress: Progress | None,
    opening: str = "",
) -> Row:
    with isolated():
        accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision="no")
        shown = progress if progress and accelerator.is_main_process else NullProgress()
        if opening:
            shown.say(opening)
        return Run(recipe, output, state, shown, accelerator).finish()


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Leaves the caller's accelerate state and random generators as they were."""
    shared = [cls._shared_state for cls in (PartialState, AcceleratorState, GradientState)]
    kept = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        for state, before in zip(shared, kept, strict=True):
            state.clear()
            state.update(before)
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        torch.set_rng_state(drawn[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)


class Run:
    """A run at some step."""

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        state: dict[str, Any],
        progress: Progress,
        accelerator: Accelerator,
    ) -> None:
        self.output, self.progress, self.accelerator = output, progress, accelerator
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.step: int = state.get("step", 0)
        recipe = replace(recipe, precision=precision(recipe.precision, self.device))
        self.given = recipe  # with the batches a step of a process that the run began with
        if state:
            recipe = self.shared(recipe, state["batches_per_step"])
        self.recipe, self.dtype = recipe, DTYPES[recipe.precision]
        self.splits = open_training(
            recipe.data,
            recipe.val_data,
            seed=recipe.seed,
            classes=Path(recipe.classes) if recipe.classes else None,
            image_column=recipe.image_column,
            label_column=recipe.label_column,
        )
        self.train_images, self.val_images, self.test_images = self.splits
        self.digest = digest(self.train_images, self.val_images)
        if state and state["images"] != self.digest:
            raise ValueError(f"the images in {recipe.data} are not those of the run in {output}")
        self.plan = Plan(
            images=self.epoch_images(),
            batch_size=recipe.batch_size,
            accumulate=recipe.accumulate,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            epochs=recipe.epochs + recipe.cooldown_epochs,
            only_steps=recipe.steps,
        )
        if state:
            self.check_length(load_recipe(None, state["recipe"]))
        images = self.val_images
        if isinstance(images, StreamedImages) and images.length is None and self.plan.world > 1:
            raise ValueError(
                "val_data: processes cannot share a stream of unknown length; give a folder"
            )
        self.sharded = recipe.fsdp and self.plan.world > 1
        self.build(state)
        self.announce()
        self.history: list[Row] = state.get("history", [])
        self.losses: list[float] = state.get("losses", [])  # of the epoch that is going on
        self.corrupt: dict[str, str] = state.get("corrupt", {})
        if self.step > self.plan.steps or (self.at_epoch_end and self.step and not self.losses):
            raise ValueError(
                f"step = {self.step}: does not fit a run of {self.plan.steps} steps, of which "
                f"history has {len(self.history)} epochs and losses {len(self.losses)} steps"
            )
        self.signal = 0
        self.advised = False

    # -------------------------------------------------------------------------- setting up

    def shared(self, recipe: Recipe, batches: int) -> Recipe:
        """The recipe for as many batches a step on however many processes there are now."""
        world = self.accelerator.num_processes
        if batches % world:
            raise ValueError(f"{world} processes cannot share the run's {batches} batches a step")
        return replace(recipe, accumulate=batches // world)

    def check_length(self, before: Recipe) -> None:
        """Refuse another length of the run if the steps done would have been others.

        Raises:
            ValueError: they would; says what to do.
        """
        names = [n for n in LENGTH if getattr(before, n) != getattr(self.recipe, n)]
        if not names:
            return
        old, new = Schedule(before, self.plan), Schedule(self.recipe, self.plan)
        done = range(0, self.step, old.unit)
        if all(old.rate(step) == new.rate(step) for step in done) and self.step <= self.plan.steps:
            return
        changed = ", ".join(f"{name} = {getattr(self.recipe, name)}" for name in names)
        raise ValueError(
            f"{changed}: the {self.step} steps done would have had another learning rate. To train "
            f"on at min_lr = {before.min_lr:g}, raise cooldown_epochs; else start another run with "
            f"model={self.output / 'last'}"
        )

    def epoch_images(self) -> int:
        """How many images an epoch has."""
        if isinstance(self.train_images, LabelledImages):
            return len(self.train_images)
        if found := self.recipe.epoch_images or self.train_images.length:
            return found
        raise ValueError(f"epoch_images: {self.recipe.data} does not say how many images it has")

    def build(self, state: dict[str, Any]) -> None:
        """Model, optimizer, schedule and augmentation, as they were where there is a state."""
        recipe, accelerator = self.recipe, self.accelerator
        seed_all(recipe.seed)
        if state:
            model = rebuilt(state["config"])
            self.processor: Any = processor_of(state["processor"], str(self.output))
        else:
            classes = self.train_images.classes
            model, sentence = classifier_for(recipe.model, classes, recipe.from_scratch)
            if sentence:
                self.progress.say(sentence)
            model = regularised(model, recipe)
            self.processor = processor_for(recipe, model.config)
        self.config = model.config
        augment = augmentation(recipe, self.processor)
        self.mix = mixing(recipe, len(model.config.class_names))
        if recipe.recompute_activations:
            recompute_activations(model)
        if recipe.gradient_checkpointing:
            model.activation_checkpointing_enable()
        if recipe.triton:
            apply_triton(model)
        if self.device.type == "cpu" and recipe.precision == "bf16":
            apply_cpu_bf16(model)
        self.plain: Any = trainable(model, recipe).to(self.device)
        if not recipe.fsdp:  # it shards contiguous weights only
            self.plain.to(memory_format=torch.channels_last)
        self.ema = None
        if recipe.ema_decay:
            self.ema = ModelEmaV3(self.plain, decay=recipe.ema_decay, use_warmup=True)
        self.averaged: Any = self.ema and self.ema.module
        if self.sharded:
            for block in [module for module in self.plain.modules() if isinstance(module, Block)]:
                fully_shard(block)
            fully_shard(self.plain)
        self.schedule = Schedule(recipe, self.plan)
        self.optimizer = optimizer_for(self.plain, recipe, self.schedule.peak)
        self.wrapped = self.plain if self.sharded else accelerator.prepare_model(self.plain)
        # A graph for each number of images: an unreadable one would make all sizes share a slower.
        self.model = torch.compile(self.wrapped, dynamic=False) if recipe.compile else self.wrapped
        fp16 = recipe.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        if state:
            check_weights(state["model"], self.plain.state_dict(), "model")
            if self.ema:
                check_weights(state["ema"] or {}, self.ema.module.state_dict(), "ema")
            set_model_state_dict(self.plain, state["model"], options=FULL)
            if found := state["optimizer"]:
                set_optimizer_state_dict(self.plain, self.optimizer, found, options=FULL)
            self.scaler.load_state_dict(state["scaler"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
        self.batches: Iterator[Batch] = batches(
            *(self.train_images, augment, recipe, self.plan, self.step),
            interrupted=self.interrupted,
        )

    def announce(self) -> None:
        """Say what is about to be trained, and how the learning rate came about."""
        plan, recipe = self.plan, self.recipe
        trained = sum(p.numel() for p in self.plain.parameters() if p.requires_grad)
        peak = f"{recipe.peak_lr(plan.images_per_step):.3g}"
        if recipe.lr is None:
            peak += f" = {recipe.lr_base:g} x {plan.images_per_step} / {recipe.lr_base_size}"
        self.progress.say(
            f"{plan.images:,} images of {self.config.num_labels} classes; {trained:,} parameters "
            f"to train on {self.device.type} in {recipe.precision}"
            + (", sharded" if self.sharded else "")
        )
        self.progress.say(
            f"{plan.steps:,} steps of {plan.images_per_step} images = {plan.batch_size} x "
            f"{plan.accumulate} x {plan.world} (batch_size, accumulate, processes); "
            f"highest learning rate {peak}"
        )

    # -------------------------------------------------------------------------- running

    def finish(self) -> Row:
        """Train to the end; gives the best epoch."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.signals())
            if self.main:
                self.output.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.output))
                run_folder.write_settings(self.output, self.given, self.plan, self.device)
                if self.splits.drawn:
                    assert isinstance(self.train_images, LabelledImages)
                    assert isinstance(self.val_images, LabelledImages)
                    write_split(self.output / "split.csv", self.train_images, self.val_images)
                self.events = run_folder.Events(self.output, self.step)
                stack.callback(self.events.close)
            stack.callback(self.__dict__.pop, "batches")  # ends its workers
            if not self.step:
                self.save()
                self.report_oversized()
            if self.at_epoch_end:  # stopped between the last step of an epoch and its end
                self.end_epoch()
            is_done = self.step == self.plan.steps
            while self.step < self.plan.steps:
                self.train_epoch()
                self.end_epoch()
            self.test(is_done)
        return best(self.history)

    def report_oversized(self) -> None:
        """Log the images with more pixels than are decoded; each process looks at its share."""
        rank, world, limit = self.plan.rank, self.plan.world, self.recipe.max_pixels
        for name, images in (("training", self.train_images), ("validation", self.val_images)):
            if isinstance(images, LabelledImages):
                for fault in gather_object(list(oversized(images, limit, rank, world))):
                    self.progress.say(f"not used in {name}: {fault}")

    @property
    def epoch(self) -> int:
        """Of the next step, from 0."""
        return self.step // self.plan.steps_per_epoch

    @property
    def at_epoch_end(self) -> bool:
        """Whether the steps of an epoch are done whose results are not there yet."""
        ended = -(-self.step // self.plan.steps_per_epoch)
        whole = self.step % self.plan.steps_per_epoch == 0 or self.step == self.plan.steps
        return whole and len(self.history) < ended

    def train_epoch(self) -> None:
        """The steps up to the end of the epoch."""
        plan, recipe = self.plan, self.recipe
        self.plain.train()
        for module in frozen(self.plain, recipe):
            module.eval()
        epoch = self.epoch
        end = min((epoch + 1) * plan.steps_per_epoch, plan.steps)
        name = f"epoch {epoch + 1}/{math.ceil(plan.steps / plan.steps_per_epoch)}"
        shown = self.progress.stage(
            name, end - epoch * plan.steps_per_epoch, self.step - epoch * plan.steps_per_epoch
        )
        # On a GPU the metrics of a step are read while the next one runs, so that it never waits.
        unread: deque[StepMetrics] = deque()
        behind = 1 if self.device.type == "cuda" else 0
        self.waited = 0.0  # for batches, in seconds
        first, clock = self.step, time.perf_counter()
        while self.step < end:
            try:
                unread.append(self.train_step())
            except Interrupted:
                while unread:
                    self.read(unread.popleft())
                self.leave_waiting()
            done = self.step == end or (recipe.save_steps and self.step % recipe.save_steps == 0)
            stop = False
            while len(unread) > (0 if done or stop else behind):
                stop |= self.read(unread.popleft())
            rate = (self.step - first) * plan.images_per_step / (time.perf_counter() - clock)
            loss = self.losses[-1] if self.losses else None
            lr = self.optimizer.param_groups[-1]["lr"]
            shown(loss=loss, lr=lr, images_per_second=rate)
            if stop:
                self.stop(together=True)
            if recipe.save_steps and self.step % recipe.save_steps == 0 and self.step < end:
                self.save()
        self.tell_speed(epoch + 1, rate, self.waited / (time.perf_counter() - clock))

    def tell_speed(self, epoch: int, images_per_second: float, waiting: float) -> None:
        """Write down how fast an epoch was; say once what helps if it waited much for images."""
        speed = {"images_per_second": images_per_second, "waiting": waiting}
        if self.main:
            run_folder.write_speed(self.output, {"epoch": epoch, **speed})
            self.events.add(self.step, {f"epoch/{name}": value for name, value in speed.items()})
        if waiting > MAX_WAITING_SHARE and not self.advised:
            self.advised = True
            self.progress.say(
                f"{100 * waiting:.0f} % of the time in epoch {epoch} went by waiting for images; "
                f"what helps: more workers (now {self.recipe.workers}, on {os.cpu_count()} cores)"
            )

    def next_batch(self) -> Batch:
        """The next batch from the workers; the time until it is there is noted."""
        began = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - began
        return batch

    def train_step(self) -> StepMetrics:
        """One step of the optimizer, on this process's batches of it."""
        recipe, plan, step = self.recipe, self.plan, self.step
        self.schedule.set(self.optimizer, step)
        losses: list[Tensor] = []
        failures: dict[str, str] = {}
        blanks = 0  # batches of which no image can be read
        for turn in range(plan.accumulate):
            batch = self.next_batch()
            seed_all(recipe.seed, plan.number(step, turn))
            failures |= batch.failures
            is_blank = not len(batch.targets)
            blanks += is_blank
            pixels, targets = self.mixed(blank(recipe.image_size) if is_blank else batch)
            kept = statistics_kept(self.plain) if is_blank else contextlib.nullcontext()
            with self.synchronised(turn == plan.accumulate - 1), kept:
                with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                    logits = self.model(pixels, return_dict=True).logits
                smoothing = recipe.label_smoothing if targets.ndim == 1 else 0.0
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
                if is_blank:  # it counts nothing, but other processes wait for its gradient
                    loss = 0 * loss
                self.scaler.scale(loss / plan.accumulate).backward()
            losses.append(loss.detach())
        if recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.plain.parameters(), recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema:
            self.ema.update(self.plain, step=self.step)
        # Made where they are needed: a copy to a GPU would wait until all its work is done.
        counts = [
            torch.full((), float(n), device=self.device)
            for n in (self.signal > 0, blanks / plan.accumulate, len(failures))
        ]
        metrics = self.accelerator.reduce(
            torch.stack([torch.stack(losses).mean(), *counts]), "mean"
        )
        return StepMetrics(step, self.optimizer.param_groups[-1]["lr"], metrics, failures)

    def mixed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and targets on the device, mixed; not if an unreadable image left an odd batch."""
        pixels = batch.pixels.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        targets = batch.targets.to(self.device, non_blocking=True)
        off = self.recipe.mixup_off_epoch
        if len(targets) % 2 or (off and self.epoch >= off):
            return pixels, targets
        return self.mix(pixels, targets)

    def synchronised(self, last: bool) -> Any:
        """Gradients are summed over the processes in the last batch of a step only."""
        if self.sharded:
            self.plain.set_requires_gradient_sync(last)
        elif not last:
            return self.accelerator.no_sync(self.wrapped)
        return contextlib.nullcontext()

    def read(self, metrics: StepMetrics) -> bool:
        """Take note of a step; tells whether the run is to stop.

        Raises:
            FloatingPointError: its loss is NaN or infinite.
            ValueError: there are too many unreadable images.
        """
        loss, stopping, blank_share, failures = metrics.tensor.tolist()
        if not math.isfinite(loss):
            raise self.diverged(f"the loss is {loss}", metrics.step)
        if blank_share < 1:
            loss /= 1 - blank_share
            self.losses.append(loss)
        if self.main and blank_share < 1:
            self.events.add(
                metrics.step + 1, {"train/loss": loss, "train/learning_rate": metrics.lr}
            )
        if failures:
            self.count_corrupt(metrics.failures)
        return stopping > 0

    def diverged(self, what: str, step: int) -> FloatingPointError:
        """The error of a run that left the finite numbers in a step, counted from 0."""
        saved = checkpoints(self.output / "checkpoints")
        return FloatingPointError(
            f"{what} in step {step + 1}, epoch {step // self.plan.steps_per_epoch + 1}, at "
            f"learning rate {self.schedule.rate(step):.3g}; the last good state is "
            f"{saved[0] if saved else 'none'}. Try a lower lr, a longer warmup_epochs, "
            "clip_grad=1 or precision=fp32"
        )

    def count_corrupt(self, failures: dict[str, str]) -> None:
        """Log the images that could not be read, by name, once each."""
        data = Path(self.recipe.data)
        folder = str(data if data.is_dir() else data.parent)
        for path, error in gather_object(list(failures.items())):
            name = path.removeprefix(folder).lstrip("/")  # the same if the data is moved
            if name not in self.corrupt:
                self.corrupt[name] = error
                self.progress.say(f"left out: {error}")
        if self.main:
            run_folder.write_corrupt(self.output, self.corrupt)
        allowed = max(CORRUPT_ALWAYS_ALLOWED, self.recipe.max_corrupt * self.plan.images)
        if len(self.corrupt) > allowed:
            raise ValueError(
                f"{len(self.corrupt)} of {self.plan.images} training images cannot be read, more "
                f"than max_corrupt = {self.recipe.max_corrupt:g} and more than "
                f"{CORRUPT_ALWAYS_ALLOWED}; {self.output / 'corrupt.txt'} lists them"
            )

    # -------------------------------------------------------------------------- between epochs

    def end_epoch(self) -> None:
        """Evaluate, write down, save."""
        recipe, number = self.recipe, len(self.history) + 1
        if not self.losses:
            raise ValueError(
                f"no training image of epoch {number} can be read; {self.output / 'corrupt.txt'} "
                "lists them"
            )
        last = self.step == self.plan.steps
        row: Row = {
            "epoch": number,
            "step": self.step,
            "learning_rate": self.optimizer.param_groups[-1]["lr"],
            "train_loss": sum(self.losses) / len(self.losses),
        }
        prefixes = ("val", "ema") if self.ema else ("val",)
        names = [f"{prefix}_{what}" for prefix in prefixes for what in ("loss", "top1", "top5")]
        row |= dict.fromkeys(names)
        evaluation = None
        if last or number % recipe.eval_every == 0:
            for prefix in prefixes:
                weights = self.plain if prefix == "val" else self.averaged
                evaluation = self.evaluated(weights, self.val_images, "validation")
                for what in ("loss", "top1", "top5"):
                    row[f"{prefix}_{what}"] = getattr(evaluation, what)
        self.history.append(row)
        self.losses = []
        state = self.state()
        if self.main and evaluation is not None:
            model, adapter = self.finished(state)
            for failure in evaluation.failures if number <= recipe.eval_every else ():
                logger.warning(f"not counted: {failure.error}")
            if is_best := best(self.history) is row:
                run_folder.write_pictures(self.output, evaluation)
            for name in ("best", "last") if is_best else ("last",):
                folder = self.output / name
                run_folder.write_model(folder, model, self.processor, recipe, row, adapter)
        if self.main:
            run_folder.write_results(self.output, self.history)
            self.events.add(self.step, {f"epoch/{name}": value for name, value in row.items()})
        self.save(state)
        self.progress.epoch(row)

    def test(self, is_done: bool) -> None:
        """Evaluate the best model on the images that were held out; once, if the run was done."""
        if self.test_images is None:
            return
        folder = self.output / "test"
        (is_known,) = broadcast_object_list([is_done and folder.exists()])
        if is_known:
            return
        model: Any = rebuilt(self.config.to_dict())
        if self.main:
            model = load_classifier(self.output / "best")
        model.to(self.device)
        if self.plan.world > 1:
            for parameter in model.parameters():
                torch.distributed.broadcast(parameter.data, 0)
        evaluation = self.evaluated(model, self.test_images, "test")
        if self.main:
            write_evaluation(evaluation, folder, overwrite=True)
            self.progress.say(
                f"{evaluation.images} held-out test images: top-1 {100 * evaluation.top1:.2f} %, "
                f"loss {evaluation.loss:.4f}; more in {folder}"
            )

    def evaluated(self, model: Any, images: Images, name: str) -> Evaluation:
        """The evaluation of a model on every image once, shared by the processes."""
        world = self.plan.world
        if world > 1:
            for buffer in model.buffers():  # the first process's, whose model is kept
                torch.distributed.broadcast(buffer, 0)
        total = images.length if isinstance(images, StreamedImages) else len(images)
        shown = self.progress.stage(name, total and -(-total // world))

        def step() -> None:
            shown()
            # Sharded processes evaluate in step; of others, the one that saves need not wait.
            if self.signal and self.main and not self.sharded:
                self.stop()

        try:
            part = evaluate(
                model,
                self.processor,
                images,
                self.recipe.batch_size,
                self.recipe.workers,
                step,
                rank=self.plan.rank,
                world=world,
                config=self.config,
                max_pixels=self.recipe.max_pixels,
                interrupted=self.interrupted,
            )
        except Interrupted:
            self.leave_waiting()
        except FloatingPointError as error:
            raise self.diverged(str(error), self.step - 1) from None
        return Evaluation.joined(gather_object([part]))

    def finished(self, state: dict[str, Any]) -> tuple[Any, Any]:
        """The model to hand out, averaged where there is an average, and its LoRA adapter."""
        if self.recipe.lora_r:
            adapted = self.averaged or self.plain
            return merged(adapted), adapted
        model = rebuilt(self.config.to_dict())
        model.load_state_dict(state["ema"] or state["model"])
        return model, None

    # -------------------------------------------------------------------------- stopping

    def state(self) -> dict[str, Any]:
        """All that the run goes on from; whole in the first process, under sharding too."""
        model = get_model_state_dict(self.plain, options=FULL)  # first: it shards what is whole
        optimizer = None
        if self.optimizer.state:  # else torch would take a step, to have something to save
            optimizer = get_optimizer_state_dict(self.plain, self.optimizer, options=FULL)
        return {
            "recipe": asdict(self.given),
            "config": self.config.to_dict(),
            "processor": json.loads(self.processor.to_json_string()),
            "images": self.digest,
            "batches_per_step": self.plan.batches_per_step,
            "step": self.step,
            "history": self.history,
            "losses": self.losses,
            "corrupt": self.corrupt,
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "ema": self.averaged.state_dict() if self.ema else None,
        }

    def save(self, state: dict[str, Any] | None = None) -> None:
        """Write a checkpoint."""
        state = self.state() if state is None else state
        if self.main:
            if not all(weight.isfinite().all() for weight in state["model"].values()):
                raise self.diverged("weights became NaN or infinite", self.step - 1)
            save_checkpoint(self.output / "checkpoints", self.step, state, self.recipe.keep)

    def stop(self, together: bool = False) -> NoReturn:
        """Save and leave, as a signal has asked for; all processes together if all stop here."""
        self.save()
        if together:  # torchrun kills the one that saves as soon as another has left
            self.accelerator.wait_for_everyone()
        self.progress.say(f"stopped and saved after {self.step} steps; --resume goes on")
        raise Stopped(128 + (self.signal or signal.SIGTERM))

    def interrupted(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self.signal > 0

    def leave_waiting(self) -> NoReturn:
        """Leave while no image comes, as a signal has asked for; a step is not taken."""
        if not self.sharded:  # whose state only all processes together can save
            self.stop()
        raise Stopped(128 + self.signal)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C stop the run after the step; a second Ctrl-C stops it at once.

        But not one of several processes: their launcher repeats the signals that it gets itself.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: object) -> None:
            self.signal = number
            if number == signal.SIGINT and self.plan.world == 1:
                signal.signal(number, before[number])

        before: dict[int, Any] = {
            number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def blank(side: int) -> Batch:
    """A batch of one image, in the place of one of which no image can be read."""
    return Batch(torch.zeros(1, 3, side, side), torch.zeros(1, dtype=torch.int64), {})


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


def precision(name: str, device: torch.device) -> str:
    """The precision that "auto" is, or the one given.

    Raises:
        ValueError: the device cannot train in it.
    """
    if name == "fp16" and device.type != "cuda":
        raise ValueError("precision = fp16: needs a GPU; use bf16 or fp32")
    if name != "auto":
        return name
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def best(history: list[Row]) -> Row:
    """The row of the highest top-1, among equals of the lowest loss; of averaged weights if any."""
    which = "ema" if "ema_top1" in history[0] else "val"

    def quality(row: Row) -> tuple[float, float]:
        top1, loss = row[f"{which}_top1"], row[f"{which}_loss"]
        return (-1.0, 0.0) if top1 is None or loss is None else (top1, -loss)

    return max(history, key=quality)


def digest(*halves: LabelledImages | StreamedImages) -> str:
    """What tells sets of images apart wherever their folder is: names of files and classes."""
    found = hashlib.sha256()
    for half in halves:
        found.update(repr(half.classes).encode())
        if isinstance(half, LabelledImages):
            found.update(repr(list(half.labels)).encode())
            for image in half.sources if isinstance(half.sources[0], Path) else ():
                found.update(repr(image.name).encode())
    return found.hexdigest()
