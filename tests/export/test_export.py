import importlib.util
import json
import math
import zipfile
from functools import partial
from pathlib import Path

import nncf
import numpy as np
import onnx
import openvino
import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import ImageClassifierOutput

import cvt.export
from cvt import CvtConfig, CvtForImageClassification, image_processor
from cvt.checkpoints import load_processor
from cvt.data import open_training
from cvt.data.decoding import ImageError
from cvt.export import export, quantization
from cvt.export.parity import compare
from cvt.export.quantization import preprocessed, two_splits
from cvt.runtime import capture, open_runtime, openvino_graph
from cvt.runtime.manifest import Manifest

FILES = {
    "onnx": {"model.onnx"},
    "openvino": {"model.xml", "model.bin"},
    "torch-export": {"model.pt2"},
}
BESIDE = {"config.json", "preprocessor_config.json", "export.json"}
DYNAMIC = ("batch", "size")
TWO_STAGES = {
    "num_heads": [1, 2], "patch_sizes": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1],
    "mlp_ratio": [4.0] * 2, "attention_drop_rate": [0.0] * 2, "drop_rate": [0.0] * 2,
    "drop_path_rate": [0.0] * 2, "qkv_bias": [True] * 2, "cls_token": [False, True],
    "qkv_projection_method": ["dw_bn"] * 2, "kernel_qkv": [3] * 2, "padding_kv": [1] * 2,
    "stride_kv": [2] * 2, "padding_q": [1] * 2, "stride_q": [1] * 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a classifier of two stages, with random weights."""
    torch.manual_seed(0)
    positions = {"position_embedding": ["learned", "learned"], "image_size": 24}
    config = CvtConfig(embed_dim=[8, 16], depth=[1, 1], **TWO_STAGES, **positions)
    config.class_names = ["blue", "green", "light red"]
    folder = tmp_path_factory.mktemp("small")
    CvtForImageClassification(config).save_pretrained(folder)
    image_processor(config, image_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(small):
    return CvtForImageClassification.from_pretrained(small).eval()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of the digits held out, and a model folder that has learned the others."""
    torch.manual_seed(0)
    train, test, _ = open_training("digits")
    config = CvtConfig(embed_dim=[32, 64], depth=[1, 1], **TWO_STAGES)
    config.class_names = train.classes
    processor = image_processor(config, image_size=16, crop_pct=1.0)
    pixels = torch.from_numpy(preprocessed(train.sources, processor))
    labels = torch.tensor([train.classes.index(label) for label in train.labels])
    model = CvtForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    order = torch.cat([torch.randperm(len(pixels)) for _ in range(5)]).split(64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, len(order))
    for batch in order:
        loss = F.cross_entropy(model(pixels[batch]).logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    root = tmp_path_factory.mktemp("digits")
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    (root / "images").mkdir()
    for i, source in enumerate(test.sources):
        source.content.save(root / "images" / f"{i:03d}.png")
    held_out = torch.from_numpy(preprocessed(test.sources, processor))
    named = logits_of(model.eval(), held_out).argmax(dim=1)
    labels = torch.tensor([train.classes.index(label) for label in test.labels])
    assert (named == labels).float().mean() > 0.93
    return root


@pytest.fixture
def run(cvt):
    """Runs `cvt export` in this process; answers exit code, output and errors."""
    return partial(cvt, "export")


def pixels_of(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def logits_of(model, pixels):
    with torch.no_grad():
        return model(pixels).logits


def same_logits(folder, model, pixels):
    runtime = open_runtime(folder, device="cpu")
    torch.testing.assert_close(runtime(pixels), logits_of(model, pixels), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------ what is written


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory):
    """The small model in every format, for images of any number and size."""
    root = tmp_path_factory.mktemp("exports")
    return {to: (root / to, export(small, root / to, to, dynamic=DYNAMIC)) for to in FILES}


@pytest.mark.parametrize("to", FILES)
def test_an_export_of_any_size_gives_the_logits_of_the_model(exported, classifier, to):
    folder, manifest = exported[to]
    assert {path.name for path in folder.iterdir()} == BESIDE | FILES[to]
    assert manifest == Manifest.read(folder)
    assert (manifest.format, manifest.precision, manifest.agreement) == (to, "fp32", None)
    assert (manifest.image_size, manifest.dynamic) == ((32, 32), ("batch", "size"))
    assert CvtConfig.from_pretrained(folder).class_names == classifier.config.class_names
    checked = {(c["images"], c["height"], c["width"]) for c in manifest.parity["checks"]}
    smallest = (classifier.config.minimum_image_size,) * 2
    sizes = ((32, 32), (33, 33), (16, 48), smallest)
    assert checked == {(b, *size) for b in (1, 2, 5) for size in sizes}
    assert 0 < manifest.parity["largest_difference"] < 1e-4
    same_logits(folder, classifier, pixels_of(3, 41, 29))


def test_a_program_loaded_as_documented_takes_every_size(exported, classifier):
    folder, _ = exported["torch-export"]
    program = torch.export.load(folder / "model.pt2").module()
    least = classifier.config.minimum_image_size
    for size in ((32, 32), (least, least), (7, 90), (15, 16), (33, 32), (64, 31)):
        for batch in (1, 3):
            pixels = pixels_of(batch, *size)
            expected = logits_of(classifier, pixels)
            torch.testing.assert_close(program(pixels), expected, atol=1e-5, rtol=1e-5)


def test_a_program_that_refuses_a_size_is_not_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "without_guards", lambda program, smallest: None)
    with pytest.raises(ValueError, match=r"model.pt2 was not written: .* pixels of shape \(1, 3, "):
        export(small, tmp_path / "out", "torch-export", dynamic=DYNAMIC)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", FILES)
def test_an_export_without_anything_dynamic(small, classifier, tmp_path, to):
    manifest = export(small, tmp_path / "out", to, dynamic=(), image_size=24)
    assert (manifest.image_size, manifest.dynamic) == ((24, 24), ())
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 24}
    same_logits(tmp_path / "out", classifier, pixels_of(2, 24, 24))


def test_graphs_name_what_is_dynamic_and_the_classes(exported, classifier):
    model = onnx.load(exported["onnx"][0] / "model.onnx")
    sides = [
        dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim
    ]
    assert (model.graph.input[0].name, sides) == ("pixel_values", ["batch", 3, "height", "width"])
    assert model.graph.output[0].name == "logits"
    network = openvino.Core().read_model(exported["openvino"][0] / "model.xml")
    assert [network.input().any_name, network.output().any_name] == ["pixel_values", "logits"]
    stored = (
        model.metadata_props[0].value,
        network.get_rt_info(["model_info", "class_names"]).value,
    )
    assert [json.loads(names) for names in stored] == [classifier.config.class_names] * 2


@pytest.mark.parametrize(
    ("to", "precision"),
    [
        ("onnx", "fp16"),
        pytest.param("openvino", "bf16", marks=pytest.mark.slow),
        ("openvino", "fp16"),
        ("torch-export", "bf16"),
    ],
)
def test_sixteen_bits_halve_the_weights_within_the_tolerance(
    exported, small, tmp_path, to, precision
):
    manifest = export(small, tmp_path / "out", to, precision=precision)
    assert manifest.precision == precision
    assert all(0 < c["difference"] <= c["tolerance"] for c in manifest.parity["checks"])
    (weights,) = FILES[to] - {"model.xml"}
    size = (tmp_path / "out" / weights).stat().st_size
    assert size < 0.85 * (exported[to][0] / weights).stat().st_size


def test_weights_in_bfloat16_are_exported_in_fp32(small, tmp_path):
    model = CvtForImageClassification.from_pretrained(small).bfloat16()
    model.save_pretrained(tmp_path / "half")
    image_processor(model.config, image_size=32).save_pretrained(tmp_path / "half")
    manifest = export(tmp_path / "half", tmp_path / "out", "torch-export")
    assert manifest.parity["largest_difference"] < 1e-5


def test_an_export_has_no_path_of_this_machine(exported):
    written = b""
    with zipfile.ZipFile(exported["torch-export"][0] / "model.pt2") as file:
        for name in file.namelist():
            written += file.read(name)
    assert b"pixel_values" in written
    assert str(Path(cvt.__file__).parent).encode() not in written


# ------------------------------------------------------------------------------ int8


@pytest.mark.parametrize(
    ("to", "dynamic", "resolutions"),
    [("openvino", ("batch",), 1), pytest.param("onnx", DYNAMIC, 4, marks=pytest.mark.slow)],
)
def test_int8_names_the_classes_of_fp32(digits, tmp_path, to, dynamic, resolutions):
    manifest = export(
        digits / "model", tmp_path / "out", to, precision="int8", dynamic=dynamic,
        calibration=digits / "images", calibration_images=120,
    )  # fmt: skip
    assert manifest.agreement >= 0.99
    checks = manifest.parity["checks"]
    assert sum(check["images"] for check in checks) == 120
    assert len({(check["height"], check["width"]) for check in checks}) == resolutions
    counted = [check for check in checks if (check["height"], check["width"]) == (16, 16)]
    assert manifest.parity["images"] == sum(check["images"] for check in counted)
    same = sum(check["same_class"] for check in counted)
    assert manifest.agreement == same / manifest.parity["images"]
    assert min(check["difference"] for check in checks) > 1e-3  # it is in int8


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"avx2"}, {"avx2", "avx512_vnni"}], ids=["floats", "8 bits"])
def test_int8_keeps_the_accuracy_of_the_digits(digits, tmp_path, monkeypatch, flags):
    """Whichever way a processor computes it; see `cvt.runtime.openvino_graph`."""
    monkeypatch.setattr(openvino_graph, "instructions", lambda: frozenset(flags))
    arguments = {"precision": "int8", "calibration": digits / "images"}
    export(digits / "model", tmp_path / "out", "openvino", **arguments)
    _, test, _ = open_training("digits")
    model = CvtForImageClassification.from_pretrained(digits / "model").eval()
    processor = load_processor(digits / "model", model.config)
    pixels = torch.from_numpy(preprocessed(test.sources, processor))
    labels = torch.tensor([model.config.class_names.index(label) for label in test.labels])
    in_fp32, in_int8 = (
        (logits.argmax(dim=1) == labels).float().mean()
        for logits in (logits_of(model, pixels), open_runtime(tmp_path / "out")(pixels))
    )
    assert in_fp32 > 0.9
    assert in_fp32 - in_int8 <= 0.005


def test_int8_below_the_agreement_asked_for_is_not_written(digits, tmp_path, monkeypatch):
    def spoiled(model, *_):
        for weights in model.graph.initializer:
            if weights.name.endswith("classifier.weight"):
                weights.raw_data = bytes(len(weights.raw_data))
        return model

    monkeypatch.setattr(cvt.export, "quantized", spoiled)
    arguments = {"precision": "int8", "calibration": digits / "images", "calibration_images": 50}
    with pytest.raises(ValueError, match=r"of 50 images .* \d+\.\d\d% .* 99.00% is required"):
        export(digits / "model", tmp_path / "out", "onnx", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_int8_that_gives_every_image_all_labels_is_not_written(
    small, photos, tmp_path, monkeypatch
):
    def spoiled(model, *_):
        for weights in model.graph.initializer:
            if weights.name.endswith("classifier.bias"):
                weights.raw_data = np.full(3, 100, np.float32).tobytes()
        return model

    model = CvtForImageClassification.from_pretrained(small)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(tmp_path / "model")
    image_processor(model.config, image_size=32).save_pretrained(tmp_path / "model")
    arguments = {"precision": "int8", "calibration": photos, "calibration_images": 10}
    monkeypatch.setattr(cvt.export, "quantized", lambda graph, *_: graph)
    assert export(tmp_path / "model", tmp_path / "out", "onnx", **arguments).agreement == 1
    monkeypatch.setattr(cvt.export, "quantized", spoiled)
    with pytest.raises(ValueError, match=r"of 10 images .* 99.00% is required"):
        export(tmp_path / "model", tmp_path / "spoiled", "onnx", **arguments)


def test_int8_is_checked_with_images_that_did_not_calibrate_it(
    small, photos, tmp_path, monkeypatch
):
    used = {}

    def quantized(graph, images, processor):
        used["calibrating"] = set(images)
        return graph

    def real_batches(images, *arguments):
        used["checking"] = set(images)
        return quantization.real_batches(images, *arguments)

    monkeypatch.setattr(cvt.export, "quantized", quantized)
    monkeypatch.setattr(cvt.export, "real_batches", real_batches)
    arguments = {"precision": "int8", "calibration": photos, "calibration_images": 10}
    manifest = export(small, tmp_path / "out", "onnx", **arguments, min_agreement=1.0)
    assert [len(images) for images in used.values()] == [10, 10]
    assert not used["calibrating"] & used["checking"]
    assert (manifest.agreement, manifest.parity["images"]) == (1.0, 10)


def test_every_image_calibrates_int8(small, photos, monkeypatch):
    decoded, settings = [], {}

    def quantize(graph, dataset, **named):
        settings.update(named)
        decoded.extend(dataset.get_inference_data())
        return graph

    monkeypatch.setattr(nncf, "quantize", quantize)
    images, processor = sorted(photos.glob("*/0[0-2].png")), image_processor(small)
    quantization.quantized(None, images, processor)
    assert settings["subset_size"] == len(decoded) == len(images) == 9
    pixels = np.concatenate([inputs["pixel_values"] for inputs in decoded])
    np.testing.assert_array_equal(pixels, preprocessed(images, processor))


def test_calibration_takes_turns_through_the_whole_folder(photos):
    calibrating, held_out = two_splits(photos, 6)
    assert (len(calibrating), len(held_out)) == (6, 6)
    assert not set(calibrating) & set(held_out)
    for images in (calibrating, held_out):
        assert {image.parent.name for image in images} == {"blue", "green", "red"}
    assert [len(images) for images in two_splits(photos, 300)] == [18, 18]


def test_calibration_needs_two_images_that_can_be_decoded(small, tmp_path):
    (tmp_path / "0.png").write_bytes(b"no")
    with pytest.raises(ValueError, match="single image"):
        export(small, tmp_path / "out", "onnx", precision="int8", calibration=tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ImageError, match=r"0\.png"):
        preprocessed([tmp_path / "0.png"], image_processor(small))


# ------------------------------------------------------------------------------ what is refused


def test_a_converter_that_changes_a_weight_is_found_out(small, tmp_path, monkeypatch):
    def changed(model, *arguments):
        model.classifier.bias[0] += 0.01
        return capture.torch_graph(model, *arguments)

    monkeypatch.setattr(cvt.export, "torch_graph", changed)
    message = r"for 1 images of 32 x 32 pixels its logits differ .* by 0.01, of which 0.0001 is"
    with pytest.raises(ValueError, match=message):
        export(small, tmp_path / "out", "torch-export")
    assert list(tmp_path.iterdir()) == []


class Fixed:
    """Gives the same logits for whatever pixels."""

    def __init__(self, *logits, precision="fp32", **fields):
        self.logits, self.precision = torch.tensor([logits]), precision
        self.config = CvtConfig(num_labels=len(logits), **fields)

    def __call__(self, pixels):
        return self.logits


@pytest.mark.parametrize(
    ("expected", "logits", "passed"),
    [
        ((1.0, 0.99995), (0.99996, 1.0), True),  # two classes too close to tell apart
        ((1.0, 0.99985), (0.99991, 0.99994), False),  # two that are not
        ((1.0, 0.0), (1.0, 0.0002), False),
        ((1.0, 0.0), (1.0, float("nan")), False),
        ((1000.0, 0.0), (1000.005, 0.0), True),
    ],
)
def test_a_check_asks_for_close_logits_and_the_same_class(expected, logits, passed):
    def model(pixels, return_dict):
        return ImageClassifierOutput(logits=torch.tensor([expected]))

    assert compare(model, Fixed(*logits), pixels_of(1, 4, 4)).passed == passed


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("expected", "logits", "same"),
    [
        ((2.0, 1.0), (2.0, -2.0), False),  # the best class is the same, but not the set
        ((2.0, 1.0), (1.0, 2.0), True),  # the same set, in another order
        ((2.0, -1.5), (2.0, -1.3), False),  # the threshold of the second is 0.2
        ((2.0,), (-2.0,), False),
        ((-1.0,), (-2.0,), True),
    ],
)
def test_a_check_of_independent_labels_compares_the_sets(precision, expected, logits, same):
    def model(pixels, return_dict):
        return ImageClassifierOutput(logits=torch.tensor([expected]))

    fields = {}
    if len(logits) == 2:
        fields = {"problem_type": "multi_label_classification", "thresholds": [0.5, 0.2]}
    found = compare(model, Fixed(*logits, precision=precision, **fields), pixels_of(1, 4, 4))
    assert found.same_class == same


def test_a_class_within_the_tolerance_of_its_threshold_is_the_same():
    def model(pixels, return_dict):
        return ImageClassifierOutput(logits=torch.tensor([(0.00004, 3.0)]))

    fields = {"problem_type": "multi_label_classification"}
    assert compare(model, Fixed(-0.00004, 3.0, **fields), pixels_of(1, 4, 4)).passed


@pytest.mark.parametrize(
    ("precision", "share", "passed"),
    [
        ("bf16", 0.049, True),
        ("bf16", 0.051, False),
        ("fp16", 0.0099, True),
        ("fp16", 0.0101, False),
        ("int8", 0.3, True),  # the classes of all images together are what counts
        ("int8", math.nan, False),
        ("int8", math.inf, False),
    ],
)
def test_logits_of_fewer_bits_may_differ_by_their_share_of_the_largest(precision, share, passed):
    def model(pixels, return_dict):
        return ImageClassifierOutput(logits=torch.tensor([(-20.0, 10.0)]))

    runtime = Fixed(-20.0 + 20.0 * share, 10.0, precision=precision)
    assert compare(model, runtime, pixels_of(1, 4, 4)).passed == passed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "tflite"}, "to = 'tflite': must be one of onnx, openvino, torch-export"),
        ({"precision": "int4"}, "precision = 'int4': must be one of fp32, bf16"),
        ({"to": "onnx", "precision": "bf16"}, "use fp16, or openvino"),
        (
            {"precision": "int8", "calibration": "photos"},
            "int8 exists for openvino, onnx and litert",
        ),
        ({"to": "onnx", "precision": "int8"}, "a folder of images .* is needed in int8"),
        ({"calibration": "photos"}, "has no use in fp32"),
        ({"dynamic": ("channels",)}, "dynamic = .*: may hold batch and size"),
        ({"min_agreement": 1.01}, "min_agreement = 1.01: must be a share from 0 to 1"),
        ({"overwrite": True, "output": "model"}, "is the model itself"),
        ({"output": "model.onnx"}, "model.onnx is the name of a file, but a folder is written"),
    ],
)
def test_bad_arguments_are_refused(small, tmp_path, changes, message):
    name = changes.get("output", "out")
    output = small if name == "model" else tmp_path / name
    arguments = {"to": "torch-export", **changes, "source": small, "output": output}
    with pytest.raises(ValueError, match=message):
        export(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(small, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError):
        export(small, tmp_path, "torch-export")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_missing_library_is_named_with_the_command_that_installs_it(small, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs onnx and .*pip install 'cvt-vision\[export\]'"):
        export(small, tmp_path / "out", "onnx")


# ------------------------------------------------------------------------------ the command


def test_the_command_prints_the_checks(run, small, tmp_path):
    code, out, err = run(small, tmp_path / "out", "--to", "torch-export", "--dynamic", "size,batch")
    assert code == 2
    assert "batch,size" in err
    code, out, err = run(small, tmp_path / "out", "--to", "torch-export")
    assert code == 0, err
    rows = [line.split("│")[1:-1] for line in out.splitlines() if "32 x 32" in line]
    assert [(row[0].strip(), row[2].strip()) for row in rows] == [
        ("1", "1"),
        ("2", "2"),
        ("5", "5"),
    ]
    assert out.splitlines()[-1] == f"{tmp_path / 'out'}: torch-export, fp32"
    assert "comparing with the torch model" in err


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--to", "tflite"),
        ("--to", "onnx", "--precision", "int4"),
        ("--to", "onnx", "--dynamic", "channels"),
        ("--to", "onnx", "--min-agreement", "1.01"),
    ],
)
def test_wrong_usage_exits_with_2(run, small, tmp_path, words):
    assert run(small, tmp_path / "out", *words)[0] == 2
