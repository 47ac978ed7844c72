"""The application in this process: what a request and a model can do to it."""

import copy
import re
import time

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from helpers.pictures import encoded, photo

import cvt
from cvt.serving.application import OpenedModel, create_app
from cvt.serving.server import open_models
from cvt.serving.settings import Settings, read_key

RED = encoded(photo())
HOST = "http://127.0.0.1"


@pytest.fixture
def colours(model_folder):
    return cvt.Classifier(model_folder, "fused", threads=1)


def client(classifier, raises=False, **settings):
    opened = OpenedModel(classifier.runtime, classifier.processor, "0" * 64)
    app = create_app({"colours": opened}, Settings(**settings))
    return TestClient(app, base_url=HOST, raise_server_exceptions=raises)


def failing(classifier, error):
    """A classifier whose runtime raises, once the application has tried it."""
    run = classifier.runtime._run

    def once(pixels):
        classifier.runtime._run = then
        return run(pixels)

    def then(pixels):
        if isinstance(error, Exception):
            raise error
        return tuple(map(error, run(pixels)))

    classifier.runtime._run = once
    return classifier


def test_nothing_of_a_request_is_repeated(colours):
    web, mark = client(colours), "<b>mark</b>"
    form = {"images": (f"{mark}.png", mark.encode(), mark)}
    for answer in (
        web.get(f"/{mark}"),
        web.post("/v1/predict", params={"model": mark}, content=RED),
        web.post("/v1/predict", params={"top_k": mark}, content=RED),
        web.post("/v1/predict", params={mark: "1"}, content=RED),
        web.post("/v1/predict", files=form),
        web.post("/v1/predict", files={mark: RED}),
        web.post("/v1/predict", data={mark: mark}, files=form),
        web.post(
            "/v1/predict", content=RED, headers={"content-type": f"multipart/form-data;{mark}"}
        ),
        web.get("/healthz", headers={"host": mark}),
        web.request(mark.strip("</>"), "/v1/predict"),
    ):
        assert 400 <= answer.status_code < 500
        assert list(answer.json()) == ["detail"]
        assert "mark" not in answer.text
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_failure_leaves_no_trace_and_the_next_request_is_answered(colours, caplog):
    web = client(failing(colours, RuntimeError("secret of the machine")))
    with web:
        answer = web.post("/v1/predict", content=RED)
        assert answer.status_code == 500
        assert answer.json() == {"detail": "the service failed; see its log"}
        del colours.runtime._run
        assert web.post("/v1/predict", content=RED).status_code == 200
        assert 'cvt_requests_total{path="/v1/predict",status="500"} 1.0' in web.get("/metrics").text


def test_scores_that_are_not_finite_are_no_answer(colours):
    web = client(failing(colours, lambda logits: logits * np.float32("nan")))
    answer = web.post("/v1/predict", content=RED)
    assert answer.status_code == 500
    assert answer.json()["detail"].startswith("image 0: its scores are not finite")


def test_a_request_that_takes_too_long_is_ended(colours):
    def slow(logits):
        time.sleep(1)
        return logits

    with client(failing(colours, slow), timeout=0.2) as web:
        answer = web.post("/v1/predict", content=RED)
        assert answer.status_code == 504
        assert answer.json() == {"detail": "the request took too long"}
        assert "cvt_queued_images 0.0" in web.get("/metrics").text  # its room is free


def test_a_host_that_is_not_this_machine_is_refused_unless_others_are_let_in(colours):
    elsewhere = {"host": "127.evil.example:8000"}
    for name in (elsewhere["host"], "evil.example", "localhost.evil.example", "10.0.0.1:8000", ""):
        assert client(colours).get("/readyz", headers={"host": name}).status_code == 403
    assert client(colours, loopback=False).get("/readyz", headers=elsewhere).status_code == 200
    for name in ("localhost:8000", "[::1]:8000", "127.0.0.1", "127.0.0.2:8000"):
        assert client(colours).get("/readyz", headers={"host": name}).status_code == 200


def test_several_classes_of_an_image_are_marked(model_folder):
    config = copy.deepcopy(cvt.CvtConfig.from_pretrained(model_folder))
    config.problem_type, config.thresholds = "multi_label_classification", [0.1, 0.9, 0.1]
    torch.manual_seed(0)
    processor = cvt.image_processor(config, image_size=32)
    model = cvt.CvtForImageClassification(config)
    classifier = cvt.Classifier(model, "fused", processor=processor)
    expected = classifier(RED)
    answer = client(classifier).post("/v1/predict", content=RED).json()
    assert answer["results"] == [{"image": 0, "predictions": expected}]
    assert [record["predicted"] for record in expected].count(True) == 2


def test_images_that_are_not_resized_are_answered_whatever_their_size(model_folder):
    config = cvt.CvtConfig.from_pretrained(model_folder)
    processor = cvt.image_processor(config, image_size=32, do_resize=False)
    classifier = cvt.Classifier(model_folder, "fused", processor=processor)
    contents = [encoded(photo(32 + 8 * i, 40)) for i in range(3)] + [encoded(photo(1, 1))]
    form = [("images", ("a.png", content)) for content in contents]
    with client(classifier) as web:
        results = web.post("/v1/predict", files=form).json()["results"]
        for content, result in zip(contents[:3], results, strict=False):
            assert result["predictions"] == classifier(content)
        assert results[3]["status"] == 422
        assert re.match(r"image 3: images are 1 x 1 pixels: this model needs", results[3]["error"])


def test_the_documentation_lists_every_status_and_loads_nothing(colours):
    web = client(colours, api_key="0123456789abcdef")
    page = web.get("/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert not re.search(r"(src|href)=['\"]?(https?:)?//|<script|@import|url\(", page.text)
    document = web.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        assert f"{path}</code></h2>" in page.text
        for operation in methods.values():
            codes = set(operation["responses"])
            assert codes >= {"200", "403", "413", "500"}
            assert ("401" in codes) == (path not in ("/healthz", "/readyz"))
    codes = document["paths"]["/v1/predict"]["post"]["responses"]
    refused = [400, 401, 403, 404, 413, 415, 422, 500, 503, 504]
    assert set(codes) == {"200", *map(str, refused)}
    links = re.findall(r"href='#(\w+)'", page.text)
    assert all(f"id='{name}'" in page.text for name in links)


# ------------------------------------------------------------------------------ what is given


def test_models_get_the_names_that_they_are_given_or_those_of_their_files(model_folder):
    opened = open_models([f"a={model_folder}", str(model_folder)], "fused")
    assert list(opened) == ["a", model_folder.name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=cvt-13", "a=cvt-21"], "cvt-13 and cvt-21 are both named a"),
        (["<b>=cvt-13"], "'<b>' is no name for requests"),
        (["=cvt-13"], "'' is no name for requests"),
        (["a=nowhere"], "no model nowhere"),
    ],
)
def test_names_that_cannot_be_are_refused(words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_models(words)


def test_a_key_has_enough_characters(tmp_path):
    path = tmp_path / "key"
    path.write_text(" 0123456789abcdef\n")
    assert read_key(path) == "0123456789abcdef"
    for bad in ("", "short", "0123456789 abcdef", "0123456789abcdefé", "0123456789abcdef\n\0"):
        path.write_text(bad)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_key(path)
