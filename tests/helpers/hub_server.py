"""A server on this machine that answers as the Hugging Face hub does for model repositories.

As on the hub, weights are large files: `resolve` describes them and sends readers on to the
storage, which is another host.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_FILES = (".safetensors", ".bin")


class HubServer(ThreadingHTTPServer):
    """Serves `repositories`, folders by hub id, while the `with` block lasts."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/storage"
        self.requests: list[str] = []  # "HEAD /microsoft/cvt-13/resolve/main/config.json"
        self.downloads: list[tuple[str, int]] = []  # name of the file, first byte sent
        self.downloads_to_break = 0  # so many more downloads from the storage end half-way
        self.overloaded: set[str] = set()  # answered with 503

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        storage = re.fullmatch(r"/storage/([^/]+/[^/]+)/(.+)", path)
        match = api or resolve or storage
        folder = self.server.repositories.get(match[1]) if match else None
        if path == "/":
            self.reply(200)
        elif not match or not folder:
            self.refuse(404, "RepoNotFound")
        elif match[1] in self.server.overloaded:
            self.refuse(503, "Overloaded")
        elif api:
            self.describe_repository(folder, *match.groups())
        elif resolve:
            self.resolve_file(folder, *match.groups())
        else:
            self.send_stored(folder / match[2])

    do_HEAD = do_GET  # noqa: N815

    def describe_repository(
        self, folder: Path, hub_id: str, what: str | None, revision: str | None
    ) -> None:
        files = _files(folder)
        commit = _commit(folder)
        answer: Any = {
            "id": hub_id,
            "sha": commit,
            "private": False,
            "siblings": [{"rfilename": name} for name in files],
        }
        if what == "tree":
            answer = [
                {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
                for name, data in files.items()
            ]
        if revision in (None, "main", commit):
            self.reply(200, json.dumps(answer).encode())
        else:
            self.refuse(404, "RevisionNotFound")

    def resolve_file(self, folder: Path, hub_id: str, revision: str, name: str) -> None:
        commit = _commit(folder)
        data = _files(folder).get(name)
        if revision not in ("main", commit):
            self.refuse(404, "RevisionNotFound")
        elif data is None:
            self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        elif name.endswith(LARGE_FILES):
            headers = {
                "Location": f"{self.server.storage}/{hub_id}/{name}",
                "X-Linked-Size": len(data),
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": commit,
            }
            self.reply(302, b"", headers)
        else:
            if self.command == "GET":
                self.server.downloads.append((name, 0))
            self.reply(200, data, {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": commit})

    def send_stored(self, file: Path) -> None:
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        self.server.downloads.append((file.name, first))
        headers = {"Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        sent = len(data) - first
        if self.server.downloads_to_break:
            self.server.downloads_to_break -= 1
            sent //= 2
        self.reply(206 if asked else 200, data[first:], headers, sent)

    def refuse(self, status: int, code: str, headers: dict[str, Any] | None = None) -> None:
        self.reply(status, b"", {"X-Error-Code": code, **(headers or {})})

    def reply(
        self,
        status: int,
        body: bytes = b"",
        headers: dict[str, Any] | None = None,
        sent: int | None = None,
    ) -> None:
        """Answer; of `body`, announced whole, only the first `sent` bytes go out before the end."""
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
        self.close_connection = self.close_connection or sent not in (None, len(body))

    def log_message(self, *_: object) -> None:
        """The test reads `requests`; nothing is printed."""


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _blob(data: bytes) -> str:
    """Git's name of a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _commit(folder: Path) -> str:
    """As git's commits: 40 hexadecimal digits that change with the files."""
    listing = "".join(f"{name} {_blob(data)}\n" for name, data in _files(folder).items())
    return hashlib.sha1(listing.encode()).hexdigest()
