"""The training of a classifier, on one process or many, from wherever it was stopped."""

import contextlib
import logging
import math
import os
import random
import shutil
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import broadcast_object_list, patch_environment

from cvt.data import Images, LabelledImages, write_split
from cvt.data.workers import Interrupted
from cvt.files import check_path, is_occupied, locked
from cvt.inference.evaluate import AnyEvaluation
from cvt.inference.output_metrics import MultiLabelEvaluation
from cvt.runtime.factory import check_device
from cvt.train import run_folder
from cvt.train.balance import advice
from cvt.train.best_epoch import best, early_end
from cvt.train.callbacks import Callback, Events, RunState
from cvt.train.checkpointing import (
    check_state,
    checkpoints,
    newest_checkpoint,
    save_checkpoint,
    seconds_of,
)
from cvt.train.corrupt import CorruptImages, report_oversized
from cvt.train.evaluation import evaluate_held_out, evaluate_shared
from cvt.train.lr_find import found_rate
from cvt.train.models import set_training
from cvt.train.progress import NullProgress, Progress, Row
from cvt.train.recipe import METRICS_OF, Recipe, load_recipe, read_settings, resumed_recipe
from cvt.train.setup import Setup, set_up
from cvt.train.signals import StopSignal
from cvt.train.step import StepMetrics, TrainingStep
from cvt.train.tracking import Tracker, require_trackers

logger = logging.getLogger(__name__)
MAX_WAITING_SHARE = 0.2  # of an epoch's time
MIN_SECONDS_BETWEEN_CURVES = 10  # one takes as long as a short epoch
# Steps that run before the metrics of one are read, by device: a GPU then never waits for Python.
READ_BEHIND = {"cuda": 1}


class Stopped(SystemExit):
    """A signal ended the run and its state is saved; the exit code is 128 + the signal's number."""


def train(
    recipe: Recipe,
    output: str | Path,
    progress: Progress | None = None,
    callbacks: Sequence[Callback] = (),
) -> Row:
    """Train a classifier and leave a run folder; `cvt.train.run_folder` lists what is in it.

    Start it in several processes with `torchrun` or `accelerate launch` and they share the work.

    Args:
        recipe: how to train.
        output: the run folder.
        progress: receives the progress, in the first process only.
        callbacks: called at the events of the run, in this order, in the first process only.

    Returns:
        The row of `results.csv` of the best epoch, whose model is `output/best`.

    Raises:
        FileExistsError: `output` has something in it.
        ImportError: a tracker of the recipe is not installed.
        OSError: there is no such data, or something cannot be written.
        ValueError: the data or the recipe cannot be used, or too many images are unreadable.
        FloatingPointError: the loss became NaN or infinite; names the step and what to try.
        Stopped: SIGTERM or SIGINT; the state is saved.
        Exception: what a callback raised; the state is saved.

    Example:
        >>> from pathlib import Path
        >>> from cvt.train import load_recipe, train
        >>> recipe = load_recipe("digits", {"epochs": 1, "steps": 2, "workers": 0})
        >>> best = train(recipe, "runs/two-steps")
        >>> best["epoch"], Path("runs/two-steps/best/model.safetensors").exists()
        (1, True)
    """
    check_path(output, "output")
    output = Path(output)
    if recipe.folds and not recipe.fold:
        raise ValueError(
            f"folds = {recipe.folds}: cross_validate trains all of them, and fold chooses one"
        )
    if checkpoints(output / "checkpoints"):
        raise FileExistsError(f"{output} exists already; --resume resumes the run in it")
    if is_occupied(output) and not run_folder.killed_start(output):
        raise FileExistsError(f"{output} exists already, with no run to resume; take another")
    return _run(recipe, output, {}, progress, callbacks)


def resume(
    output: str | Path,
    changes: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[Callback] = (),
) -> Row:
    """Resume a run from its newest checkpoint that verifies, as if it had not been stopped.

    On another number of processes, each takes so many batches a step that the steps stay the same;
    but a stream's images are shared in another way then.

    Args:
        output: the run folder.
        changes: settings. Those of `cvt.train.recipe.RESUME_OVERRIDES` may differ from the run's,
            such as where the images are now, patience and max_hours; or the number of epochs, if
            the learning rate of the steps done would have been the same.
        progress: as in `train`.
        callbacks: as in `train`.

    Returns:
        As `train`.

    Raises:
        FileNotFoundError: there is no run in `output`.
        ValueError: no checkpoint is whole, the images are not the run's, a setting may not differ
            or was edited in args.yaml; else as `train`.

    Example:
        >>> from cvt.train import resume
        >>> resume("runs/two-steps")["epoch"]  # that of `train`: complete, so nothing is left to do
        1
    """
    check_path(output, "output")
    output = Path(output)
    path, state = newest_checkpoint(output / "checkpoints")
    check_state(state, path)
    state["seconds"] = seconds_of(path)
    recipe = load_recipe(None, state["recipe"])
    if (output / "args.yaml").is_file():  # what was edited in it counts, or is refused
        edited = read_settings(output / "args.yaml")
        recipe = resumed_recipe(recipe, edited, f"{output / 'args.yaml'}: ")
    recipe = resumed_recipe(recipe, changes or {})
    opening = f"resuming from {path}, {state['step']} steps done"
    return _run(recipe, output, state, progress, callbacks, opening)


def _run(
    recipe: Recipe,
    output: Path,
    state: dict[str, Any],
    progress: Progress | None,
    callbacks: Sequence[Callback],
    opening: str = "",
) -> Row:
    require_trackers(recipe)
    with isolated(), accelerator_on(recipe.device) as accelerator:
        shown = progress if progress and accelerator.is_main_process else NullProgress()
        if opening:
            shown.log(opening)
        stop_signal = StopSignal()
        if not state and accelerator.is_main_process:
            run_folder.delete_killed_start(output)
        if recipe.lr == "find":
            recipe = found_rate(recipe, output, accelerator, shown)
        setup = set_up(recipe, output, state, accelerator, shown, stop_signal.received)
        events = Events([*map(Tracker, recipe.trackers), *callbacks] if setup.is_main else [])
        return Trainer(setup, state, shown, stop_signal, events).run()


@contextlib.contextmanager
def accelerator_on(device: str) -> Iterator[Accelerator]:
    """The processes and their device; several GPUs are dealt out to several processes.

    Args:
        device: a name of torch's; "auto" is a GPU where there is one.

    Raises:
        ValueError: there is no such device, or several processes are to share one GPU.
    """
    check_device(device)
    is_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    is_shared = int(os.environ.get("WORLD_SIZE", "1")) > 1
    index = None if device == "auto" else torch.device(device).index
    if is_shared and index is not None:
        raise ValueError(f"device = {device}: each of several processes has one of its own")
    is_named = device not in ("auto", "cpu") and not is_shared
    named = (
        patch_environment(accelerate_torch_device=device) if is_named else contextlib.nullcontext()
    )
    with torch.accelerator.device_index(index):  # whose generator is seeded
        with named:
            accelerator = Accelerator(cpu=is_cpu, mixed_precision="no")
        yield accelerator


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


class Trainer:
    """A run at some step.

    Args:
        setup: what the run is built of.
        state: of the checkpoint that the run resumes from; empty for a new run.
        progress: receives the progress.
        stop_signal: notes the signals of this process.
        events: calls the callbacks.

    Raises:
        ValueError: the state does not fit the run.
    """

    def __init__(
        self,
        setup: Setup,
        state: dict[str, Any],
        progress: Progress,
        stop_signal: StopSignal,
        events: Events,
    ) -> None:
        self.setup, self.progress, self.stop_signal = setup, progress, stop_signal
        self.events = events
        self.recipe, self.plan, self.output = setup.recipe, setup.plan, setup.output
        self.train_step = TrainingStep(setup, self.must_stop, self.is_late)
        self.clock = time.monotonic() - state.get("seconds", 0.0)
        self.step: int = state.get("step", 0)
        self.history: list[Row] = state.get("history", [])
        self.losses: list[float] = state.get("losses", [])  # of the current epoch
        self.corrupt = CorruptImages(
            state.get("corrupt", {}), setup.recipe, setup.plan.images, setup.output, progress
        )
        self.speed: Row = {}  # of the last epoch
        self.found: Row = {}  # the results of the best epoch, at the end
        self.curve_drawn = -math.inf  # when, by the clock
        self.has_advised = False  # about the time that was spent on waiting for images
        if self.step > self.plan.steps or (self.at_epoch_end and self.step and not self.losses):
            raise ValueError(
                f"step = {self.step}: does not fit a run of {self.plan.steps} steps, of which "
                f"history has {len(self.history)} epochs and losses {len(self.losses)} steps"
            )

    def run(self) -> Row:
        """Train to the end; returns the row of the best epoch."""
        setup = self.setup
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.stop_signal.handled(self.plan.world))
            if setup.is_main:
                self.output.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.output))
                run_folder.restore_best(self.output)
                run_folder.write_settings(self.output, setup.first_recipe, self.plan, setup.device)
                if setup.splits.drawn:
                    assert isinstance(setup.splits.train, LabelledImages)
                    assert isinstance(setup.splits.validation, LabelledImages)
                    path = self.output / "split.csv"
                    write_split(path, setup.splits.train, setup.splits.validation)
            stack.push(self.end)
            stack.callback(delattr, setup, "batches")  # ends its workers
            if not self.step:
                self.save()
                report_oversized(setup.splits, self.recipe, self.plan, self.progress)
            self.call("on_train_begin", {})
            if self.at_epoch_end:  # stopped between the last step of an epoch and its end
                self.end_epoch()
            if not self.ending() and setup.is_main:  # that of a shorter run is out of date
                shutil.rmtree(self.output / "test", ignore_errors=True)
            while not (reason := self.ending()):
                if self.train_epoch():
                    self.end_epoch()
            history = self.history
            if self.step < self.plan.steps:
                self.progress.log(f"ended after {self.step} of {self.plan.steps} steps: {reason}")
                history = self.conclude()
            self.draw_curve(history)
            self.found = best(history, self.recipe.metric)
            if sentence := advice(self.found, self.recipe, setup.splits.train):
                self.progress.log(sentence)
            evaluate_held_out(setup, self.evaluated, self.progress)
            if setup.features:
                setup.features.delete()
        return self.found

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between its sessions."""
        return time.monotonic() - self.clock

    def is_late(self) -> bool:
        """Whether the time is over by the clock of the main process, or a callback ends the run."""
        limit = self.recipe.max_hours
        is_over = self.setup.is_main and limit is not None and self.seconds >= 3600 * limit
        return is_over or bool(self.events.reason)

    def must_stop(self) -> bool:
        """Whether the run is to save and leave: a signal was received, or a callback failed."""
        return self.stop_signal.received() or self.events.error is not None

    def ending(self) -> str:
        """Why the run ends here, the same in all processes; empty if it does not."""
        late = self.step > 0 and self.is_late()
        found = [late, late and self.events.reason, self.events.error is not None]
        is_late, reason, has_failed = broadcast_object_list(found)
        if has_failed:
            self.stop(together=True)
        if self.step == self.plan.steps:
            return "all steps are done"
        return reason or early_end(self.history, self.recipe, is_late)

    def call(self, event: str, metrics: Row, step: int | None = None) -> None:
        """Call an event of the callbacks, after the last step or the given one."""
        if self.events.callbacks:
            step = self.step if step is None else step
            run = RunState(
                *(self.recipe, self.output, step, self.plan.steps),
                epoch=self.plan.epochs_in(step),
                history=tuple(map(MappingProxyType, self.history)),
                metrics=MappingProxyType(metrics),
                stop=self.events.stop,
            )
            self.events.call(event, run)

    def end(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Call the last event; raise what a callback raised, if nothing else has."""
        self.call("on_train_end", self.found)
        if self.events.error and error is not self.events.error:
            raise self.events.error

    @property
    def at_epoch_end(self) -> bool:
        """Whether the steps of an epoch are done whose results are not there yet."""
        whole = self.step % self.plan.steps_per_epoch == 0 or self.step == self.plan.steps
        return whole and len(self.history) < self.plan.epochs_in(self.step)

    def train_epoch(self) -> bool:
        """Take the steps up to the end of the epoch; False if the time is over before it."""
        plan, save_steps = self.plan, self.recipe.save_steps
        set_training(self.setup.model, self.recipe)
        epoch = self.step // plan.steps_per_epoch
        self.compute_features(epoch)
        begin = epoch * plan.steps_per_epoch
        end = min(begin + plan.steps_per_epoch, plan.steps)
        name = f"epoch {epoch + 1}/{plan.epochs_in(plan.steps)}"
        shown = self.progress.stage(name, end - begin, self.step - begin)
        unread: deque[StepMetrics] = deque()
        behind = READ_BEHIND.get(self.setup.device.type, 0)
        self.train_step.waited = 0.0
        first, clock = self.step, time.perf_counter()
        while self.step < end:
            try:
                unread.append(self.train_step(self.step))
            except Interrupted:
                while unread:
                    self.read(unread.popleft())
                self.leave_waiting()
            self.step += 1
            is_due = save_steps is not None and self.step % save_steps == 0
            stop = late = False
            while len(unread) > (0 if self.step == end or is_due or stop or late else behind):
                stops, is_late = self.read(unread.popleft())
                stop, late = stop or stops, late or is_late
            rate = (self.step - first) * plan.images_per_step / (time.perf_counter() - clock)
            loss = self.losses[-1] if self.losses else None
            lr = self.setup.optimizer.param_groups[-1]["lr"]
            shown(loss=loss, lr=lr, images_per_second=rate)
            if stop:
                self.stop(together=True)
            if (is_due or late) and self.step < end:
                self.save()
            if late:
                break
        self.log_speed(epoch + 1, rate, self.train_step.waited / (time.perf_counter() - clock))
        return self.step == end

    def compute_features(self, epoch: int) -> None:
        """Run the frozen stages on the views of an epoch that they have not seen."""
        if not (features := self.setup.features):
            return
        for view in features.views_in(epoch):
            name = f"frozen stages, view {view + 1}/{self.recipe.views}"
            try:
                features.compute_view(view, self.progress.stage(name, self.plan.images))
            except Interrupted:
                self.stop()
            except FloatingPointError as error:
                raise self.diverged(str(error), self.step) from None

    def read(self, metrics: StepMetrics) -> tuple[bool, bool]:
        """Log the metrics of a step; returns whether the run is to stop, and if its time is over.

        Raises:
            FloatingPointError: its loss is NaN or infinite.
            ValueError: there are too many unreadable images.
        """
        loss, stopping, late, blank_share, failures = metrics.tensor.tolist()
        if not math.isfinite(loss):
            raise self.diverged(f"the loss is {loss}", metrics.step)
        is_blank = blank_share == 1
        if not is_blank:
            loss /= 1 - blank_share
            self.losses.append(loss)
        if failures:
            self.corrupt.add(metrics.failures, write=self.setup.is_main)
        row = {"loss": None if is_blank else loss, "learning_rate": metrics.lr}
        self.call("on_step_end", row, metrics.step + 1)
        return stopping > 0, late > 0

    def log_speed(self, epoch: int, images_per_second: float, waiting: float) -> None:
        """Write how fast an epoch was; advise once if it spent much time waiting for images."""
        self.speed = {"images_per_second": images_per_second, "waiting": waiting}
        if self.setup.is_main:
            run_folder.write_speed(self.output, {"epoch": epoch, **self.speed})
        if waiting > MAX_WAITING_SHARE and not self.has_advised:
            self.has_advised = True
            self.progress.log(
                f"{100 * waiting:.0f} % of the time in epoch {epoch} was spent waiting for images; "
                f"more workers help (now {self.recipe.workers}, on {os.cpu_count()} cores)"
            )

    def diverged(self, what: str, step: int) -> FloatingPointError:
        """The error for numbers that are not finite in a step, counted from 0."""
        saved = checkpoints(self.output / "checkpoints")
        return FloatingPointError(
            f"{what} in step {step + 1}, epoch {step // self.plan.steps_per_epoch + 1}, at "
            f"learning rate {self.setup.schedule.rate(step):.3g}; the last good state is "
            f"{saved[0] if saved else 'none'}. Try a lower lr, a longer warmup_epochs, "
            "clip_grad=1 or precision=fp32"
        )

    # -------------------------------------------------------------------------- between epochs

    def end_epoch(self) -> None:
        """Evaluate, write the results and the models, save."""
        row = self.new_row()
        evaluation = None
        number = len(self.history) + 1
        if self.step == self.plan.steps or number % self.recipe.eval_every == 0:
            evaluation = self.validate(row)
        self.history.append(row)
        self.losses = []
        state = self.state()
        self.write_epoch(state, self.history, evaluation)
        self.call("on_epoch_end", row | self.speed)
        self.save(state)
        self.progress.epoch(row, self.recipe.metric)

    def conclude(self) -> list[Row]:
        """Evaluate and write the models where the run ends early; returns the results.

        If the run ends between two validations, no checkpoint has the one here, and the best model
        so far is kept: a run that is resumed with more time ends as one that had it at once.
        """
        if self.losses or not self.history:
            history = [*self.history, self.new_row()]
        elif self.history[-1]["val_loss"] is None:
            history = [*self.history[:-1], dict(self.history[-1])]
        else:
            return self.history
        evaluation = self.validate(history[-1])
        if self.setup.is_main:
            run_folder.keep_best(self.output)
        self.write_epoch(self.state(), history, evaluation)
        self.progress.epoch(history[-1], self.recipe.metric)
        return history

    def new_row(self) -> Row:
        """The results of the epoch before its validation.

        Raises:
            ValueError: no image could be read.
        """
        number = len(self.history) + 1
        if not self.losses:
            raise ValueError(
                f"no training image of epoch {number} can be read; "
                f"{self.output / run_folder.CORRUPT} lists them"
            )
        row: Row = {
            "epoch": number,
            "step": self.step,
            "learning_rate": self.setup.optimizer.param_groups[-1]["lr"],
            "train_loss": sum(self.losses) / len(self.losses),
        }
        prefixes = ("val", "ema") if self.setup.ema else ("val",)
        names = METRICS_OF[self.recipe.problem]
        return row | dict.fromkeys(f"{prefix}_{name}" for prefix in prefixes for name in names)

    def validate(self, row: Row) -> AnyEvaluation:
        """Fill in the metrics of the validation; returns the evaluation of the model to write.

        Of several classes, the thresholds are chosen here.
        """
        weights = {"val": self.setup.model}
        if self.setup.ema:
            weights["ema"] = self.setup.averaged
        for prefix, model in weights.items():
            evaluation = self.evaluated(model, self.setup.splits.validation, "validation")
            if isinstance(evaluation, MultiLabelEvaluation):
                evaluation = evaluation.at_best_thresholds()
            names = METRICS_OF[self.recipe.problem]
            row.update({f"{prefix}_{name}": getattr(evaluation, name) for name in names})
        return evaluation

    def write_epoch(
        self, state: dict[str, Any], history: list[Row], evaluation: AnyEvaluation | None
    ) -> None:
        """Write the models, if the last epoch was validated, and the results."""
        if self.setup.is_main:
            if evaluation is not None:
                self.write_models(state, history, evaluation)
            run_folder.write_rows(self.output / "results.csv", history)
            if time.monotonic() - self.curve_drawn > MIN_SECONDS_BETWEEN_CURVES:
                self.draw_curve(history)

    def draw_curve(self, history: list[Row]) -> None:
        """Draw the learning curve."""
        if self.setup.is_main and history:
            run_folder.write_curve(self.output, history, self.recipe.metric)
            self.curve_drawn = time.monotonic()

    def write_models(
        self, state: dict[str, Any], history: list[Row], evaluation: AnyEvaluation
    ) -> None:
        """Write `last/`, and `best/` with its pictures if the last epoch is the best."""
        row = history[-1]
        model, adapter = self.setup.final_model(state)
        if isinstance(evaluation, MultiLabelEvaluation):
            of_classes = dict(zip(evaluation.labels, evaluation.thresholds, strict=True))
            model.config.thresholds = [of_classes[name] for name in model.config.class_names]
        is_first = len(history) <= self.recipe.eval_every
        for failure in evaluation.failures if is_first else ():
            logger.warning(f"not counted: {failure.error}")
        if is_best := best(history, self.recipe.metric) is row:
            run_folder.write_pictures(self.output, evaluation)
        for name in ("best", "last") if is_best else ("last",):
            folder = self.output / name
            processor = self.setup.processor
            run_folder.write_model(folder, model, processor, self.recipe, row, adapter)

    def evaluated(self, model: Any, images: Images, name: str) -> AnyEvaluation:
        """The evaluation of a model on every image once, shared by the processes."""
        total = images.length
        shown = self.progress.stage(name, total and -(-total // self.plan.world))
        # Sharded processes evaluate together; of others, the one that saves need not wait.
        may_stop = self.setup.is_main and not self.setup.is_sharded

        def after_image() -> None:
            shown()
            if may_stop and self.must_stop():
                self.stop()

        try:
            return evaluate_shared(self.setup, model, images, after_image, self.must_stop)
        except Interrupted:
            self.leave_waiting()
        except FloatingPointError as error:
            raise self.diverged(str(error), self.step - 1) from None

    # -------------------------------------------------------------------------- stopping

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; whole in the main process, under sharding too."""
        return self.setup.state() | {
            "step": self.step,
            "history": self.history,
            "losses": self.losses,
            "corrupt": self.corrupt.found,
        }

    def save(self, state: dict[str, Any] | None = None) -> None:
        """Write a checkpoint."""
        state = self.state() if state is None else state
        if self.setup.is_main:
            if not all(weight.isfinite().all() for weight in state["model"].values()):
                raise self.diverged("weights became NaN or infinite", self.step - 1)
            folder, keep = self.output / "checkpoints", self.recipe.keep
            save_checkpoint(folder, self.step, state, keep, self.seconds)

    def stop(self, together: bool = False) -> NoReturn:
        """Save and leave, for a signal or an error; all processes together if all stop here."""
        self.save()
        self.draw_curve(self.history)
        if together:  # torchrun kills the one that saves as soon as another has left
            self.setup.accelerator.wait_for_everyone()
        if self.events.error:
            self.progress.log(
                f"{self.events.failed} failed; saved after {self.step} steps; --resume continues"
            )
            raise self.events.error
        self.progress.log(f"stopped and saved after {self.step} steps; --resume continues")
        raise Stopped(128 + (self.stop_signal.number or signal.SIGTERM))

    def leave_waiting(self) -> NoReturn:
        """Leave while no image comes, as a signal has asked for; a step is not taken."""
        if not self.setup.is_sharded:  # whose state only all processes together can save
            self.stop()
        raise Stopped(128 + self.stop_signal.number)
