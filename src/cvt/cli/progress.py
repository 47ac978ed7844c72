"""Progress bars of the commands, on the error stream if that is a terminal."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cvt.cli.console import err
from cvt.inference.metrics import metric_text
from cvt.libraries import is_installed

if TYPE_CHECKING:
    from rich.progress import Progress

    from cvt.inference.result_file import ResultFile

Result = TypeVar("Result")
# How the figures of a step are shown.
FORMATS = {"loss": "loss {:.3f}", "lr": "lr {:.2e}", "images_per_second": "{:.0f} images/s"}


def bars() -> "Progress":
    """A progress display on the error stream, if that is a terminal."""
    from rich import progress

    from cvt.cli.rich_console import console

    stderr = console(stderr=True)
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=stderr,
        transient=True,
        # What is printed to the same terminal appears above the bar; a file stays a file.
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        disable=not stderr.is_terminal,
    )


@contextmanager
def bar(description: str, total: int | None) -> Iterator[Callable[[], None]]:
    """One progress bar; call what it gives after each step. No bar where rich is not installed."""
    if sys.stderr is None or not sys.stderr.isatty() or not is_installed("rich"):
        yield lambda: None
        return
    with bars() as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


def consume(
    title: str,
    results: Iterable[Result],
    write: Callable[[Any], object],
    error_of: Callable[[Result], str | None],
    file: "ResultFile | None" = None,
) -> tuple[int, int]:
    """Write results and report errors, with a progress bar; a file is complete then.

    Args:
        title: of the bar.
        results: of images.
        write: called with each that has no error.
        error_of: returns the error of a result.
        file: that `write` adds to.

    Returns:
        How many were skipped, and how many there were.
    """
    skipped = count = 0
    try:
        with bar(title, None) as step:
            for result in results:
                step()
                count += 1
                if error := error_of(result):
                    skipped += 1
                    err.print(f"skipped {error}", fg="yellow")
                else:
                    write(result)
    except BaseException:
        if file and file.count:
            err.print(f"{file.count} images are in {file.part}: --resume continues")
        raise
    if file:
        file.finish()
    return skipped, count


def exit_if_skipped(skipped: int, count: int) -> None:
    """Report images that were skipped, with exit code 3."""
    if skipped:
        err.print(f"{skipped} of {count} images skipped")
        raise click.exceptions.Exit(3)


class TrainingBars:
    """The progress of `cvt.train.train`: a bar while it works, a line after each epoch.

    Where the error stream is no terminal, plain lines instead of the bar, a few a minute.
    """

    EVERY = 20.0  # seconds between plain lines

    def __enter__(self) -> "TrainingBars":
        self.display = bars()
        self.display.start()
        self.printed_at = time.monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        self.display.stop()

    def log(self, text: str) -> None:
        """Print a line about the run."""
        err.print(text)

    def stage(self, name: str, total: int | None, done: int = 0) -> Callable[..., None]:
        """Show a bar of `total` steps in the place of the last one."""
        for task in self.display.task_ids:
            self.display.remove_task(task)
        task = self.display.add_task(name, total=total, completed=done)
        began, begun_at = time.monotonic(), done

        def advance(**figures: float | None) -> None:
            nonlocal done
            done += 1
            text = "  ".join(
                [name, *(FORMATS[k].format(v) for k, v in figures.items() if v is not None)]
            )
            self.display.update(task, advance=1, description=text)
            now = time.monotonic()
            if self.display.disable and now - self.printed_at > self.EVERY:
                self.printed_at = now
                left = (now - began) / (done - begun_at) * ((total or done) - done)
                err.print(f"{text}  {done}/{total or '?'}  {timedelta(seconds=round(left))} left")

        return advance

    def epoch(self, row: dict[str, float | None], metric: str) -> None:
        """Print the results of an epoch."""
        parts = [f"epoch {row['epoch']:>3}  loss {row['train_loss']:.4f}"]
        for prefix, name in (("val", "val"), ("ema", "averaged")):
            for each in dict.fromkeys(("loss", "top1", metric)):
                if (value := row.get(f"{prefix}_{each}")) is not None:
                    first = f"{name} " if each == "loss" else ""
                    parts.append(first + metric_text(each, value))
        err.print("  ".join(parts))
