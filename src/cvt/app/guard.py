"""What stands between the network and gradio: an ASGI application around its own.

It lets through what the page itself asks for, and nothing else that gradio offers; it answers what
is too large or too much with a sentence in the language of the page; it gives the page its language
and the browser its rules.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cvt.app import limits
from cvt.app.texts import TEXTS, Texts, preferred
from cvt.http_server import host_of, is_loopback

API = "/gradio_api"
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json")
READ = ("/assets/", "/static/", "/svelte/", f"{API}/heartbeat/", f"{API}/file=")
ASKED = (f"{API}/queue/data", f"{API}/startup-events", f"{API}/upload_progress", f"{API}/app_id")
SENT = tuple(f"{API}/{name}" for name in ("upload", "queue/join", "cancel", "reset"))
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; font-src 'self' data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; frame-ancestors 'none'"
)
ICON = (  # three stages, as of the model
    "data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>"
    "<g fill='%232563eb'><rect y='1' width='4' height='14' rx='1'/>"
    "<rect x='6' y='4' width='4' height='8' rx='1'/>"
    "<rect x='12' y='6' width='4' height='4' rx='1'/></g></svg>"
)
DRAINED_BYTES = 2**30  # of a request that is refused: a browser reads no answer before all is sent


class Guard:
    """The application around gradio's.

    Args:
        app: gradio's pages, at `/en` and `/zh`.
        folder: where gradio keeps files, the only ones that are served.
        language: of the page at `/`; None for the browser's.
        private: whether only names of this machine are answered. Otherwise a page elsewhere could
            reach this one through a name of its own that leads here.
    """

    def __init__(self, app: ASGIApp, folder: Path, language: str | None, private: bool) -> None:
        self.app, self.folder = app, folder.resolve()
        self.language, self.private = language, private

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":  # the start and the end of the server; no sockets
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self.private and not is_loopback(host_of(headers.get("host", ""))):
            await PlainTextResponse("not the name of this machine", 403)(scope, receive, send)
            return
        if scope["path"] == "/":
            language = self.language or preferred(headers.get("accept-language", ""))
            query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
            await RedirectResponse(f"{language}/{query}", 307)(scope, receive, send)
            return
        language, path = split_path(scope["path"])
        if language not in TEXTS or not self.is_open(scope["method"], path):
            await PlainTextResponse("not found", 404)(scope, receive, send)
            return
        texts = TEXTS[language]
        if refusal := self.refusal(path, headers, texts):
            await drain(headers, receive)
            await refusal(scope, receive, send)
            return
        if path == f"{API}/queue/join":
            body = await content(receive)
            if not self.names_only_own_files(body):
                gone = JSONResponse({"detail": texts.expired}, 403)
                await gone(scope, receive, send)
                return
            receive = replayed(body, receive)
        await self.app(scope, receive, answering(send, path, texts))

    def is_own(self, path: str) -> bool:
        """Whether a path leads to a file in the folder, followed through its links."""
        file = Path(path).resolve()
        return file.is_file() and file.is_relative_to(self.folder)

    def names_only_own_files(self, body: bytes) -> bool:
        """Whether a JSON text names no files but uploaded ones.

        An application that is mounted does not check this itself: `launch` would turn that on.
        """
        try:
            paths = list(paths_in(json.loads(body)))
            return all(isinstance(path, str) and self.is_own(path) for path in paths)
        except (ValueError, OSError, RecursionError):  # no JSON; no path, such as with a zero byte
            return False

    def is_open(self, method: str, path: str) -> bool:
        """Whether the page itself asks for it."""
        if method == "POST":
            return path in SENT
        if method not in ("GET", "HEAD"):
            return False
        if path.startswith(f"{API}/file="):
            try:
                return self.is_own(path.removeprefix(f"{API}/file="))
            except (ValueError, OSError):
                return False
        return path in PAGES or path in ASKED or path.startswith(READ)

    def refusal(self, path: str, headers: Headers, texts: Texts) -> Response | None:
        """The answer to a request that is too large; None for others."""
        if path not in SENT:
            return None
        length = headers.get("content-length", "")
        if not length.isdecimal():
            return PlainTextResponse("a Content-Length is needed", 411)
        is_upload = path == f"{API}/upload"
        most = limits.REQUEST_BYTES if is_upload else limits.MESSAGE_BYTES
        if int(length) > most:
            sentence = texts.request_too_large.format(size=limits.megabytes(most))
            return PlainTextResponse(sentence, 413)
        if is_upload and folder_bytes(self.folder) + int(length) > limits.FOLDER_BYTES:
            return PlainTextResponse(texts.full, 429, {"Retry-After": "60"})
        return None


def answering(send: Send, path: str, texts: Texts) -> Send:
    """A `send` that gives every answer the browser's rules, and some another content."""
    started: list[Message] = []

    async def changed(message: Message) -> None:
        if message["type"] != "http.response.start":
            if not started:
                await send(message)
            elif not message.get("more_body"):
                await send_content(started.pop(), message)
            return
        add_rules(message)
        is_full = message["status"] == 503 and path == f"{API}/queue/join"
        is_page = message["status"] == 200 and path == "/"
        if is_full or is_page:
            started.append(message)
        else:
            await send(message)

    async def send_content(start: Message, last: Message) -> None:
        headers = MutableHeaders(scope=start)
        if path == "/":
            content = with_language(last["body"], texts)
        else:
            # The page shows its own English words for 503, and these for others.
            start["status"], headers["Retry-After"] = 429, "5"
            content = json.dumps({"detail": texts.busy}).encode()
        headers["Content-Length"] = str(len(content))
        await send(start)
        await send({"type": "http.response.body", "body": content})

    return changed


def with_language(page: bytes, texts: Texts) -> bytes:
    """The page for a language, whatever the browser's is: gradio knows no other setting."""
    script = (
        "<script>Object.defineProperty(navigator, 'language', "
        f"{{get: () => {json.dumps(texts.locale)}}})</script>"
    )
    script += f'<link rel="icon" href="{ICON}">'
    page = page.replace(b'lang="en"', f'lang="{texts.locale}"'.encode(), 1)
    return page.replace(b"<head>", b"<head>" + script.encode(), 1)


def add_rules(start: Message) -> None:
    """Headers that keep a browser from loading anything from elsewhere, or keeping pictures."""
    headers = MutableHeaders(scope=start)
    headers["Content-Security-Policy"] = POLICY
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "no-referrer"


async def content(receive: Receive) -> bytes:
    """The body of a request."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message["type"] == "http.request" and message.get("more_body", False)
    return body


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


def paths_in(value: Any) -> Iterator[Any]:
    """Every `path` in a value of JSON, however deep."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from paths_in(each)


async def drain(headers: Headers, receive: Receive) -> None:
    """Read what a refused request sends on, up to `DRAINED_BYTES`."""
    length: Any = headers.get("content-length", "")
    more = length.isdecimal() and int(length) <= DRAINED_BYTES
    while more:
        message = await receive()
        more = message["type"] == "http.request" and message.get("more_body", False)


def split_path(path: str) -> tuple[str, str]:
    """The language of a path, and the rest of it."""
    _, language, *rest = path.split("/", 2)
    return language, "/" + "".join(rest)


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below a folder; what is deleted meanwhile counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):  # which skips folders that are deleted meanwhile
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total
