"""A server on this machine that answers as the Hugging Face hub does for data sets."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef" * 2 + "01234567"


class DatasetServer(ThreadingHTTPServer):
    """Serves `repositories`, folders by hub id, while the `with` block lasts."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.endpoint = f"http://localhost:{self.server_port}"
        self.requests: list[str] = []  # "HEAD /datasets/someone/photos/resolve/main/README.md"

    def __enter__(self) -> "DatasetServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DatasetServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/([^/]+)/([^/]+)(?:/(.+))?)?", path)
        resolve = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or resolve
        folder = self.server.repositories.get(match[1]) if match else None
        if path == "/":
            self.reply(200)
        elif not match or not folder:
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif resolve:
            self.send_file(folder / resolve[3])
        elif match[2] == "tree":
            below = folder / (match[4] or "")
            self.answer([_entry(folder, path) for path in sorted(below.rglob("*"))])
        elif match[2] == "paths-info":
            named = [folder / name for name in json.loads(asked)["paths"]]
            self.answer([_entry(folder, path) for path in named if path.exists()])
        else:
            self.answer({"id": match[1], "sha": COMMIT, "private": False, "siblings": []})

    do_HEAD = do_POST = do_GET  # noqa: N815

    def send_file(self, file: Path) -> None:
        if not file.is_file():
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        data = file.read_bytes()
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self.reply(206, data[first : last + 1], headers)
        else:
            self.reply(200, data, headers)

    def answer(self, content: Any) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes = b"", headers: dict[str, Any] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """The test reads `requests`; nothing is printed."""


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": _digest(name.encode())}
    data = path.read_bytes()
    return {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
