"""What the commands share: messages, quiet libraries, opening a model. It needs no rich."""

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import click

from cvt.text import printable

if TYPE_CHECKING:
    from cvt.checkpoints import ModelSource
    from cvt.runtime import FeatureSettings
    from cvt.runtime.base import Runtime


class Printer:
    """Prints names of files and classes without what a terminal obeys.

    Args:
        err: to the error stream instead of the output stream.
    """

    def __init__(self, err: bool = False) -> None:
        self.err = err

    def print(self, text: str, **style: Any) -> None:
        """Print a message of `cvt.text.printable`; the style is that of `click.style`."""
        color = False if os.environ.get("NO_COLOR") else None  # None: where it is a terminal
        text = printable(text, keep="\n")
        click.echo(click.style(text, **style) if style else text, err=self.err, color=color)


out = Printer()
err = Printer(err=True)


class SafeFormatter(logging.Formatter):
    """Formats records without what a terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        """As in logging, of `cvt.text.printable`."""
        return printable(super().format(record), keep="\n")


def quiet_libraries(verbose: bool = False) -> None:
    """Let this package's warnings through in one line each, and keep transformers' reports back.

    transformers is not imported for it: an exported model does without.

    Args:
        verbose: let through what this package logs for information, too.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if sys.modules.get("transformers"):  # it has read the variables already
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    handler = logging.StreamHandler()
    handler.setFormatter(SafeFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    if verbose:
        logging.getLogger("cvt").setLevel(logging.INFO)


def open_classifier(
    model: "str | ModelSource",
    runtime: str,
    precision: str | None,
    device: str,
    threads: int | None,
    images: int | None,
    verify: bool,
    features: "FeatureSettings | None" = None,
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
        features: likewise.

    Returns:
        The runtime and the image processor.
    """
    from cvt.checkpoints import load_preprocessing, model_source
    from cvt.runtime import open_runtime

    source, how = model_source(model), (runtime, precision, device, threads)
    classifier = open_runtime(source, *how, images=images, verify=verify, features=features)
    err.print(f"runtime: {classifier.describe}")
    return classifier, load_preprocessing(source, classifier.config)
