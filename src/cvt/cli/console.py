"""What the commands share: consoles, progress bars, quiet libraries."""

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cvt.text import printable

if TYPE_CHECKING:
    from cvt.checkpoints import ModelSource
    from cvt.runtime.base import Runtime


class SafeConsole(Console):
    """Prints names of files and classes without what a terminal obeys; never as markup."""

    def render_str(self, text: str, **options: Any) -> Text:
        """As in rich, of `cvt.text.printable`; cells of tables come here too."""
        return super().render_str(printable(text, keep="\n"), **options)


class SafeFormatter(logging.Formatter):
    """Formats records without what a terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        """As in logging, of `cvt.text.printable`."""
        return printable(super().format(record), keep="\n")


out = SafeConsole(highlight=False, markup=False, soft_wrap=True)
# How the figures of a step are shown.
FORMATS = {"loss": "loss {:.3f}", "lr": "lr {:.2e}", "images_per_second": "{:.0f} images/s"}
err = SafeConsole(stderr=True, highlight=False, markup=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Let this package's warnings through in one line each, and keep transformers' reports back."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    handler = logging.StreamHandler()
    handler.setFormatter(SafeFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)


def open_classifier(
    model: "str | ModelSource",
    runtime: str,
    precision: str | None,
    device: str,
    threads: int | None,
    images: int | None,
    verify: bool,
) -> "tuple[Runtime, Any]":
    """Open a model by the options of a command, and print what runs it.

    Args:
        model: a name, a folder or a file; or what `model_source` returned for it.
        runtime: as in `cvt.runtime.open_runtime`.
        precision: likewise.
        device: likewise.
        threads: likewise.
        images: likewise.
        verify: likewise.

    Returns:
        The runtime and the image processor.
    """
    from cvt.checkpoints import load_preprocessing, model_source
    from cvt.runtime import open_runtime

    source, how = model_source(model), (runtime, precision, device, threads)
    classifier = open_runtime(source, *how, images=images, verify=verify)
    err.print(f"runtime: {classifier.describe}")
    return classifier, load_preprocessing(source, classifier.config)


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
def bar(description: str, total: int | None) -> Iterator[Callable[[], None]]:
    """One progress bar; call what it gives after each step."""
    with bars() as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


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

    def epoch(self, row: dict[str, float | None]) -> None:
        """Print the results of an epoch."""
        parts = [f"epoch {row['epoch']:>3}  loss {row['train_loss']:.4f}"]
        for prefix, name in (("val", "val"), ("ema", "averaged")):
            if (top1 := row.get(f"{prefix}_top1")) is not None:
                loss = row[f"{prefix}_loss"]
                parts.append(f"{name} loss {loss:.4f}  top-1 {100 * top1:.2f} %")
        err.print("  ".join(parts))
