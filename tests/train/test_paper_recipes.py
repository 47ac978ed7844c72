"""The packaged recipes of the paper run on data in the layout of each set, and resume exactly."""

import pytest
from helpers.data_sets import (
    write_cifar,
    write_flowers,
    write_imagenet,
    write_imagenet_22k,
    write_pets,
)
from helpers.small_models import make, tiny
from safetensors.torch import load_file

from cvt import CvtConfig, image_processor
from cvt.checkpoints import load_config
from cvt.train import Callback, load_recipe, resume, train
from cvt.train.recipe import packaged_recipes

OURS = ("digits", "few-pictures", "photos")
WRITERS = {"cifar": write_cifar, "pets": write_pets, "flowers": write_flowers}
OFTEN = ("ablations/patches-positions", "finetune-cifar", "finetune-pets", "finetune-flowers")
NAMES = [
    pytest.param(name, marks=[] if name in OFTEN or "-imagenet" in name else pytest.mark.slow)
    for name in packaged_recipes()
    if name not in OURS
]
# Three steps an epoch of ImageNet's, one of Pets' and Flowers': the run crosses the end of one.
SMALL = {
    "image_size": 32, "batch_size": 4, "accumulate": 1, "steps": 4, "lr": 1e-3, "warmup_epochs": 0,
    "workers": 0, "precision": "fp32", "device": "cpu", "track": None,
}  # fmt: skip


class StoppedError(Exception):
    pass


class After(Callback):
    """Fails after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, run):
        if run.step == self.step:
            raise StoppedError


def small_recipe(name, tmp_path):
    """A packaged recipe with a tiny model, on a few images in the layout of its data set."""
    changes = dict(SMALL)
    kind = name.partition("-")[2]
    if kind in WRITERS:
        changes["data"] = WRITERS[kind](tmp_path / kind)
    elif name == "pretrain-imagenet-22k":
        changes["data"] = write_imagenet_22k(tmp_path / "22k")
        changes["val_data"] = write_imagenet(tmp_path / "1k") / "val"
        names = sorted(path.name for path in changes["data"].iterdir())
        (tmp_path / "classes.txt").write_text("\n".join(names))
        changes["classes"] = tmp_path / "classes.txt"
    else:
        changes["data"] = write_imagenet(tmp_path / "1k")
    changes["model"] = tmp_path / "model"
    if name.startswith("finetune"):
        model = make(tiny(num_labels=7, hidden_act="quick_gelu", depth=[1, 1, 1]))
        model.save_pretrained(tmp_path / "model")
        image_processor(model.config, 32).save_pretrained(tmp_path / "model")
    else:
        tiny(depth=[1, 1, 1]).save_pretrained(tmp_path / "model")
    return load_recipe(name, changes)


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_runs_and_resumes(tmp_path, name):
    recipe = small_recipe(name, tmp_path)
    train(recipe, tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(recipe, tmp_path / "stopped", callbacks=[After(2)])
    resume(tmp_path / "stopped")
    whole, resumed = (
        load_file(tmp_path / run / "last" / "model.safetensors") for run in ("whole", "stopped")
    )
    assert whole.keys() == resumed.keys()
    assert all((whole[key] == resumed[key]).all() for key in whole)
    results = [(tmp_path / run / "results.csv").read_text() for run in ("whole", "stopped")]
    assert results[0] == results[1]
    config = load_config(tmp_path / "whole" / "last")
    changes = recipe.config_changes(3)
    assert {key: getattr(config, key) for key in changes} == {
        key: [*value] for key, value in changes.items()
    }
    assert config.image_size == (32 if "position_embedding" in changes else None)


def test_the_ablations_differ_from_the_papers_recipe_in_the_architecture_alone():
    base = load_recipe("cvt-13-224x224")
    names = [name for name in packaged_recipes() if name.startswith("ablations/")]
    assert len(names) == 9
    for name in names:
        recipe = load_recipe(name)
        assert recipe.architecture
        assert load_recipe(name, {"architecture": None}) == base
        CvtConfig.from_variant("cvt-13", image_size=224, **recipe.config_changes(3))


@pytest.mark.parametrize("name", ["imagenet", "cifar", "pets", "flowers"])
def test_the_papers_transfer_is_sgd_for_so_many_steps(name):
    recipe = load_recipe(f"finetune-{name}")
    steps = {"imagenet": 20_000, "cifar": 10_000}.get(name, 500)
    assert (recipe.optimizer, recipe.momentum, recipe.steps) == ("sgd", 0.9, steps)
    assert (recipe.batch_size * recipe.accumulate * 8, recipe.image_size) == (512, 384)
