"""Runs the service on one machine, by uvicorn."""

import math
import re
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cvt.checkpoints import load_preprocessing, model_source
from cvt.http_server import is_loopback, uvicorn_server
from cvt.runtime import FeatureSettings, open_runtime
from cvt.runtime.factory import MANY_IMAGES
from cvt.serving.served_model import OpenedModel
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
) -> dict[str, OpenedModel]:
    """The models of a service, by their names.

    Args:
        words: `NAME=MODEL`, or a MODEL, whose name is the last part of its path.
        runtime: as in `cvt.runtime.open_runtime`, as all that follows.
        precision: likewise.
        device: likewise.
        threads: likewise.
        verify: likewise.

    Raises:
        FileNotFoundError: there is no such model.
        ImportError: the runtime is not installed.
        ValueError: a name is none, or of two models.
    """
    opened = {}
    for name, model in named_models(words).items():
        source = model_source(model)
        features = None if source.is_export else FeatureSettings()  # an export has its own
        how = (runtime, precision, device, threads)
        running = open_runtime(source, *how, images=MANY_IMAGES, verify=verify, features=features)
        opened[name] = OpenedModel(
            running, load_preprocessing(source, running.config), source.sha256
        )
    return opened


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
            raise ValueError(f"{word}: {name!r} is no name for requests; NAME=MODEL sets one")
        if name in named:
            raise ValueError(
                f"{named[name]} and {model} are both named {name}; NAME=MODEL sets a name"
            )
        named[name] = model
    return named


def serve(
    opened: Mapping[str, OpenedModel],
    settings: Settings,
    listener: socket.socket,
    ready: Callable[[str], None] = print,
) -> None:
    """Serve until SIGTERM or Ctrl-C: no new requests then, and those in flight are answered.

    Args:
        opened: as in `cvt.serving.application.create_app`.
        settings: limits and batches; `loopback` follows from the address.
        listener: of `cvt.http_server.listening`; addresses other than this machine's own let
            others in.
        ready: called with the address when requests are answered.

    Raises:
        ValueError: a model has no classes.
    """
    from cvt.serving.application import create_app

    loopback = is_loopback(listener.getsockname()[0])
    app = create_app(opened, replace(settings, loopback=loopback))
    server = uvicorn_server(app, listener, ready, math.ceil(settings.timeout) + 1)
    # uvicorn ends with the signal that it received; with this handler, with 0.
    before = signal.signal(signal.SIGTERM, server.handle_exit)
    try:
        server.run([listener])
    finally:
        signal.signal(signal.SIGTERM, before)
