"""Weights of the Keras models: to PyTorch and back, out of every kind of file, and strictly."""

import copy
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import keras
import numpy as np
import pytest
import torch
import transformers
from golden.cases import (
    DIALECT_SETTINGS,
    DIALECTS_FOLDER,
    NUM_CLASSES,
    TF_CLASSIFIER,
    TF_IMAGES,
    TF_MODEL,
    image,
)
from helpers.keras_models import compiled
from helpers.small_models import CLASSES, assert_equal, make, tiny
from safetensors.torch import load_file, save_file

from cvt import (
    CvtConfig,
    CvtForImageClassification,
    CvtModel,
    TFCvtForImageClassification,
    TFCvtModel,
)
from cvt.architecture import VARIANTS
from cvt.checkpoints import transformers_to_authors
from cvt.keras import weights

BACKEND = keras.config.backend()
FRAMEWORKS = {"tensorflow", "jax", "torch"}
HEAD = ["classifier.bias", "classifier.weight", "layernorm.bias", "layernorm.weight"]
FIRST = "cvt.encoder.stages.0.embedding.convolution_embeddings.projection.bias"

PER_STAGE = [n for n, v in tiny().to_dict().items() if isinstance(v, list) and len(v) == 3]
ONE_STAGE = {name: getattr(tiny(), name)[:1] for name in PER_STAGE} | {"cls_token": [True]}


@pytest.fixture(scope="module")
def model():
    """The first stage of `tiny`, with a class token."""
    return make(CvtConfig(**ONE_STAGE, num_labels=CLASSES))


@pytest.fixture
def folder(model, tmp_path):
    """The folder of a PyTorch model, to be spoilt."""
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def saved_by(model, folder):
    """The weights that a Keras model writes, and a PyTorch model has."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def edit(folder, change):
    """Change the weights in a folder."""
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")


def assert_close(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(keras.ops.convert_to_numpy(ours), theirs, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------ PyTorch and back


@pytest.mark.parametrize("kind", ["CvtForImageClassification", "CvtModel"])
def test_pytorch_and_transformers_open_what_keras_writes_and_keras_what_they_write(kind, tmp_path):
    theirs = make(tiny(), {c.__name__: c for c in (CvtForImageClassification, CvtModel)}[kind])
    theirs.save_pretrained(tmp_path / "torch")
    cls = TFCvtModel if kind == "CvtModel" else TFCvtForImageClassification
    ours = cls.from_pretrained(tmp_path / "torch")
    assert_equal(saved_by(ours, tmp_path / "keras"), theirs.state_dict(), tolerance=0)

    pixels = image("keras", TF_IMAGES)
    outputs = compiled(ours, ours)(pixels)
    again = type(theirs).from_pretrained(tmp_path / "keras").eval()
    stock, loaded = getattr(transformers, kind).from_pretrained(
        tmp_path / "keras", output_loading_info=True
    )
    assert not any(loaded.values())
    for model in (theirs, again, stock.eval()):
        with torch.no_grad():
            expected = model(torch.from_numpy(pixels))
        for name in ("logits", "last_hidden_state", "cls_token_value"):
            if name in expected:
                assert_close(getattr(outputs, name), expected[name])
    same = ("architectures", "dtype", "hidden_act", "layer_norm_eps", "id2label", *PER_STAGE)
    before, after = theirs.config.to_dict(), again.config.to_dict()
    assert {name: after[name] for name in same} == {name: before[name] for name in same}

    stock.save_pretrained(tmp_path / "stock")
    back = cls.from_pretrained(tmp_path / "stock")
    assert_equal(saved_by(back, tmp_path / "back"), theirs.state_dict(), tolerance=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_weights_are_saved_in_the_type_that_they_have(dtype, folder, model, tmp_path):
    ours = TFCvtForImageClassification.from_pretrained(folder, dtype=dtype)
    kept = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert_equal(
        saved_by(ours, tmp_path / "keras"),
        copy.deepcopy(model).to(kept).state_dict(),
        tolerance=0,
    )
    assert CvtForImageClassification.from_pretrained(tmp_path / "keras").dtype == kept
    assert ours.compute_dtype == dtype.removeprefix("mixed_")


def test_saving_leaves_other_files_alone_and_a_failure_leaves_the_old_ones(
    folder, model, monkeypatch
):
    ours = TFCvtForImageClassification.from_pretrained(folder, hidden_act="quick_gelu")
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(weights, "save_file", fail)
        with pytest.raises(OSError, match="No space left"):
            ours.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]

    ours.save_pretrained(folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"config.json"}
    assert json.loads(after["config.json"])["hidden_act"] == "quick_gelu"


# ------------------------------------------------------------------------------ kinds of files


def write_safetensors(model, folder, **kwargs):
    model.save_pretrained(folder, **kwargs)


def write_pickle(model, folder):
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


FORMATS = {
    "model.safetensors": write_safetensors,
    "model.safetensors.index.json": partial(write_safetensors, max_shard_size="2KB"),
    "pytorch_model.bin": write_pickle,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("file", FORMATS)
def test_weights_of_every_file_and_type_are_read(file, dtype, model, tmp_path):
    theirs = copy.deepcopy(model).to(dtype)
    FORMATS[file](theirs, tmp_path / "torch")
    assert (tmp_path / "torch" / file).exists()
    ours = TFCvtForImageClassification.from_pretrained(tmp_path / "torch")
    assert ours.variable_dtype == "float32"
    assert_equal(saved_by(ours, tmp_path / "keras"), theirs.float().state_dict(), tolerance=0)


@pytest.mark.parametrize("folder", [TF_CLASSIFIER, TF_MODEL], ids=lambda folder: folder.name)
def test_a_folder_of_transformers_4_gives_the_outputs_that_it_gave_there(folder):
    cls = TFCvtForImageClassification if folder == TF_CLASSIFIER else TFCvtModel
    model = cls.from_pretrained(folder)
    assert (model.config.hidden_act, model.config.layer_norm_eps) == ("gelu", 1e-5)
    call = compiled(model, lambda pixels: model(pixels, output_hidden_states=True))
    outputs = call(image(folder.name, TF_IMAGES))
    found = {f"stage{i}": state for i, state in enumerate(outputs.hidden_states)}
    if cls is TFCvtForImageClassification:
        found["logits"] = outputs.logits
    expected = np.load(folder / "outputs.npz")
    assert found.keys() == set(expected)
    for name, values in found.items():
        assert_close(values, expected[name], tolerance=1e-4)


def test_weights_of_other_software_are_read(tmp_path):
    shutil.copy(TF_CLASSIFIER / "config.json", tmp_path)
    shutil.copy(DIALECTS_FOLDER / "transformers-tf.safetensors", tmp_path / "model.safetensors")
    found = saved_by(TFCvtForImageClassification.from_pretrained(tmp_path), tmp_path / "a")
    same = saved_by(TFCvtForImageClassification.from_pretrained(TF_CLASSIFIER), tmp_path / "b")
    assert_equal(found, same, tolerance=0)
    config = CvtConfig(**DIALECT_SETTINGS, num_labels=NUM_CLASSES)
    for name in ("paddlevit.pdparams", "cvt-tensorflow.h5"):
        path = DIALECTS_FOLDER / name
        ours = TFCvtForImageClassification.from_pretrained(path, config=config)
        theirs = CvtForImageClassification.from_pretrained(path, config=config)
        assert_equal(saved_by(ours, tmp_path / name), theirs.state_dict(), tolerance=0)


def test_an_authors_file_is_read_and_may_be_given_a_new_classifier(
    model, monkeypatch, caplog, tmp_path
):
    monkeypatch.setitem(VARIANTS, "cvt-one", ONE_STAGE)
    path = tmp_path / "weights.pth"
    torch.save(transformers_to_authors(model.state_dict()), path)
    ours = TFCvtForImageClassification.from_pretrained(path, drop_path_rate=[0.5])
    assert (ours.config.hidden_act, ours.config.drop_path_rate) == ("quick_gelu", [0.5])
    found = saved_by(ours, tmp_path / "keras")
    assert_equal(found, model.state_dict(), tolerance=0)

    ours = TFCvtForImageClassification.from_pretrained(path, num_labels=3)
    assert caplog.text.count("New classifier of 3 classes") == 1
    other = saved_by(ours, tmp_path / "other")
    assert other["classifier.weight"].shape == (3, 8)
    changed = {name for name in found if not torch.equal(other[name], found[name])}
    assert changed == {"classifier.weight", "classifier.bias"}

    torch.save({"stage0.wrong": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"weights\.pth.+stage0\.wrong"):
        TFCvtForImageClassification.from_pretrained(path)


def test_an_authors_file_without_a_head_is_one_of_features(model, monkeypatch, tmp_path):
    monkeypatch.setitem(VARIANTS, "cvt-one", ONE_STAGE)
    path = tmp_path / "weights.pth"
    theirs = transformers_to_authors(model.state_dict())
    torch.save({name: w for name, w in theirs.items() if not name.startswith("head.")}, path)
    found = saved_by(TFCvtModel.from_pretrained(path), tmp_path / "keras")
    assert_equal(found, model.cvt.state_dict(), tolerance=0)
    with pytest.raises(ValueError, match=r"weights\.pth holds a model without a classifier"):
        TFCvtForImageClassification.from_pretrained(path)
    ours = TFCvtForImageClassification.from_pretrained(path, num_labels=3)
    assert ours.classifier.units == 3
    torch.save({**theirs, "norm.bias": torch.full((8,), float("nan"))}, path)
    with pytest.raises(ValueError, match=r"weights\.pth has NaN or infinity in layernorm\.bias"):
        TFCvtForImageClassification.from_pretrained(path)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "weights.pth"])
def test_weights_that_lack_only_the_counters_of_batches_load(
    kind, folder, model, monkeypatch, tmp_path
):
    monkeypatch.setitem(VARIANTS, "cvt-one", ONE_STAGE)
    kept = {n: w for n, w in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    source = folder
    if kind == "model.safetensors":
        save_file(kept, folder / kind)
    else:
        (folder / "model.safetensors").unlink()
        source = folder if kind.endswith(".bin") else folder / kind
        torch.save(kept if source is folder else transformers_to_authors(kept), folder / kind)
    found = saved_by(TFCvtForImageClassification.from_pretrained(source), tmp_path / "keras")
    assert_equal(found, model.state_dict(), tolerance=0)


@pytest.mark.parametrize("name", weights.FILES)
def test_a_pointer_of_git_lfs_is_called_one(name, folder, model):
    if name.endswith(".json"):
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="2KB")
        name = min(path.name for path in folder.glob("model-*"))
    for path in folder.glob("model.safetensors"):
        path.unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        TFCvtForImageClassification.from_pretrained(folder)
    assert str(error.value) == (
        f"{folder / name} is a git-lfs pointer, not the weights: `git lfs pull` in its repository "
        "gets it"
    )


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_what_keras_writes_has_the_permissions_of_the_umask(folder, tmp_path):
    ours = TFCvtForImageClassification.from_pretrained(folder)
    before = os.umask(0o027)
    try:
        ours.save_pretrained(tmp_path / "keras")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "keras").iterdir()}
    assert modes == {"config.json": 0o640, "model.safetensors": 0o640}


def test_a_model_that_answers_with_tuples_is_trained_and_evaluated(folder):
    ours = TFCvtForImageClassification.from_pretrained(folder, return_dict=False)
    pixels = image("keras", (2, 9, 12))
    assert isinstance(compiled(ours, ours)(pixels), tuple)
    ours.compile("sgd", run_eagerly=BACKEND != "jax")  # JAX would compile operation by operation
    ours.fit(pixels, np.zeros(2), verbose=0)
    assert ours.predict(pixels, verbose=0).shape == (2, CLASSES)


# ------------------------------------------------------------------------------ other models


def test_a_model_without_a_head_leaves_a_classifiers_aside(folder, model, tmp_path):
    ours = TFCvtModel.from_pretrained(folder)
    assert_equal(saved_by(ours, tmp_path / "keras"), model.cvt.state_dict(), tolerance=0)


def test_a_classifier_of_a_model_without_a_head_must_be_asked_for(model, caplog, tmp_path):
    CvtModel(model.config).save_pretrained(tmp_path / "torch")
    missing = r".+missing ".join(("torch do not fit", *HEAD))
    with pytest.raises(ValueError, match=f"(?s){missing}$"):
        TFCvtForImageClassification.from_pretrained(tmp_path / "torch")
    ours = TFCvtForImageClassification.from_pretrained(tmp_path / "torch", num_labels=3)
    assert caplog.text.count("New classifier of 3 classes") == 1
    assert ours.classifier.kernel.shape == (8, 3)


@pytest.mark.parametrize(
    "fields", [{"num_labels": 3}, {"id2label": {0: "ant", 1: "bee", 2: "cow"}}], ids=str
)
def test_a_new_classifier_is_random_and_logged_and_the_rest_is_loaded(
    fields, folder, model, caplog, tmp_path
):
    ours = TFCvtForImageClassification.from_pretrained(folder, **fields)
    assert caplog.text.count("New classifier of 3 classes") == 1
    found, before = saved_by(ours, tmp_path / "keras"), model.state_dict()
    assert found["classifier.weight"].shape == (3, 8)
    assert found["classifier.weight"].std() < 0.05
    changed = {name for name in before if not torch.equal(found[name], before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_as_many_classes_as_there_are_keep_their_classifier(folder, model, caplog, tmp_path):
    ours = TFCvtForImageClassification.from_pretrained(folder, num_labels=CLASSES)
    assert_equal(saved_by(ours, tmp_path / "keras"), model.state_dict(), tolerance=0)
    assert "New classifier" not in caplog.text


def test_settings_and_the_format_of_images_can_be_changed(folder, tmp_path):
    ours = TFCvtForImageClassification.from_pretrained(
        folder, hidden_act="quick_gelu", drop_path_rate=[0.3], data_format="channels_last"
    )
    pixels = image("keras", (2, 9, 12))
    theirs = CvtForImageClassification.from_pretrained(folder, hidden_act="quick_gelu").eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(pixels)).logits
    assert_close(ours(pixels.transpose(0, 2, 3, 1)).logits, expected)
    assert ours.config.drop_path_rate == [0.3]
    with pytest.raises(ValueError, match="hidden_act = 'relu'"):
        TFCvtForImageClassification.from_pretrained(folder, hidden_act="relu")
    with pytest.raises(ValueError, match="data_format = 'NCHW'"):
        TFCvtForImageClassification.from_pretrained(folder, data_format="NCHW")


# ------------------------------------------------------------------------------ what does not fit


def test_a_config_that_is_given_takes_the_place_of_the_folders(folder, model):
    given = CvtConfig(**ONE_STAGE, num_labels=CLASSES, layer_norm_eps=0.5)
    for config in (given, given.to_dict()):
        ours = TFCvtForImageClassification.from_pretrained(folder, config=config, hidden_act="gelu")
        assert (ours.config.layer_norm_eps, ours.config.hidden_act) == (0.5, "gelu")
    wider = CvtConfig(**ONE_STAGE | {"embed_dim": [16]})
    with pytest.raises(ValueError, match="do not fit"):
        TFCvtForImageClassification.from_pretrained(folder, config=wider)


@pytest.mark.parametrize("argument", ["output_loading_info", "from_pt", "ignore_mismatched_sizes"])
def test_an_argument_that_would_do_nothing_is_refused(folder, argument):
    with pytest.raises(TypeError, match=f"from_pretrained does not take {argument}: it takes"):
        TFCvtForImageClassification.from_pretrained(folder, **{argument: True})


def test_every_weight_that_does_not_fit_is_listed_at_once(folder):
    def spoil(found):
        found["surplus.weight"] = found.pop(FIRST)
        found["cvt.encoder.stages.0.extra"] = torch.ones(1)
        found["classifier.weight"] = found["classifier.weight"].T.contiguous()
        found["layernorm.bias"] = torch.ones(7)

    edit(folder, spoil)
    with pytest.raises(ValueError, match="do not fit") as raised:
        TFCvtForImageClassification.from_pretrained(folder)
    first, *faults = str(raised.value).splitlines()
    assert str(folder) in first
    assert faults == [
        f"  missing {FIRST}",
        "  unexpected cvt.encoder.stages.0.extra",
        "  unexpected surplus.weight",
        "  classifier.weight is (8, 5), expected (5, 8)",
        "  layernorm.bias is (7,), expected (8,)",
    ]


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
@pytest.mark.parametrize("file", [*FORMATS, "tf_model.h5"])
def test_a_damaged_file_is_named(file, share, model, tmp_path):
    folder = tmp_path / "model"
    if file in FORMATS:
        FORMATS[file](model, folder)
    else:
        shutil.copytree(TF_MODEL, folder)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"{file} (is|holds)"):
        TFCvtModel.from_pretrained(folder)


def test_what_is_no_weight_of_a_cvt_is_named(folder, tmp_path):
    import h5py

    old = shutil.copytree(TF_MODEL, tmp_path / "old")
    with h5py.File(old / "tf_model.h5", "a") as file:
        file["optimizer/iterations:0"] = 1
        file["cvt/encoder/stages.0/pooler/kernel:0"] = [1.0]
    with pytest.raises(ValueError, match=r"old/tf_model\.h5 .+pooler/kernel:0, optimizer/iter"):
        TFCvtModel.from_pretrained(old)

    edit(folder, lambda found: found.update({FIRST: found[FIRST].to(torch.float8_e4m3fn)}))
    with pytest.raises(ValueError, match=r"model\.safetensors holds weights of type 'F8_E4M3'"):
        TFCvtModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("absent", "error", "message"),
    [
        ("model-0000*", FileNotFoundError, r"model lacks model-00001-of-.+index\.json names"),
        ("model*", FileNotFoundError, r"model has no weights: none of model\.safetensors, .+\.bin"),
        ("config.json", OSError, r"config\.json"),
        ("*", OSError, r"config\.json"),
    ],
)
def test_absent_files_are_named(absent, error, message, model, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size="2KB")
    for path in folder.glob(absent):
        path.unlink()
    with pytest.raises(error, match=message):
        TFCvtForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cvt-13", r"microsoft/cvt-13 is not on this machine.+`hf download microsoft/cvt-13`"),
        ("someone/cvt", "someone/cvt is not on this machine and could not be downloaded"),
        ("no such model", "no such model"),
        ("/no/such/folder", "/no/such/folder"),
    ],
)
def test_a_name_that_is_out_of_reach_is_an_error_of_the_system(name, message):
    with pytest.raises(OSError, match=message):
        TFCvtModel.from_pretrained(name)


# ------------------------------------------------------------------------------ Keras' own files

HIDE = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):  # to it, what is hidden is not installed
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in hidden:
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""

LOAD = """
import cvt
import keras, numpy
assert "cvt.keras" not in sys.modules
pixels = numpy.load("pixels.npy")
loaded = {
    "keras": keras.saving.load_model("model.keras"),
    "safetensors": cvt.TFCvtForImageClassification.from_pretrained("model"),
}
for name, model in loaded.items():
    numpy.save(name, keras.ops.convert_to_numpy(model(pixels).logits))
loaded["safetensors"].save_pretrained("again")
print([name for name in hidden if sys.modules.get(name)])
"""


def test_another_process_without_the_other_frameworks_loads_what_was_saved(folder, model, tmp_path):
    ours = TFCvtForImageClassification.from_pretrained(folder)
    ours.save(tmp_path / "model.keras")
    pixels = image("keras", (2, 9, 12))
    np.save(tmp_path / "pixels.npy", pixels)
    hidden = FRAMEWORKS - {BACKEND}
    hidden |= {"torchvision", "triton"} if "torch" in hidden else set()
    done = subprocess.run(
        [sys.executable, "-c", f"hidden = {hidden}\n{HIDE}{LOAD}"],
        env={**os.environ, "KERAS_BACKEND": BACKEND},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    expected = keras.ops.convert_to_numpy(ours(pixels).logits)
    for name in ("keras", "safetensors"):
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), expected)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert_equal(again, model.state_dict(), tolerance=0)


def test_weights_alone_are_saved_and_loaded_as_keras_does(folder, model, tmp_path):
    TFCvtForImageClassification.from_pretrained(folder).save_weights(tmp_path / "a.weights.h5")
    other = TFCvtForImageClassification(model.config)
    other.load_weights(tmp_path / "a.weights.h5")
    assert_equal(saved_by(other, tmp_path / "keras"), model.state_dict(), tolerance=0)
