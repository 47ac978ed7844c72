import atexit
import os
import shutil
import signal
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network by accident
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cvt-tests-")  # not the user's graphs
os.environ["TRACKIO_DIR"] = os.path.join(os.environ["XDG_CACHE_HOME"], "trackio")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ["WANDB_SILENT"] = "true"

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # two fight over two cores as soon as anything else runs
torch.backends.cudnn.allow_tf32 = False  # a GPU's fp32 is compared with that of a CPU
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 30)}


def pytest_collection_modifyitems(items):
    """Without a GPU, `-m gpu` skips what it selects."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """An image folder of three classes, twelve images each, which differ in colour."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(12):
            noise = generator.normal(0, 40, (24 + i, 40, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A small classifier of the three colours, with random weights, and its preprocessing."""
    from cvt import CvtConfig, CvtForImageClassification, image_processor

    torch.manual_seed(0)
    config = CvtConfig(embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 1, 2])
    config.class_names = list(COLOURS)
    folder = tmp_path_factory.mktemp("model")
    CvtForImageClassification(config).save_pretrained(folder)
    image_processor(config, image_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(model_folder):
    """The small classifier, loaded."""
    from cvt.checkpoints import load_classifier

    return load_classifier(model_folder).eval()


@pytest.fixture(scope="module")
def processor(model_folder, classifier):
    """Its image processor."""
    from cvt.checkpoints import load_processor

    return load_processor(model_folder, classifier.config)


@pytest.fixture
def cvt(monkeypatch, capsys):
    """Runs the command line in this process; answers exit code, output and errors."""
    from cvt.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cvt", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def no_recompilation():
    """A test in which nothing may be compiled twice."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()
