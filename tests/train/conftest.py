import os

import pytest
from helpers.training_runs import without_pictures

from cvt import CvtConfig
from cvt.train import Recipe

os.environ["WANDB_MODE"] = "offline"  # not for notebooks, in which it prints a line


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing the pictures of a run takes longer than the run."""
    if "pictures" not in request.keywords:
        without_pictures(monkeypatch.setattr)


@pytest.fixture
def config_folder(tmp_path):
    """A folder with a configuration and no weights; dropout and drop path draw random numbers."""
    config = CvtConfig(
        embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 1, 2], drop_rate=[0.1, 0.1, 0.1],
        drop_path_rate=[0.0, 0.0, 0.3],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.fixture
def recipe(photos, config_folder):
    """A recipe for the photos, 30 to train on, with some settings changed."""

    def make(**changes):
        settings = {"data": str(photos), "model": str(config_folder), "epochs": 3, "lr": 3e-3,
                    "batch_size": 8, "image_size": 32}  # fmt: skip
        return Recipe(**{**settings, **changes})

    return make
