import copy
import gc
import importlib.util
import io
import json
import os
import shutil
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import openvino
import pytest
import torch
from helpers.damage import assert_flips_are_refused
from torch import nn

from cvt import CvtConfig, CvtForImageClassification
from cvt.architecture import PER_STAGE
from cvt.checkpoints import loading
from cvt.files import sums_of
from cvt.runtime import available, open_runtime
from cvt.runtime.base import PixelError
from cvt.runtime.capture import onnx_graph, openvino_graph, torch_graph
from cvt.runtime.factory import MANY_IMAGES
from cvt.runtime.fused import fuse
from cvt.runtime.manifest import Manifest
from cvt.runtime.openvino_runtime import KEPT_GRAPHS, OpenVinoRuntime, computes
from cvt.runtime.torch_runtime import CompiledRuntime, TorchRuntime

MODELS = ("torch", "fused", "onnxruntime", "openvino")
EXPORTS = {"onnx": "model.onnx", "openvino": "model.xml", "torch-export": "model.pt2"}
ONE_STAGE = {
    "patch_sizes": [7],
    "patch_stride": [4],
    "patch_padding": [2],
    "embed_dim": [16],
    "num_heads": [2],
    "depth": [1],
    "cls_token": [True],
}
REST = {name: getattr(CvtConfig, name)[:1] for name in PER_STAGE if name not in ONE_STAGE}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = CvtConfig(**ONE_STAGE, **REST, hidden_act="quick_gelu", num_labels=5)
    model = CvtForImageClassification(config).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


@cache
def program(model, dynamic, image_size):
    return torch_graph(fuse(model), image_size, dynamic)


def write_export(folder, kind, model, dynamic=("batch", "size"), image_size=(32, 32)):
    """The least that an exported folder has."""
    graph = program(model, dynamic, image_size)
    path = folder / EXPORTS[kind]
    if kind == "onnx":
        onnx.save(onnx_graph(graph), path)
    elif kind == "openvino":
        openvino.save_model(openvino_graph(graph), path, compress_to_fp16=False)
    else:
        torch.export.save(graph, path)
    model.config.save_pretrained(folder)
    Manifest(kind, "fp32", path.name, image_size, tuple(dynamic), {}, {}).write(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model):
    """Exported folders, by format, that take any number and size of images."""
    return {kind: write_export(tmp_path_factory.mktemp(kind), kind, model) for kind in EXPORTS}


@pytest.fixture(scope="module")
def opened(tmp_path_factory, model, exported):
    """One of each runtime that is opened quickly, of a model and of an export."""
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    runtimes = {f"{kind} export": open_runtime(path) for kind, path in exported.items()}
    load = loading.load_classifier
    with pytest.MonkeyPatch.context() as patch:
        for name in MODELS:
            loaded = load(folder)
            pop = {folder: loaded}.pop
            patch.setattr(
                loading, "load_classifier", lambda source, verify, pop=pop: pop(source.path)
            )
            runtimes[name] = open_runtime(folder, name)
            runtimes[name].loaded = weakref.ref(loaded)
    return runtimes


@pytest.fixture(params=[*MODELS, *(f"{kind} export" for kind in EXPORTS)])
def runtime(request, opened):
    return opened[request.param]


def random_pixels(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (6, 3, 32, 32), (3, 3, 35, 50), (2, 3, 3, 3)])
def test_every_runtime_gives_the_logits_of_the_model(runtime, model, shape):
    pixels = random_pixels(*shape)
    logits = runtime(pixels)
    assert (logits.dtype, logits.device.type) == (torch.float32, "cpu")
    torch.testing.assert_close(logits, model(pixels).logits.detach(), atol=1e-5, rtol=1e-5)


def test_an_answer_does_not_depend_on_the_neighbours_in_the_batch(runtime):
    pixels = random_pixels(7, 3, 32, 32)
    alone = torch.cat([runtime(image[None]) for image in pixels])
    torch.testing.assert_close(runtime(pixels), alone, atol=1e-5, rtol=0)


def test_eight_threads_get_the_serial_answers_bit_for_bit(runtime):
    batches = [random_pixels(1 + i % 6, 3, 32, 32 + i % 2, seed=i) for i in range(24)]
    serial = [runtime(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for expected, found in zip(serial, pool.map(runtime, batches), strict=True):
                assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.double,
        torch.Tensor.numpy,
        lambda pixels: pixels.double().numpy(),
        lambda pixels: pixels.numpy().astype(">f4"),
        lambda pixels: np.ascontiguousarray(pixels.permute(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        lambda pixels: np.broadcast_to(pixels.numpy(), pixels.shape),
        lambda pixels: pixels.to(memory_format=torch.channels_last),
        lambda pixels: pixels.clone().requires_grad_(),
    ],
    ids=["float64", "array", "float64 array", "big-endian", "strided", "read-only", "nhwc", "grad"],
)
def test_floats_of_every_kind_are_taken(runtime, convert, recwarn):
    pixels = random_pixels(2, 3, 32, 32)
    converted = convert(pixels)
    logits = runtime(converted)
    assert type(logits) is type(converted)
    assert torch.equal(torch.as_tensor(logits), runtime(pixels))
    assert not recwarn.list


needs_openvino_bf16 = pytest.mark.skipif(
    not computes("bf16"), reason="OpenVINO does not compute in bf16 on this processor"
)


@pytest.mark.parametrize(
    "name", ["auto", "torch", "fused", pytest.param("openvino", marks=needs_openvino_bf16)]
)
def test_bf16_is_close_to_fp32(model, exported, name):
    source = exported["openvino"] if name == "openvino" else model
    runtime = open_runtime(source, name, "bf16")
    pixels = random_pixels(5, 3, 64, 64)
    expected = model(pixels).logits.detach()
    logits = runtime(pixels)
    assert (runtime.precision, logits.dtype) == ("bf16", torch.float32)
    difference = (logits - expected).abs().max() / expected.abs().max()
    assert 1e-5 < difference < 0.03


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ([[[[0.0]]]], "pixels are of type list: expected a tensor or an array of floats"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "pixels are of type torch.uint8: expected"),
        (np.zeros((1, 3, 32, 32), np.int64), "pixels are of type int64: expected"),
        (torch.zeros(3, 32, 32), r"shape \(3, 32, 32\): expected \(batch, 3, height, width\)"),
        (torch.zeros(1, 4, 32, 32), r"shape \(1, 4, 32, 32\): expected \(batch, 3, "),
        (np.zeros((1, 32, 32, 3), np.float32), r"shape \(1, 32, 32, 3\): expected \(batch, 3, "),
        (torch.zeros(0, 3, 32, 32), "expected a batch of at least one"),
        (torch.zeros(1, 3, 32, 2), "32 x 2 pixels: this model needs at least 3 x 3"),
        (torch.full((1, 3, 32, 32), float("nan")), "NaN or infinite"),
        (torch.full((1, 3, 32, 32), float("-inf")), "NaN or infinite"),
        (torch.zeros(2, 3, 32, 32).index_fill(0, torch.tensor(1), torch.nan), "NaN or infinite"),
        (torch.linspace(0, 255, 3072).view(1, 3, 32, 32), "from 0 to 255: expected normalised"),
        (torch.full((1, 3, 32, 32), -21.0), "from -21 to -21: expected normalised"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_wrong_pixels_are_refused_with_what_was_expected(runtime, pixels, expected):
    with pytest.raises(PixelError, match=expected):
        runtime(pixels)


@pytest.mark.parametrize("kind", EXPORTS)
def test_an_export_for_single_images_of_one_size_takes_batches_but_no_other_size(
    kind, model, tmp_path
):
    runtime = open_runtime(write_export(tmp_path, kind, model, (), (32, 48)))
    assert runtime.image_size == (32, 48)
    pixels = random_pixels(5, 3, 32, 48)
    torch.testing.assert_close(runtime(pixels), model(pixels).logits.detach(), atol=1e-5, rtol=0)
    with pytest.raises(PixelError, match="48 x 32 pixels: this export takes 32 x 48 only"):
        runtime(random_pixels(1, 3, 48, 32))


# ------------------------------------------------------------------------------ factory


@pytest.mark.parametrize(
    ("capabilities", "expected"), [(["FP32", "BF16"], "openvino"), (["FP32", "INT8"], "fused")]
)
def test_auto_takes_a_runtime_that_computes_in_bf16(model, monkeypatch, capabilities, expected):
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: capabilities)
    runtime = open_runtime(model, device="cpu", precision="bf16", images=MANY_IMAGES)
    assert (runtime.name, runtime.precision) == (expected, "bf16")


def test_auto_is_the_fastest_that_is_installed(model, monkeypatch):
    monkeypatch.setattr(OpenVinoRuntime, "from_model", lambda *arguments: arguments[1:])
    assert open_runtime(model, device="cpu").describe == "fused fp32 on cpu"
    assert open_runtime(model, device="cpu", threads=2, images=MANY_IMAGES) == ("fp32", 2, None)
    assert open_runtime(model, device="cpu", images=MANY_IMAGES - 1).describe == "fused fp32 on cpu"
    assert open_runtime(model, device="cpu", precision="fp16").describe == "fused fp16 on cpu"
    without(monkeypatch, "openvino")
    assert open_runtime(model, device="cpu", images=MANY_IMAGES).describe == "fused fp32 on cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "torch", "compiled", "torch-export"])
def test_a_gpu_is_used_where_there_is_one(model, exported, name):
    runtime = open_runtime(exported[name]) if name in exported else open_runtime(model, name)
    assert runtime.device.startswith("cuda")
    assert name != "auto" or runtime.name == "fused"
    for images in (5, 2, 1):
        pixels = random_pixels(images, 3, 32, 32)
        expected = model(pixels).logits.detach()
        torch.testing.assert_close(runtime(pixels), expected, atol=1e-4, rtol=1e-4)


def test_a_program_moves_to_another_device_as_a_whole(exported):
    runtime = open_runtime(exported["torch-export"], device="meta")
    (logits,) = runtime.graph(*runtime.weights, torch.empty(3, 3, 40, 56, device="meta"))
    assert (logits.device.type, logits.shape) == ("meta", (3, 5))


def test_an_export_opens_in_its_own_runtime(exported):
    described = [open_runtime(folder, threads=1).describe for folder in exported.values()]
    assert described == [
        "onnxruntime fp32 on cpu, 1 thread",
        "openvino fp32 on cpu, 1 thread",
        "torch fp32 on cpu, 1 thread",
    ]


def without(monkeypatch, library):
    """As if a library were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == library else find(name)
    )


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    name, model, exported, monkeypatch
):
    assert available(name)
    without(monkeypatch, name)
    assert not available(name)
    for source in (model, exported[name.removesuffix("runtime")]):
        with pytest.raises(ImportError, match=rf"needs {name}: pip install 'cvt-vision\[export\]'"):
            open_runtime(source, name)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"runtime": "tensorrt"}, "runtime = 'tensorrt': must be one of auto, torch, fused, "),
        ({"precision": "fp8"}, "precision = 'fp8': must be one of fp32, bf16, "),
        ({"threads": 0}, "threads = 0: must be at least 1"),
        ({"threads": 10**6}, "threads = 1000000: must be at most"),
        ({"device": "abacus"}, "device = 'abacus': "),
        (
            {"device": "meta:0", "runtime": "onnxruntime"},
            "device = meta:0: the onnxruntime .* cannot",
        ),
        ({"device": "cuda", "runtime": "openvino"}, "device = cuda: .* computes on a CPU"),
        ({"precision": "int8"}, "precision = int8: is for exports; `cvt export` writes one"),
        ({"precision": "bf16", "runtime": "onnxruntime"}, "precision = bf16: ONNX Runtime has"),
    ],
)
def test_what_cannot_be_opened_is_a_value_error(model, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        open_runtime(model, **arguments)


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        ("onnx", {"runtime": "openvino"}, "runtime = openvino: .* is an export for onnxruntime"),
        ("onnx", {"precision": "bf16"}, "precision = bf16: .* is an export in fp32"),
        ("openvino", {"precision": "int8"}, "precision = int8: .* is an export in fp32"),
        ("torch-export", {"runtime": "fused"}, "runtime = fused: .* is an export for torch"),
    ],
)
def test_an_export_is_opened_as_nothing_else(exported, kind, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        open_runtime(exported[kind], **arguments)


def test_a_precision_that_the_processor_lacks_is_refused(model, exported, monkeypatch):
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"], raising=True)
    assert computes("fp32")
    for source in (model, exported["openvino"]):
        refusal = "precision = bf16: OpenVINO does not compute in it.*the runtime fused computes"
        with pytest.raises(ValueError, match=refusal):
            open_runtime(source, "openvino", "bf16")


@pytest.mark.parametrize(
    ("kind", "name"),
    [*EXPORTS.items(), ("openvino", "model.bin"), ("onnx", "model.onnx.data")],
)
def test_a_pointer_of_git_lfs_in_place_of_a_graph_is_called_one(exported, tmp_path, kind, name):
    shutil.copytree(exported[kind], tmp_path / "export")
    file = tmp_path / "export" / name
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 8011\n")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        open_runtime(tmp_path / "export")
    assert str(error.value) == (
        f"{file} is a git-lfs pointer, not the weights: `git lfs pull` in its repository gets it"
    )


def test_a_name_that_means_no_model_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model"):
        open_runtime(tmp_path / "nothing")


# ------------------------------------------------------------------------------ models in torch


class Wrapper(nn.Module):
    """What calls a model."""

    def __init__(self, model):
        super().__init__()
        self.module, self.config = model, model.config

    def forward(self, *inputs, **options):
        return self.module(*inputs, **options)


def test_a_wrapped_model_runs_in_eval_mode_whatever_was_done_with_it(model):
    dropping = copy.deepcopy(model)
    for module in dropping.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.9
    runtime = TorchRuntime(Wrapper(dropping))
    pixels = random_pixels(2, 3, 32, 32)
    for _ in range(2):
        torch.testing.assert_close(runtime(pixels), model(pixels).logits.detach())
        dropping.train()


def answering_with_tuples(model):
    model = copy.deepcopy(model)
    model.config.return_dict = False
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_answers_with_tuples_runs(model, name):
    tuples, pixels = answering_with_tuples(model), random_pixels(2, 3, 32, 32)
    expected = model(pixels).logits.detach()
    torch.testing.assert_close(open_runtime(tuples, name)(pixels), expected, rtol=0, atol=1e-4)
    assert isinstance(tuples(pixels), tuple)
    assert isinstance(fuse(tuples)(pixels), tuple)


def test_a_model_that_answers_with_tuples_is_compiled(model):
    pixels = random_pixels(2, 3, 32, 32)
    with torch.compiler.set_stance("force_eager"):
        logits = CompiledRuntime(answering_with_tuples(model))(pixels)
    torch.testing.assert_close(logits, model(pixels).logits.detach())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("where", ["some", "all"])
def test_an_offloaded_model_is_refused_in_one_sentence(model, name, where):
    offloaded = copy.deepcopy(model)
    (offloaded.cvt.encoder.stages[0].layers if where == "some" else offloaded).to("meta")
    offloaded.hf_device_map = {"": "disk"}  # as transformers notes it
    message = r"\d+ of the model's \d+ weights are offloaded \(on the meta device\), as cvt\."
    for open_it in (fuse, lambda model: open_runtime(model, name), TorchRuntime):
        with pytest.raises(ValueError, match=message) as error:
            open_it(offloaded)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["torch", "fused"])
def test_a_loaded_model_is_left_as_it_is(model, name, precision):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    open_runtime(model, name, precision)(random_pixels(1, 3, 32, 32))
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert model.dtype == torch.float32


@pytest.mark.parametrize("name", ["fused", "onnxruntime", "openvino"])
def test_a_model_that_was_loaded_to_be_converted_is_freed(opened, name):
    gc.collect()
    assert opened[name].loaded() is None


def test_threads_of_torch_are_set_when_asked_for(model):
    before = torch.get_num_threads()
    try:
        assert open_runtime(model, "fused", threads=before + 1).describe.endswith(
            f"{before + 1} threads"
        )
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_compiled_model_meets_two_shapes_for_a_size_of_images(model):
    shapes = []
    with torch.compiler.set_stance("force_eager"):
        runtime = open_runtime(model, "compiled", device="cpu")
        runtime.model.register_forward_pre_hook(lambda _, inputs: shapes.append(len(inputs[0])))
        pixels = random_pixels(10, 3, 32, 32)
        logits = runtime(pixels)
    assert shapes == [4, 4, 1, 1]
    torch.testing.assert_close(logits, model(pixels).logits.detach(), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_compiled_model_gives_the_logits_of_the_model_to_eight_threads(model):
    runtime = open_runtime(model, "compiled", device="cpu")
    batches = [random_pixels(1 + i % 6, 3, 32, 32, seed=i) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(runtime, batches))
    for batch, logits in zip(batches, first, strict=True):
        torch.testing.assert_close(logits, model(batch).logits.detach(), atol=1e-5, rtol=0)
        assert torch.equal(runtime(batch), logits)


@pytest.mark.gpu
def test_a_gpu_gives_eight_threads_the_logits_of_a_compiled_model(model):
    runtime = open_runtime(model, "compiled", device="cuda")
    batches = [random_pixels(2 + i % 3, 3, 32, 32 + 16 * (i % 2), seed=i) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for batch, logits in zip(batches, pool.map(runtime, batches), strict=True):
            expected = model(batch).logits.detach()
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------ openvino


def test_openvino_keeps_few_shapes_compiled_and_runs_large_images_alone(exported):
    runtime = open_runtime(exported["openvino"], threads=2)
    for side in range(32, 32 + KEPT_GRAPHS + 2):
        runtime(random_pixels(1, 3, side, 32))
    assert runtime.compiled.cache_info().currsize == KEPT_GRAPHS
    assert runtime.images_at_once(random_pixels(9, 3, 224, 224)) == 9
    assert runtime.images_at_once(random_pixels(1, 3, 224, 224)) == 1
    assert runtime.images_at_once(random_pixels(8, 3, 384, 384)) == 1
    assert runtime.images_at_once(random_pixels(19, 3, 32, 32)) == 16  # pieces of eight
    assert runtime.images_at_once(random_pixels(7, 3, 32, 32)) == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_openvino_gives_the_images_of_a_batch_back_in_order(exported, threads):
    runtime = open_runtime(exported["openvino"], threads=threads)
    pixels = random_pixels(27, 3, 48, 32)
    alone = torch.cat([runtime(image[None]) for image in pixels])
    torch.testing.assert_close(runtime(pixels), alone, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------ export.json


def test_a_manifest_is_read_as_it_was_written(exported):
    for kind, folder in exported.items():
        manifest = Manifest.read(folder)
        assert (manifest.format, manifest.dynamic) == (kind, ("batch", "size"))
        written = (folder / "export.json").read_text()
        manifest.write(folder)
        assert (folder / "export.json").read_text() == written


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_flipped_bit_in_an_export_is_refused_by_the_files_name(exported, tmp_path, kind):
    folder = tmp_path / "export"
    shutil.copytree(exported[kind], folder)
    open_runtime(folder)  # without sums, as those of before
    names = [path.name for path in folder.iterdir() if path.name != "export.json"]
    replace(Manifest.read(folder), files=sums_of(folder, names)).write(folder)
    open_runtime(folder)
    assert sorted(Manifest.read(folder).files) == sorted(names)
    assert_flips_are_refused(folder, places=10)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("LABEL_0", "tabby cat"))
    assert open_runtime(folder, verify=False).config.class_names[0] == "tabby cat"
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        open_runtime(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("files", []),
        ("files", {"../model.onnx": [1, "a"]}),
        ("files", {"/etc/passwd": [1, "a"]}),
        ("files", {"model.onnx": 1}),
        ("format", "tensorflow"),
        ("format", ["onnx"]),
        ("precision", "fp8"),
        ("file", "../model.onnx"),
        ("file", "missing.onnx"),
        ("file", 3),
        ("image_size", [224]),
        ("image_size", [224, 0]),
        ("image_size", 224),
        ("dynamic", ["channels"]),
        ("dynamic", "batch"),
        ("versions", []),
        ("parity", None),
        ("agreement", "high"),
    ],
)
def test_a_wrong_field_of_a_manifest_is_named(exported, tmp_path, field, value):
    (tmp_path / "model.onnx").touch()
    fields = json.loads((exported["onnx"] / "export.json").read_text())
    (tmp_path / "export.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(ValueError, match=rf"export\.json: {field} = "):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "onnx"}', "\0"])
def test_what_is_no_manifest_is_a_value_error_that_names_the_file(tmp_path, text):
    (tmp_path / "export.json").write_text(text)
    with pytest.raises(ValueError, match=r"export\.json: "):
        open_runtime(tmp_path)


@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("export.json", "image_size", (64, 64)),
        ("export.json", "dynamic", ("batch", "size")),
        ("export.json", "dynamic", ()),
        ("config.json", "num_channels", 4),
    ],
)
def test_a_graph_for_other_pixels_than_listed_is_refused(tmp_path, model, kind, file, field, value):
    write_export(tmp_path, kind, model, ("batch",))
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=r"its pixels and those of export\.json and config\.json"):
        open_runtime(tmp_path)


def test_a_configuration_of_other_classes_is_refused(runtime, monkeypatch):
    monkeypatch.setattr(runtime, "config", CvtConfig(num_labels=6))
    with pytest.raises(ValueError, match="has 5 classes, and its configuration has 6"):
        runtime(random_pixels(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["model.onnx", "model.xml", "model.bin", "model.pt2"])
def test_a_damaged_graph_is_a_value_error_that_names_it(exported, name, tmp_path):
    (folder,) = (folder for folder in exported.values() if (folder / name).exists())
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    graph = tmp_path / name
    graph.write_bytes(graph.read_bytes()[: graph.stat().st_size // 2])
    with pytest.raises(ValueError, match=Manifest.read(folder).file):
        open_runtime(tmp_path)


# ------------------------------------------------------------------------------ torch.export


class Harmful:
    """A pickle that creates a folder when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def harmful_target(program, mark):
    program["graph_module"]["graph"]["nodes"][0]["target"] = "torch.os.mkdir"


def harmful_operator(program, mark):
    program["graph_module"]["graph"]["nodes"][0]["target"] = "_operator.call"


def harmful_expression(program, mark):
    sizes = program["graph_module"]["graph"]["tensor_values"]["pixel_values"]["sizes"]
    sizes[0]["as_expr"]["expr_str"] = f"__import__('os').mkdir('{mark}')"


def harmful_symbol(program, mark):
    program["range_constraints"] = {f"__import__('os').mkdir('{mark}')": {"min_val": 2}}


def harmful_name(program, mark):
    program["graph_module"]["graph"]["nodes"][0]["inputs"][0]["name"] = "a, b"


@pytest.mark.parametrize(
    "change",
    [harmful_target, harmful_operator, harmful_expression, harmful_symbol, harmful_name],
)
def test_a_program_that_asks_for_more_than_arithmetic_is_refused(exported, tmp_path, change):
    def changed(name, content):
        if not name.endswith("models/model.json"):
            return content
        program = json.loads(content)
        change(program, tmp_path / "mark")
        return json.dumps(program).encode()

    assert_refused(exported, tmp_path, changed)


@pytest.mark.parametrize("kind", ["sample_inputs", "constants"])
def test_a_program_with_pickles_is_refused(exported, tmp_path, kind):
    buffer = io.BytesIO()
    torch.save(Harmful(tmp_path / "mark"), buffer)

    def changed(name, content):
        if name.endswith("sample_inputs/model.pt" if kind == "sample_inputs" else "tensor_0"):
            return buffer.getvalue()
        if kind == "constants" and name.endswith("model_constants_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true', 1)
        return content

    assert_refused(exported, tmp_path, changed)


def test_a_program_with_other_files_is_refused(exported, tmp_path):
    assert_refused(exported, tmp_path, extra="data/aotinductor/model/code.so")
    assert_refused(exported, tmp_path, extra="data/constants/opaque_obj_0")
    assert_refused(exported, tmp_path, extra="models/Model.json")


def assert_refused(exported, tmp_path, changed=lambda name, content: content, extra=None):
    """Neither is the changed program opened, nor does it make its mark."""
    folder = tmp_path / "export"
    shutil.copytree(exported["torch-export"], folder, dirs_exist_ok=True)
    with (
        zipfile.ZipFile(exported["torch-export"] / "model.pt2") as whole,
        zipfile.ZipFile(folder / "model.pt2", "w") as copied,
    ):
        for name in whole.namelist():
            copied.writestr(name, changed(name, whole.read(name)))
        if extra:
            copied.writestr(f"model/{extra}", b"")
    with pytest.raises(ValueError, match=r"model\.pt2"):
        open_runtime(folder)
    assert not (tmp_path / "mark").exists()
