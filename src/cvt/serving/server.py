"""Runs the service on one machine, by uvicorn."""

import math
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cvt.http_server import is_loopback, listening, uvicorn_server
from cvt.inference.classifier import Classifier
from cvt.libraries import require
from cvt.serving.settings import Settings

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def open_models(
    words: Sequence[str],
    runtime: str = "auto",
    precision: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    *,
    verify: bool = True,
) -> dict[str, tuple[Classifier, str | None]]:
    """The models of a service, by their names.

    Args:
        words: `NAME=MODEL`, or a MODEL, whose name is the last part of its path.
        runtime: as in `cvt.Classifier`, as all that follows.
        precision: likewise.
        device: likewise.
        threads: likewise.
        verify: likewise.

    Raises:
        FileNotFoundError: there is no such model.
        ImportError: what a service needs is not installed.
        ValueError: a name is none, or of two models.
    """
    require(
        "cvt serve", "fastapi", "uvicorn", "python_multipart", "prometheus_client", extra="serve"
    )
    return {
        name: (Classifier(model, runtime, precision, device, threads, verify=verify), None)
        for name, model in named_models(words).items()
    }


def named_models(words: Sequence[str]) -> dict[str, str]:
    """Models by the names that requests give.

    Args:
        words: as in `open_models`.

    Raises:
        ValueError: a name is none, or of two models.
    """
    named: dict[str, str] = {}
    for word in words:
        name, found, model = word.partition("=")
        if not found or Path(word).exists():
            model, name = word, Path(word).stem if Path(word).is_file() else Path(word).name
        if not NAME.fullmatch(name):
            raise ValueError(f"{word}: {name!r} is no name for requests; NAME=MODEL gives one")
        if name in named:
            raise ValueError(f"{named[name]} and {model} are both named {name}; NAME=MODEL tells")
        named[name] = model
    return named


def serve(
    classifiers: Mapping[str, tuple[Classifier, str | None]],
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8000,
    ready: Callable[[str], None] = print,
) -> None:
    """Serve until SIGTERM or Ctrl-C: no new requests then, and those in flight are answered.

    Args:
        classifiers: as in `cvt.serving.application.create_app`.
        settings: limits and batches; `loopback` follows from the address.
        host: the address to listen on; others than this machine's own let others in.
        port: the port; 0 is any free one.
        ready: called with the address when requests are answered.

    Raises:
        OSError: the port is in use, or the address is not one of this machine.
        ValueError: a model has no classes.
    """
    from cvt.serving.application import create_app

    with listening(host, [port]) as listener:
        app = create_app(classifiers, replace(settings, loopback=is_loopback(host)))
        server = uvicorn_server(app, listener, ready, math.ceil(settings.timeout) + 1)
        # uvicorn ends with the signal that it received; with this handler, with 0.
        before = signal.signal(signal.SIGTERM, server.handle_exit)
        try:
            server.run([listener])
        finally:
            signal.signal(signal.SIGTERM, before)
