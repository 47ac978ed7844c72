"""The export to a page: what is written, what is refused, and its JavaScript in node."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from helpers.pictures import encoded, photo
from PIL import Image

from cvt import CvtConfig, CvtForImageClassification, image_processor
from cvt.data import decode
from cvt.data.preprocessing import Preprocessing
from cvt.export import export, web
from cvt.files import sha256
from cvt.inference.predict import predict
from cvt.runtime import open_runtime
from cvt.runtime.base import Runtime
from cvt.runtime.cache import cache_folder

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
MULTI = {"problem_type": "multi_label_classification", "thresholds": [0.9, 0.4, 0.1]}


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """The unpacked npm package, with other files of the same names."""
    folder = tmp_path / "package"
    (folder / "dist").mkdir(parents=True)
    for name in web.RUNTIME_FILES:
        (folder / "dist" / name).write_text(name)
    sums = {name: sha256(folder / "dist" / name) for name in web.RUNTIME_FILES}
    monkeypatch.setattr(web, "RUNTIME_FILES", sums)
    return folder


def saved(folder, settings=None, **fields):
    """The folder of a small model of three classes."""
    config = CvtConfig(embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 1, 1], num_labels=3)
    for name, value in fields.items():
        setattr(config, name, value)
    CvtForImageClassification(config).save_pretrained(folder)
    processor = image_processor(config, image_size=32)
    for name, value in (settings or {}).items():
        setattr(processor, name, value)
    processor.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------ what is written


def test_the_folder_is_a_page_and_an_export(model_folder, runtime, tmp_path):
    out = tmp_path / "out"
    manifest = export(model_folder, out, "web", language="zh", runtime_files=runtime)
    page = {path.relative_to(web.PAGE) for path in web.PAGE.rglob("*") if path.is_file()}
    written = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert page <= written
    for name in web.RUNTIME_FILES:  # with a suffix that every server knows
        assert (out / "runtime" / name.replace(".mjs", ".js")).read_text() == name
    assert "Microsoft" in (out / "runtime" / "LICENSE.txt").read_text("utf-8")
    content = json.loads((out / "page.json").read_text("utf-8"))
    assert content["language"] == "zh"
    assert content["labels"] == ["blue", "green", "red"]
    assert (content["problem"], content["thresholds"]) == ("exclusive", None)
    assert content["graph_bytes"] == (out / "model.onnx").stat().st_size
    assert str(tmp_path) not in (out / "page.json").read_text("utf-8")
    assert manifest.parity["largest_difference"] < 1e-4
    (out / "page.css").write_text("")  # a user may change the page
    pattern = (np.arange(3 * 32 * 32) % 251 / 125 - 1).astype(np.float32).reshape(1, 3, 32, 32)
    (logits,) = open_runtime(out, device="cpu")(pattern)
    np.testing.assert_allclose(logits, content["example"], atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"filter": "bicubic", "shortest_edge": 36, "rescale_factor": 1 / 255}),
        ({"resample": 2, "crop_pct": 1.0}, {"filter": "bilinear", "shortest_edge": 32}),
        ({"size": {"shortest_edge": 384}}, {"image_size": 384, "shortest_edge": None}),
        ({"do_resize": False}, {"filter": None}),
        ({"do_rescale": False}, {"rescale_factor": 1.0}),
        ({"do_normalize": False}, {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}),
        ({"image_mean": 0.4}, {"image_mean": [0.4] * 3}),
    ],
)
def test_the_page_gets_settings_that_leave_nothing_to_decide(tmp_path, settings, expected):
    saved(tmp_path, settings)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    written = web._preprocessing(Preprocessing.from_settings(stored, "here"))
    assert written.items() >= expected.items()


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        ({"resample": 0}, {}, r"resample = 0: the page resizes with 1 \(lanczos\), 2"),
        ({}, {"num_labels": 0}, "num_labels = 0: the model has no classes"),
    ],
)
def test_a_model_that_the_page_cannot_show_is_refused(runtime, tmp_path, settings, fields, message):
    model = saved(tmp_path / "model", settings, **fields)
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", "web", runtime_files=runtime)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ the runtime


def npm(folder, script):
    """A program of this name that runs a script of the shell."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    return str(folder)


def test_npm_fetches_the_runtime_once(runtime, tmp_path, monkeypatch):
    archive = shutil.make_archive(str(tmp_path / "fetched"), "gztar", tmp_path, "package")
    bin = npm(tmp_path / "bin", f'echo "$@" >> {tmp_path}/calls; cp {archive} "$4/a.tgz"')
    monkeypatch.setenv("PATH", bin, prepend=":")
    for _ in range(2):
        folder = web.runtime_folder()
        assert {path.name for path in folder.iterdir()} == {*web.RUNTIME_FILES, "config.json"}
    assert folder.parent == cache_folder()
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    (folder / "ort.wasm.min.mjs").write_text("damaged")
    assert (web.runtime_folder() / "ort.wasm.min.mjs").read_text() == "ort.wasm.min.mjs"
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo npm error code E404 >&2; exit 1", r"cannot fetch onnxruntime-web@.* \(code E404\)"),
        (None, "npm, which fetches the runtime, is not found: unpack .* --runtime-files"),
    ],
)
def test_a_runtime_that_cannot_be_had(runtime, tmp_path, monkeypatch, script, message):
    monkeypatch.setenv("PATH", npm(tmp_path / "bin", script) if script else "")
    with pytest.raises(FileNotFoundError, match=message):
        web.runtime_folder()


def test_files_of_another_version_are_refused(runtime, tmp_path):
    (runtime / "dist" / "ort.webgpu.min.mjs").write_text("other")
    with pytest.raises(ValueError, match=r"ort.webgpu.min.mjs is not that of the npm package"):
        web.runtime_folder(runtime)
    with pytest.raises(FileNotFoundError, match=r"has no ort.wasm.min.mjs, a file of the npm"):
        web.runtime_folder(tmp_path)


# ------------------------------------------------------------------------------ in node


def node(tmp_path, script, **files):
    """Run a module, which finds those of the page in `page`; returns what it prints, as JSON."""
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    shutil.copytree(web.PAGE, tmp_path / "page")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    head = 'import fs from "node:fs"; const page = "./page/";\n'
    (tmp_path / "run.mjs").write_text(head + script)
    done = subprocess.run([NODE, "run.mjs"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_resizing_equals_pillows_to_the_bit(tmp_path):
    sizes = [(7, 5), (1, 1), (64, 48), (61, 200), (300, 17), (640, 427), (50, 37)]
    targets = [(32, 32), (1, 3), (37, 37), (131, 89), (50, 20)]
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in sizes]
    # Edges of black and white, which overshoot.
    pictures = [np.where(p > 127, 255, 0).astype(np.uint8) if i % 2 else p
                for i, p in enumerate(pictures)]  # fmt: skip
    cases = [[i, *size, to] for i in range(len(sizes)) for to in targets for size in [sizes[i]]]
    script = """
    const { resize } = await import(page + "preprocessing.js");
    const [sizes, targets, filters] = JSON.parse(fs.readFileSync("cases"));
    const pictures = fs.readFileSync("pictures");
    const out = [];
    let start = 0;
    for (const [width, height] of sizes) {
      const data = new Uint8Array(pictures.subarray(start, start += 3 * width * height));
      for (const to of targets) for (const filter of filters)
        out.push(Buffer.from(resize({ width, height, data }, ...to, filter).data));
    }
    fs.writeFileSync("resized", Buffer.concat(out));
    console.log(out.length);
    """
    filters = list(web.FILTERS.values())
    given = json.dumps([sizes, targets, filters]).encode()
    content = b"".join(picture.tobytes() for picture in pictures)
    assert node(tmp_path, script, cases=given, pictures=content) == len(cases) * len(filters)
    resized = (tmp_path / "resized").read_bytes()
    for picture in pictures:
        for to in targets:
            for number in web.FILTERS:
                expected = Image.fromarray(picture).resize(to, number).tobytes()
                assert resized[: len(expected)] == expected, (picture.shape, to, number)
                resized = resized[len(expected) :]


@needs_node
def test_preprocessing_equals_pythons_to_the_bit(tmp_path):
    settings = [
        Preprocessing(image_size=32, crop_pct=0.875, image_mean=(0.485, 0.456, 0.406)),
        Preprocessing(image_size=33, crop_pct=1.0, resample=2, image_std=0.3),
        Preprocessing(image_size=24, crop_pct=1.5),  # crops more than there is
        Preprocessing(image_size=384, do_rescale=False, do_normalize=False),
    ]
    pictures = [photo(40, 57, seed=1), photo(101, 30, seed=2)]
    script = """
    const { preprocess } = await import(page + "preprocessing.js");
    const all = [];
    const pictures = fs.readFileSync("pictures");
    let start = 0;
    for (const [height, width] of [[40, 57], [101, 30]]) {
      const data = new Uint8Array(pictures.subarray(start, start += 3 * width * height));
      for (const settings of JSON.parse(fs.readFileSync("settings")))
        all.push(new Uint8Array(preprocess({ width, height, data }, settings).pixels.buffer));
    }
    fs.writeFileSync("pixels", Buffer.concat(all));
    console.log(all.length);
    """
    given = [{**web._preprocessing(each), "any_size": False} for each in settings]
    content = b"".join(picture.tobytes() for picture in pictures)
    node(tmp_path, script, settings=json.dumps(given).encode(), pictures=content)
    expected = [
        each([Image.fromarray(picture)]).tobytes() for picture in pictures for each in settings
    ]
    assert (tmp_path / "pixels").read_bytes() == b"".join(expected)


@needs_node
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_16_bit_greyscale_png_is_decoded_as_in_python(tmp_path, orientation):
    grey = np.linspace(0, 65535, 37 * 53).astype(np.uint16).reshape(37, 53)
    grey[20:] = np.random.default_rng(0).integers(0, 65536, (17, 53))  # every filter of PNG
    exif = Image.Exif()
    exif[274] = orientation
    content = encoded(Image.fromarray(grey), exif=exif.tobytes(), transparency=int(grey[30, 7]))
    script = """
    const { decode } = await import(page + "decode.js");
    const { width, height, data } = await decode(new Blob([fs.readFileSync("a.png")]));
    console.log(JSON.stringify([width, height, [...data]]));
    """
    width, height, data = node(tmp_path, script, **{"a.png": content})
    expected = np.asarray(decode(content))
    np.testing.assert_array_equal(np.array(data).reshape(height, width, 3), expected)


@needs_node
@pytest.mark.parametrize(
    "fields", [{}, MULTI, {"problem_type": "regression"}, {"num_labels": 1}, {"num_labels": 9}]
)
def test_the_page_names_the_classes_that_predict_names(tmp_path, fields):
    config = CvtConfig(num_labels=3)
    for name, value in fields.items():
        setattr(config, name, value)
    logits = np.random.default_rng(1).normal(size=config.num_labels).astype(np.float32)

    class Fixed(Runtime):
        def _run(self, pixels):
            return (np.repeat(logits[None], len(pixels), axis=0),)

    settings = {
        "labels": config.class_names,
        "problem": web._problem(config),
        "thresholds": config.thresholds,
    }
    script = """
    const { ranked } = await import(page + "classify.js");
    const [logits, settings] = JSON.parse(fs.readFileSync("given"));
    console.log(JSON.stringify(ranked(Float32Array.from(logits), settings)));
    """
    shown = node(tmp_path, script, given=json.dumps([logits.tolist(), settings]).encode())
    (tmp_path / "a.png").write_bytes(encoded(photo()))
    (found,) = predict(Fixed(config, "fp32"), Preprocessing(32), [tmp_path / "a.png"], workers=0)
    assert [each["label"] for each in shown] == found.labels
    np.testing.assert_allclose([each["score"] for each in shown], found.scores, rtol=1e-5)
    assert [each["has"] for each in shown] == (found.has or [None] * len(shown))
