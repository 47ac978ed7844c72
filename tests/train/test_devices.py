import os

import pytest
import torch
from helpers.training_runs import equal
from helpers.watcher import Watcher, final_state
from torch import nn

from cvt import CvtForImageClassification
from cvt.train import resume, setup, train, trainer
from cvt.train.trainer import Stopped, accelerator_on, isolated


def test_a_named_device_is_that_of_the_run(monkeypatch):
    """Of accelerate, with devices that this machine need not have."""
    monkeypatch.setattr(trainer, "check_device", lambda name: None)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: isolated())
    for name in ("cpu", "meta:3"):
        with isolated(), accelerator_on(name) as accelerator:
            assert accelerator.device == torch.device(name)
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device = cuda:1: each of several processes"):
        accelerator_on("cuda:1").__enter__()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(cvt, photos, tmp_path):
    words = ("train", photos, "--output", tmp_path / "run")
    for name in ("cuda:1", "gpu"):
        code, _, err = cvt(*words, "--device", name)
        assert code == 1
        assert err.startswith(f"Error: device = '{name}': ")
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_may_resume_on_another_device(recipe, tmp_path):
    train(recipe(), tmp_path / "whole")
    with pytest.raises(Stopped):
        train(recipe(), tmp_path / "stopped", Watcher(stop_after=4))
    resume(tmp_path / "stopped", {"device": "cpu"})
    equal(*(final_state(tmp_path / run) | {"recipe": {}} for run in ("whole", "stopped")))


def test_batchnorms_are_those_of_all_processes(recipe, classifier):
    settings = recipe(sync_batchnorm=True, gradient_checkpointing=True)
    pixels = torch.randn(4, 3, 32, 32)

    def prepared(world):
        model = CvtForImageClassification(classifier.config)
        model.load_state_dict(classifier.state_dict())
        return setup._prepared(model, settings, torch.device("cpu"), world)[0]

    def norms(model):
        return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    alone = prepared(1)
    assert all(type(norm) is nn.BatchNorm2d for norm in norms(alone))
    with pytest.raises(ValueError, match="sync_batchnorm: PyTorch has it on GPUs only"):
        prepared(2)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(prepared(1))  # as for a GPU
    assert all(type(norm) is nn.SyncBatchNorm for norm in norms(shared))
    assert shared.state_dict().keys() == alone.state_dict().keys()
    for model in (alone, shared):
        model.train()
        torch.manual_seed(0)
        model(pixels).logits.square().sum().backward()
    for one, other in zip(alone.parameters(), shared.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    equal(alone.state_dict(), shared.state_dict())  # a batch counts once, recomputed or not


def test_a_gpu_has_synchronised_batchnorms(recipe, classifier, monkeypatch):
    model = CvtForImageClassification(classifier.config)
    monkeypatch.setattr(type(model), "to", lambda self, *_, **__: self)  # there is no GPU
    model, _ = setup._prepared(model, recipe(sync_batchnorm=True), torch.device("cuda"), 2)
    assert not any(type(module) is nn.BatchNorm2d for module in model.modules())
    assert any(type(module) is nn.SyncBatchNorm for module in model.modules())
