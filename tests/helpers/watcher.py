"""A training run in this process, watched and stopped."""

import os
import signal

from cvt.train.checkpointing import newest_checkpoint
from cvt.train.progress import NullProgress


class Watcher(NullProgress):
    """Keeps the log, and sends a signal after so many steps."""

    def __init__(self, stop_after=None, signal=signal.SIGTERM, during="epoch"):
        self.lines, self.rows, self.steps = [], [], 0
        self.stop_after, self.signal, self.during = stop_after, signal, during

    def log(self, text):
        self.lines.append(text)

    def epoch(self, row, metric):
        self.rows.append(row)

    def stage(self, name, total, done=0):
        def step(**figures):
            if name.startswith(self.during):
                self.steps += 1
                if self.steps == self.stop_after:
                    os.kill(os.getpid(), self.signal)

        return step


def final_state(run):
    return newest_checkpoint(run / "checkpoints")[1]
