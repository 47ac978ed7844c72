"""Metrics of a run for TensorBoard, by accelerate's tracker."""

import math
from collections.abc import Mapping
from pathlib import Path

from accelerate.tracking import TensorBoardTracker

from cvt.libraries import keep_tensorflow_out_of_tensorboard


class Tracker:
    """Writes the metrics of a run to `output/tensorboard`, in the main process only.

    Args:
        output: the run folder.
        step: the run's, from which on earlier events are dropped: those after the checkpoint that
            a run is resumed from.
    """

    def __init__(self, output: Path, step: int) -> None:
        keep_tensorflow_out_of_tensorboard()
        self.tracker = TensorBoardTracker("tensorboard", output, purge_step=step + 1)
        self.tracker.start()

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write the finite values of a step."""
        finite = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
        self.tracker.log(finite, step)

    def close(self) -> None:
        """Write what is still in memory."""
        self.tracker.finish()
