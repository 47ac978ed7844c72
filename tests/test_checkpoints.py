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
    read_weights,
    transformers_to_authors,
)
from cvt.labels import imagenet_classes

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


def test_a_folder_becomes_an_authors_file(model, tmp_path):
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


def test_the_activation_that_a_config_names_is_kept(model, authors_file, tmp_path):
    model.config.hidden_act = "gelu"
    model.config.save_pretrained(tmp_path)
    done = convert(authors_file, tmp_path / "folder", config=tmp_path / "config.json")
    assert done.model.config.hidden_act == "gelu"


def test_what_an_authors_file_cannot_record_is_said(model, tmp_path, caplog):
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


def test_a_new_head_is_made_only_if_asked_for(authors_file, model, tmp_path, caplog):
    done = convert(authors_file, tmp_path / "folder", num_labels=3)
    assert done.model.classifier.out_features == 3
    assert "New classifier of 3 classes" in caplog.text
    torch.testing.assert_close(done.model.layernorm.weight, model.layernorm.weight)
    caplog.clear()
    assert load_authors(authors_file, num_labels=7).config.num_labels == 7
    assert "New classifier" not in caplog.text


# ------------------------------------------------------------------------------ bad files


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
