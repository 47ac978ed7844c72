import argparse
import copy
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from transformers import CvtForImageClassification as TransformersCvt

from cvt import CvtConfig, CvtForImageClassification, CvtModel
from cvt.checkpoints import (
    CheckpointError,
    authors_to_transformers,
    convert,
    load_authors,
    load_classifier,
    load_config,
    read_weights,
    transformers_to_authors,
)
from cvt.data.class_names import imagenet_classes

ANIMALS = ["ant", "bee", "cow", "dog", "elk", "fox", "gnu"]
TINY = {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 4]}


@pytest.fixture
def tiny_variant(monkeypatch):
    """A variant small enough to be written by the dozen."""
    monkeypatch.setitem(__import__("cvt.configuration").configuration.VARIANTS, "cvt-tiny", TINY)
    return CvtConfig.from_variant("cvt-tiny", num_labels=7)


@pytest.fixture
def model(tiny_variant):
    torch.manual_seed(0)
    model = CvtForImageClassification(tiny_variant).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


@pytest.fixture
def authors_file(model, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(transformers_to_authors(model.state_dict()), path)
    return path


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, 48, 64, generator=torch.manual_seed(1))).logits


# ------------------------------------------------------------------------------ names


def test_names_are_the_authors_and_come_back():
    config = CvtConfig(**TINY, cls_token=[True, False, True])
    weights = CvtForImageClassification(config).state_dict()
    renamed = transformers_to_authors(weights)
    for name in (
        "stage0.cls_token",
        "stage1.patch_embed.proj.bias",
        "stage1.patch_embed.norm.weight",
        "stage2.blocks.3.attn.conv_proj_q.conv.weight",
        "stage2.blocks.3.attn.conv_proj_v.bn.num_batches_tracked",
        "stage0.blocks.0.attn.proj_k.bias",
        "stage0.blocks.0.attn.proj.weight",
        "stage0.blocks.0.mlp.fc1.weight",
        "stage0.blocks.0.norm2.bias",
        "norm.weight",
        "head.bias",
    ):
        assert name in renamed
    assert len(renamed) == len(weights)
    again = authors_to_transformers(renamed)
    assert all(again[name] is weight for name, weight in weights.items())


def test_a_headless_model_is_renamed_too():
    weights = CvtModel(CvtConfig(**TINY)).state_dict()
    renamed = transformers_to_authors(weights)
    assert "stage0.patch_embed.proj.weight" in renamed
    assert "head.weight" not in renamed


@pytest.mark.parametrize("rename", [authors_to_transformers, transformers_to_authors])
def test_unknown_names_are_listed_all(rename):
    with pytest.raises(ValueError, match=r"stage0\.pos_embed, stage0\.blocks\.x\.norm1\.weight"):
        rename({"stage0.pos_embed": 1, "stage0.blocks.x.norm1.weight": 2})


# ------------------------------------------------------------------------------ conversion


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_an_authors_file_becomes_a_folder(model, tmp_path, wrapped, prefix):
    content = {prefix + k: v for k, v in transformers_to_authors(model.state_dict()).items()}
    if wrapped:
        content = {"epoch": 3, "state_dict": content, "optimizer": {"state": {}}, "perf": 81.5}
    torch.save(content, tmp_path / "weights.pth")
    done = convert(tmp_path / "weights.pth", tmp_path / "folder", image_size=64)
    assert done.largest_difference <= 1e-6
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {
        "checksums.json",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    again = CvtForImageClassification.from_pretrained(tmp_path / "folder")
    assert again.config.hidden_act == "quick_gelu"
    assert again.config.num_labels == 7
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    with open(tmp_path / "folder/preprocessor_config.json") as file:
        assert json.load(file)["size"] == {"shortest_edge": 64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_folder_becomes_an_authors_file(model, tmp_path, dtype):
    model = copy.deepcopy(model).to(dtype)
    model.save_pretrained(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "weights.pth", to="authors")
    expected = transformers_to_authors(model.state_dict())
    found = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_folder_of_transformers_is_converted_with_the_activation_asked_for(model, tmp_path):
    config = TransformersCvt.config_class(**TINY, num_labels=7)
    stock = TransformersCvt(config)
    stock.load_state_dict(model.state_dict())
    stock.save_pretrained(tmp_path / "stock")
    convert(tmp_path / "stock", tmp_path / "gelu")
    convert(tmp_path / "stock", tmp_path / "quick", hidden_act="quick_gelu")
    gelu = CvtForImageClassification.from_pretrained(tmp_path / "gelu")
    quick = CvtForImageClassification.from_pretrained(tmp_path / "quick")
    torch.testing.assert_close(logits(gelu), logits(stock), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(quick), logits(model), rtol=0, atol=0)


def test_a_thousand_classes_get_the_names_of_imagenet(tiny_variant, tmp_path):
    tiny_variant.num_labels = 1000
    weights = CvtForImageClassification(tiny_variant).state_dict()
    torch.save(transformers_to_authors(weights), tmp_path / "weights.pth")
    config = convert(tmp_path / "weights.pth", tmp_path / "folder").model.config
    assert config.id2label[0] == "tench, Tinca tinca"
    assert config.label2id["toilet tissue, toilet paper, bathroom tissue"] == 999
    assert len(set(config.class_names)) == 1000
    assert list(imagenet_classes())[:2] == ["n01440764", "n01443537"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.txt", "\n".join(ANIMALS)),
        ("labels.json", json.dumps(ANIMALS)),
        ("id2label.json", json.dumps({"id2label": dict(enumerate(ANIMALS))})),
    ],
)  # fmt: skip
def test_labels_come_from_a_file(authors_file, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    done = convert(authors_file, tmp_path / "folder", labels=tmp_path / name)
    assert done.model.config.class_names == ANIMALS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant\nbee\n", "2 names; the classifier has 7 classes"),
        ("a\nb\nc\nd\ne\nf\na\n", "twice: a"),
    ],
)
def test_labels_that_do_not_fit_are_refused(authors_file, tmp_path, text, message):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"labels\.txt .*{message}"):
        convert(authors_file, tmp_path / "folder", labels=tmp_path / "labels.txt")
    assert not (tmp_path / "folder").exists()


def test_a_published_file_tells_its_resolution(model, tmp_path, authors_file):
    named = authors_file.rename(tmp_path / "CvT-13-384x384-IN-22k.pth")
    assert convert(named, tmp_path / "folder").image_size == 384
    other = named.rename(tmp_path / "mine.pth")
    assert convert(other, tmp_path / "other").image_size == 224


def test_a_config_tells_what_the_tensors_do_not(tmp_path):
    config = CvtConfig(
        embed_dim=[12, 24],
        num_heads=[3, 4],
        depth=[1, 2],
        num_labels=5,
        cls_token=[False, True],
        qkv_projection_method=["avg", "linear"],
        **{name: CvtConfig().to_dict()[name][:2] for name in
           ("patch_sizes", "patch_stride", "patch_padding", "mlp_ratio", "attention_drop_rate",
            "drop_rate", "drop_path_rate", "qkv_bias", "kernel_qkv", "padding_kv", "stride_kv",
            "padding_q", "stride_q")},
    )  # fmt: skip
    model = CvtForImageClassification(config).eval()
    torch.save(transformers_to_authors(model.state_dict()), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"depth \[1, 2\].*--config"):
        convert(tmp_path / "weights.pth", tmp_path / "folder")
    config.save_pretrained(tmp_path)
    done = convert(tmp_path / "weights.pth", tmp_path / "folder", config=tmp_path / "config.json")
    torch.testing.assert_close(logits(done.model), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "must be an object"),
        ('{"model_type": "resnet", "depths": [1, 2]}', "of a model of type resnet, not cvt"),
        ('{"model_type": "cvt", "hidden_act": "gelu", "depth": [0]}', r"depth = \[0\] lists 1"),
    ],
)
def test_a_config_that_is_none_of_a_cvt_is_named(authors_file, tmp_path, content, message):
    path = tmp_path / "other.json"
    path.write_text(content)
    for load in (load_authors, CvtForImageClassification.from_pretrained):
        with pytest.raises(ValueError, match=rf"other\.json: .*{message}"):
            load(authors_file, config=path)


def test_a_file_takes_the_folder_of_its_config_and_its_attention(model, authors_file, tmp_path):
    model.config.save_pretrained(tmp_path / "folder")
    load = CvtForImageClassification.from_pretrained
    for config in (tmp_path / "folder", str(tmp_path / "folder/config.json")):
        torch.testing.assert_close(logits(load(authors_file, config=config)), logits(model))
    config = CvtConfig(**TINY, hidden_act="quick_gelu", num_labels=7, attn_implementation="eager")
    assert load(authors_file, config=config).config._attn_implementation == "eager"
    found = load(authors_file, config=config, attn_implementation="sdpa")
    assert found.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("field", [{"image_size": 64}, {"labels": "labels.txt"}])
def test_a_file_takes_nothing_that_it_cannot_record(authors_file, tmp_path, field):
    with pytest.raises(ValueError, match=rf"{next(iter(field))} = .*: is for a folder"):
        convert(authors_file, tmp_path / "out.pth", to="authors", **field)


def test_the_activation_that_a_config_names_is_kept(model, authors_file, tmp_path):
    model.config.hidden_act = "gelu"
    model.config.save_pretrained(tmp_path)
    done = convert(authors_file, tmp_path / "folder", config=tmp_path / "config.json")
    assert done.model.config.hidden_act == "gelu"


def test_what_an_authors_file_cannot_record_is_reported(model, tmp_path, caplog):
    model.config.hidden_act = "gelu"
    model.save_pretrained(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "weights.pth", to="authors")
    assert "does not record that this model has gelu" in caplog.text


def test_an_authors_file_with_a_thousand_classes_predicts_their_names(tiny_variant, tmp_path):
    tiny_variant.num_labels = 1000
    weights = CvtForImageClassification(tiny_variant).state_dict()
    torch.save(transformers_to_authors(weights), tmp_path / "weights.pth")
    assert load_authors(tmp_path / "weights.pth").config.class_names[281] == "tabby, tabby cat"


def test_projections_without_weights_ask_for_a_config(tiny_variant, tmp_path):
    tiny_variant.qkv_projection_method = ["dw_bn", "avg", "dw_bn"]
    weights = CvtForImageClassification(tiny_variant).state_dict()
    torch.save(transformers_to_authors(weights), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"avg or linear.*--config"):
        convert(tmp_path / "weights.pth", tmp_path / "folder")


def test_a_new_head_is_created_only_if_asked_for(authors_file, model, tmp_path, caplog):
    done = convert(authors_file, tmp_path / "folder", num_labels=3)
    assert done.model.classifier.out_features == 3
    assert "New classifier of 3 classes" in caplog.text
    torch.testing.assert_close(done.model.layernorm.weight, model.layernorm.weight)
    caplog.clear()
    assert load_authors(authors_file, num_labels=7).config.num_labels == 7
    assert "New classifier" not in caplog.text


# ------------------------------------------------------------------------------ files of others


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
WRAPPED = {
    "timm": lambda w: {"args": argparse.Namespace(lr=np.float64(1)), "arch": "a", "state_dict": w},
    "Swin": lambda w: {"model": w, "optimizer": OPTIMIZER, "max_accuracy": np.float64(81.5)},
    "tutorial": lambda w: {"epoch": np.int64(3), "model_state_dict": w, "loss": torch.tensor(0.5)},
    "torchvision": lambda w: {"model_state": w, "best": np.float32(0.8), "last": np.bool_(True)},
    "kuangliu": lambda w: {"net": w, "acc": np.float16(81), "rng": torch.get_rng_state()},
    "deepspeed": lambda w: {"module": w},
    "twice": lambda w: {"state": 1, "model": {"state_dict": w, "epoch": 3}},
    "bare": lambda w: {**w, "epoch": np.int64(3), "best": np.float64(0.8), "name": np.str_("x")},
}  # fmt: skip


def prefixed(weights, prefix):
    return {prefix + name: weight for name, weight in weights.items()}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_checkpoints_of_training_scripts_are_unwrapped_without_a_word(
    model, tmp_path, wrap, caplog
):
    torch.save(wrap(transformers_to_authors(model.state_dict())), tmp_path / "a.pth")
    torch.testing.assert_close(logits(load_authors(tmp_path / "a.pth")), logits(model))
    assert not caplog.records


@pytest.mark.parametrize(
    "prefix",
    ["model.", "net.", "_orig_mod.", "module._orig_mod.", "model._orig_mod.", "net.module.vit."],
)
@pytest.mark.parametrize("dialect", [transformers_to_authors, dict])
def test_what_stands_before_the_names_is_removed(model, tmp_path, prefix, dialect):
    content = {"state_dict": prefixed(dialect(model.state_dict()), prefix), "hyper_parameters": {}}
    torch.save(content, tmp_path / "last.ckpt")
    found = load_authors(tmp_path / "last.ckpt", hidden_act="quick_gelu")
    torch.testing.assert_close(logits(found), logits(model))


def test_a_model_whose_blocks_were_compiled_is_read(model, tmp_path):
    weights = {
        name.replace("layers.0.", "layers.0._orig_mod.").replace("cvt.", "cvt._orig_mod."): weight
        for name, weight in model.state_dict().items()
    }
    torch.save(weights, tmp_path / "a.pth")
    found = load_authors(tmp_path / "a.pth", hidden_act="quick_gelu")
    torch.testing.assert_close(logits(found), logits(model))


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema"])
def test_of_several_weights_the_averaged_are_read_and_the_others_named(
    model, tmp_path, name, caplog
):
    averaged = transformers_to_authors(model.state_dict())
    others = {key: torch.zeros_like(weight) for key, weight in averaged.items()}
    torch.save({"model": others, name: averaged, "epoch": 3}, tmp_path / "a.pth")
    torch.testing.assert_close(logits(load_authors(tmp_path / "a.pth")), logits(model))
    assert f"the weights are those in {name!r}; not read: 'model'" in caplog.text


def test_what_lies_beside_the_model_is_named(model, tmp_path, caplog):
    weights = prefixed(transformers_to_authors(model.state_dict()), "model.")
    beside = {"criterion.weight": torch.ones(7)}
    content = {"state_dict": weights | beside, "head": {"weight": torch.ones(7)}}
    torch.save(content, tmp_path / "a.pth")
    torch.testing.assert_close(logits(load_authors(tmp_path / "a.pth")), logits(model))
    assert "begin with 'model.'; not read: criterion.weight" in caplog.text
    assert "those in 'state_dict'; not read: 'head'" in caplog.text


def ambiguous(kind, weights):
    body = {name: w for name, w in weights.items() if not name.startswith("head.")}
    return {
        "two models": prefixed(weights, "model.") | prefixed(weights, "teacher."),
        "two dicts": {"model": weights, "net": weights},
        "head elsewhere": prefixed(body, "backbone.") | {"fc.weight": weights["head.weight"]},
        "unknown": prefixed(weights, "model.") | {"model.pos_embed": torch.ones(1)},
        "compiled and not": weights | prefixed(weights, "_orig_mod."),
    }[kind]


@pytest.mark.parametrize(("kind", "key"), [("two models", "teacher"), ("two dicts", "net")])
def test_one_of_several_models_is_asked_for_by_key(model, tmp_path, kind, key):
    torch.save(ambiguous(kind, transformers_to_authors(model.state_dict())), tmp_path / "a.pth")
    for load in (load_authors, CvtForImageClassification.from_pretrained):
        torch.testing.assert_close(logits(load(tmp_path / "a.pth", key=key)), logits(model))
        with pytest.raises(CheckpointError, match=r"by key \(`cvt convert .*a\.pth FOLDER --key"):
            load(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("two models", r"2 models, whose names begin with 'model\.', 'teacher\.': ask for one"),
        ("two dicts", r"weights in each of 'model', 'net': ask for one of them by key"),
        ("head elsewhere", r"holds a model without a classifier: give num_labels"),
        ("unknown", r"unexpected pos_embed"),
        ("compiled and not", r"holds weights twice"),
    ],
)
def test_what_is_not_plain_is_refused(model, tmp_path, kind, message):
    torch.save(ambiguous(kind, transformers_to_authors(model.state_dict())), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"(?s)a\.pth .*{message}"):
        load_authors(tmp_path / "a.pth")


def test_transformers_names_need_their_activation(model, tmp_path):
    path = tmp_path / "a.pth"
    torch.save(model.state_dict(), path)
    for load in (load_classifier, load_config):
        with pytest.raises(CheckpointError, match=r"not record its activation.*--hidden-act gelu`"):
            load(path)
    done = convert(path, tmp_path / "quick", hidden_act="quick_gelu")
    torch.testing.assert_close(logits(done.model), logits(model))
    stock = TransformersCvt(TransformersCvt.config_class(**TINY, num_labels=7))
    stock.load_state_dict(model.state_dict())
    stock.config.save_pretrained(tmp_path)  # does not record it: transformers computes GELU
    done = convert(path, tmp_path / "gelu", config=tmp_path / "config.json")
    assert done.model.config.hidden_act == "gelu"
    torch.testing.assert_close(logits(done.model), logits(stock), rtol=0, atol=1e-5)


def headless_files(model):
    ours = model.state_dict()
    body = {name: w for name, w in ours.items() if name.startswith("cvt.")}
    theirs = transformers_to_authors(ours)
    return {
        "authors, no head": {name: w for name, w in theirs.items() if not name.startswith("head.")},
        "authors, no norm": transformers_to_authors(body),
        "CvtModel": {name.removeprefix("cvt."): w for name, w in body.items()},
        "cvt.": body,
    }


@pytest.mark.parametrize("kind", ["authors, no head", "authors, no norm", "CvtModel", "cvt."])
def test_a_model_without_a_head_gets_one_if_classes_are_given(model, tmp_path, kind, caplog):
    path = tmp_path / "a.pth"
    torch.save(headless_files(model)[kind], path)
    with pytest.raises(CheckpointError, match=r"a\.pth holds a model without a classifier: give n"):
        load_classifier(path, hidden_act="quick_gelu")
    assert load_config(path).num_labels == 0 if kind.startswith("authors") else True
    found = load_classifier(path, num_labels=4, hidden_act="quick_gelu")
    assert "New classifier of 4 classes" in caplog.text
    assert found.classifier.out_features == found.config.num_labels == 4
    for name, weight in found.state_dict().items():
        if name.startswith("cvt."):
            torch.testing.assert_close(weight, model.state_dict()[name])


def test_weights_that_lack_only_the_counters_of_batches_are_read(model, tmp_path):
    weights = transformers_to_authors(model.state_dict())
    weights = {name: w for name, w in weights.items() if not name.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "a.pth")
    found = load_authors(tmp_path / "a.pth")
    torch.testing.assert_close(logits(found), logits(model))
    counters = {b.item() for name, b in found.named_buffers() if name.endswith("tracked")}
    assert counters == {0}
    del weights["stage0.blocks.0.attn.conv_proj_q.bn.running_mean"]
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"fit:\n  missing stage0.*running_mean$"):
        load_authors(tmp_path / "a.pth")


# ------------------------------------------------------------------------------ bad files


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 80113104\n"


@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.ckpt", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(CheckpointError) as error:
        load_classifier(tmp_path / name)
    assert str(error.value) == (
        f"{tmp_path / name} is a git-lfs pointer, not the weights: `git lfs pull` in its "
        "repository gets it"
    )


def test_code_beside_numbers_of_numpy_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {}, "acc": np.float64(1), "args": argparse.Namespace(x=Evil())}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"to run \w+\.system; only.*state_dict\(\) alone"):
        read_weights(tmp_path / "a.pth")
    assert not (tmp_path / "pwned").exists()
    torch.save({"a": torch.zeros(2), "b": np.array([None])}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"multiarray\._reconstruct"):
        read_weights(tmp_path / "a.pth")


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=4))


@pytest.mark.parametrize("save", [torch.save, legacy, plain_pickle])
def test_a_pickle_that_asks_for_code_is_refused_by_name(tmp_path, save, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({"head.weight": torch.zeros(2), "x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(
        CheckpointError, match=r"evil\.pth was not read: it asks to run .*posix\.system"
    ):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not a checkpoint at all", "is no PyTorch checkpoint, or not a whole one"),
        (pickle.dumps([1, 2], protocol=2), "is no PyTorch checkpoint, or not a whole one"),
        (saved({}), "holds no weights, but dict"),
        (saved([1, 2]), "holds no weights, but list"),
        (saved({"a": dict.fromkeys(range(9), 1)}), "'a' is a dict of 0, 1, 2, 3, 4 and 4 more"),
        (saved({"a": 3, "b": "x"}), r"'a' is int\s+'b' is str"),
    ],
)
def test_alien_files_are_refused(tmp_path, content, message):
    (tmp_path / "alien.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"(?s)alien\.pth .*{message}"):
        read_weights(tmp_path / "alien.pth")


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    whole = saved({f"w{i}": torch.full((50,), float(i)) for i in range(4)})
    path = tmp_path / "cut.pth"
    for length in range(1, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pth"):
            read_weights(path)


@pytest.mark.parametrize("content", [b"", b"xx", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      junk"])
def test_damaged_safetensors_are_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        read_weights(tmp_path / "a.safetensors")


def test_every_fault_is_listed_and_nothing_written(model, tmp_path):
    weights = transformers_to_authors(model.state_dict())
    del weights["stage1.blocks.1.norm1.bias"]
    del weights["norm.weight"]
    weights["stage0.blocks.0.mlp.fc1.weight"] = torch.zeros(5, 16)
    weights["stage0.pos_embed"] = torch.zeros(1)
    weights["stage0.blocks.0.norm1.weight"] = torch.full((16,), float("nan"))
    weights["stage2.blocks.4.norm1.bias"] = torch.zeros(64)
    config = tmp_path / "config.json"
    model.config.save_pretrained(tmp_path)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError) as error:
        convert(tmp_path / "weights.pth", tmp_path / "folder", config=config)
    for fault in (
        "weights.pth",
        "missing stage1.blocks.1.norm1.bias",
        "missing norm.weight",
        "stage0.blocks.0.mlp.fc1.weight is (5, 16), expected (64, 16)",
        "unexpected stage2.blocks.4.norm1.bias",
        "unexpected stage0.pos_embed",
        "stage0.blocks.0.norm1.weight has NaN or infinity",
    ):
        assert fault in str(error.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "weights.pth"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_are_refused_unless_allowed(model, tmp_path, value):
    weights = transformers_to_authors(model.state_dict())
    weights["stage2.blocks.3.attn.proj.weight"][0, 0] = value
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(
        CheckpointError, match=r"stage2\.blocks\.3\.attn\.proj\.weight has NaN or infinity"
    ):
        convert(tmp_path / "weights.pth", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    convert(tmp_path / "weights.pth", tmp_path / "folder", allow_nonfinite=True)
    assert (tmp_path / "folder/model.safetensors").is_file()


def test_weights_under_transformers_names_want_their_folder(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"name the folder with its config.json.*hidden-act"):
        convert(tmp_path / "pytorch_model.bin", tmp_path / "folder")


def test_nothing_is_overwritten_unasked(authors_file, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"folder exists already"):
        convert(authors_file, folder)
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]
    convert(authors_file, folder, force=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "config.json").is_file()
    before = authors_file.read_bytes()
    with pytest.raises(FileExistsError):
        convert(folder, authors_file, to="authors")
    assert authors_file.read_bytes() == before


def test_a_failed_check_leaves_nothing(authors_file, tmp_path, monkeypatch):
    monkeypatch.setattr("cvt.checkpoints.conversion.largest_difference", lambda *models: 0.5)
    with pytest.raises(CheckpointError, match=r"differ by 0\.5"):
        convert(authors_file, tmp_path / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pth"]


def test_an_unknown_source_names_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cvt-99.*cvt-13-384-22k"):
        convert("cvt-99", tmp_path / "folder")


def test_a_zip_that_is_no_checkpoint_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        read_weights(tmp_path / "a.pth")
