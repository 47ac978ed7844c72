"""Serves the page, and deletes what it was given."""

import asyncio
import contextlib
import ctypes
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Set
from pathlib import Path
from typing import Any

from cvt.app.limits import ABANDONED_SECONDS, SWEEP_SECONDS
from cvt.app.sessions import Sessions
from cvt.files import locked
from cvt.http_server import is_loopback, listening, uvicorn_server
from cvt.libraries import require

PORTS = range(7860, 7880)  # tried in turn, where none is given
PREFIX = "cvt-app-"
# Nothing is sent anywhere: no statistics, no look for a newer version, no hub.
SETTINGS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SSR_MODE": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_ALLOWED_PATHS": "",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


# What ends a process without asking it to clean up: a request, and a terminal that is closed.
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int | None = None,
    language: str | None = None,
    examples: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    ready: Callable[[str], None] = print,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM; all that it was given is deleted then.

    Args:
        model: the name of a model, a model folder or a file of weights.
        host: the address to listen on; others than this machine's own let others in.
        port: the port; by default the first free one of `PORTS`.
        language: `en` or `zh`; by default the browser's.
        examples: a folder of pictures to try, see `cvt.app.examples.find_examples`.
        device: as in `cvt.Classifier`.
        threads: likewise.
        ready: called with the address of the page when it can be opened.

    Raises:
        ImportError: gradio is not installed.
        FileNotFoundError: there is no such model or folder.
        OSError: the port is in use, or the address is not one of this machine.
        ValueError: the model has no classes or explanations to show.
    """
    require("cvt app", "gradio", extra="app")
    ports = PORTS if port is None else [port]
    with upload_folder() as folder, listening(host, ports) as listener:
        os.environ |= SETTINGS | {"GRADIO_TEMP_DIR": str(folder)}
        private = is_loopback(listener.getsockname()[0])
        app = build(model, folder, private, language, examples, device, threads)
        uvicorn_server(app, listener, ready, graceful_seconds=1).run([listener])


def build(
    model: str,
    folder: Path,
    private: bool,
    language: str | None = None,
    examples: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> Any:
    """The application: both languages of the page behind the guard.

    Args:
        model: as in `serve`.
        folder: where gradio keeps files.
        private: whether only this machine reaches the page.
        language: as in `serve`.
        examples: likewise.
        device: likewise.
        threads: likewise.
    """
    import gradio
    from fastapi import FastAPI

    from cvt.app.card import model_card
    from cvt.app.examples import find_examples
    from cvt.app.guard import Guard
    from cvt.app.handlers import Handlers
    from cvt.app.page import appearance, build_page
    from cvt.app.texts import TEXTS
    from cvt.app.viewer import Viewer

    found = find_examples(model, examples, private)
    viewer, sessions = Viewer(model, device, threads), Sessions()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        gc.collect()
        gc.freeze()  # what was loaded stays, so a sweep need not look through it
        task = asyncio.create_task(sweep(folder, sessions))
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for name, texts in TEXTS.items():
        page = build_page(
            Handlers(viewer, sessions, texts, found), model_card(model, viewer, texts), texts
        )
        gradio.mount_gradio_app(
            app,
            page,
            path=f"/{name}",
            allowed_paths=[],
            footer_links=[],
            show_error=False,
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            **appearance(texts),
        )
    return Guard(app, folder, language, private)


async def sweep(folder: Path, sessions: Sessions) -> None:
    """Delete what is too old, again and again: gradio knows only of uploads that were completed."""
    own = set(folder.rglob("*"))  # the examples
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        sessions.drop_expired()
        await asyncio.to_thread(delete_older, folder, ABANDONED_SECONDS, own)
        await asyncio.to_thread(return_memory)


def return_memory() -> None:
    """Give the system what is free: gradio leaves cycles, and glibc keeps what threads freed."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)


def delete_older(folder: Path, seconds: float, own: Set[Path] = frozenset()) -> None:
    """Delete the files below a folder that are older, and empty folders that are.

    A young empty folder stays: an upload is about to be written to it.

    Args:
        folder: where to look.
        seconds: the age.
        own: what stays, whatever its age.
    """
    # `os.walk` skips folders that are deleted meanwhile; `rglob` raises.
    walk = os.walk(folder, topdown=False)
    for path in (Path(place, name) for place, folders, files in walk for name in files + folders):
        with contextlib.suppress(OSError):  # of a folder that is not empty, of what is gone
            if path in own or time.time() - path.lstat().st_mtime <= seconds:
                continue
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """A folder for uploads that is gone at the end, also after SIGTERM.

    Folders that a killed process has left are deleted first: a page holds a lock on its own.
    """
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, or another user's
            if not left.is_symlink() and left.stat().st_uid == os.getuid():
                with locked(left):
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
        before = [(number, signal.signal(number, stop)) for number in STOPS]
        try:
            with locked(Path(folder)):
                yield Path(folder)
        finally:
            for number, handler in before:
                signal.signal(number, handler)


def stop(number: int, frame: object) -> None:
    """End the process as SIGTERM would, but cleaning up; uvicorn ends its connections first."""
    if number == signal.SIGTERM:
        sys.exit(128 + number)
    signal.raise_signal(signal.SIGTERM)
