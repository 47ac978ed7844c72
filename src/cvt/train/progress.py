"""What hears of a training run."""

from collections.abc import Callable
from typing import Protocol

Row = dict[str, float | None]  # the results of an epoch, by the columns of results.csv


class Progress(Protocol):
    """What hears of a run; the command line shows it as bars."""

    def say(self, text: str) -> None:
        """A line about the run."""
        ...

    def stage(self, name: str, total: int | None, done: int = 0) -> Callable[..., None]:
        """A part of the run begins; call the answer after each step, with figures to show."""
        ...

    def epoch(self, row: Row) -> None:
        """An epoch ended with these results."""
        ...


class NullProgress:
    """The progress of which nobody hears."""

    def say(self, text: str) -> None:
        """Nothing."""

    def stage(self, name: str, total: int | None, done: int = 0) -> Callable[..., None]:
        """Nothing."""
        return lambda **figures: None

    def epoch(self, row: Row) -> None:
        """Nothing."""
