import http.server
import itertools
import multiprocessing
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import dataset, parquet
from transformers import pipeline

from cvt.data.decoding import ImageError, decode
from cvt.inference import classifier as module
from cvt.inference.classifier import Classifier
from cvt.inference.predict import find_images, predict


@pytest.fixture(scope="module")
def clf(model_folder):
    return Classifier(model_folder, "torch", batch_size=4)


@pytest.fixture(scope="module")
def paths(photos):
    return list(find_images([photos]))[::4]


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 this is no photo")
    return path


def close(ours, theirs, tolerance=1e-6):
    """Whether two lists of records have the same labels and scores."""
    return [r["label"] for r in ours] == [r["label"] for r in theirs] and [
        r["score"] for r in ours
    ] == pytest.approx([r["score"] for r in theirs], abs=tolerance)


# ------------------------------------------------------------------------------ calls


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["torch", "fused"])
def test_a_gpu_gives_the_answers_of_a_cpu(model_folder, paths, runtime):
    on_gpu, on_cpu = (Classifier(model_folder, runtime, device=d)(paths) for d in ("cuda", "cpu"))
    for found, expected in zip(on_gpu, on_cpu, strict=True):
        assert close(found, expected, tolerance=1e-4)


def test_answers_are_those_of_transformers_pipeline(clf, classifier, processor, paths):
    pipe = pipeline("image-classification", model=classifier, image_processor=processor)
    theirs = pipe([str(path) for path in paths], top_k=2)
    ours = clf([str(path) for path in paths], top_k=2)
    assert all(itertools.starmap(close, zip(ours, theirs, strict=True)))
    assert close(clf(str(paths[0])), pipe(str(paths[0])))


def test_every_form_of_an_image_gets_the_same_answer(clf, paths):
    expected = clf(paths[0])
    image = decode(paths[0])
    pixels = np.asarray(image)
    floats = [(pixels / 255).astype(dtype) for dtype in (np.float32, np.float64)]
    forms = [str(paths[0]), paths[0].read_bytes(), image, pixels, *floats, pixels[::-1][::-1]]
    for form, answer in zip(forms, clf(forms), strict=True):
        assert close(answer, expected), form


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_a_rounding_beyond_their_range_are_clipped(clf, dtype):
    exact = np.eye(16, dtype=dtype)[:, :, None].repeat(3, axis=2)
    beyond = np.where(exact > 0, np.nextafter(dtype(1), dtype(2)), -np.finfo(dtype).eps)
    assert beyond.min() < 0 < 1 < beyond.max()
    assert clf(beyond) == clf(exact)


def test_a_list_gives_a_list_and_topk_beyond_the_classes_all(clf, paths):
    assert clf([]) == []
    ((first, *rest),) = clf([paths[0]], top_k=99)
    assert first.keys() == {"label", "score"}
    assert len(rest) == 2


@pytest.mark.parametrize("runtime", ["torch", "fused"])
def test_eight_threads_get_the_serial_answers(model_folder, paths, runtime):
    clf = Classifier(model_folder, runtime)
    serial = [clf(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(clf, paths * 4)) == serial * 4


def test_it_travels_as_its_arguments(model_folder, paths):
    clf = Classifier(
        model_folder, "torch", batch_size=3, exact=True, max_pixels=10**6, allow_urls=True
    )
    again = pickle.loads(pickle.dumps(clf))
    assert (again.batch_size, again.exact, again.allow_urls) == (3, True, True)
    assert again.max_pixels == 10**6
    assert again(paths) == clf(paths)


def test_a_loaded_model_comes_with_its_processor(classifier, processor, clf, paths):
    with pytest.raises(ValueError, match="give its processor"):
        Classifier(classifier)
    assert Classifier(classifier, "torch", processor=processor)(paths[0]) == clf(paths[0])


def test_an_image_of_too_many_pixels_is_refused(model_folder, paths):
    clf = Classifier(model_folder, "torch", max_pixels=24 * 40 - 1)
    with pytest.raises(ImageError, match=r"is 40 x 24 pixels; at most 959 are decoded"):
        clf(paths[0])


@pytest.mark.parametrize("exact", [False, True])
def test_large_jpegs_are_decoded_smaller_unless_exact(model_folder, tmp_path, exact, monkeypatch):
    sizes = []

    def spy(*arguments, **limits):
        image = decode(*arguments, **limits)
        sizes.append(image.size)
        return image

    monkeypatch.setattr("cvt.inference.predict.decode", spy)
    Image.new("RGB", (128, 112), "teal").save(tmp_path / "large.jpg")
    Classifier(model_folder, "torch", exact=exact)(tmp_path / "large.jpg")
    assert sizes == [(128, 112) if exact else (64, 56)]


# ------------------------------------------------------------------------------ bad input

PNG = "iVBORw0KGgo" + "AbC+" * 253 + "="  # in base64


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 4), np.uint8), r"shape \(4, 4, 4\); expected \(height, width, 3\)"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\)"),
        (np.zeros((8, 8), np.uint8), r"shape \(8, 8\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"shape \(2, 8, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        (np.zeros((8, 8, 3), np.int64), "is of int64; expected uint8, or floats from 0 to 1"),
        (np.full((8, 8, 3), 200.0), "floats from 200 to 200; expected 0 to 1"),
        (np.full((8, 8, 3), -0.1), "floats from -0.1 to -0.1"),
        (np.full((8, 8, 3), np.nan), "floats from nan to nan"),
        (np.array([0.5, np.nan, np.inf]).reshape(1, 1, 3), "floats from nan to nan"),
        (b"", "<bytes>: is empty"),
        (b"text", "<bytes>: is not an image"),
        ("missing.png", "missing.png: cannot be decoded: No such file"),
        (os.curdir, "is a folder"),
        (Image.new("F", (8, 8)), "<PIL image>: has floating-point pixels"),
        ("data:image/png;base64," + PNG, "^a string of 1046 characters is no path; .* the bytes"),
        (PNG, "^a string of 1024 characters is no path"),
        (PNG[:64], "^a string of 64 characters is no path"),
        ("name/" * 1000, "^a string of 5000 characters is no path"),
    ],
)
def test_a_bad_image_names_what_was_expected(clf, image, message):
    with pytest.raises(ImageError, match=message):
        clf(image)
    (record,) = clf.stream([image])
    assert record.keys() == {"path", "error"}
    with pytest.raises(ImageError, match=message):
        clf([np.zeros((8, 8, 3), np.uint8), image])


@pytest.mark.parametrize("image", [None, 3, {1}, (path for path in "ab")])
def test_what_is_no_image_is_a_type_error(clf, image):
    with pytest.raises(
        TypeError, match="an image is a path, bytes, a PIL image, an array or a URL"
    ):
        clf(image)
    with pytest.raises(TypeError, match="an image is a path"):
        list(clf.stream([image]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda clf, path: clf(path, top_k=0), "top_k = 0: must be at least 1"),
        (lambda clf, path: clf.stream([path], batch_size=0), "batch_size = 0"),
        (lambda clf, path: clf.stream([path], workers=-1), "workers = -1"),
        (lambda clf, path: clf.stream([path], workers=10**6), "workers = 1000000: .* at most"),
        (lambda clf, path: clf(path, top_k="5"), "top_k is of type str: must be a whole number"),
        (lambda clf, path: clf(path, top_k=True), "top_k is of type bool"),
        (lambda clf, path: Classifier("cvt-13", batch_size=1.5), "batch_size is of type float"),
        (lambda clf, path: Classifier("cvt-13", batch_size=10**9), "batch_size = 10.* most 65536"),
        (lambda clf, path: Classifier("cvt-13", threads=10**6), "threads = 1000000: .* at most"),
        (lambda clf, path: Classifier("cvt-13", device=0), "device is of type int: .* a string"),
        (lambda clf, path: Classifier("cvt-13", device="gpu"), "device = 'gpu'"),
        (lambda clf, path: Classifier("cvt-13", batch_size=-1), "batch_size = -1"),
        (lambda clf, path: Classifier("cvt-13", runtime="jax"), "runtime = 'jax'"),
        (lambda clf, path: clf.stream("nowhere"), "nowhere does not exist"),
        (lambda clf, path: Classifier("cvt-99"), "no model cvt-99"),
    ],
)
def test_an_illegal_argument_is_named(clf, paths, call, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        call(clf, paths[0])


# ------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_is_streamed_in_order(clf, photos, broken, workers):
    found = list(find_images([photos]))
    records = list(clf.stream(photos, workers=workers, top_k=2))
    assert [record["path"] for record in records] == [str(path) for path in found]
    for record, answer in zip(records, clf(found, top_k=2), strict=True):
        assert close(record["predictions"], answer)
    good, bad, last = clf.stream([found[0], broken, found[1]], batch_size=2, workers=workers)
    assert "broken.jpg" in bad["error"]
    assert (good["path"], last["path"]) == (str(found[0]), str(found[1]))


def test_a_daemonic_process_streams_without_processes_of_its_own(clf, paths, monkeypatch):
    expected = list(clf.stream(paths, workers=0))
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert list(clf.stream(paths, workers=2)) == expected


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_stream_takes_no_more_images_than_it_has_room_for(clf, paths, workers):
    taken = itertools.count()
    endless = (paths[next(taken) % len(paths)] for _ in itertools.count())
    stream = clf.stream(endless, batch_size=3, workers=workers)
    for seen in range(1, 8):
        next(stream)
        time.sleep(0.05)  # for workers that would run ahead
        batches = -(-seen // 3) + 2 * workers
        assert taken.__reduce__()[1][0] <= 3 * (batches + 1)
    stream.close()


# ------------------------------------------------------------------------------ URLs


class Site(http.server.BaseHTTPRequestHandler):
    """A photo, and all that can be wrong with a site."""

    photo = b""

    def do_GET(self):
        kind = self.path.rsplit("/")[-1]
        if kind in ("ftp", "file", "again"):
            targets = {"ftp": "ftp://127.0.0.1/x", "file": "file:///etc/hosts", "again": "/photo"}
            self.send_response(302)
            self.send_header("Location", targets[kind])
            self.end_headers()
            return
        self.send_response(200 if kind in ("photo", "huge", "slow", "cut", "page") else 404)
        if kind == "cut":
            self.send_header("Content-Length", "99999")
        self.end_headers()
        if kind in ("photo", "cut"):
            self.wfile.write(self.photo)
        elif kind == "page":
            self.wfile.write(b"<html>")
        elif kind == "huge":
            self.wfile.write(bytes(300_000))
        elif kind == "slow":
            for _ in range(40):
                time.sleep(0.05)
                self.wfile.write(b".")

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site(paths):
    Site.photo = paths[0].read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def online(model_folder):
    return Classifier(model_folder, "torch", allow_urls=True)


def test_urls_are_fetched_only_when_allowed(clf, online, site, paths):
    with pytest.raises(ValueError, match="allow_urls=True"):
        clf(f"{site}/photo")
    assert online(f"{site}/photo") == online(f"{site}/again") == clf(paths[0])
    (record,) = online.stream([f"{site}/photo"], workers=1)
    assert record == {"path": f"{site}/photo", "predictions": clf(paths[0])}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "404"),
        ("page", "is not an image"),
        ("ftp", "unknown url type: ftp"),
        ("file", "not allowed"),
        ("huge", "is larger than 200000 bytes"),
        ("slow", "takes longer than 0.5 seconds"),
    ],
)
def test_a_url_that_gives_no_image_is_named(online, site, kind, message, monkeypatch):
    monkeypatch.setattr(module, "DOWNLOAD_BYTES", 200_000)
    monkeypatch.setattr(module, "DOWNLOAD_SECONDS", 0.5)
    with pytest.raises(ImageError, match=f"{site}/{kind}.*{message}"):
        online(f"{site}/{kind}")


def test_a_host_that_does_not_answer_is_named(online):
    with pytest.raises(ImageError, match=r"127\.0\.0\.1:1/x: cannot be fetched"):
        online("http://127.0.0.1:1/x")


# ------------------------------------------------------------------------------ batches of columns


def expected_columns(clf, paths):
    best = predict(clf.runtime, clf.processor, paths, topk=1)
    return [(prediction.labels[0], pytest.approx(prediction.scores[0])) for prediction in best]


@pytest.mark.parametrize("kind", ["arrays", "one array", "bytes", "structs", "paths in structs"])
def test_a_batch_gets_columns(clf, paths, kind):
    cells = {
        "arrays": [np.asarray(decode(path)) for path in paths],
        "one array": [np.asarray(decode(paths[0]))] * 2,
        "bytes": [path.read_bytes() for path in paths],
        "structs": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "paths in structs": [{"bytes": None, "path": str(path)} for path in paths],
    }[kind]
    column = np.empty(len(cells), dtype=object)
    column[:] = cells
    column = np.stack(cells) if kind == "one array" else column
    batch = {"bytes" if kind == "bytes" else "image": column, "id": np.arange(len(cells))}
    answer = clf(batch)
    assert list(answer) == [*batch, "label", "score", "error"]
    assert answer["id"] is batch["id"]
    expected = expected_columns(clf, paths[:1] * 2 if kind == "one array" else paths)
    assert list(zip(answer["label"].to_pylist(), answer["score"], strict=True)) == expected
    assert answer["error"].to_pylist() == [None] * len(cells)


def test_a_cell_without_an_image_has_an_error(clf, paths):
    cells = np.array([paths[0].read_bytes(), None, b"no", b""], dtype=object)
    answer = clf({"bytes": cells})
    assert answer["label"].is_null().to_pylist() == [False, True, True, True]
    assert np.isnan(answer["score"]).tolist() == [False, True, True, True]
    assert "is not an image" in answer["error"][2].as_py()


def test_tables_of_good_and_of_bad_images_are_one_data_set(clf, paths, tmp_path):
    for name, cells in (("good", [path.read_bytes() for path in paths]), ("bad", [b"no", b""])):
        answer = clf({"bytes": np.array(cells, dtype=object)})
        columns = {  # as Ray Data turns a batch into a block
            column: pyarrow.array(values, type=pyarrow.infer_type(values))
            for column, values in answer.items()
        }
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    for first in ("good", "bad"):
        schema = parquet.read_schema(tmp_path / f"{first}.parquet")
        table = dataset.dataset(tmp_path, schema=schema).to_table()
        assert [schema.field(name).type for name in ("label", "error")] == [pyarrow.string()] * 2
        assert table["label"].null_count == 2
        assert table["error"].null_count == len(paths)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"picture": []}, "columns picture: expected image .* or bytes"),
        ({"image": [], "label": [], "score": []}, "a column label, score already: rename"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(clf, batch, message):
    with pytest.raises(ValueError, match=message):
        clf(batch)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("image", Image.new("RGB", (8, 8))),
        ("image", np.zeros((8, 8, 3), np.uint8)),
        ("bytes", b"\x89PNG"),
    ],
)
def test_a_row_in_place_of_a_batch_is_refused(clf, name, image):
    with pytest.raises(TypeError, match=rf"{name} is one image: .* as classifier\(row\['{name}'\]"):
        clf({name: image})
