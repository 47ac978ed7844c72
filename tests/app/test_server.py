"""The page as a process: what can be read through it, what stays of it, who may wait."""

import asyncio
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.page import Visitor, classes_of, served
from helpers.pictures import encoded, photo

import cvt
from cvt.app import server
from cvt.app.guard import folder_bytes
from cvt.app.limits import SWEEP_SECONDS, WAITING
from cvt.app.sessions import Sessions
from cvt.app.texts import EN, ZH

RED = encoded(photo(40, 56))


def forged(path):
    return [{"path": str(path), "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}]


# ------------------------------------------------------------------------------ answers


def test_a_picture_is_answered_as_by_the_classifier(page, model_folder):
    output, notes = Visitor(page.address).give(("red.png", RED))
    assert notes == []
    expected = cvt.Classifier(model_folder, "fused")(RED, top_k=3)
    for (label, score), record in zip(classes_of(output), expected, strict=True):
        assert label == record["label"]
        assert score == pytest.approx(record["score"], abs=1e-5)
    assert output["data"][2]["value"]["path"].endswith(".jpeg")


@pytest.mark.parametrize(("language", "texts"), [("en", EN), ("zh", ZH)])
def test_bad_files_are_named_and_the_good_ones_answered(page, language, texts):
    visitor = Visitor(page.address, language)
    output, notes = visitor.give(("a.png", b"text"), ("red.png", RED), ("b&b.png", RED[:99]))
    beginning = texts.unreadable.split("{formats}")[0]
    assert len(notes) == 2
    assert notes[0].startswith(beginning.format(name="a.png"))
    assert notes[1].startswith(beginning.format(name="b&amp;b.png"))
    assert len(output["data"][1]["value"]) == 1


def test_too_many_pictures_and_too_large_ones_are_left_out(page):
    pictures = [(f"{i}.png", encoded(photo(seed=i))) for i in range(14)]
    output, notes = Visitor(page.address).give(*pictures)
    assert notes == [EN.too_many.format(pictures=12, count=2)]
    assert len(output["data"][1]["value"]) == 12
    bomb = encoded(photo(8, 8), "PNG") + b"\0" * (20 * 2**20)
    output, notes = Visitor(page.address, "zh").give(("bomb.png", bomb))
    assert notes == [ZH.file_too_large.format(name="bomb.png", size="20 MB")]


def test_clicks_without_a_picture_are_answered_with_a_sentence(page):
    visitor = Visitor(page.address)
    for component, event, data, clicked in (
        ("classes", "select", [], {"index": 0, "value": "green"}),
        ("pictures", "select", [], {"index": 0, "value": None}),
        ("choice", "input", [1], None),
    ):
        assert visitor.join(component, event, data, clicked).status_code == 200
        _, notes = visitor.result()
        assert notes == [EN.expired]


@pytest.mark.parametrize("index", [-1, 99, "0", None, [0, 1], {"a": 1}])
def test_clicks_on_what_is_not_there_change_nothing(page, index):
    visitor = Visitor(page.address)
    visitor.give(("red.png", RED))
    for component in ("pictures", "examples"):
        visitor.join(component, "select", [], {"index": index, "value": None})
        output, _ = visitor.result()
        assert all(each == {"__type__": "update"} for each in output["data"])


# ------------------------------------------------------------------------------ files


def test_no_file_of_the_machine_is_read_as_a_picture(page, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(RED)
    visitor = Visitor(page.address)
    link = page.folder / "link.png"
    link.symlink_to(secret)
    try:
        for path in (
            *(secret, "/etc/passwd", f"{page.folder}/../{secret.name}", link),
            *(os.path.relpath(secret), f"file://{secret}", "http://127.0.0.1:1/a.png"),
        ):
            answer = visitor.join("upload", "upload", [forged(path)])
            assert answer.status_code == 403, path
    finally:
        link.unlink()
    output, notes = visitor.give(("red.png", RED))  # it still answers
    assert classes_of(output)
    assert notes == []


def test_no_file_of_the_machine_is_served(page, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    web = Visitor(page.address).web
    for path in (
        "/etc/passwd",
        "../../../../../../etc/passwd",
        "%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        secret,
        f"{page.folder}/../{tmp_path.name}/secret.png",
        f"{page.folder}/.lock",
        "pyproject.toml",
        "http://127.0.0.1:22/",
        "file:///etc/passwd",
    ):
        answer = web.get(f"/gradio_api/file={path}")
        assert answer.status_code in (403, 404) or not answer.content, path
    for path in ("/static/../../../etc/passwd", "/assets/%2e%2e/%2e%2e/%2e%2e/config", "/svelte/x"):
        assert web.get(path).status_code in (403, 404), path


def test_an_upload_cannot_leave_the_folder_or_run_in_the_page(page):
    visitor = Visitor(page.address)
    (path,) = visitor.upload(("../../../../x.html", b"<script>alert(1)</script>")).json()
    assert path.startswith(str(page.folder))
    answer = visitor.web.get(f"/gradio_api/file={path}")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_names_no_folder_of_the_machine(page, model_folder, photos):
    web = Visitor(page.address).web
    everything = web.get("/").text + web.get("/config").text
    assert "About this model" in everything
    for folder in (model_folder, photos, os.getcwd(), os.path.expanduser("~") + "/"):
        assert str(folder) not in everything


# ------------------------------------------------------------------------------ load


def visit(address, number, times):
    """Give a picture so many times; returns how many were answered and how many rejected."""
    answered = waited = 0
    visitor = Visitor(address, ("en", "zh")[number % 2])
    busy = (EN, ZH)[number % 2].busy
    with visitor.web:
        for turn in range(times):
            picture = (f"{turn}.png", encoded(photo(seed=100 * number + turn)))
            (path,) = visitor.upload(picture).raise_for_status().json()
            joined = visitor.join("upload", "upload", [forged(path)])
            if joined.status_code == 429:
                assert joined.json() == {"detail": busy}
                waited += 1
                continue
            assert joined.status_code == 200
            output, notes = visitor.result()
            assert len(classes_of(output)) == 3
            assert notes == []
            answered += 1
    return answered, waited


def load(page, clients, times):
    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(lambda i: visit(page.address, i, times), range(clients)))
    answered, waited = map(sum, zip(*results, strict=True))
    assert answered + waited == clients * times
    return answered, waited


def test_of_many_visitors_each_is_answered_or_told_to_wait(page):
    clients = 2 * WAITING + 12  # of which some find the queues full
    answered, waited = load(page, clients, 1)
    assert answered >= 2 * WAITING
    assert answered + waited == clients
    output, notes = Visitor(page.address).give(("red.png", RED))
    assert classes_of(output)
    assert notes == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_fifty_clients_with_twenty_requests_each(page, capsys):
    load(page, 50, 20)  # what gradio keeps of so many visitors, and what allocators keep
    before = swept_memory(page)
    answered, waited = load(page, 50, 20)
    after = swept_memory(page)
    with capsys.disabled():
        print(f"\n{answered} answered, {waited} rejected; {before:.0f} MiB, then {after:.0f}")
    assert answered > 0
    assert after < before + 16


def swept_memory(page):
    """What the process occupies after two sweeps."""
    time.sleep(2.5 * SWEEP_SECONDS)
    return page.memory


def test_a_sweep_drops_what_is_no_longer_used(tmp_path, monkeypatch):
    class Cycle:
        def __init__(self):
            self.own = self

    async def sweep_once():
        swept = asyncio.Event()
        loop, return_memory = asyncio.get_running_loop(), server.return_memory

        def returned():
            return_memory()
            loop.call_soon_threadsafe(swept.set)

        monkeypatch.setattr(server, "return_memory", returned)
        task = asyncio.create_task(server.sweep(tmp_path, Sessions()))
        await swept.wait()
        task.cancel()

    monkeypatch.setattr(server, "SWEEP_SECONDS", 0)
    gc.disable()
    try:
        kept = weakref.ref(Cycle())
        assert kept() is not None
        asyncio.run(sweep_once())
        assert kept() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------ the end


def test_uploads_are_deleted_at_the_end(page):
    """The last test that needs the page."""
    check_the_end(page, signal.SIGTERM, 143)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_uploads_are_deleted_after_other_signals(model_folder, tmp_path, number, code):
    with served(model_folder, tmp_path) as running:
        check_the_end(running, number, code)


def check_the_end(page, number, code):
    assert not page.left.exists()  # of a process that was killed before this one was started
    visitor = Visitor(page.address)
    visitor.give(("red.png", RED))
    visitor.upload(("unused.png", encoded(photo(seed=5))))
    assert len(page.files()) > 3
    assert page.stop(number) == code
    assert list(page.folder.parent.glob("cvt-app-*")) == []
    assert "Traceback" not in page.printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_folder_is_deleted_after_every_signal(tmp_path, number):
    script = (
        "import time; from cvt.app.server import upload_folder\n"
        "with upload_folder() as folder:\n"
        "    (folder / 'a.png').touch(); print('ready', flush=True); time.sleep(60)"
    )
    command, environment = [sys.executable, "-c", script], os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        assert len(list(tmp_path.glob("cvt-app-*/a.png"))) == 1
        process.send_signal(number)
    assert process.returncode
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_page_that_runs_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(server.tempfile, "gettempdir", lambda: str(tmp_path))
    script = (
        "import sys, time; from pathlib import Path; from cvt.files import locked\n"
        "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    other = tmp_path / "cvt-app-other"
    other.mkdir()
    with subprocess.Popen([sys.executable, "-c", script, other], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with server.upload_folder():
            assert other.exists()
        process.kill()
        process.wait()
        with server.upload_folder() as own:
            assert own.exists()
            assert not other.exists()
    assert list(tmp_path.iterdir()) == []


def test_what_is_too_old_is_deleted(tmp_path):
    own, old, new = (tmp_path / name / "a.png" for name in ("own", "old", "new"))
    for path in (own, old, new):
        path.parent.mkdir()
        path.write_bytes(b"x")
    for path in (own, old):
        os.utime(path, (time.time() - 100,) * 2)
    server.delete_older(tmp_path, 60, own={own, own.parent})
    assert [path for path in (own, old, new) if path.exists()] == [own, new]
    assert old.parent.exists()  # an upload may be about to be written to it
    os.utime(old.parent, (time.time() - 100,) * 2)
    server.delete_older(tmp_path, 60, own={own, own.parent})
    assert not old.parent.exists()


@pytest.mark.parametrize("function", [folder_bytes, lambda folder: server.delete_older(folder, 0)])
def test_a_folder_that_is_deleted_meanwhile_stops_nothing(function, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"x")
    scandir = os.scandir

    def gone(path=".", *arguments):
        if os.path.basename(path) == "a":
            raise FileNotFoundError(path)
        return scandir(path, *arguments)

    monkeypatch.setattr(os, "scandir", gone)
    function(tmp_path)


# ------------------------------------------------------------------------------ the command


def test_without_gradio_the_error_has_the_command(cvt, model_folder, monkeypatch):
    monkeypatch.setattr("cvt.libraries.is_installed", lambda name: name != "gradio")
    code, _, error = cvt("app", model_folder)
    assert code == 1
    assert error == "Error: cvt app needs gradio: pip install 'cvt-vision[app]'\n"


def test_a_port_in_use_is_an_error_that_names_it(cvt, model_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, error = cvt("app", model_folder, "--port", port)
    assert code == 1
    assert re.fullmatch(rf"Error: 127.0.0.1, port {port}: .+; --port takes another\n", error)


def test_importing_the_package_loads_neither_gradio_nor_torch():
    script = "import sys, cvt.app, cvt.cli; print({'gradio', 'torch'} & sys.modules.keys())"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert answer.stdout == "set()\n"
