"""The interface for displays of a training run's progress."""

from collections.abc import Callable
from typing import Protocol

Row = dict[str, float | None]  # the results of an epoch, by the columns of results.csv


class Progress(Protocol):
    """Receives the progress of a run; the command line shows it as bars."""

    def log(self, text: str) -> None:
        """A line about the run."""
        ...

    def stage(self, name: str, total: int | None, done: int = 0) -> Callable[..., None]:
        """A stage of the run begins; the function that is returned is called after each step."""
        ...

    def epoch(self, row: Row, metric: str) -> None:
        """An epoch ended with these results; `metric` chooses the best."""
        ...


class NullProgress:
    """Shows nothing."""

    def log(self, text: str) -> None:
        """Do nothing."""

    def stage(self, name: str, total: int | None, done: int = 0) -> Callable[..., None]:
        """Do nothing."""
        return lambda **figures: None

    def epoch(self, row: Row, metric: str) -> None:
        """Do nothing."""
