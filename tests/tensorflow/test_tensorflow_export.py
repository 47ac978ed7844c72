import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from helpers.damage import assert_flips_are_refused
from helpers.small_models import make, mixed, random_case

from cvt import Classifier, CvtConfig, CvtForImageClassification, image_processor
from cvt.export import export
from cvt.export.tensorflow import write_saved_model
from cvt.keras import weights
from cvt.libraries import silence_stderr
from cvt.runtime import available, open_runtime
from cvt.runtime.base import PixelError
from cvt.runtime.manifest import Manifest
from cvt.runtime.saved_model_runtime import check, import_tensorflow

tf = import_tensorflow()

RUNTIMES = {"saved-model": "tensorflow", "litert": "litert"}
NAMES = ["blue", "green", "red"]
SAVED_MODEL = {
    "model/saved_model.pb",
    "model/fingerprint.pb",
    "model/variables/variables.index",
    "model/variables/variables.data-00000-of-00001",
}
FILES = {"saved-model": SAVED_MODEL, "litert": {"model.tflite"}}
BESIDE = {"config.json", "preprocessor_config.json", "export.json", "labels.txt"}


def save(folder, activation, names=NAMES):
    positions = {"position_embedding": ["learned", "none", "learned"], "image_size": 24}
    model = make(mixed(num_labels=3, hidden_act=activation, **positions))
    model.config.class_names = names
    model.save_pretrained(folder)
    image_processor(model.config, image_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a classifier that has every kind of layer, with exact GELU."""
    return save(tmp_path_factory.mktemp("small"), "gelu")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The same with QuickGELU, and a class whose name is broken."""
    return save(tmp_path_factory.mktemp("quick"), "quick_gelu", ["blue", "light\nred", "red"])


@pytest.fixture(scope="module")
def model(small):
    return CvtForImageClassification.from_pretrained(small).eval()


@pytest.fixture(scope="module")
def command(small, tmp_path_factory):
    """A folder that the command line exported in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("exports") / "litert"
    words = ["export", small, folder, "--to", "litert", "--dynamic", "batch,size"]
    return folder, python("-m", "cvt", *words)


@pytest.fixture(scope="module")
def exported(small, command, tmp_path_factory):
    """The small model in both formats, for images of any number and size."""
    folder = tmp_path_factory.mktemp("exports") / "saved-model"
    export(small, folder, "saved-model", dynamic=("batch", "size"))
    return {"saved-model": folder, "litert": command[0]}


@pytest.fixture(scope="module")
def opened(exported):
    return {to: open_runtime(folder) for to, folder in exported.items()}


def python(*words):
    """A process of Python that keeps no library silent; answers its output and errors."""
    loud = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, env=loud, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def pixels_of(batch, height, width, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, height, width, generator=generator)


@torch.no_grad()
def same_logits(run, model, pixels, tolerance=1e-5):
    torch.testing.assert_close(run(pixels), model(pixels).logits, atol=tolerance, rtol=tolerance)


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("to", FILES)
def test_an_export_of_any_size_gives_the_logits_of_the_model(exported, opened, model, to):
    manifest = Manifest.read(exported[to])
    assert files_of(exported[to]) == BESIDE | FILES[to]
    assert (manifest.format, manifest.precision, manifest.image_size) == (to, "fp32", (32, 32))
    checked = {(c["images"], c["height"], c["width"]) for c in manifest.parity["checks"]}
    sizes = ((32, 32), (33, 33), (16, 48), (model.config.minimum_image_size,) * 2)
    assert checked == {(b, *size) for b in (1, 2, 5) for size in sizes}
    assert 0 < manifest.parity["largest_difference"] < 1e-4
    assert {"keras", "tensorflow"} <= manifest.versions.keys()
    for shape in ((3, 41, 29), (1, 32, 32), (2, model.config.minimum_image_size, 20)):
        same_logits(opened[to], model, pixels_of(*shape))


@pytest.mark.parametrize(
    ("to", "precision", "tolerance"), [("saved-model", "fp32", 1e-5), ("litert", "fp16", 1e-2)]
)
def test_an_export_for_single_images_of_one_size_with_features(
    quick, tmp_path, to, precision, tolerance
):
    how = {"precision": precision, "dynamic": (), "image_size": 24, "features": True}
    manifest = export(quick, tmp_path / "out", to, **how)
    assert (manifest.image_size, manifest.dynamic) == ((24, 24), ())
    differences = [check["difference"] for check in manifest.parity["checks"]]
    assert all(difference > 1e-5 for difference in differences) == (precision == "fp16")
    assert (tmp_path / "out/labels.txt").read_text() == "blue\nlight red\nred\n"
    runtime = open_runtime(tmp_path / "out")
    model = CvtForImageClassification.from_pretrained(quick).eval()
    same_logits(runtime, model, pixels_of(3, 24, 24), tolerance)
    with torch.no_grad():
        features = model.layernorm(model.cvt(pixels_of(3, 24, 24)).cls_token_value)[:, 0]
    found = runtime.features(pixels_of(3, 24, 24))
    torch.testing.assert_close(found, features, atol=tolerance, rtol=tolerance)
    with pytest.raises(PixelError, match="32 x 24 pixels: this export takes 24 x 24 only"):
        runtime(pixels_of(1, 32, 24))


def test_int8_has_weights_of_8_bits_and_is_checked_with_images(cvt, photos, tmp_path):
    """Small weights stay in floats; those of this model are most of its numbers."""
    model = make(mixed(embed_dim=[32, 64, 96], num_labels=3))
    model.config.class_names = NAMES
    model.save_pretrained(tmp_path / "model")
    image_processor(model.config, image_size=32).save_pretrained(tmp_path / "model")
    words = [tmp_path / "model", tmp_path / "out", "--to", "litert", "--precision", "int8"]
    code, out, err = cvt("export", *words, "--calibration", photos, "--min-agreement", 0)
    assert code == 0, err
    manifest = Manifest.read(tmp_path / "out")
    assert (manifest.precision, manifest.parity["images"], "nncf" in manifest.versions) == (
        *("int8", 18),
        False,
    )
    assert f"{manifest.agreement:.2%} get the class that they get in fp32" in out
    interpreter = Interpreter(str(tmp_path / "out/model.tflite"))
    in_8_bits = [each for each in interpreter.get_tensor_details() if each["dtype"] is np.int8]
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert 0.8 < sum(np.prod(each["shape"]) for each in in_8_bits) / weights < 1
    assert all((each["quantization_parameters"]["zero_points"] == 0).all() for each in in_8_bits)
    logits = open_runtime(tmp_path / "out")(pixels_of(4, 32, 32))
    expected = model(pixels_of(4, 32, 32)).logits
    assert 1e-4 < (logits - expected).abs().max() < 0.05 * expected.abs().max()
    code, out, err = cvt("predict", tmp_path / "out", photos / "red", "--topk", 1)
    assert (code, len(out.splitlines()), err) == (0, 12, "runtime: litert int8 on cpu\n")


def test_the_labels_go_along(exported):
    for folder in exported.values():
        assert CvtConfig.from_pretrained(folder).class_names == NAMES
        assert (folder / "labels.txt").read_text().splitlines() == NAMES
    loaded = tf.saved_model.load(str(exported["saved-model"] / "model"))
    assert [name.decode() for name in loaded.class_names.numpy()] == NAMES


# Run where neither this package nor what wrote the exports is: pixels from, logits into a file.
SERVE = {
    "saved-model": """
absent("cvt", "torch", "keras")
import tensorflow as tf
loaded = tf.saved_model.load(folder + "/model")
logits = loaded.signatures["serving_default"](pixel_values=pixels)["logits"]
assert np.array_equal(loaded.serve(pixels)["logits"], logits)
""",
    "litert": """
absent("cvt", "torch", "keras", "tensorflow")
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(folder + "/model.tflite")
(pixel_values,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
interpreter.resize_tensor_input(pixel_values["index"], pixels.shape)
interpreter.allocate_tensors()
interpreter.set_tensor(pixel_values["index"], pixels)
interpreter.invoke()
logits = interpreter.get_tensor(output["index"])
signatures = {"serving_default": {"inputs": ["pixel_values"], "outputs": ["logits"]}}
assert interpreter.get_signature_list() == signatures
""",
}
BEGIN = """
import sys
import numpy as np
def absent(*names):
    sys.modules.update(dict.fromkeys(names))
folder, given, written = sys.argv[1:]
pixels = np.load(given)
"""
END = "\nnp.save(written, logits)"


@pytest.mark.parametrize("to", SERVE)
def test_an_export_runs_where_this_package_is_not(exported, model, tmp_path, to):
    pixels = pixels_of(3, 35, 50)
    given, written = tmp_path / "pixels.npy", tmp_path / "logits.npy"
    np.save(given, pixels.numpy())
    python("-c", BEGIN + SERVE[to] + END, exported[to], given, written)
    same_logits(lambda _: torch.from_numpy(np.load(written)), model, pixels)


def test_a_converter_that_changes_a_weight_is_found_out(small, tmp_path, monkeypatch):
    assign = weights.assign

    def changed(network, found, source):
        bias = found["classifier.bias"] + np.array([0.01, 0, 0], np.float32)
        assign(network, found | {"classifier.bias": bias}, source)

    monkeypatch.setattr(weights, "assign", changed)
    with pytest.raises(ValueError, match=r"logits differ .* by 0.01, of which 0.0001 is accepted"):
        export(small, tmp_path / "out", "saved-model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", [0, 3, 6])
def test_no_config_needs_an_operator_that_is_not_taken(tmp_path, seed):
    fields, (_, _, *size) = random_case(seed, portable=False)
    model = CvtForImageClassification(CvtConfig(**fields)).eval()
    write_saved_model(model, tmp_path / "model", tuple(size), [("batch", "size"), ()][seed % 2])
    check(tmp_path / "model")


# ------------------------------------------------------------------------------ what runs it


def test_eight_threads_get_the_serial_answers(opened):
    batches = [pixels_of(1 + i % 3, 32, 32 + i % 2) for i in range(16)]
    for runtime in opened.values():
        serial = [runtime(batch) for batch in batches]
        with ThreadPoolExecutor(8) as pool:
            for expected, found in zip(serial, pool.map(runtime, batches), strict=True):
                assert torch.equal(found, expected)


def test_pixels_may_lie_in_any_order(opened):
    pixels = pixels_of(2, 32, 32)
    for runtime in opened.values():
        channels_last = pixels.to(memory_format=torch.channels_last)
        assert torch.equal(runtime(channels_last), runtime(pixels))


@pytest.mark.parametrize("to", FILES)
def test_the_commands_and_the_classifier_answer_as_with_the_model(cvt, exported, small, photos, to):
    def answers(folder, runtime):
        """Of `cvt predict`, by image, of `cvt evaluate` and of `Classifier`."""
        code, lines, err = cvt("predict", folder, photos, "--json", "--runtime", runtime)
        assert (code, err) == (0, f"runtime: {runtime} fp32 on cpu\n")
        code, measured, err = cvt("evaluate", folder, photos, "--runtime", runtime)
        assert code == 0, err
        read = [json.loads(line) for line in lines.splitlines()]
        predicted = {each["path"]: each["predictions"] for each in read}
        return predicted, measured, Classifier(folder, runtime)(sorted(photos.glob("*/00.png")))

    theirs, ours = answers(small, "torch"), answers(exported[to], RUNTIMES[to])
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    records = [(ours[0][path], theirs[0][path]) for path in theirs[0]]
    for found, expected in [*records, *zip(ours[2], theirs[2], strict=True)]:
        assert [each["label"] for each in found] == [each["label"] for each in expected]
        scores = [each["score"] for each in expected]
        assert [each["score"] for each in found] == pytest.approx(scores, abs=1e-5)


# Each in a process of its own, so that warnings that are printed once are seen.
OPEN = """
import sys
from cvt.runtime import open_runtime
for folder in sys.argv[1:]:
    print(open_runtime(folder, threads=1).describe)
"""


def test_libraries_print_nothing_and_threads_are_set(command, exported, small):
    out, err = command[1]
    lines = [f"loading {small}", "converting to litert in fp32", "comparing with the torch model"]
    assert err.splitlines() == lines
    assert out.splitlines()[-1] == f"{command[0]}: litert, fp32"
    out, err = python("-c", OPEN, *exported.values())
    assert err == ""
    assert out.splitlines() == [f"{name} fp32 on cpu, 1 thread" for name in RUNTIMES.values()]


def test_the_error_stream_comes_back_whatever_threads_silence_it(capfd):
    def write(number):
        with silence_stderr():
            os.write(2, b"library")
        os.write(2, b"we")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    os.write(2, b"!")
    assert capfd.readouterr().err.replace("we", "") == "!"


def test_threads_are_no_longer_set_when_tensorflow_has_begun(exported, opened):
    with pytest.raises(ValueError, match="threads = 3: TensorFlow has begun to compute"):
        open_runtime(exported["saved-model"], threads=3)
    assert open_runtime(exported["litert"], threads=3).describe == "litert fp32 on cpu, 3 threads"


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("to", "precision", "message"),
    [
        ("saved-model", "bf16", "a SavedModel is in fp32; use openvino or torch-export"),
        ("saved-model", "fp16", "a SavedModel is in fp32; use litert, onnx or openvino"),
        ("saved-model", "int8", "int8 exists for openvino, onnx and litert"),
        ("litert", "bf16", "LiteRT has no weights in bf16; use fp16, or openvino"),
    ],
)
def test_a_precision_that_a_format_lacks_is_refused_with_what_to_use(
    small, tmp_path, to, precision, message
):
    with pytest.raises(ValueError, match=f"precision = {precision}, to = {to}: {message}"):
        export(small, tmp_path / "out", to, precision=precision, calibration="photos")


@pytest.mark.parametrize("to", FILES)
def test_another_backend_of_keras_is_refused(small, tmp_path, monkeypatch, to):
    monkeypatch.setattr("keras.config.backend", lambda: "jax")
    with pytest.raises(ValueError, match=f"to = {to}: .*is on jax; set KERAS_BACKEND=tensorflow"):
        export(small, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("to", "library"), [("saved-model", "tensorflow"), ("litert", "ai_edge_litert")]
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    exported, small, tmp_path, monkeypatch, to, library
):
    find = importlib.util.find_spec
    assert available(RUNTIMES[to])
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == library else find(name)
    )
    assert not available(RUNTIMES[to])
    for act in (lambda: export(small, tmp_path / "out", to), lambda: open_runtime(exported[to])):
        with pytest.raises(
            ImportError, match=rf"needs {library}: pip install 'cvt-vision\[tensorflow\]'"
        ):
            act()


@pytest.mark.parametrize("to", FILES)
def test_an_export_is_opened_as_what_it_is_alone(exported, small, to):
    name, (other,) = RUNTIMES[to], {*RUNTIMES.values()} - {RUNTIMES[to]}
    for source, arguments, message in (
        (small, {"runtime": name}, f"is for exports; `cvt export` writes one, with --to {to}"),
        (exported[to], {"runtime": other}, f"is an export for {name}"),
        (exported[to], {"device": "cuda"}, f"the runtime {name} computes on a CPU"),
        (exported[to], {"precision": "bf16"}, "is an export in fp32"),
    ):
        with pytest.raises(ValueError, match=message):
            open_runtime(source, **arguments)


@pytest.mark.parametrize("to", FILES)
def test_a_flipped_bit_is_refused_by_the_files_name(exported, tmp_path, to):
    folder = tmp_path / "export"
    shutil.copytree(exported[to], folder)
    assert_flips_are_refused(folder, places=50)
    open_runtime(folder)


@pytest.mark.parametrize("to", FILES)
def test_a_full_disk_leaves_nothing_under_the_final_name(small, tmp_path, to):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"export was not written: .*[Ff]ile too large"):
            export(small, tmp_path / "export", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("file", sorted(set.union(*FILES.values()) - {"model/fingerprint.pb"}))
def test_a_damaged_export_is_a_value_error_that_names_it(exported, tmp_path, file, share):
    (folder,) = (folder for folder in exported.values() if (folder / file).exists())
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    content = (folder / file).read_bytes()
    (damaged / file).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=str(damaged / file.partition("/")[0])):
        open_runtime(damaged)


@pytest.mark.parametrize("to", FILES)
def test_an_export_that_takes_other_pixels_than_listed_is_refused(exported, tmp_path, to):
    folder = tmp_path / "export"
    shutil.copytree(exported[to], folder)
    manifest = json.loads((folder / "export.json").read_text())
    (folder / "export.json").write_text(json.dumps(manifest | {"dynamic": ["batch"]}))
    with pytest.raises(
        ValueError, match=r"config\.json differ: \(any, 3, any, any\) and \(any, 3, 32"
    ):
        open_runtime(folder)


# ------------------------------------------------------------------------------ hostile SavedModels


def function_of(graph, contains="serve"):
    """One that the signature calls, or another."""
    return next(
        each for each in graph.graph_def.library.function if contains in each.signature.name
    )


def another_operator(graph):
    function_of(graph).node_def[0].op = "PyFunc"


def a_call_of_what_saves(graph):
    saving = function_of(graph, "traced_save").signature.name
    call = function_of(graph).node_def.add(name="call", op="StatefulPartitionedCall")
    call.attr["f"].func.name = saving


def a_substitute(graph):
    function_of(graph, "traced_save").attr["api_implements"].s = b"serve"


def another_kind(graph):
    graph.ClearField("object_graph_def")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_operator, "holds PyFunc, and only weights and arithmetic"),
        (a_call_of_what_saves, r"holds (S|M)\w+, and only weights"),
        (a_substitute, "holds api_implements"),
        (another_kind, "holds a graph of TensorFlow 1"),
    ],
)
def test_a_saved_model_that_asks_for_more_than_arithmetic_is_refused(
    exported, tmp_path, change, message
):
    folder = tmp_path / "export"
    shutil.copytree(exported["saved-model"], folder)
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    path = folder / "model/saved_model.pb"
    saved = SavedModel.FromString(path.read_bytes())
    change(saved.meta_graphs[0])
    path.write_bytes(saved.SerializeToString())
    with pytest.raises(ValueError, match=message):
        open_runtime(folder, verify=False)
    with pytest.raises(ValueError, match=r"saved_model.pb is damaged or was changed"):
        open_runtime(folder)


@pytest.mark.parametrize("file", ["saved_model.cpb", "assets/vocabulary.txt", "code.so"])
def test_a_saved_model_with_other_files_is_refused(exported, tmp_path, file):
    folder = tmp_path / "export"
    shutil.copytree(exported["saved-model"], folder)
    (folder / "model" / file).parent.mkdir(exist_ok=True)
    (folder / "model" / file).touch()
    with pytest.raises(ValueError, match=f"it holds {file}, and only"):
        open_runtime(folder)


class Writes(tf.saved_model.experimental.TrackableResource):
    """Writes a file when it is loaded."""

    def __init__(self, mark):
        super().__init__()
        self.mark = mark

    def _create_resource(self):
        return tf.raw_ops.HashTableV2(key_dtype=tf.int64, value_dtype=tf.int64)

    def _initialize(self):
        tf.io.write_file(self.mark, "here")


def test_a_saved_model_that_writes_a_file_when_loaded_is_refused_before_that(exported, tmp_path):
    folder, mark = tmp_path / "export", tmp_path / "mark"
    shutil.copytree(exported["saved-model"], folder)
    hostile = tf.Module()
    hostile.resource = Writes(str(mark))
    hostile.serve = tf.function(
        lambda pixel_values: {"logits": tf.reduce_mean(pixel_values, (2, 3))},
        input_signature=[tf.TensorSpec((None, 3, None, None), name="pixel_values")],
    )
    shutil.rmtree(folder / "model")
    tf.saved_model.save(hostile, folder / "model", signatures=hostile.serve)
    with pytest.raises(ValueError, match=r"model was not read: it holds (WriteFile|HashTableV2)"):
        open_runtime(folder, verify=False)
    assert not mark.exists()
    tf.saved_model.load(folder / "model")
    assert mark.exists()  # so it would have been harmful
