"""Exports for ONNX Runtime and OpenVINO need neither PyTorch nor transformers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.pictures import encoded, photo
from helpers.small_models import one_block

import cvt
from cvt.export import export

ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}
HEAVY = ("torch", "torchvision", "transformers", "safetensors", "huggingface_hub", "rich", "yaml")
PROGRAM = """
import sys
for name in {heavy}:
    sys.modules[name] = None  # what Python takes for missing
import {engine}  # and what it imports itself
before = set(sys.modules)
{body}
new = {{name.partition(".")[0] for name in sys.modules.keys() - before if sys.modules[name]}}
import json
from importlib.metadata import packages_distributions
print(json.dumps(sorted(new & packages_distributions().keys())))
"""
CLASSIFIER = """
import cvt
classifier = cvt.Classifier({model!r})
print(classifier([{picture!r}, {picture!r}], top_k=2))
print(list(classifier.stream({folder!r}, batch_size=1)))
"""
COMMAND = """
from cvt.cli import main
sys.argv = ["cvt", "predict", {model!r}, {folder!r}, "--json", "--batch-size", "1"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    place = tmp_path_factory.mktemp("exports")
    model = one_block()
    model.save_pretrained(place / "model")
    cvt.image_processor(model.config, 32).save_pretrained(place / "model")
    for to in ("onnx", "openvino"):
        export(place / "model", place / to, to)
    (place / "photos").mkdir()
    for i in range(3):
        (place / "photos" / f"{i}.jpg").write_bytes(encoded(photo(60, 80, seed=i), "JPEG"))
    return place


@pytest.mark.parametrize("body", [CLASSIFIER, COMMAND], ids=["Classifier", "cvt predict"])
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_only_numpy_pillow_and_the_engine_are_imported(exports, to, body):
    where = {
        "model": str(exports / to),
        "folder": str(exports / "photos"),
        "picture": str(exports / "photos" / "0.jpg"),
    }
    engine = ENGINES[to]
    program = PROGRAM.format(heavy=HEAVY, engine=engine, body=body.format(**where))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) <= {"cvt", "numpy", "PIL", "click", engine}


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_the_configuration_of_an_export_is_the_models(exports, to):
    config, full = (
        cvt.Classifier(exports / to).runtime.config,
        cvt.CvtConfig.from_pretrained(exports / to),
    )
    for name in ("class_names", "label2id", "num_labels", "problem_type", "minimum_image_size"):
        assert getattr(config, name) == getattr(full, name), name
    assert config.stages == full.stages
    assert config.parameters == full.parameters
    assert config.layer_norm_eps == full.layer_norm_eps


def test_arrays_and_tensors_get_the_same_logits(exports):
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    for name in ("onnx", "openvino", "model"):
        runtime = cvt.Classifier(exports / name).runtime
        logits = runtime(pixels)
        assert logits.dtype == np.float32
        tensor = runtime(torch.from_numpy(pixels))
        assert isinstance(tensor, torch.Tensor)
        np.testing.assert_array_equal(tensor.numpy(), logits)


def test_another_image_processor_asks_for_transformers(exports, monkeypatch):
    folder = exports / "other"
    folder.mkdir()
    for file in (exports / "onnx").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("cvt.libraries.is_installed", lambda *names: "transformers" not in names)
    with pytest.raises(ImportError, match=r"ViTImageProcessor' needs transformers: pip install"):
        cvt.Classifier(folder, verify=False)
