"""A server on this machine that answers as the Hugging Face hub does for model repositories.

As on the hub, weights are large files: `resolve` describes them and sends readers on to the
storage, which is another host, and an upload brings them there before the commit that names them.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

LARGE_FILES = (".safetensors", ".bin")
USER, TOKEN = "someone", "hf_of_someone"  # who may write, and where


class HubServer(ThreadingHTTPServer):
    """Serves `repositories`, folders by hub id, while the `with` block lasts.

    A branch other than main is a folder of its own, under the id with `@` and the branch. New
    repositories and branches become folders in `place`.
    """

    def __init__(self, repositories: dict[str, Path], place: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.place = place
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.storage = f"http://localhost:{self.server_port}/storage"
        self.requests: list[str] = []  # "HEAD /microsoft/cvt-13/resolve/main/config.json"
        self.downloads: list[tuple[str, int]] = []  # name of the file, first byte sent
        self.downloads_to_break = 0  # so many more downloads from the storage end half-way
        self.overloaded: set[str] = set()  # answered with 503
        self.gated: set[str] = set()  # described to all, files refused
        self.private: set[str] = set()
        self.commits: list[tuple[str, list[str]]] = []  # repository@branch, operations
        self.stored: dict[str, bytes] = {}  # large files by SHA-256, before they are committed

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def folder_of(self, hub_id: str, revision: str | None) -> Path | None:
        """The files of a branch or a commit."""
        for name, folder in self.repositories.items():
            found, _, branch = name.partition("@")
            if found == hub_id and revision in (None, branch or "main", commit_of(folder)):
                return folder
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        storage = re.fullmatch(r"/storage/([^/]+/[^/]+)/([^/]+)/(.+)", path)
        match = api or resolve or storage
        if path == "/":
            self.reply(200)
        elif not match or match[1] not in self.server.repositories:
            self.refuse(404, "RepoNotFound")
        elif match[1] in self.server.overloaded:
            self.refuse(503, "Overloaded")
        elif api:
            self.describe_repository(*match.groups())
        elif resolve:
            self.resolve_file(*match.groups())
        else:
            self.send_stored(*match.groups())

    do_HEAD = do_GET  # noqa: N815

    def describe_repository(self, hub_id: str, what: str | None, revision: str | None) -> None:
        folder = self.server.folder_of(hub_id, revision)
        if folder is None:
            self.refuse(404, "RevisionNotFound")
            return
        files = _files(folder)
        answer: Any = {
            "id": hub_id,
            "sha": commit_of(folder),
            "private": hub_id in self.server.private,
            "siblings": [{"rfilename": name} for name in files],
        }
        if card := re.match(r"---\n(.+?)\n---\n", files.get("README.md", b"").decode(), re.DOTALL):
            answer["cardData"] = yaml.safe_load(card[1])
        if what == "tree":
            answer = [
                {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
                for name, data in files.items()
            ]
        self.reply(200, json.dumps(answer).encode())

    def resolve_file(self, hub_id: str, revision: str, name: str) -> None:
        folder = self.server.folder_of(hub_id, revision)
        if folder is None:
            self.refuse(404, "RevisionNotFound")
            return
        commit = commit_of(folder)
        data = _files(folder).get(name)
        if hub_id in self.server.gated:
            self.refuse(403, "GatedRepo")
        elif data is None:
            self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        elif name.endswith(LARGE_FILES):
            headers = {
                "Location": f"{self.server.storage}/{hub_id}/{commit}/{name}",
                "X-Linked-Size": len(data),
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": commit,
            }
            self.reply(302, b"", headers)
        else:
            if self.command == "GET":
                self.server.downloads.append((name, 0))
            self.reply(200, data, {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": commit})

    def send_stored(self, hub_id: str, commit: str, name: str) -> None:
        folder = self.server.folder_of(hub_id, commit)
        assert folder
        data = (folder / name).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        self.server.downloads.append((name, first))
        headers = {"Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        sent = len(data) - first
        if self.server.downloads_to_break:
            self.server.downloads_to_break -= 1
            sent //= 2
        self.reply(206 if asked else 200, data[first:], headers, sent)

    # -------------------------------------------------------------------------- uploads

    def do_POST(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|branch|commit)/(.+)", path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "")
        elif path == "/api/validate-yaml":
            self.reply(200, b"{}")
        elif path == "/api/repos/create":
            self.create_repository(**json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self.offer_storage(json.loads(body)["objects"])
        elif found and found[2] == "preupload":
            self.describe_upload(json.loads(body)["files"])
        elif found and found[2] == "branch":
            self.create_branch(found[1], found[3])
        elif found:
            self.commit(found[1], found[3], [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(data).hexdigest() == Path(self.path).name
        self.server.stored[Path(self.path).name] = data
        self.reply(200)

    def create_repository(
        self, name: str, organization: str, visibility: str = "public", **_: object
    ) -> None:
        hub_id = f"{organization}/{name}"
        assert self.server.place
        assert hub_id not in self.server.repositories
        if organization != USER:
            self.refuse(403, "")
            return
        self.server.private |= {hub_id} if visibility == "private" else set()
        self.add_branch(hub_id).joinpath(".gitattributes").write_text("*.safetensors filter=lfs\n")
        self.reply(200, json.dumps({"url": f"{self.server.endpoint}/{hub_id}"}).encode())

    def create_branch(self, hub_id: str, branch: str) -> None:
        if f"{hub_id}@{branch}" in self.server.repositories:
            self.refuse(409, "")
            return
        folder = self.add_branch(f"{hub_id}@{branch}")
        shutil.copytree(self.server.repositories[hub_id], folder, dirs_exist_ok=True)
        self.reply(201)

    def add_branch(self, name: str) -> Path:
        assert self.server.place
        folder = self.server.place / name.replace("/", "--")
        folder.mkdir()
        self.server.repositories[name] = folder
        return folder

    def describe_upload(self, files: list[dict[str, Any]]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE_FILES) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self.reply(200, json.dumps({"files": modes}).encode())

    def offer_storage(self, objects: list[dict[str, Any]]) -> None:
        for each in objects:
            href = f"{self.server.storage}/{each['oid']}"
            each["actions"] = {"upload": {"href": href, "header": {}}}
        self.reply(200, json.dumps({"objects": objects, "transfer": "basic"}).encode())

    def commit(self, hub_id: str, branch: str, lines: list[dict[str, Any]]) -> None:
        name = hub_id if branch == "main" else f"{hub_id}@{branch}"
        folder = self.server.repositories[name]
        head, *operations = lines
        assert head["value"].get("parentCommit") in (None, commit_of(folder))
        for operation in operations:
            value = operation["value"]
            path = folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if operation["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                path.write_bytes(self.server.stored[value["oid"]])
            else:
                path.unlink()
        done = [f"{each['key']} {each['value']['path']}" for each in operations]
        self.server.commits.append((name, sorted(done)))
        commit = commit_of(folder)
        answer = {
            "commitUrl": f"{self.server.endpoint}/{hub_id}/commit/{commit}",
            "commitOid": commit,
        }
        self.reply(200, json.dumps(answer).encode())

    # -------------------------------------------------------------------------- answers

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
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _blob(data: bytes) -> str:
    """Git's name of a file's contents."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def commit_of(folder: Path) -> str:
    """As git's commits: 40 hexadecimal digits that change with the files."""
    listing = "".join(f"{name} {_blob(data)}\n" for name, data in _files(folder).items())
    return hashlib.sha1(listing.encode()).hexdigest()


def connect(monkeypatch: pytest.MonkeyPatch, server: HubServer, cache: Path) -> None:
    """Let the hub library of this process ask the server, with a cache of its own."""
    settings = {
        "ENDPOINT": server.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("DISABLE_SAFETENSORS_CONVERSION", "1")  # would call a third host
