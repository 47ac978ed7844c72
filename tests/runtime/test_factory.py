"""Which runtime and device `auto` takes, and what can be opened."""

import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import cvt
from cvt.runtime import factory, open_runtime
from cvt.runtime.factory import MANY_IMAGES, check_device, fastest, has_cuda


@pytest.mark.parametrize(
    ("asked", "expected", "reason"),
    [
        ({}, "fused", "an unknown number of images; conversion saves"),
        ({"images": 1}, "fused", f"1 images; conversion saves time from {MANY_IMAGES} on"),
        ({"images": MANY_IMAGES}, "openvino", "conversion saves time"),
        ({"images": 1, "is_converted": True}, "openvino", "was converted earlier"),
        ({"is_converted": True}, "openvino", "was converted earlier"),
        ({"images": MANY_IMAGES, "precision": "fp16"}, "fused", "fastest on cpu in fp16"),
        ({"images": MANY_IMAGES, "device": "cuda"}, "fused", "fastest on cuda in fp32"),
        ({"images": MANY_IMAGES, "precision": "bf16"}, "fused", "does not compute in bf16"),
    ],
    ids=str,
)
def test_auto_takes_what_is_through_first_and_logs_why(
    asked, expected, reason, monkeypatch, caplog
):
    monkeypatch.setattr(factory, "available", lambda runtime: True)
    monkeypatch.setattr(factory, "computes", lambda precision: precision == "fp32")
    caplog.set_level(logging.INFO, "cvt")
    assert fastest(**{"device": "cpu", "precision": "fp32", **asked}) == expected
    assert f"runtime auto takes {expected}: " in caplog.text
    assert reason in caplog.text


def test_without_openvino_auto_is_fused(monkeypatch):
    monkeypatch.setattr(factory, "available", lambda runtime: False)
    assert fastest("cpu", "fp32", MANY_IMAGES) == "fused"


def test_pytorch_is_not_asked_for_a_gpu_where_no_driver_is(monkeypatch):
    def fail(*names):
        raise AssertionError("PyTorch is not to be looked for")

    monkeypatch.setattr(factory, "is_installed", fail)
    monkeypatch.setattr(factory.sys, "platform", "linux")
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert not has_cuda()
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl")
    with pytest.raises(AssertionError, match="looked for"):
        has_cuda()


def test_a_device_that_is_none_is_named():
    check_device("auto")
    check_device("cpu")
    with pytest.raises(ValueError, match="device = 'abacus': "):
        check_device("abacus")
    with pytest.raises(TypeError, match="device is of type int"):
        check_device(0)


@pytest.mark.parametrize("runtime", ["auto", "torch", "openvino"])
@pytest.mark.parametrize("model", [5, None, torch.nn.Linear(2, 2)], ids=["number", "none", "layer"])
def test_what_is_no_model_is_a_type_error(model, runtime):
    with pytest.raises(TypeError):
        open_runtime(model, runtime)
    with pytest.raises(TypeError):
        cvt.Classifier(model, runtime, processor=cvt.image_processor("cvt-13"))


def test_a_folder_without_preprocessing_warns_once(model_folder, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "preprocessor_config.json").unlink()
    cvt.Classifier(folder)
    assert len([line for line in caplog.messages if "preprocessing is assumed" in line]) == 1


def test_a_model_that_cannot_be_converted_is_reported_when_it_is_opened(model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "checksums.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"layernorm\.bias"):
        open_runtime(folder, "openvino")
