"""The batch size that fits into memory, by counting: `batch_size: auto`."""

import copy
import os
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch._subclasses import FakeTensorMode
from transformers import initialization

from cvt.checkpoints import load_config, model_source
from cvt.configuration import CvtConfig
from cvt.modeling import CvtForImageClassification
from cvt.profile import profile, step_peak
from cvt.train.memory import free_memory
from cvt.train.models import DTYPES, as_trained, changed_config, regularised, set_training
from cvt.train.optim import optimizer_for
from cvt.train.recipe import Recipe

SHARE = 0.6  # of the free memory; kernels, allocators and libraries take some that is not counted
STEPS = 10  # that an epoch has at least: fewer would hardly train


def chosen_batch_size(
    recipe: Recipe,
    classes: list[str],
    images: int,
    accelerator: Accelerator,
) -> tuple[int, str]:
    """The largest power of two that fits into memory by count, of all processes the least.

    An epoch keeps `STEPS` steps, and a step has at most `lr_base_size` images, for which the
    learning rate is given.

    Args:
        recipe: of the run; its precision is settled.
        classes: of the run.
        images: in an epoch.
        accelerator: the processes and their device.

    Returns:
        The batch size, and how it was chosen, in a sentence.

    Raises:
        ValueError: not even two images fit.
    """
    config = changed_config(load_config(model_source(recipe.model)), recipe)
    config.class_names = classes
    batches = recipe.accumulate * accelerator.num_processes
    largest = max(2, min(recipe.lr_base_size, images // STEPS) // batches)
    size = 1 << (largest.bit_length() - 1)
    free = free_memory(accelerator.device)
    if accelerator.device.type == "cpu":  # which the processes of a machine share
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    while (counted := step_bytes(recipe, config, size, accelerator.device)) > SHARE * free:
        if size == 2:
            raise ValueError(
                f"batch_size = auto: a step of 2 images takes {counted / 2**30:.2f} GiB by count, "
                f"more than {SHARE:.0%} of the {free / 2**30:.2f} GiB that are free; try a smaller "
                "image_size or gradient_checkpointing"
            )
        size //= 2
    size = min(gather_object([size]))
    return size, (
        f"batch_size = {size}: a step takes {counted / 2**30:.2f} GiB by count, and "
        f"{free / 2**30:.1f} GiB are free; at most {SHARE:.0%} of them, {recipe.lr_base_size} "
        f"images a step and a tenth of an epoch are taken"
    )


def step_bytes(recipe: Recipe, config: CvtConfig, size: int, device: torch.device) -> int:
    """The memory of a step with a batch of so many images, counted as `cvt.profile` does.

    Args:
        recipe: of the run.
        config: of the classifier.
        size: of the batch.
        device: of the run. Operators are counted as a CPU runs them, in any case.
    """
    side = recipe.image_size
    # Adapters cannot be put on what has no values, and muon reads values: what takes more counts.
    optimizer = "adamw" if recipe.optimizer == "muon" else recipe.optimizer
    recipe = replace(recipe, triton=False, lora_r=0, optimizer=optimizer)
    with FakeTensorMode():
        with initialization.no_init_weights():
            model = CvtForImageClassification._from_config(copy.deepcopy(config))
            model = regularised(model, recipe)
        trained = as_trained(model, recipe, device)
        set_training(trained, recipe)
        pixels = torch.empty(size, config.num_channels, side, side)
        weights = trained.state_dict().values() if recipe.ema_decay else ()
        average = [torch.empty_like(weight) for weight in weights]
        of_run = optimizer_for(trained, recipe, lr=1e-3)
        counted = step_peak(trained, of_run, pixels, DTYPES[recipe.precision], average)
    if recipe.teacher:
        counted += profile(load_config(model_source(recipe.teacher)), side, size).inference_bytes
    return counted
