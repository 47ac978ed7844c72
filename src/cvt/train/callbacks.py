"""Callbacks: code of a user, and the trackers, that a run calls at its events."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cvt.train.recipe import Recipe


@dataclass(frozen=True)
class RunState:
    """Where a run is, for a callback to read.

    Attributes:
        recipe: of the run.
        output: its folder.
        step: steps that are done.
        steps: steps of the whole run.
        epoch: epochs that are done or under way.
        history: the rows of `results.csv` so far.
        metrics: of the event, see `Callback`.
        stop: ends the run for the reason that it is given, as `patience` does: after the step under
            way, with a checkpoint, an evaluation and the best model. `resume` continues the run.

    Example:
        >>> from cvt.train import Callback, RunState
        >>> class Report(Callback):
        ...     def on_epoch_end(self, run: RunState) -> None:
        ...         print(f"{run.step} of {run.steps}: {run.metrics['train_loss']}")
    """

    recipe: Recipe
    output: Path
    step: int
    steps: int
    epoch: int
    history: Sequence[Mapping[str, float | None]]
    metrics: Mapping[str, float | None]
    stop: Callable[[str], None]


class Callback:
    """The events of a run; a subclass overrides those that it needs.

    Of several processes, the first calls them. A callback reads: no weight, image or random number
    of the run depends on one, so a run with callbacks resumes exactly, too, whatever they draw from
    the global generators. What a callback itself remembers is its own to keep: it can compute it
    from `run.history` in `on_train_begin`. Where an event raises, the run saves a checkpoint after
    the step under way and raises the same error.

    Example:
        >>> from cvt.train import Callback, load_recipe, train
        >>> class GoodEnough(Callback):
        ...     def on_epoch_end(self, run):
        ...         if run.metrics["val_top1"] is not None and run.metrics["val_top1"] >= 0:
        ...             run.stop("good enough")
        >>> recipe = load_recipe("digits", {"epochs": 2, "workers": 0})
        >>> train(recipe, "runs/good-enough", callbacks=[GoodEnough()])["epoch"]
        1
    """

    def on_train_begin(self, run: RunState) -> None:
        """The run begins or resumes: `run.step` steps are done. No metrics."""

    def on_step_end(self, run: RunState) -> None:
        """A step was taken.

        Metrics: `loss`, None if no image of the step could be read, and `learning_rate`. On a GPU
        the next step is under way, so that it does not wait for Python.
        """

    def on_epoch_end(self, run: RunState) -> None:
        """An epoch ended, and its models and results are written.

        Metrics: its row of `results.csv`, with None where it was not validated; and
        `images_per_second` and `waiting`, the share of the time spent on waiting for images.
        """

    def on_train_end(self, run: RunState) -> None:
        """The run ends, also by a signal or an error; each `on_train_begin` is followed by one.

        Metrics: the row of the best epoch if the run ended by itself, else none.
        """


class Events:
    """Calls the callbacks of a run, up to the first error.

    Attributes:
        reason: for which a callback ends the run; empty while none does.
        error: that a callback raised.
        failed: the event that raised it.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = callbacks
        self.reason = ""
        self.error: Exception | None = None
        self.failed = ""

    def stop(self, reason: str) -> None:
        """End the run; the first reason counts."""
        self.reason = self.reason or reason or "a callback ended the run"

    def call(self, event: str, run: RunState) -> None:
        """Call an event of all callbacks; after an error the end of the run alone."""
        for callback in self.callbacks:
            if self.error is None or event == "on_train_end":
                try:
                    getattr(callback, event)(run)
                except Exception as error:
                    if self.error is None:
                        self.error, self.failed = error, f"{type(callback).__name__}.{event}"
