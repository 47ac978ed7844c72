"""What the commands share: consoles, progress bars, quiet libraries."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Names of files and classes are printed as they are, never as markup and never broken.
out = Console(highlight=False, markup=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Let this package's warnings through in one line each, and keep transformers' reports back."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)


def bars() -> Progress:
    """A progress display on the error stream, if that is a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


@contextmanager
def bar(description: str, total: int) -> Iterator[Callable[[], None]]:
    """One progress bar; call what it gives after each step."""
    with bars() as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


class TrainingBars:
    """The progress of `cvt.train.train`: a bar while it works, a line after each epoch."""

    def __enter__(self) -> "TrainingBars":
        self.display = bars()
        self.display.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.display.stop()

    def stage(self, name: str, total: int) -> Callable[[], None]:
        """Show a bar of `total` steps in the place of the last one."""
        for task in self.display.task_ids:
            self.display.remove_task(task)
        task = self.display.add_task(name, total=total)
        return lambda: self.display.advance(task)

    def epoch(self, row: dict[str, float]) -> None:
        """Print the results of an epoch."""
        err.print(
            f"epoch {row['epoch']:>3}  loss {row['train_loss']:.4f}  "
            f"test loss {row['test_loss']:.4f}  top-1 {100 * row['test_top1']:.2f} %"
        )
