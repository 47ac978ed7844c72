"""Files of other software, most of them written by it: recognised, read exactly, written back."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from golden.cases import (
    DIALECT_IMAGES,
    DIALECT_SETTINGS,
    DIALECTS_FOLDER,
    NUM_CLASSES,
    TF_CLASSIFIER,
    TF_IMAGES,
    TF_MODEL,
    image,
)
from helpers.hub_server import HubServer, connect
from helpers.small_models import make, tiny
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save_file

from cvt import CvtBackbone, CvtConfig, CvtForImageClassification, CvtModel
from cvt.checkpoints import (
    CheckpointError,
    convert,
    image_size_of,
    load_authors,
    load_classifier,
    load_config,
    load_processor,
    read_weights,
    transformers_to_authors,
)
from cvt.checkpoints.conversion import WRITTEN
from cvt.checkpoints.names import DIALECTS, dialect_of, keras_to_transformers
from cvt.checkpoints.reading import load_content
from cvt.cli.convert import DIALECTS as CHOICES

FILES = {
    "cvt-tensorflow": "cvt-tensorflow.h5",
    "timm": "timm.safetensors",
    "vformer": "vformer.pth",
    "paddlevit": "paddlevit.pdparams",
    "passl": "passl.pdparams",
}
SUFFIXES = {name: dialect.suffixes[-1] for name, dialect in DIALECTS.items() if dialect.suffixes}
SUFFIXES["authors"] = ".pth"


def config_of(dialect):
    return CvtConfig(
        **{**DIALECT_SETTINGS, "qkv_bias": [dialect != "vformer"] * 3}, num_labels=NUM_CLASSES
    )


@torch.no_grad()
def logits_of(model):
    """In float64, so that what differs is the other software's rounding."""
    pixels = torch.from_numpy(image("dialects", DIALECT_IMAGES)).double()
    return model.eval().double()(pixels).logits.numpy()


@pytest.fixture(scope="module")
def model():
    return make(tiny(hidden_act="quick_gelu"))


@pytest.fixture
def tiny_variant(monkeypatch):
    """`tiny` as a variant, which is recognised by its weights."""
    names = ("embed_dim", "num_heads", "depth", "mlp_ratio")
    fields = {name: getattr(tiny(), name) for name in names}
    monkeypatch.setitem(__import__("cvt.configuration").configuration.VARIANTS, "cvt-tiny", fields)


@torch.no_grad()
def outputs(model):
    return model.eval()(torch.randn(2, 3, 48, 64, generator=torch.manual_seed(1))).logits


# ------------------------------------------------------------------------------ what others wrote


@pytest.mark.parametrize("dialect", FILES)
def test_a_file_of_other_software_gives_the_logits_that_it_gave_there(dialect, caplog):
    path = DIALECTS_FOLDER / FILES[dialect]
    model = load_authors(path, config=config_of(dialect), hidden_act=DIALECTS[dialect].hidden_act)
    expected = np.load(DIALECTS_FOLDER / f"{dialect}.npy")
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(logits_of(model), expected, rtol=0, atol=1e-6)
    assert f"{path.name} has the names of {DIALECTS[dialect].title}" in caplog.text


def test_the_fused_attention_of_timm_is_what_the_note_says():
    path = DIALECTS_FOLDER / FILES["timm"]
    model = load_authors(path, config=config_of("timm"), hidden_act="quick_gelu")
    for stage, heads in zip(model.cvt.encoder.stages, DIALECT_SETTINGS["num_heads"], strict=True):
        for block in stage.layers:
            for parameter in block.attention.attention.projection_query.parameters():
                parameter.data *= heads**0.5
    expected = np.load(DIALECTS_FOLDER / "timm_fused.npy")
    np.testing.assert_allclose(logits_of(model), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["tf_model.h5", "model.safetensors"])
def test_a_folder_of_tensorflow_opens_in_pytorch(kind, tmp_path, caplog):
    folder = TF_CLASSIFIER
    if kind == "model.safetensors":
        folder = tmp_path
        shutil.copy(TF_CLASSIFIER / "config.json", folder)
        shutil.copy(DIALECTS_FOLDER / "transformers-tf.safetensors", folder / kind)
        with safe_open(folder / kind, "pt") as file:
            assert "classifier/kernel:0" in file.keys()  # noqa: SIM118
    pixels = torch.from_numpy(image(TF_CLASSIFIER.name, TF_IMAGES))
    expected = np.load(TF_CLASSIFIER / "outputs.npz")
    for load in (CvtForImageClassification.from_pretrained, load_classifier):
        model = load(folder).eval()
        assert model.config.hidden_act == "gelu"
        with torch.no_grad():
            found = model(pixels).logits
        np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=1e-5)
    assert "has the names of transformers 4 in TensorFlow" in caplog.text
    done = convert(folder, tmp_path / "converted")
    assert done.largest_difference == 0
    backbone = CvtBackbone.from_pretrained(
        folder, out_features=["stage1", "stage2", "stage3"]
    ).eval()
    with torch.no_grad():
        maps = backbone(pixels).feature_maps
    for i in range(3):
        states = expected[f"stage{i}"]
        np.testing.assert_allclose(maps[i], states, rtol=0, atol=1e-4)


def test_a_headless_folder_of_tensorflow_opens_as_such():
    with pytest.raises(ValueError, match=r"(?s)missing classifier\.weight.*missing layernorm"):
        CvtForImageClassification.from_pretrained(TF_MODEL)
    assert CvtForImageClassification.from_pretrained(TF_MODEL, num_labels=3).num_labels == 3
    model = CvtModel.from_pretrained(TF_MODEL).eval()
    with torch.no_grad():
        output = model(torch.from_numpy(image(TF_MODEL.name, TF_IMAGES)))
    expected = np.load(TF_MODEL / "outputs.npz")["stage0"]
    np.testing.assert_allclose(output.last_hidden_state, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FILES.values())
def test_from_pretrained_takes_a_file(name, caplog):
    path = DIALECTS_FOLDER / name
    dialect = path.stem
    model = CvtForImageClassification.from_pretrained(
        path, config=config_of(dialect), hidden_act=DIALECTS[dialect].hidden_act
    )
    expected = np.load(DIALECTS_FOLDER / f"{dialect}.npy")
    np.testing.assert_allclose(logits_of(model), expected, rtol=0, atol=1e-6)
    head = CvtForImageClassification.from_pretrained(path, config=config_of(dialect), num_labels=3)
    assert head.classifier.out_features == 3
    assert "New classifier of 3 classes" in caplog.text
    wider = CvtConfig(**{**DIALECT_SETTINGS, "depth": [1, 1, 3]}, num_labels=NUM_CLASSES)
    with pytest.raises(ValueError, match=r"(?s)do not fit.*missing cvt\.encoder\.stages\.2\."):
        CvtForImageClassification.from_pretrained(path, config=wider)


# ------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_every_row_has_an_inverse_and_is_recognised(dialect, model):
    weights = model.state_dict()
    counters = {n for n in weights if n.endswith("num_batches_tracked")}
    theirs = dialect.written(weights)
    assert len(theirs) == len(weights) - ("num_batches_tracked" not in dialect.norm) * len(counters)
    named = {n.removeprefix(dialect.holder): w for n, w in theirs.items()}
    assert dialect_of(named) is dialect
    read, unknown = dialect.read(named)
    assert not unknown
    assert read.keys() | counters == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in read)


@pytest.mark.parametrize(
    "path",
    [DIALECTS_FOLDER / name for name in [*FILES.values(), "transformers-tf.safetensors"]],
    ids=lambda path: path.stem,
)
def test_the_inverse_gives_the_names_and_shapes_that_the_software_has(path):
    content = load_content(path)
    theirs = content.get("state_dict", content)
    dialect = DIALECTS[path.stem]
    read, unknown = dialect.read(read_weights(path))
    assert not unknown
    if not dialect.suffixes:  # there is none
        assert len(read) == len(theirs)
        return
    written = dialect.written(read)
    assert written.keys() == theirs.keys()
    assert all(torch.equal(written[name], weight) for name, weight in theirs.items())


def test_what_has_no_place_is_listed():
    weights = {"cvt.encoder.stages.0.position_embedding": 1, "pooler.weight": 2}
    with pytest.raises(ValueError, match=r"not weights of a CvT: cvt\.enc.*bedding, pooler\.wei"):
        DIALECTS["timm"].written(weights)


def test_a_path_of_keras_that_comes_twice_is_unexpected():
    names = {"a/norm/gamma:0": 1, "b/norm/gamma:0": 2, "stage0/x/norm/gamma:0": 3}
    read, unknown = DIALECTS["cvt-tensorflow"].read(names)
    assert read == {"layernorm.weight": 1}
    assert unknown == ["b/norm/gamma:0", "stage0/x/norm/gamma:0"]
    assert keras_to_transformers("cvt/encoder/stages.0/pooler/kernel:0") is None
    ours = "cvt/encoder/stages-0/embedding-convolution_embeddings/projection/kernel"  # in Keras 3
    assert keras_to_transformers(ours) == DIALECTS["transformers"].first


def test_the_command_offers_what_can_be_written():
    assert CHOICES == WRITTEN


@pytest.mark.usefixtures("tiny_variant")
@pytest.mark.parametrize(
    ("to", "dtype"), [*((to, torch.float32) for to in SUFFIXES), ("passl", torch.bfloat16)]
)
def test_a_model_is_written_for_other_software_and_comes_back(tmp_path, to, dtype):
    folder = tmp_path / "folder"
    make(tiny(hidden_act=DIALECTS[to].hidden_act or "gelu")).to(dtype).save_pretrained(folder)
    path = tmp_path / f"written{SUFFIXES[to]}"
    assert convert(folder, path, to=to).largest_difference == 0
    given = {} if DIALECTS[to].hidden_act else {"hidden_act": "gelu"}
    again = CvtForImageClassification.from_pretrained(path, **given)
    ours = CvtForImageClassification.from_pretrained(folder)
    assert again.config.hidden_act == ours.config.hidden_act
    torch.testing.assert_close(outputs(again.float()), outputs(ours.float()), rtol=0, atol=0)


def test_a_file_of_another_kind_than_its_software_reads_is_not_written(model, tmp_path):
    model.save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"a\.pth: paddlevit is written to a file \.pdparams"):
        convert(tmp_path / "folder", tmp_path / "a.pth", to="paddlevit")
    for name in ("a.h5", "a.pdparams"):
        with pytest.raises(ValueError, match=rf"{name}: authors is written to a file \.pth or"):
            convert(tmp_path / "folder", tmp_path / name, to="authors")
    with pytest.raises(ValueError, match="must be one of transformers, authors"):
        convert(tmp_path / "folder", tmp_path / "a.h5", to="cvt-tensorflow")
    with pytest.raises(ValueError, match=r"a\.safetensors is the name of a file, but a folder is"):
        convert(tmp_path / "folder", tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# ------------------------------------------------------------------------------ lucid-dl


def lucid_folder(model, folder, hub):
    """A folder as lucid-dl's converter writes it for the hub, or its `save_pretrained`."""
    folder.mkdir()
    save_file(DIALECTS["lucid"].written(model.state_dict()), folder / "model.safetensors")
    config = {
        "num_classes": 5, "in_channels": 3, "variant": "cvt_13", "dims": [8, 16, 24],
        "depths": [1, 2, 3], "num_heads": [1, 2, 3], "embed_strides": [4, 2, 2], "mlp_ratio": 2.0,
        "dropout": 0.0, "drop_path_rate": 0.1, "cls_token": [False, False, True],
    }  # fmt: skip
    if hub:
        config = {
            "library_name": "lucid", "architecture": "cvt_13", "model_type": "cvt",
            "task": "image-classification", "config": config,
            "preprocessing": {
                "preprocessor_type": "image_classification",
                "init_kwargs": {"crop_size": 96, "resize_size": 110},
            },
            "weights": {"tag": "IN1K", "source": "transformers/microsoft/cvt-13"},
        }  # fmt: skip
    else:
        config["model_type"] = "cvt"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("hub", [True, False], ids=["of the hub", "saved"])
def test_a_folder_of_lucid_opens_with_its_activation(model, tmp_path, hub, caplog):
    folder = lucid_folder(model, tmp_path / "lucid", hub)
    config = load_config(folder)
    assert config.hidden_act == ("quick_gelu" if hub else "gelu")
    assert (config.depth, config.embed_dim, config.num_labels) == ([1, 2, 3], [8, 16, 24], 5)
    found = CvtForImageClassification.from_pretrained(folder)
    expected = make(tiny(hidden_act=config.hidden_act))
    torch.testing.assert_close(outputs(found), outputs(expected), rtol=0, atol=0)
    assert "has the names of lucid-dl" in caplog.text
    caplog.clear()
    assert convert(folder, tmp_path / "ours").image_size == (96 if hub else 224)
    assert ("no preprocessor_config.json" in caplog.text) != hub
    if hub:
        assert image_size_of(load_processor(folder, config)) == 96


@pytest.mark.parametrize("software", ["lucid", "tensorflow"])
def test_a_repository_of_other_software_opens_with_from_pretrained(
    model, tmp_path, software, monkeypatch
):
    folder = TF_CLASSIFIER
    if software == "lucid":
        folder = lucid_folder(model, tmp_path / "lucid", True)
    expected = CvtForImageClassification.from_pretrained(folder).state_dict()
    with HubServer({"someone/theirs": folder}) as server:
        connect(monkeypatch, server, tmp_path / "cache")
        online = CvtForImageClassification.from_pretrained("someone/theirs", revision="main")
        with pytest.raises(OSError, match="someone/nothing"):
            CvtForImageClassification.from_pretrained("someone/nothing")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        cached = CvtForImageClassification.from_pretrained("someone/theirs")
    for found in (online, cached):
        assert all(torch.equal(w, expected[n]) for n, w in found.state_dict().items())


@pytest.mark.usefixtures("tiny_variant")
def test_a_file_of_lucid_asks_for_its_activation(model, tmp_path):
    folder = lucid_folder(model, tmp_path / "lucid", True)
    path = (folder / "model.safetensors").rename(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"of lucid-dl and does not record its activation"):
        load_classifier(path)
    for given in ({"hidden_act": "quick_gelu"}, {"config": folder}):
        for load in (load_classifier, CvtForImageClassification.from_pretrained):
            found = load(path, **given)
            torch.testing.assert_close(outputs(found), outputs(model), rtol=0, atol=0)


def test_weights_of_no_dialect_in_a_folder_are_listed(model, tmp_path):
    model.save_pretrained(tmp_path)
    save_file({"some.weight": torch.zeros(30_000)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)missing cvt\.encoder.*unexpected some\.weight"):
        CvtForImageClassification.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------ what holds a CvT


def prefixed(weights, prefix):
    return {prefix + name: weight for name, weight in weights.items()}


def authors(model):
    return transformers_to_authors(model.state_dict())


@pytest.mark.usefixtures("tiny_variant")
@pytest.mark.parametrize("head", ["head.fc", "head.layers.head", "fc", "classifier"])
@pytest.mark.parametrize("outer", ["", "model.", "module."])
def test_a_classifier_beside_its_backbone_belongs_to_it(model, tmp_path, head, outer, caplog):
    weights = prefixed(authors(model), f"{outer}backbone.")
    for tensor in ("weight", "bias"):
        weights[f"{outer}{head}.{tensor}"] = weights.pop(f"{outer}backbone.head.{tensor}")
    weights["data_preprocessor.mean"] = torch.zeros(3)
    torch.save({"meta": {"epoch": 1}, "state_dict": weights}, tmp_path / "epoch_1.pth")
    found = load_authors(tmp_path / "epoch_1.pth")
    torch.testing.assert_close(outputs(found), outputs(model), rtol=0, atol=0)
    assert (
        f"begin with '{outer}backbone.' and '{outer}{head}'; not read: data_preprocessor.mean"
        in caplog.text
    )


DETECTORS = {
    "MMDetection": lambda m: prefixed(transformers_to_authors(m.cvt.state_dict()), "backbone."),
    "transformers": lambda m: prefixed(m.cvt.state_dict(), "model.pixel_level_module.encoder."),
}


@pytest.mark.usefixtures("tiny_variant")
@pytest.mark.parametrize("kind", DETECTORS)
def test_a_detector_gives_its_backbone(model, tmp_path, kind, caplog):
    heads = {f"rpn_head.conv{i}.weight": torch.zeros(2, 2) for i in range(7)}
    heads |= {"roi_head.fc_cls.weight": torch.zeros(81, 24), "neck.fc.bias": torch.zeros(2)}
    path = tmp_path / "detector.pth"
    torch.save({"state_dict": DETECTORS[kind](model) | heads}, path)
    with pytest.raises(CheckpointError, match="holds a model without a classifier: give num"):
        load_classifier(path, hidden_act="quick_gelu")
    assert "not read: rpn_head.conv0.weight" in caplog.text
    assert "and 4 more" in caplog.text
    for cls in (CvtModel, CvtBackbone):
        found = cls.from_pretrained(path, hidden_act="quick_gelu")
        assert all(torch.equal(w, model.cvt.state_dict()[n]) for n, w in found.state_dict().items())
    with pytest.raises(ValueError, match=r"(?s)num_labels would.*missing classifier\.bias"):
        CvtForImageClassification.from_pretrained(path, hidden_act="quick_gelu")
    found = load_classifier(path, num_labels=3, hidden_act="quick_gelu")
    assert torch.equal(found.cvt.encoder.stages[2].cls_token, model.cvt.encoder.stages[2].cls_token)


def zeros(weights):
    return {name: torch.zeros_like(weight) for name, weight in weights.items()}


@pytest.mark.usefixtures("tiny_variant")
def test_averaged_weights_are_read_and_others_are_asked_for(model, tmp_path, caplog):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": authors(model), "state_dict_ema": zeros(authors(model))}, path)
    assert not load_authors(path).classifier.weight.any()
    assert "those in 'state_dict_ema'; not read: 'state_dict'" in caplog.text
    caplog.clear()
    done = convert(path, tmp_path / "folder", key="state_dict")
    torch.testing.assert_close(outputs(done.model), outputs(model), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"holds no 'ema', neither an entry nor"):
        load_authors(path, key="ema")
    with pytest.raises(ValueError, match="key = 'ema': is for files of weights"):
        load_classifier(tmp_path / "folder", key="ema")


@pytest.mark.usefixtures("tiny_variant")
def test_one_of_several_models_is_asked_for(model, tmp_path):
    path = tmp_path / "last.ckpt"
    both = prefixed(authors(model), "student.") | prefixed(zeros(authors(model)), "teacher.")
    torch.save({"state_dict": both}, path)
    for key in ("student.", "student"):
        found = load_classifier(path, key=key)
        torch.testing.assert_close(outputs(found), outputs(model), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"2 models.*'student\.', 'teacher\.'.*--key"):
        load_classifier(path)


def test_the_other_network_called_cvt_is_named(tmp_path):
    names = ("layers.0.0.weight", "layers.0.2.layers.0.0.to_kv.net.0.weight", "to_logits.2.weight")
    torch.save({name: torch.zeros(2) for name in names}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth holds no CvT of the paper: it is vit-pyt"):
        load_authors(tmp_path / "a.pth")


# ------------------------------------------------------------------------------ files of Paddle


class Named:
    """As PaddlePaddle pickles a tensor in a dict within a dict: a pair of name and array."""

    def __init__(self, name, array):
        self.pair = (name, array)

    def __reduce__(self):
        return tuple, (self.pair,)


@pytest.mark.usefixtures("tiny_variant")
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_training_checkpoint_of_paddle_is_unwrapped(model, tmp_path, protocol, caplog):
    weights = DIALECTS["paddlevit"].written(model.state_dict())
    arrays = {n: np.asfortranarray(w.numpy()) for n, w in weights.items()}
    content = {
        "model": {n: Named(f"linear_{i}.w_0", 0 * a) for i, (n, a) in enumerate(arrays.items())},
        "model_ema": {n: Named(f"linear_{i}.w_0", a) for i, (n, a) in enumerate(arrays.items())},
        "optimizer": {"moment": Named("m", np.zeros(3)), "LR_Scheduler": {"last_lr": 0.1}},
        "epoch": np.int64(3),
    }
    path = tmp_path / "Epoch-3-Loss-0.1.pdparams"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    torch.testing.assert_close(outputs(load_authors(path)), outputs(model), rtol=0, atol=0)
    assert "those in 'model_ema'; not read: 'model'" in caplog.text


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("evil", "asked"),
    [
        (Evil(os.system, ("touch pwned",)), r"\w+\.system"),
        (Evil(eval, ("data", {"data": 1})), r"builtins\.eval"),
        (np.array([Evil(os.system, ("touch pwned",))], dtype=object), r"\w+\.system"),
        (np.array([None]), r"numpy\.dtype\('.*O8?'\)"),
        (SimpleNamespace(a=1), r"types\.SimpleNamespace"),
        (np.zeros(2, "U3"), r"numpy\.dtype"),
    ],
    ids=["system", "eval", "array of calls", "array of objects", "class", "text"],
)
def test_a_pickle_of_paddle_runs_nothing(tmp_path, monkeypatch, evil, asked):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pdparams"
    path.write_bytes(pickle.dumps({"head.weight": np.zeros((2, 2)), "x": evil}, protocol=4))
    with pytest.raises(CheckpointError, match=rf"evil\.pdparams was not read: .*run {asked}"):
        read_weights(path)
    assert not (tmp_path / "pwned").exists()


def changed_function():
    """A pickle that would change a function of the reader: BUILD on what a name stands for."""
    return b"\x80\x02c_codecs\nencode\n}(X\x01\x00\x00\x00aK\x01ub."


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"a": np.zeros(3)}, protocol=4).replace(b"K\x03", b"K\x04"),
        changed_function(),
        b"\x80\x02cnumpy\nndarray\n)R.",
    ],
    ids=["empty", "text", "list", "shape", "function", "array"],
)
def test_other_files_called_pdparams_are_refused(tmp_path, content):
    (tmp_path / "a.pdparams").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pdparams (is|holds)"):
        read_weights(tmp_path / "a.pdparams")


def test_a_file_of_paddle_cut_off_anywhere_is_refused(tmp_path):
    whole = (DIALECTS_FOLDER / "paddlevit.pdparams").read_bytes()
    for length in range(1, len(whole), 1999):
        (tmp_path / "cut.pdparams").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pdparams"):
            read_weights(tmp_path / "cut.pdparams")


# ------------------------------------------------------------------------------ files of Keras


def test_a_whole_model_of_keras_is_read_without_its_optimizer(tmp_path):
    with (
        h5py.File(DIALECTS_FOLDER / "cvt-tensorflow.h5") as weights,
        h5py.File(tmp_path / "model.h5", "w") as file,
    ):
        group = file.create_group("model_weights")
        for name in weights:
            weights.copy(name, group)
        file["optimizer_weights/iterations:0"] = 3
    found = load_authors(tmp_path / "model.h5", config=config_of("cvt-tensorflow"))
    expected = np.load(DIALECTS_FOLDER / "cvt-tensorflow.npy")
    found.config.hidden_act = "quick_gelu"
    read = read_weights(tmp_path / "model.h5")
    assert not any("iterations" in name for name in read)
    assert found.classifier.out_features == expected.shape[1]


def external(file, tmp_path):
    (tmp_path / "secret").write_bytes(b"12345678")
    file.create_dataset("a", (2,), "f4", external=[(str(tmp_path / "secret"), 0, 8)])


def virtual(file, tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["b"] = np.zeros(2, np.float32)
    layout = h5py.VirtualLayout((2,), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "b", (2,))
    file.create_virtual_dataset("a", layout)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (external, "a refers to another file"),
        (virtual, "a refers to another file"),
        (lambda file, _: file.create_dataset("a", (10**9,), "f4"), "a holds no whole array"),
        (lambda file, _: file.create_dataset("a", data="text"), "a holds no whole array"),
    ],
    ids=["external", "virtual", "huge", "text"],
)
def test_an_h5_file_reads_no_other_and_takes_no_more_memory_than_it_has(tmp_path, spoil, message):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        spoil(file, tmp_path)
    with pytest.raises(CheckpointError, match=rf"a\.h5 was not read: {message}"):
        read_weights(tmp_path / "a.h5")


def test_without_h5py_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("cvt.libraries.is_installed", lambda name: name != "h5py")
    with pytest.raises(ImportError, match=r"tf_model\.h5, an \.h5 file, needs h5py: .*tensorflow"):
        CvtForImageClassification.from_pretrained(TF_CLASSIFIER)


def test_the_table_needs_neither_pytorch_nor_numpy():
    code = (
        "import sys, cvt.checkpoints.names;"
        "print(sorted({'torch', 'numpy', 'h5py'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_weights_are_read_as_they_are():
    found = read_weights(DIALECTS_FOLDER / "paddlevit.pdparams")
    assert found["stages.0.blocks.0.mlp.fc1.weight"].shape == (4, 16)  # inputs first
