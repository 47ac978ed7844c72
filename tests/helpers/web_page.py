"""A page of `cvt export --to web`: its server, its runtime's files, and the browser."""

import contextlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cvt.export.web import PACKAGE, RUNTIME_FILES

CHROMIUM = Path("/usr/bin/chromium")
# The user's own, where conftest.py leads everything else away from it.
RUNTIME = Path.home() / ".cache/cvt-vision/graphs" / PACKAGE.replace("@", "-")
needs_browser = [
    pytest.mark.skipif(
        not CHROMIUM.is_file(), reason=f"no Chromium at {CHROMIUM}: `make browser` installs it"
    ),
    pytest.mark.skipif(
        not all((RUNTIME / name).is_file() for name in RUNTIME_FILES),
        reason=f"no {PACKAGE} in the user's cache: `make browser` fetches it",
    ),
]


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder; below /isolated they come with the headers that allow threads."""

    extensions_map = {".js": "text/javascript", ".wasm": "application/wasm"}

    def translate_path(self, path):
        return super().translate_path(path.removeprefix("/isolated"))

    def end_headers(self):
        if self.path.startswith("/isolated"):
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def served(folder):
    """The address of a static server of a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
