"""Trackers of a run, by accelerate: TensorBoard, Weights & Biases, MLflow and trackio."""

import dataclasses
import json
import logging
import math
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any

from accelerate import tracking

from cvt.files import read_json, staged
from cvt.libraries import keep_tensorflow_out_of_tensorboard, require
from cvt.train.callbacks import Callback, RunState
from cvt.train.recipe import Recipe
from cvt.train.strict_yaml import write_yaml

logger = logging.getLogger(__name__)
PROJECT = "cvt"  # of Weights & Biases, MLflow and trackio, where their own variables name no other
IDS = "trackers.json"  # in the run folder: the tracker's id of the run, for a resumed one
LIBRARIES = {  # of each tracker: the libraries, and the extra of this package that brings them
    "tensorboard": (("tensorboard",), "train"),
    "wandb": (("wandb",), "track"),
    "mlflow": (("mlflow", "sqlalchemy", "alembic"), "track"),
    "trackio": (("trackio",), "track"),
}


def require_trackers(recipe: Recipe) -> None:
    """Make sure that the trackers of a recipe are installed.

    Raises:
        ImportError: one is not; names the command that installs it.
    """
    for name in recipe.trackers:
        libraries, extra = LIBRARIES[name]
        require(f"track = {name}", *libraries, extra=extra)


class Tracker(Callback):
    """Logs the recipe and the metrics of a run to one tracker; those of a resumed run to the same.

    A tracker that cannot be started ends the run before its first step. One that fails later is
    warned of and dropped: no run ends for it.

    Args:
        name: of the tracker.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tracker: Any = None

    def on_train_begin(self, run: RunState) -> None:
        """Start the tracker.

        Raises:
            RuntimeError: it cannot be started; names it.
        """
        known = _ids(run.output)
        try:
            with redirect_stdout(sys.stderr):  # trackio prints
                tracker = _tracker(self.name, run, known.get(self.name))
                tracker.start()
            recipe, is_new = dataclasses.asdict(run.recipe), self.name not in known
            if self.name == "tensorboard":
                text = indent(write_yaml(recipe), "    ")  # as Markdown's code
                tracker.log({"recipe": text}, run.step)
            elif is_new or self.name != "mlflow":  # whose parameters cannot change
                tracker.store_init_configuration(recipe)
            if is_new and self.name in ID_OF:
                with staged(run.output / IDS, overwrite=True) as file:
                    ids = known | {self.name: ID_OF[self.name](tracker)}
                    file.write_text(json.dumps(ids, indent=2) + "\n", "utf-8")
        except Exception as error:
            raise RuntimeError(f"track = {self.name} cannot be started: {error}") from error
        self.tracker = tracker

    def on_step_end(self, run: RunState) -> None:
        """Log the metrics of the step."""
        self._log("train", run)

    def on_epoch_end(self, run: RunState) -> None:
        """Log the metrics of the epoch."""
        self._log("epoch", run)

    def on_train_end(self, run: RunState) -> None:
        """Write what is still in memory."""
        if self.tracker is not None:
            self._attempt(self.tracker.finish)

    def _log(self, prefix: str, run: RunState) -> None:
        if self.tracker is not None:
            finite = {
                f"{prefix}/{name}": value
                for name, value in run.metrics.items()
                if value is not None and math.isfinite(value)
            }
            # MLflow would wait for its database, longer than a small step takes.
            settings = {"synchronous": False} if self.name == "mlflow" else {}
            self._attempt(partial(self.tracker.log, finite, run.step, **settings))

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr):
                action()
        except Exception as error:
            logger.warning(f"track = {self.name} failed; the run continues without it: {error}")
            self.tracker = None


class TrackioTracker(tracking.TrackioTracker):
    """accelerate's, which lets trackio finish the run once more as the process ends."""

    def finish(self) -> None:
        """Finish the run."""
        import trackio

        trackio.finish()


def _tracker(name: str, run: RunState, known: str | None) -> Any:
    """A tracker that is not started yet.

    Args:
        name: of the tracker.
        run: as it begins or resumes.
        known: the tracker's id of the run; None of a new one.
    """
    title = run.output.resolve().name
    if name == "tensorboard":
        keep_tensorflow_out_of_tensorboard()
        # Events after the checkpoint that a run is resumed from are dropped.
        return tracking.TensorBoardTracker(name, run.output, purge_step=run.step + 1)
    if name == "mlflow":
        return tracking.MLflowTracker(PROJECT, run_id=known, run_name=title)
    if name == "wandb":
        return tracking.WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", title),
            dir=os.environ.get("WANDB_DIR", run.output),
            **({"id": known, "resume": "allow"} if known else {}),
        )
    # trackio finds a run by its name, so no two may have one.
    return TrackioTracker(
        PROJECT, name=known or f"{title}-{secrets.token_hex(3)}", resume="allow", embed=False
    )


ID_OF: dict[str, Callable[[Any], str]] = {
    "wandb": lambda tracker: tracker.run.id,
    "mlflow": lambda tracker: tracker.tracker.info.run_id,
    "trackio": lambda tracker: tracker.run.name,
}


def _ids(output: Path) -> dict[str, str]:
    """The ids that the trackers gave a run."""
    path = output / IDS
    return read_json(path) if path.is_file() else {}
