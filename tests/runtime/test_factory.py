"""Which runtime and device `auto` takes."""

import logging
import os

import pytest

from cvt.runtime import factory
from cvt.runtime.factory import MANY, check_device, fastest, has_cuda


@pytest.mark.parametrize(
    ("asked", "expected", "reason"),
    [
        ({}, "fused", "an unknown number of images do not earn"),
        ({"images": 1}, "fused", f"1 images do not earn a conversion; {MANY} would"),
        ({"images": MANY}, "openvino", "earn the conversion"),
        ({"images": 1, "is_converted": True}, "openvino", "was converted earlier"),
        ({"is_converted": True}, "openvino", "was converted earlier"),
        ({"images": MANY, "precision": "fp16"}, "fused", "fastest on cpu in fp16"),
        ({"images": MANY, "device": "cuda"}, "fused", "fastest on cuda in fp32"),
        ({"images": MANY, "precision": "bf16"}, "fused", "does not compute in bf16"),
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
    assert fastest("cpu", "fp32", MANY) == "fused"


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
