"""The weights of a plain folder, and the fused form that is built of them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.small_models import make, tiny
from safetensors.torch import load_file, save_file

import cvt
from cvt.checkpoints import model_source
from cvt.checkpoints.plain import read_plain, shapes
from cvt.files import write_checksums
from cvt.runtime import open_runtime


def saved(tmp_path, **changes):
    model = make(tiny(**changes)).eval()
    model.save_pretrained(tmp_path)
    cvt.image_processor(model.config, 40).save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_act": "gelu"},
        {"qkv_projection_method": ["avg", "linear", "dw_bn"], "stride_kv": [2, 1, 2]},
        {"cls_token": [False, False, False]},
        {"position_embedding": ["learned", "none", "learned"], "image_size": 40},
        {"qkv_bias": [False, True, False], "num_labels": 1},
    ],
    ids=str,
)
def test_the_fused_form_is_that_of_the_model(tmp_path, changes):
    model = saved(tmp_path, **changes)
    config, _ = read_plain(model_source(tmp_path))
    assert dict(shapes(config)) == {
        name: tuple(w.shape) for name, w in model.state_dict().items() if w.is_floating_point()
    }
    pixels = np.random.default_rng(0).standard_normal((2, 3, 40, 40)).astype(np.float32)
    found = open_runtime(str(tmp_path), "fused", threads=1)
    expected = open_runtime(model, "fused", threads=1)
    np.testing.assert_array_equal(found(pixels), expected(pixels))
    assert found.config.class_names == model.config.class_names


def test_transformers_is_not_imported_for_it(tmp_path):
    saved(tmp_path)
    program = (
        "import sys; from cvt.runtime import open_runtime; "
        f"open_runtime({str(tmp_path)!r}, 'fused'); print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    (folder / "checksums.json").unlink(missing_ok=True)


def change_config(folder, **changes):
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({n: value for n, value in fields.items() if value is not None}))
    (folder / "checksums.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: change_weights(folder, lambda w: w.pop("layernorm.bias")),
        lambda folder: change_weights(folder, lambda w: w.update(more=torch.zeros(1))),
        lambda folder: change_weights(
            folder, lambda w: w.update({"layernorm.bias": w["layernorm.bias"].half()})
        ),
        lambda folder: change_config(folder, dtype="float16"),
        lambda folder: change_config(folder, model_type="vit"),
        lambda folder: change_config(folder, depth=[1, 1, 3]),
        lambda folder: change_config(folder, model_type=None),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 99),
    ],
    ids=["missing", "more", "mixed", "dtype", "type", "depth", "no type", "no config", "bin", "no"],
)
def test_what_is_unusual_is_left_to_the_loader(tmp_path, change):
    saved(tmp_path)
    assert read_plain(model_source(tmp_path))
    change(tmp_path)
    assert read_plain(model_source(tmp_path), verify=False) is None


def test_a_damaged_folder_is_reported(tmp_path):
    saved(tmp_path)
    write_checksums(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        read_plain(model_source(tmp_path))
