"""Features beside the logits, and of earlier stages, in every runtime and export."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers.small_models import images, make, mixed, one_block

import cvt
from cvt.export import export
from cvt.runtime import FeatureSettings, cache, open_runtime

# A class token in the first and the last of three stages.
SETTINGS = [(None, None), (3, "mean"), (1, None), (1, "mean"), (2, None)]
CASES = [(name, *each) for name in ("torch", "fused") for each in SETTINGS]
CASES += [
    (name, *each) for name in ("onnxruntime", "openvino") for each in ((None, None), (1, None))
]
CASES += [pytest.param("compiled", None, None, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def model():
    return make(mixed())


@torch.no_grad()
def expected(model, pixels, stage, pool):
    """The same from what transformers' interface of the model gives."""
    if stage == 1:
        block_output = model.cvt.encoder.stages[0](pixels, False)
        image, class_token, _ = block_output
        return class_token[:, 0] if pool is None else image.mean(dim=(2, 3))
    output = model.cvt(pixels, output_hidden_states=True)
    if stage == 2:
        return output.hidden_states[1].mean(dim=(2, 3))
    norm = model.layernorm
    tokens = output.last_hidden_state.flatten(2).transpose(1, 2)
    chosen = output.cls_token_value if pool is None else tokens
    return F.layer_norm(chosen, norm.weight.shape, norm.weight, norm.bias, norm.eps).mean(dim=1)


@pytest.mark.parametrize(("name", "stage", "pool"), CASES)
def test_every_runtime_gives_the_features_of_the_model(model, name, stage, pool):
    runtime = open_runtime(model, name, threads=1, features=FeatureSettings(stage, pool))
    pixels = images()
    found = runtime.run(pixels)
    wanted = expected(model, pixels, stage, pool)
    torch.testing.assert_close(found["features"], wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(runtime.features(pixels.numpy()), found["features"].numpy())
    if stage in (None, 3):
        with torch.no_grad():
            logits = model(pixels).logits
        torch.testing.assert_close(runtime(pixels), logits, rtol=0, atol=2e-5)
    else:
        assert runtime.outputs == ("features",)
        with pytest.raises(ValueError, match="features of an earlier stage alone"):
            runtime(pixels)


def test_later_stages_are_not_run(model):
    calls = []
    hook = model.cvt.encoder.stages[1].register_forward_hook(lambda *_: calls.append(1))
    open_runtime(model, "torch", features=FeatureSettings(1)).features(images())
    hook.remove()
    assert calls == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((4, None), "stage = 4: the model has the stages 1 to 3"),
        ((2, "cls"), "stage 2 of the model has no class token"),
        ((None, "max"), "pool = 'max': must be one of cls, mean"),
    ],
)
def test_features_that_a_model_does_not_have_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        open_runtime(model, "fused", features=FeatureSettings(*settings))
    with pytest.raises(ValueError, match="computes no features"):
        open_runtime(model, "fused").features(images())


@pytest.fixture
def folder(tmp_path):
    small = one_block()
    small.save_pretrained(tmp_path / "model")
    cvt.image_processor(small.config, 32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_graph_is_kept_for_the_features_that_it_gives(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")
    pixels = images(2, 32, 32)
    for features in (None, FeatureSettings(), FeatureSettings(pool="mean")):
        runtime = open_runtime(folder, "openvino", threads=1, features=features)
        assert len(runtime.run(pixels)) == (2 if features else 1)
        again = open_runtime(folder, "openvino", threads=1, features=features)
        assert again.run(pixels).keys() == runtime.run(pixels).keys()
    kept = sorted(entry.about.get("features", "") for entry in cache.entries())
    assert kept == ["", "stage 1, cls", "stage 1, mean"]


@pytest.mark.parametrize("to", ["onnx", "openvino", "torch-export"])
def test_an_export_gives_the_features_that_it_was_asked_for(folder, tmp_path, to):
    plain = export(folder, tmp_path / "plain", to)
    assert "outputs" not in json.loads((tmp_path / "plain" / "export.json").read_text())
    done = export(folder, tmp_path / "features", to, features=True)
    assert (plain.outputs, done.outputs) == (("logits",), ("logits", "features"))
    assert done.parity["features_difference"] < 1e-4
    pixels = images(3, 32, 32)
    found = open_runtime(tmp_path / "features").run(pixels)
    wanted = open_runtime(folder, "torch", features=FeatureSettings()).run(pixels)
    for name in ("logits", "features"):
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"plain is an export without features: .* --features"):
        open_runtime(tmp_path / "plain", features=FeatureSettings())
    with pytest.raises(ValueError, match="features of the last stage alone"):
        open_runtime(tmp_path / "features", features=FeatureSettings(pool="mean"))


def test_an_export_whose_features_are_wrong_is_not_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("cvt.export.parity.TOLERANCES", {"fp32": (1e-4, 1e-5)})
    monkeypatch.setattr(
        "cvt.runtime.exported_runtime.ExportedRuntime.features",
        lambda self, pixels: self.run(pixels)["features"] + 0.1,
    )
    monkeypatch.setattr("cvt.export.LoadedProgram", lambda path, runtime: runtime)
    with pytest.raises(ValueError, match=r"its features differ from the torch model.s by 0\.1"):
        export(folder, tmp_path / "out", "torch-export", features=True)
    assert not (tmp_path / "out").exists()
