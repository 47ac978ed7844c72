"""Adapters as PEFT saves them, given where a model is: their base is loaded and merged."""

import importlib
import json
import os
import shutil

import pytest
import torch
import transformers
from helpers.small_models import images, make, tiny
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from cvt import Classifier, CvtForImageClassification, image_processor
from cvt.architecture import VARIANTS
from cvt.checkpoints import (
    CheckpointError,
    convert,
    load_classifier,
    load_config,
    load_processor,
    transformers_to_authors,
)
from cvt.hub import PUBLISHED
from cvt.train.models import classifier_for

OWN = {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 3], "depth": [1, 2, 3], "mlp_ratio": [2] * 3}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder `base` in the current one, of five classes."""
    monkeypatch.chdir(tmp_path)
    model = make(tiny(hidden_act="quick_gelu"))
    model.save_pretrained("base")
    image_processor(model.config, image_size=48).save_pretrained("base")
    return model


def adapted(model, **settings):
    """A model with adapters of which every number matters."""
    targets = ["projection_query", "projection_value", "dense"]
    lora = LoraConfig(**{"r": 2, "target_modules": targets, **settings})
    torch.manual_seed(1)
    wrapped = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight))
    return wrapped


def of_transformers(classes=3):
    """What code for transformers trains on the base: GELU, and another head if asked for."""
    kind = transformers.CvtForImageClassification
    return kind.from_pretrained("base", num_labels=classes, ignore_mismatched_sizes=True)


def logits(model):
    with torch.no_grad():
        return model.eval()(images()).logits


def settings(**changes):
    with open("adapter/adapter_config.json") as file:
        found = json.load(file)
    with open("adapter/adapter_config.json", "w") as file:
        json.dump(found | changes, file)


def test_an_adapter_of_transformers_with_a_new_head_is_merged(base):
    wrapped = adapted(of_transformers(), modules_to_save=["classifier"])
    wrapped.save_pretrained("adapter")
    model = load_classifier("adapter")
    assert type(model) is CvtForImageClassification
    assert (model.config.num_labels, model.config.hidden_act) == (3, "gelu")
    torch.testing.assert_close(logits(model), logits(wrapped), rtol=0, atol=1e-5)
    assert all(weight.requires_grad for weight in model.parameters())
    assert load_config("adapter").num_labels == 3
    assert load_processor("adapter", model.config).size == {"shortest_edge": 48}


def test_an_adapter_of_this_package_keeps_activation_classes_and_head_of_its_base(base, caplog):
    names = ["ant", "bee", "cow", "dog", "elk"]
    base.config.class_names = names
    base.save_pretrained("base")
    wrapped = adapted(CvtForImageClassification.from_pretrained("base"))
    wrapped.save_pretrained("adapter")
    model = load_classifier("adapter")
    assert model.config.hidden_act == "quick_gelu"
    assert model.config.class_names == names
    torch.testing.assert_close(logits(model), logits(wrapped), rtol=0, atol=1e-5)
    assert "New classifier" not in caplog.text
    assert load_classifier("adapter", hidden_act="gelu").config.hidden_act == "gelu"


def test_an_adapter_is_taken_wherever_a_model_is(base, cvt, photos, tmp_path):
    wrapped = adapted(of_transformers(), modules_to_save=["classifier"])
    wrapped.save_pretrained("adapter")
    pixels = images(2, 48, 48)
    with torch.no_grad():
        expected = wrapped(pixels).logits
    classifier = Classifier("adapter", "fused")
    torch.testing.assert_close(classifier.runtime(pixels), expected, rtol=0, atol=1e-4)
    assert {record["label"][:6] for record in classifier(photos / "red/00.png")} == {"LABEL_"}
    convert("adapter", "merged")
    merged = CvtForImageClassification.from_pretrained("merged")
    torch.testing.assert_close(logits(merged), logits(wrapped), rtol=0, atol=1e-5)
    started, _ = classifier_for("adapter", ["ant", "bee"])
    assert started.config.class_names == ["ant", "bee"]
    name = "cvt.encoder.stages.0.layers.0.output.dense.weight"
    torch.testing.assert_close(started.state_dict()[name], merged.state_dict()[name])
    code, out, _ = cvt("predict", "adapter", photos / "red/00.png", "--runtime", "torch")
    assert (code, "LABEL_" in out) == (0, True)
    code, out, _ = cvt("export", "adapter", "exported", "--to", "torch-export")
    assert (code, "exported: torch-export, fp32" in out) == (0, True)


def test_the_base_is_found_from_here_from_the_adapter_and_by_its_published_name(base, monkeypatch):
    adapted(of_transformers(), modules_to_save=["classifier"]).save_pretrained("adapter")
    expected = logits(load_classifier("adapter"))
    os.makedirs("elsewhere")
    shutil.move("base", "elsewhere/base")
    settings(base_model_name_or_path="../elsewhere/base")
    assert torch.equal(logits(load_classifier("adapter")), expected)
    monkeypatch.setitem(VARIANTS, "cvt-own", OWN)
    torch.save(transformers_to_authors(base.state_dict()), "base.pth")
    settings(base_model_name_or_path="base.pth")
    torch.testing.assert_close(logits(load_classifier("adapter")), expected)
    assert load_processor("adapter", load_config("adapter")).size == {"shortest_edge": 224}
    load = CvtForImageClassification.from_pretrained

    def of_the_hub(name, **kwargs):
        assert name == PUBLISHED["cvt-13"].hub_id
        return load("elsewhere/base", **kwargs)

    monkeypatch.setattr(CvtForImageClassification, "from_pretrained", of_the_hub)
    settings(base_model_name_or_path=PUBLISHED["cvt-13"].hub_id)
    assert torch.equal(logits(load_classifier("adapter")), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"nowhere, which is no model on the hub and no folder here: set base_model_na"),
        ("someone/cvt", r"adapter is an adapter without its base: someone/cvt is not on this mach"),
        (None, r"adapter is an adapter that does not name its base: set base_model_name_or_path"),
        ("adapter", r"adapter is an adapter of adapter, which is no"),  # not for ever
    ],
)
def test_a_base_that_is_not_there_is_named(base, name, message):
    adapted(of_transformers()).save_pretrained("adapter")
    settings(base_model_name_or_path=name)
    with pytest.raises((CheckpointError, FileNotFoundError), match=message):
        load_classifier("adapter")


def rewritten(change):
    weights = load_file(f"adapter/{WEIGHTS}")
    change(weights)
    save_file(weights, f"adapter/{WEIGHTS}")


QUERY = "base_model.model.cvt.encoder.stages.0.layers.0.attention.attention.projection_query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(f"{QUERY}.lora_A.weight"), r"missing \S+query\.lora_A\.default"),
        (lambda w: w.pop("base_model.model.classifier.bias"), r"missing \S+classifier\.bias"),
        (lambda w: w.update({"base_model.model.x": torch.ones(1)}), r"unexpected \S+model\.x"),
        (lambda w: w.update({f"{QUERY}.lora_A.weight": torch.ones(2, 5)}), r"size mismatch"),
        (lambda w: w[f"{QUERY}.lora_A.weight"].fill_(float("nan")), r"NaN"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(base, change, message):
    adapted(of_transformers(), modules_to_save=["classifier"]).save_pretrained("adapter")
    rewritten(change)
    with pytest.raises(CheckpointError, match=rf"(?s)in adapter does not fit its base:.*{message}"):
        load_classifier("adapter")


def test_what_is_no_adapter_to_merge_raises(base, monkeypatch):
    adapted(of_transformers()).save_pretrained("adapter")
    settings(peft_type="PREFIX_TUNING")
    with pytest.raises(CheckpointError, match="PREFIX_TUNING cannot be merged into weights"):
        load_classifier("adapter")
    shutil.copy("base/model.safetensors", "adapter")
    with pytest.raises(CheckpointError, match="adapter holds both a model and an adapter: move"):
        load_classifier("adapter")
    os.remove("adapter/model.safetensors")
    base.config.save_pretrained("adapter")
    with pytest.raises(ValueError, match=r"adapter is an adapter: cvt\.checkpoints\.load_c"):
        CvtForImageClassification.from_pretrained("adapter")
    with open(f"adapter/{WEIGHTS}", "w") as file:
        file.write("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} is a git-lfs pointer"):
        load_classifier("adapter")
    os.remove(f"adapter/{WEIGHTS}")
    with pytest.raises(FileNotFoundError, match="adapter is an adapter without weights"):
        load_classifier("adapter")


def test_without_peft_the_extra_is_named_in_a_sentence(base, cvt, monkeypatch):
    adapted(of_transformers()).save_pretrained("adapter")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    code, _, errors = cvt("convert", "adapter", "merged")
    sentence = "adapter is an adapter, which needs peft: pip install 'cvt-vision[train]'"
    assert (code, errors.splitlines()[-1]) == (1, f"Error: {sentence}")
