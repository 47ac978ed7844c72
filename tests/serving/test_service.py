"""The service as a process, driven over HTTP."""

import contextlib
import io
import itertools
import json
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from helpers.pictures import encoded, photo
from helpers.server import Server
from PIL import Image

from cvt import image_processor
from cvt.checkpoints import load_classifier, model_source

KEY = "0123456789abcdef-key"
BEARER = {"Authorization": f"Bearer {KEY}"}
QUEUE = 40
RED = encoded(photo(40, 56))
FAULTY = {
    *("cut.png", "cut.jpg", "flipped.png", "long.png", "bomb.png", "float.tif", "icon.ico"),
    *("drawing.svg", "text.jpg", "empty.png"),
}


@pytest.fixture(scope="module")
def models(model_folder, tmp_path_factory):
    """Two models: that of the colours, and one of values."""
    import torch

    from cvt import CvtConfig, CvtForImageClassification

    torch.manual_seed(1)
    config = CvtConfig(embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 1, 2])
    config.class_names, config.problem_type = ["width", "height"], "regression"
    folder = tmp_path_factory.mktemp("models") / "values"
    CvtForImageClassification(config).save_pretrained(folder)
    image_processor(config, image_size=32).save_pretrained(folder)
    return model_folder, folder


@pytest.fixture(scope="module")
def service(models, tmp_path_factory):
    place = tmp_path_factory.mktemp("service")
    (place / "key").write_text(f"{KEY}\n")
    options = [f"colours={models[0]}", models[1], "--api-key-file", place / "key"]
    options += ["--max-queue", QUEUE, "--max-mib", 1, "--threads", 1, "--runtime", "fused"]
    with Server("serve", options, place / "log") as running:
        yield running


@pytest.fixture(scope="module")
def web(service):
    with httpx.Client(base_url=service.address, headers=BEARER, timeout=120) as client:
        yield client


@contextlib.contextmanager
def begun(service, body, sent):
    """A socket with a request of which the body is sent up to a place."""
    host, port = service.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        head = f"POST /v1/predict HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Length: {body if isinstance(body, int) else len(body)}\r\n\r\n"
        connection.sendall(head.encode() + (body[:sent] if sent else b""))
        yield connection


def is_open(service):
    """Whether it takes new connections."""
    host, port = service.address.removeprefix("http://").split(":")
    with socket.socket() as connection:
        return connection.connect_ex((host, int(port))) == 0


def answer_of(connection):
    """Status and JSON of what comes on a socket."""
    file = connection.makefile("rb")
    status = int(file.readline().split()[1])
    headers = dict(line.decode().lower().split(": ", 1) for line in iter(file.readline, b"\r\n"))
    return status, json.loads(file.read(int(headers["content-length"])))


def odd_pictures():
    """Pictures of every mode and format, and files that are none: name, bytes."""
    image = Image.fromarray(photo(40, 56))
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        wide = Image.fromarray(np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 29)
        yield (
            f"{mode.replace(';', '-')}.png",
            encoded(wide if mode == "I;16" else image.convert(mode)),
        )
    for kind in ("JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF"):
        yield f"{kind}.{kind.lower()}", encoded(image, kind)
    yield "cmyk.jpg", encoded(image.convert("CMYK"), "JPEG")
    exif = Image.Exif()
    exif[274] = 6
    yield "turned.jpg", encoded(image, "JPEG", exif=exif, progressive=True)
    yield "large.jpg", encoded(photo(600, 800), "JPEG")  # decoded smaller
    yield "pages.gif", encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)])
    yield "one.png", encoded(photo(1, 1))
    # those of FAULTY
    yield "cut.png", RED[: len(RED) // 2]
    yield "cut.jpg", encoded(image, "JPEG")[:300]
    yield "flipped.png", RED[:60] + bytes([RED[60] ^ 255]) + RED[61:]
    yield "long.png", encoded(Image.new("1", (3000, 2)))
    yield "bomb.png", encoded(Image.new("1", (8000, 8000)))
    yield "float.tif", encoded(Image.new("F", (40, 56)), "TIFF")
    yield "icon.ico", encoded(image, "ICO")
    yield "drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    yield "text.jpg", b"\x1b[31m<script>alert(1)</script>"
    yield "empty.png", b""


def test_every_file_is_answered_as_by_cvt_predict(web, models, tmp_path, cvt):
    files = dict(odd_pictures())
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    how = ["--json", "--batch-size", 1, "--workers", 0, "--runtime", "fused"]
    code, out, _ = cvt("predict", models[0], tmp_path, "--max-pixels", 50_000_000, *how)
    assert code == 3
    lines = map(json.loads, out.splitlines())
    expected = {Path(line["path"]).name: line["predictions"] for line in lines}
    assert files.keys() - expected.keys() == FAULTY

    answers = {}
    for name, content in files.items():
        answer = web.post("/v1/predict", content=content)
        if name in expected:
            assert answer.status_code == 200, name
            assert answer.json()["model"] == "colours"
            (answers[name],) = answer.json()["results"]
            assert answers[name] == {"image": 0, "predictions": expected[name]}
        else:
            assert answer.status_code == (422 if name in ("long.png", "bomb.png") else 415), name
            (sentence,) = answer.json().values()
            assert sentence.startswith("image 0: ")
            assert "script" not in sentence
            answers[name] = {"status": answer.status_code, "error": sentence}

    # In one form, the bad ones fail alone.
    form = [("images", (name, content)) for name, content in files.items()]
    results = web.post("/v1/predict", files=form).raise_for_status().json()["results"]
    assert [result["image"] for result in results] == list(range(len(files)))
    for i, (name, result) in enumerate(zip(files, results, strict=True)):
        if name in expected:
            assert_close(result["predictions"], expected[name])
        else:
            alone = answers[name]["error"].replace("image 0: ", f"image {i}: ")
            assert result == {"image": i, "status": answers[name]["status"], "error": alone}


def assert_close(found, expected):
    """Sums of a batch of another size may be rounded otherwise."""
    scores = {record["label"]: record["score"] for record in expected}
    assert {record["label"]: record["score"] for record in found} == pytest.approx(scores, abs=1e-6)


def test_requests_at_the_same_time_share_batches_and_get_their_own_answers(web, models):
    import cvt

    classifier = cvt.Classifier(models[0], "fused", threads=1)
    contents = [encoded(photo(seed=seed)) for seed in range(32)]

    def ask(content):
        answer = web.post("/v1/predict", params={"top_k": 2}, content=content)
        return answer.raise_for_status().json()["results"][0]["predictions"]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, contents))
    for answer, content in zip(answers, contents, strict=True):
        assert_close(answer, classifier(content, top_k=2))
    metrics = web.get("/metrics").text
    alone, images = (
        float(re.search(rf"^cvt_batch_images_{name} (.+)$", metrics, re.MULTILINE)[1])
        for name in (r'bucket\{le="1.0",model="colours"\}', r'sum\{model="colours"\}')
    )
    assert alone < images
    assert "cvt_queued_images 0.0" in metrics


def test_a_request_names_its_model_and_values_are_not_scores(web, models):
    import cvt

    answer = web.post("/v1/predict", params={"model": "values"}, content=RED).json()
    expected = cvt.Classifier(models[1], "fused", threads=1)(RED)
    assert answer == {"model": "values", "results": [{"image": 0, "predictions": expected}]}
    listed = web.get("/v1/models").json()["models"]
    assert [model["name"] for model in listed] == ["colours", "values"]
    assert listed[0]["labels"] == ["blue", "green", "red"]
    assert listed[0]["preprocessing"]["image_size"] == 32
    assert listed[0]["sha256"] == model_source(models[0]).sha256
    assert listed[1]["problem_type"] == "regression"
    assert listed[1]["runtime"]["name"] == "fused"


def test_embeddings_are_what_the_classifier_receives(web, models):
    model = load_classifier(models[0]).eval()
    received = []
    model.classifier.register_forward_pre_hook(lambda module, given: received.append(given[0]))
    processor = image_processor(models[0])
    model(**processor(Image.open(io.BytesIO(RED)), return_tensors="pt"))
    expected = received[0][0].detach().numpy()

    form = [("images", ("a.png", content)) for content in (RED, b"text")]
    answer = web.post("/v1/embed", files=form).json()
    assert answer["model"] == "colours"
    found, failed = answer["results"]
    assert np.allclose(found["embedding"], expected, atol=1e-5)
    assert failed["status"] == 415
    assert web.get("/v1/models").json()["models"][0]["embedding"] == len(expected)
    normed = web.post("/v1/embed", params={"normalize": "true"}, content=RED).json()["results"][0]
    assert np.allclose(normed["embedding"], expected / np.linalg.norm(expected), atol=1e-5)


def test_a_huge_body_is_refused_by_its_header(service):
    with begun(service, 2 * 2**30, 0) as connection:
        begin = time.monotonic()
        assert answer_of(connection) == (413, {"detail": "a request may have 1 MiB"})
        assert time.monotonic() - begin < 30  # nothing was sent


def test_who_goes_away_while_sending_leaves_room_and_no_trace(web, service):
    with begun(service, RED, 99):
        while "cvt_queued_images 1.0" not in web.get("/metrics").text:
            time.sleep(0.01)
    while "cvt_queued_images 0.0" not in web.get("/metrics").text:
        time.sleep(0.01)
    assert "Traceback" not in service.printed


def test_a_body_without_a_length_is_refused_at_the_limit(web):
    sent = itertools.repeat(b"\0" * 2**16, 32)
    assert web.post("/v1/predict", content=sent).status_code == 413


def test_only_who_has_the_key_is_answered(web, service):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        for method, path in (("POST", "/v1/predict"), ("GET", "/v1/models"), ("GET", "/metrics")):
            answer = httpx.request(method, service.address + path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert httpx.get(service.address + path).status_code == 200


def test_a_full_queue_is_503_with_the_seconds_to_wait(web, service):
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(begun(service, RED, 99)) for _ in range(QUEUE)]
        while web.get("/readyz").status_code == 200:
            time.sleep(0.01)
        answer = web.post("/v1/predict", content=RED)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert web.get("/healthz").status_code == 200
        for connection in waiting:
            connection.sendall(RED[99:])
        assert [answer_of(connection)[0] for connection in waiting] == [200] * QUEUE
    assert web.get("/readyz").status_code == 200
    assert web.post("/v1/predict", content=RED).status_code == 200
    many = [("images", ("a.png", RED))] * (QUEUE + 1)
    assert web.post("/v1/predict", files=many).status_code == 400


def test_what_answers_is_what_the_openapi_document_says(service, tmp_path):
    """schemathesis: each status, content type and field, of good requests and bad ones."""
    command = [Path(sys.executable).with_name("schemathesis"), "run"]
    command += [f"{service.address}/openapi.json", "--phases", "examples,coverage,fuzzing"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--max-examples", "12"]
    # Any bytes are a body of the schema; of an image they are not.
    command += ["--exclude-checks", "positive_data_acceptance", "--generation-deterministic"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_port_that_is_taken_is_an_error_before_a_model_is_opened(cvt, model_folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = cvt("serve", model_folder, "--port", port)
    assert (code, out) == (1, "")
    assert f"port {port}: " in err
    assert "opening the models" not in err


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost"])
def test_a_service_answers_at_the_address_that_it_prints(models, tmp_path, host):
    options = [models[0], "--host", host, "--threads", 1, "--runtime", "torch"]
    with Server("serve", options, tmp_path / "log") as running:
        assert httpx.get(f"{running.address}/readyz").status_code == 200
        port = running.address.rpartition(":")[2]
        elsewhere = {"Host": f"127.evil.example:{port}"}
        assert httpx.get(f"{running.address}/readyz", headers=elsewhere).status_code == 403
        assert "everyone" not in running.printed


def test_sigterm_answers_what_is_in_flight_and_nothing_new(models, tmp_path):
    key = tmp_path / "key"
    key.write_text(KEY)
    options = [models[0], "--api-key-file", key, "--threads", 1, "--runtime", "fused"]
    with Server("serve", options, tmp_path / "log") as service, contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(begun(service, RED, 99)) for _ in range(8)]
        while (
            "cvt_queued_images 8.0"
            not in httpx.get(f"{service.address}/metrics", headers=BEARER).text
        ):
            time.sleep(0.01)
        service.process.terminate()
        while is_open(service):
            time.sleep(0.01)
        for connection in waiting:
            connection.sendall(RED[99:])
        answers = [answer_of(connection) for connection in waiting]
        assert [status for status, _ in answers] == [200] * 8
        assert len({str(content) for _, content in answers}) == 1
        assert service.process.wait(60) == 0
        assert "Traceback" not in service.printed
