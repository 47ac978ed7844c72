"""What every request passes first: refused by its headers, or measured and passed on."""

import json
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cvt.http_server import host_of, is_loopback
from cvt.serving.metrics import Metrics
from cvt.serving.settings import MIB, Settings


class Json(Response):
    """A JSON answer in ASCII: nothing in a label can break it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return json.dumps(content, allow_nan=False).encode()


def problem(status: int, sentence: str, headers: Any = None) -> Json:
    """The answer to a request that is refused, or failed."""
    return Json({"detail": sentence}, status, headers)


class Boundary:
    """The application around another.

    Args:
        app: the other.
        settings: of the service.
        metrics: likewise.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, begin = 500, time.perf_counter()  # of what leaves by an exception

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            app = self.refusal(Headers(scope=scope)) or self.app
            await app(scope, receive, noted)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, status).inc()
            self.metrics.request_seconds.labels(path).observe(time.perf_counter() - begin)

    def refusal(self, headers: Headers) -> Response | None:
        """The answer to a request that is refused by its headers; None for others."""
        if self.settings.loopback and not is_loopback(host_of(headers.get("host", ""))):
            return problem(403, "the Host header is not a name of this machine")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self.settings.max_bytes:
            return problem(413, f"a request may have {self.settings.max_bytes / MIB:g} MiB")
        return None
