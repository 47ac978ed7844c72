"""What the guard lets through and what it answers, in front of an application that answers all."""

import json
import os

import pytest
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.testclient import TestClient

from cvt.app import limits
from cvt.app.guard import Guard
from cvt.app.texts import EN, ZH

HTML = '<!doctype html>\n<html\n\tlang="en"\n>\n<head>\n<title>t</title></head></html>'


class Inner:
    """Gradio's place: a page, a full queue, and the paths that it was asked for."""

    def __init__(self):
        self.asked = []

    async def __call__(self, scope, receive, send):
        self.asked.append(scope["path"])
        status = 503 if scope["path"] == "/zh/gradio_api/queue/join" else 200
        if scope["path"] in ("/en/", "/zh/"):
            answer = HTMLResponse(HTML)
        else:
            answer = PlainTextResponse("inner", status)
        await answer(scope, receive, send)


@pytest.fixture
def inner():
    return Inner()


@pytest.fixture
def web(inner, tmp_path):
    (tmp_path / "kept").mkdir()
    guard = Guard(inner, tmp_path / "kept", None, private=True)
    return TestClient(guard, base_url="http://127.0.0.1:7860", follow_redirects=False)


@pytest.mark.parametrize(
    "path",
    [
        "/config",
        "/theme.css",
        "/assets/index-1.js",
        "/gradio_api/queue/data?session_hash=1",
        "/gradio_api/heartbeat/1",
        "/gradio_api/upload_progress?upload_id=1",
    ],
)
def test_what_the_page_asks_for_passes(web, inner, path):
    for language in ("en", "zh"):
        answer = web.get(f"/{language}{path}")
        assert (answer.status_code, answer.text) == (200, "inner")
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert len(inner.asked) == 2


@pytest.mark.parametrize(
    "path",
    [
        "/fr/",
        "/config",
        "/gradio_api/file=/etc/passwd",
        "/en/gradio_api/file=/etc/passwd",
        "/en/gradio_api/file=../../../etc/passwd",
        "/en/gradio_api/file=http://127.0.0.1/",
        "/en/gradio_api/file/etc/passwd",
        "/en/gradio_api/proxy=http://127.0.0.1/",
        "/en/gradio_api/info",
        "/en/gradio_api/openapi.json",
        "/en/gradio_api/call/given/1",
        "/en/gradio_api/stream/1/1/1/playlist.m3u8",
        "/en/gradio_api/runs",
        "/en/gradio_api/deep_link",
        "/en/monitoring",
        "/en/login_check",
        "/docs",
        "/openapi.json",
        "/en/../config",
    ],
)
def test_nothing_else_of_gradio_is_reached(web, inner, path):
    assert web.get(path).status_code == 404
    assert inner.asked == []


@pytest.mark.parametrize("path", ["call/given", "run/given", "api/given", "vibe-edit", "login"])
def test_no_other_handler_is_called(web, inner, path):
    assert web.post(f"/en/gradio_api/{path}", json={}).status_code == 404
    assert web.put("/en/gradio_api/upload", json={}).status_code == 404
    assert web.delete("/en/").status_code == 404
    assert inner.asked == []


def test_files_are_served_from_the_folder_alone(web, inner, tmp_path):
    secret, kept = tmp_path / "secret.png", tmp_path / "kept"
    secret.write_bytes(b"secret")
    (kept / "own.webp").write_bytes(b"own")
    (kept / "link.png").symlink_to(secret)
    (kept / "up").symlink_to(tmp_path)
    (tmp_path / "kept-too").mkdir()
    (tmp_path / "kept-too" / "x.png").write_bytes(b"secret")
    os.mkfifo(kept / "pipe")

    def status(path):
        return web.get(f"/en/gradio_api/file={path}").status_code

    assert status(kept / "own.webp") == 200
    assert len(inner.asked) == 1
    for path in (
        secret,
        kept / "link.png",
        kept / "up" / "secret.png",
        f"{kept}/../secret.png",
        f"{kept}/%2e%2e/secret.png",
        f"{kept}/..%2fsecret.png",
        tmp_path / "kept-too" / "x.png",
        kept / "pipe",
        kept / "none.png",
        "%00",
        "a" * 5000,
        kept,
    ):
        assert status(path) == 404, path
    assert len(inner.asked) == 1


def test_an_event_names_uploaded_files_alone(web, inner, tmp_path):
    secret, kept = tmp_path / "secret.png", tmp_path / "kept"
    secret.write_bytes(b"secret")
    (kept / "own.png").write_bytes(b"own")
    (kept / "link.png").symlink_to(secret)

    def status(path, deep=0):
        value = {"path": path, "meta": {"_type": "gradio.FileData"}}
        for _ in range(deep):
            value = [{"a": value}]
        return web.post("/en/gradio_api/queue/join", json={"data": [value]}).status_code

    for path in (
        *(str(secret), str(kept / "link.png"), f"{kept}/../secret.png", "/etc/passwd", "README.md"),
        *("http://elsewhere/a.png", "file:///etc/passwd", "", "\0", "a" * 5000, None, 3, ["x"]),
    ):
        assert status(path) == 403, path
        assert status(path, deep=5) == 403, path
    assert inner.asked == []
    assert status(str(kept / "own.png")) == 200
    for text in (b"{", b"\xff", b"[" * 100_000):
        assert web.post("/en/gradio_api/queue/join", content=text).status_code == 403


def test_an_event_arrives_unchanged(tmp_path):
    async def echo(scope, receive, send):
        message = await receive()
        assert not message["more_body"]
        await PlainTextResponse(message["body"].decode())(scope, receive, send)

    web = TestClient(Guard(echo, tmp_path, None, private=False))
    text = json.dumps({"data": ["中文" * 1000]})
    answer = web.post("/en/gradio_api/queue/join", content=text.encode())
    assert answer.text == text


@pytest.mark.parametrize(("language", "texts"), [("en", EN), ("zh", ZH)])
def test_what_is_too_large_is_refused_with_a_sentence(web, inner, language, texts):
    def post(path, length):
        headers = {"content-length": str(length)}
        return web.post(f"/{language}/gradio_api/{path}", content=b"x", headers=headers)

    answer = post("upload", limits.REQUEST_BYTES + 1)
    sentence = texts.request_too_large.format(size="100 MB")
    assert (answer.status_code, answer.text) == (413, sentence)
    assert post("queue/join", limits.MESSAGE_BYTES + 1).status_code == 413
    assert inner.asked == []
    assert post("upload", limits.REQUEST_BYTES).status_code == 200


def test_the_size_must_be_known_before(web, inner):
    answer = web.post("/en/gradio_api/upload", content=iter([b"x"]))
    assert answer.status_code == 411
    assert inner.asked == []


def test_a_full_folder_takes_no_more(web, inner, tmp_path, monkeypatch):
    (tmp_path / "kept" / "a.png").write_bytes(b"x" * 1000)
    monkeypatch.setattr(limits, "FOLDER_BYTES", 1500)
    assert web.post("/zh/gradio_api/upload", content=b"x" * 400).status_code == 200
    answer = web.post("/zh/gradio_api/upload", content=b"x" * 600)
    assert (answer.status_code, answer.text) == (429, ZH.full)
    assert answer.headers["retry-after"] == "60"


def test_a_full_queue_is_a_sentence_of_ours(web):
    answer = web.post("/zh/gradio_api/queue/join", json={})
    assert answer.status_code == 429
    assert answer.json() == {"detail": ZH.busy}
    assert answer.headers["retry-after"] == "5"


@pytest.mark.parametrize(("language", "locale"), [("en", "en"), ("zh", "zh-CN")])
def test_the_page_has_its_language_whatever_the_browsers_is(web, language, locale):
    answer = web.get(f"/{language}/", headers={"accept-language": "fr"})
    assert f'lang="{locale}"' in answer.text
    assert f"get: () => {json.dumps(locale)}" in answer.text
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.text.endswith("</html>")


def test_an_address_without_its_last_slash_is_gradios_to_answer(web, inner):
    assert web.get("/en").status_code == 200
    assert inner.asked == ["/en"]


@pytest.mark.parametrize(
    ("chosen", "accepted", "path"),
    [
        (None, "zh-CN,zh;q=0.9", "zh/"),
        (None, "de,en", "en/"),
        ("zh", "en", "zh/"),
        ("en", "zh", "en/"),
    ],
)
def test_the_first_page_is_in_the_language_that_was_chosen(inner, tmp_path, chosen, accepted, path):
    web = TestClient(Guard(inner, tmp_path, chosen, private=False), follow_redirects=False)
    answer = web.get("/?__theme=dark", headers={"accept-language": accepted})
    assert answer.status_code == 307
    assert answer.headers["location"] == f"{path}?__theme=dark"


def test_a_name_from_elsewhere_is_refused_unless_others_are_let_in(web, inner, tmp_path):
    headers = {"host": "127.evil.example:7860"}
    for name in (headers["host"], "evil.example", "localhost.evil.example", "10.0.0.1:7860", ""):
        assert web.get("/en/config", headers={"host": name}).status_code == 403
    assert inner.asked == []
    for name in ("localhost:7860", "127.0.0.2:7860", "[::1]"):
        assert web.get("/en/config", headers={"host": name}).status_code == 200
    public = TestClient(Guard(inner, tmp_path, None, private=False))
    assert public.get("/en/config", headers=headers).status_code == 200
