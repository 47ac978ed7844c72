"""The models inside transformers, accelerate and PEFT: loading, training, serving, adapting."""

import ast
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import ConvNextImageProcessor, Trainer, TrainingArguments, pipeline

import cvt
from cvt import CvtBackbone, CvtConfig, CvtForImageClassification, CvtModel, hub

CLASSES = 4
PUBLIC = {
    "CvtConfig",
    "CvtModel",
    "CvtForImageClassification",
    "CvtBackbone",
    "image_processor",
    "register_auto_classes",
    "checkpoints",
}


def tiny(method="dw_bn", **fields):
    defaults = {
        "embed_dim": [8, 16],
        "num_heads": [1, 2],
        "depth": [1, 2],
        "cls_token": [False, True],
        "drop_path_rate": [0, 0],
        "qkv_projection_method": [method] * 2,
        "num_labels": CLASSES,
    }
    two = {
        name: list(getattr(CvtConfig(), name)[:2])
        for name in (
            *("patch_sizes", "patch_stride", "patch_padding", "mlp_ratio", "qkv_bias"),
            *("attention_drop_rate", "drop_rate", "kernel_qkv"),
            *("padding_kv", "stride_kv", "padding_q", "stride_q"),
        )
    }
    return CvtConfig(**{**two, **defaults, **fields})


def make(config):
    torch.manual_seed(0)
    model = CvtForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def model():
    return make(tiny())


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def images(batch=4):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def python(code, *arguments):
    """What a fresh interpreter prints last, read as JSON."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------ importing


def test_importing_cvt_loads_no_framework():
    code = """
import json, sys
import cvt
dir(cvt), cvt.__version__
heavy = {"torch", "transformers", "keras", "tensorflow", "numpy", "PIL"}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""
    assert python(code) == []


def test_public_names_are_listed_and_load():
    assert set(dir(cvt)) >= PUBLIC
    assert set(cvt.__all__) >= PUBLIC
    for name in PUBLIC:
        assert getattr(cvt, name).__name__.split(".")[-1] == name


@pytest.mark.parametrize("package", [cvt, cvt.checkpoints])
def test_the_names_for_type_checkers_are_those_that_load(package):
    """`make lint` checks their types in tests/static."""
    imported = {}
    for node in ast.walk(ast.parse(Path(package.__file__).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("cvt"):
            for alias in node.names:
                assert alias.asname == alias.name  # else it is private to type checkers
                imported[alias.name] = node.module
    homes = {name: f"{package.__name__}.{home}" for name, home in package._HOME.items()}
    modules = dict.fromkeys(getattr(package, "_MODULES", ()), "cvt")
    assert imported == homes | modules


def test_unknown_names_fail_as_names_do():
    with pytest.raises(ImportError, match="cannot import name 'nonsense' from 'cvt'"):
        from cvt import nonsense  # noqa: F401
    with pytest.raises(AttributeError, match="module 'cvt' has no attribute 'nonsense'"):
        cvt.nonsense  # noqa: B018


def test_auto_classes_give_ours_only_after_registration(model, folder, tmp_path):
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    model.save_pretrained(tmp_path / "coded", with_code=True)
    for path in (tmp_path / "coded").glob("*.py"):
        path.write_text("raise SystemExit('the code of the folder ran')")
    code = """
import json, sys
import cvt
from transformers import (
    AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
    pipeline,
)
folder = sys.argv[1]
ours = cvt.CvtForImageClassification.from_pretrained(folder)

def given():
    config = AutoConfig.from_pretrained(folder)
    found = [
        config,
        AutoModel.from_pretrained(folder),
        AutoModelForImageClassification.from_pretrained(folder),
        pipeline("image-classification", model=folder, device="cpu").model,
    ]
    return [f"{type(each).__module__.split('.')[0]}.{type(each).__name__}" for each in found]

before = given()
cvt.register_auto_classes()
cvt.register_auto_classes()
after = given()
# AutoBackbone.from_pretrained asks the hub for its argument, so a folder goes through its config.
config = AutoConfig.from_pretrained(folder, out_features=["stage1"])
backbone = AutoBackbone.from_config(config)
processor = AutoImageProcessor.from_pretrained(folder)
coded = AutoModelForImageClassification.from_pretrained(sys.argv[2], trust_remote_code=True)
modules = [type(coded).__module__, type(backbone).__module__]
size = processor.size["shortest_edge"]
print(json.dumps([before, after, *modules, backbone.channels, type(processor).__name__, size]))
"""
    before, after, *rest = python(code, folder, tmp_path / "coded")
    names = ["CvtConfig", "CvtModel", *["CvtForImageClassification"] * 2]
    assert before == [f"transformers.{name}" for name in names]
    assert after == [f"cvt.{name}" for name in names]
    assert rest == ["cvt.modeling", "cvt.backbone", [8], "ConvNextImageProcessor", 32]


# ------------------------------------------------------------------------------ training, serving


def separable(count=24):
    """Images whose brightness tells their class."""
    labels = torch.arange(count) % CLASSES
    noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = 0.1 * noise + labels.view(-1, 1, 1, 1) - 1.5
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]


def trainer(output, data):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=6,
        eval_strategy="steps",
        eval_steps=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = CvtForImageClassification(tiny())
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data)


def test_trainer_trains_saves_and_resumes(tmp_path):
    data = separable()
    whole = trainer(tmp_path, data)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    scores = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert scores[1] < scores[0]
    assert whole.predict(data).predictions.shape == (24, CLASSES)

    resumed = trainer(tmp_path, data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == 12
    close(resumed.model.state_dict(), whole.model.state_dict())
    loaded = CvtForImageClassification.from_pretrained(tmp_path / "checkpoint-12")
    close(loaded.state_dict(), whole.model.state_dict())


def test_pipeline_serves_pictures():
    model = make(tiny(id2label={0: "ant", 1: "bee", 2: "cat", 3: "dog"}))
    processor = ConvNextImageProcessor(size={"shortest_edge": 32})
    noise = np.random.default_rng(0).integers(0, 256, (2, 50, 40, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in noise]
    serve = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    for picture, answers in zip(pictures, serve(pictures, top_k=4, batch_size=2), strict=True):
        logits = model(**processor(picture, return_tensors="pt")).logits[0]
        probabilities = dict(zip(("ant", "bee", "cat", "dog"), logits.softmax(0), strict=True))
        ranked = sorted(probabilities, key=probabilities.get, reverse=True)
        assert [answer["label"] for answer in answers] == ranked
        for answer in answers:
            assert answer["score"] == pytest.approx(probabilities[answer["label"]].item(), abs=1e-5)


# Training moves BatchNorm's statistics, so an adapter of a model with them must hold them.
@pytest.mark.parametrize(
    ("method", "modules_to_save", "checkpointing"),
    [
        ("linear", ["classifier"], False),
        ("dw_bn", ["classifier", "convolution_projection.normalization"], False),
        ("dw_bn", ["classifier", "convolution_projection.normalization"], True),
    ],
)
def test_peft_adapts_saves_reloads_and_merges(tmp_path, method, modules_to_save, checkpointing):
    folder, adapter_folder = tmp_path / "model", tmp_path / "adapter"
    make(tiny(method)).save_pretrained(folder)

    def base():
        return CvtForImageClassification.from_pretrained(folder)

    plain = base()(images()).logits
    targets = ["projection_query", "projection_value"]
    lora = LoraConfig(r=2, target_modules=targets, modules_to_save=modules_to_save)
    adapted = get_peft_model(base(), lora).train()
    if checkpointing:
        adapted.base_model.model.activation_checkpointing_enable()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for _ in range(2):  # LoRA's first matrix gets a gradient only when the second is not zero
        optimizer.zero_grad()
        adapted(pixel_values=images(), labels=torch.arange(4)).loss.backward()
        optimizer.step()
    adapters = [p for name, p in trained.items() if "lora_" in name]
    assert len(adapters) == 3 * 2 * 2  # blocks, targets, matrices
    assert all(p.grad.abs().max() > 0 for p in adapters)

    expected = adapted.eval()(pixel_values=images()).logits
    assert (expected - plain).abs().max() > 0.01
    adapted.save_pretrained(adapter_folder)
    reloaded = PeftModel.from_pretrained(base(), adapter_folder)
    close(reloaded(pixel_values=images()).logits, expected)
    close(CvtForImageClassification.from_pretrained(adapter_folder)(images()).logits, expected)
    merged = reloaded.merge_and_unload()
    assert type(merged) is CvtForImageClassification
    merged.save_pretrained(tmp_path / "merged")
    for each in (merged, CvtForImageClassification.from_pretrained(tmp_path / "merged")):
        close(each(images()).logits, expected)


# ------------------------------------------------------------------------------ folders


def test_sharded_folders_load(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = list(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    loaded = CvtForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()).logits, model(images()).logits)


def test_a_saved_file_holds_every_tensor_and_its_format(model, folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(model.state_dict())


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps_load(model, folder, device_map):
    loaded = CvtForImageClassification.from_pretrained(folder, device_map=device_map)
    logits = loaded(images().to(loaded.device)).logits
    close(logits.cpu(), model(images()).logits, atol=1e-4)


@pytest.mark.parametrize("share", [0.6, 0.8])
def test_a_model_larger_than_memory_is_split_between_blocks(model, folder, tmp_path, share):
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    loaded = CvtForImageClassification.from_pretrained(
        folder,
        device_map="auto",
        max_memory={"cpu": int(share * size)},
        offload_folder=tmp_path / "offload",
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert not any("attention" in part for part in loaded.hf_device_map)
    assert torch.equal(loaded(images()).logits, model(images()).logits)


def test_weights_load_in_half_precision(model, folder):
    loaded = CvtForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    close(loaded(images()).logits.float(), model(images()).logits, atol=0.1)
    again = CvtForImageClassification.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(again(images()).logits, model(images()).logits)


# ------------------------------------------------------------------------------ strict loading

EMBEDDING = "cvt.encoder.stages.0.embedding.convolution_embeddings.projection.weight"
MEAN = (
    "cvt.encoder.stages.1.layers.0.attention.attention.convolution_projection_key."
    "convolution_projection.normalization.running_mean"
)


def rewrite(folder, **changes):
    """Put tensors into the folder's weights; None takes one out."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("asked", [{}, {"num_labels": 9}])
def test_every_fault_of_the_weights_is_listed_at_once(folder, asked):
    changes = {MEAN: None, "layernorm.bias": None, "alien": torch.zeros(1)}
    rewrite(folder, **changes, **{EMBEDDING: torch.zeros(8, 1, 7, 7)})
    with pytest.raises(ValueError, match="do not fit CvtForImageClassification") as error:
        CvtForImageClassification.from_pretrained(folder, **asked)
    assert str(folder) in str(error.value)
    assert str(error.value).splitlines()[1:] == [
        f"  missing {MEAN}",
        "  missing layernorm.bias",
        "  unexpected alien",
        f"  {EMBEDDING} is (8, 1, 7, 7), expected (8, 3, 7, 7)",
    ]


@pytest.mark.parametrize("cls", [CvtModel, CvtBackbone])
def test_models_without_a_head_are_as_strict(folder, cls):
    rewrite(folder, **{MEAN: None, "alien": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"do not fit {cls.__name__}") as error:
        cls.from_pretrained(folder)
    faults = str(error.value).splitlines()[1:]
    assert faults == [f"  missing {MEAN.removeprefix('cvt.')}", "  unexpected alien"]


@pytest.mark.parametrize(
    "asked",
    [{"num_labels": 7}, {"id2label": {i: str(i) for i in range(7)}}],
    ids=["num_labels", "id2label"],
)
def test_another_number_of_classes_gives_a_new_head_and_a_warning(model, folder, asked, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = CvtForImageClassification.from_pretrained(folder, **asked)
    assert f"New classifier of 7 classes: {folder}" in caplog.text
    assert loaded.classifier.weight.shape == (7, 16)
    assert loaded.num_labels == loaded.config.num_labels == 7
    expected, found = model.state_dict(), loaded.state_dict()
    for name in expected.keys() - {"classifier.weight", "classifier.bias"}:
        assert torch.equal(found[name], expected[name]), name
    assert found["classifier.weight"].std() < 0.04  # as initialised


def test_the_same_number_of_classes_keeps_the_head(model, folder, caplog):
    loaded = CvtForImageClassification.from_pretrained(folder, num_labels=CLASSES)
    assert "New classifier" not in caplog.text
    assert torch.equal(loaded(images()).logits, model(images()).logits)


def test_a_head_of_the_wrong_size_is_an_error_unless_asked_for(folder):
    rewrite(folder, **{"classifier.weight": torch.zeros(9, 16), "classifier.bias": torch.zeros(9)})
    with pytest.raises(ValueError, match="num_labels") as error:
        CvtForImageClassification.from_pretrained(folder)
    assert str(error.value).splitlines()[1:] == [
        f"  classifier.bias is (9,), expected ({CLASSES},)",
        f"  classifier.weight is (9, 16), expected ({CLASSES}, 16)",
    ]


def test_callers_may_judge_for_themselves(folder):
    rewrite(folder, **{"layernorm.bias": None, "classifier.bias": torch.zeros(9)})
    lenient = {"ignore_mismatched_sizes": True}
    loaded = CvtForImageClassification.from_pretrained(folder, **lenient)
    assert loaded.classifier.bias.shape == (CLASSES,)
    loaded, report = CvtForImageClassification.from_pretrained(
        folder, **lenient, output_loading_info=True
    )
    assert isinstance(loaded, CvtForImageClassification)
    assert set(report["missing_keys"]) == {"layernorm.bias"}
    assert [name for name, *_ in report["mismatched_keys"]] == ["classifier.bias"]


@pytest.mark.parametrize("cls", [CvtModel, CvtBackbone])
def test_a_classifiers_folder_serves_models_without_a_head(model, folder, cls, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = cls.from_pretrained(folder)
    assert caplog.text == ""
    close(loaded.state_dict(), model.cvt.state_dict(), atol=0)


@pytest.mark.parametrize("cls", [CvtModel, CvtBackbone])
def test_a_folder_without_a_head_gives_a_classifier_only_when_asked(
    model, folder, tmp_path, cls, caplog
):
    cls.from_pretrained(folder).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="num_labels") as error:
        CvtForImageClassification.from_pretrained(tmp_path / "base")
    head = ["classifier.bias", "classifier.weight", "layernorm.bias", "layernorm.weight"]
    assert str(error.value).splitlines()[1:] == [f"  missing {name}" for name in head]
    with caplog.at_level(logging.WARNING):
        loaded = CvtForImageClassification.from_pretrained(tmp_path / "base", num_labels=7)
    assert "New classifier of 7 classes" in caplog.text
    assert loaded.classifier.weight.shape == (7, 16)
    assert torch.equal(loaded.layernorm.weight, torch.ones(16))
    close(loaded.cvt.state_dict(), model.cvt.state_dict(), atol=0)


# ------------------------------------------------------------------------------ published names


def test_published_checkpoints_are_known_by_two_names_and_no_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cvt-13", "microsoft/cvt-13"):
        assert hub.published(name).hub_id == "microsoft/cvt-13"
    for name in ("cvt-1313", "someone/cvt-13", tmp_path):
        assert hub.published(name) is None


def test_a_folder_wins_over_a_published_name(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("cvt-13")
    assert hub.published("cvt-13") is None
    loaded = CvtForImageClassification.from_pretrained("cvt-13")
    assert loaded.config.hidden_act == "gelu"
    assert torch.equal(loaded(images()).logits, model(images()).logits)


def test_a_published_name_out_of_reach_names_what_to_do(tmp_path):
    with pytest.raises(OSError, match="hf download microsoft/cvt-13"):
        CvtForImageClassification.from_pretrained("cvt-13", cache_dir=tmp_path)
