"""What a run gives its model: sheets of training views and of validation images."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cvt.checkpoints import load_config, model_source
from cvt.data import Images, StoredImage
from cvt.data.decoding import ImageError
from cvt.data.preprocessing import normalisation, preprocessing_of
from cvt.files import staged
from cvt.inference.predict import reader
from cvt.inference.report import Cell, plot_sheet, short
from cvt.problem_type import MULTI_LABEL, REGRESSION
from cvt.train.augmentation import augmentation, mixing
from cvt.train.loader import batches, seed_all
from cvt.train.models import changed_config, processor_for
from cvt.train.plan import Plan
from cvt.train.recipe import Recipe
from cvt.train.setup import images_per_epoch, splits_for

WIDTH = 18  # characters above an image
SHOWN_SHARE = 0.05  # of a mixed target, below which a class is not named


def show(recipe: Recipe, output: str | Path, images: int = 30, overwrite: bool = False) -> int:
    """Draw what a run with a recipe would give its model: no model is loaded, nothing is trained.

    `training.png` has the views of the first steps, augmented and mixed, with their labels;
    `validation.png` has images of the validation split as the model gets them.

    Args:
        recipe: of the run.
        output: a folder for both sheets.
        images: on a sheet, at most.
        overwrite: whether a folder that is there already may be replaced.

    Returns:
        How many of the images could not be read; they are left out.

    Raises:
        FileExistsError: `output` exists already.
        OSError: there is no such data or model.
        ValueError: the data or the recipe cannot be used, or no image can be read.

    Example:
        >>> from pathlib import Path
        >>> from cvt.train import load_recipe
        >>> from cvt.train.show import show
        >>> show(load_recipe("digits", {"workers": 0}), "views")
        0
        >>> sorted(path.name for path in Path("views").iterdir())
        ['training.png', 'validation.png']
    """
    with staged(output, overwrite) as folder:
        splits = splits_for(recipe)
        source = model_source(recipe.model)
        config = changed_config(load_config(source), recipe)
        processor = processor_for(source, recipe, config)
        views, failures = _training_cells(recipe, splits.train, processor, images)
        held_out, unread = _validation_cells(recipe, splits.validation, processor, images)
        if not views or not held_out:
            raise ValueError(f"none of the images of {recipe.data} that were tried can be read")
        folder.mkdir(exist_ok=True)
        size = f"{recipe.image_size} x {recipe.image_size}"
        plot_sheet(views, f"training: views of {size} pixels", folder / "training.png")
        plot_sheet(held_out, f"validation: images of {size} pixels", folder / "validation.png")
    return failures + unread


def _training_cells(
    recipe: Recipe, images: Images, processor: Any, count: int
) -> tuple[list[Cell], int]:
    """The views of the first batches, and how many images of these could not be read."""
    size = recipe.batch_size if recipe.batch_size != "auto" else count  # counted by a run
    plan = Plan(
        images=images_per_epoch(recipe, images),
        batch_size=size,
        accumulate=1,
        rank=0,
        world=1,
        epochs=1,
    )
    mix = mixing(recipe, len(images.classes))
    cells: list[Cell] = []
    failures = 0
    found = batches(images, augmentation(recipe, processor), recipe, plan, 0)
    for step, batch in enumerate(islice(found, -(-count // size))):
        seed_all(recipe.seed, step)
        failures += len(batch.failures)
        pixels, targets = batch.pixels, batch.targets
        if len(targets) and len(targets) % 2 == 0:
            pixels, targets = mix(pixels, targets)
        for view, target in zip(pixels, targets, strict=True):
            label = _label(target, images, recipe.label_smoothing)
            cells.append(Cell(_picture(view.numpy(), processor), label))
    return cells[:count], failures


def _validation_cells(
    recipe: Recipe, images: Images, processor: Any, count: int
) -> tuple[list[Cell], int]:
    """Images of the validation split, spread evenly, and how many of them could not be read."""
    preprocessing = preprocessing_of(processor)
    read = reader(preprocessing, exact=True, max_pixels=recipe.max_pixels)
    step = max(1, (images.length or 0) // count)
    cells: list[Cell] = []
    failures = 0
    for i, (source, label) in enumerate(images):
        if len(cells) == count:
            break
        if i % step:
            continue
        try:
            pixels = preprocessing([read(source)])[0]
        except ImageError:
            failures += 1
        else:
            if images.task.problem_type == MULTI_LABEL:
                label = _names(images.task.classes_of(label))
            cells.append(Cell(_picture(pixels, processor), short(label, WIDTH)))
    return cells, failures


def _names(classes: list[str]) -> str:
    return short(", ".join(classes) or "none", WIDTH)


def _picture(pixels: np.ndarray, processor: Any) -> StoredImage:
    """Normalised pixels, (3, H, W), as a picture."""
    mean, std = (np.array(each)[:, None, None] for each in normalisation(processor))
    levels = np.clip(255 * (pixels * std + mean), 0, 255).round().astype("uint8")
    return StoredImage("", Image.fromarray(levels.transpose(1, 2, 0)))


def _label(target: Tensor, images: Images, smoothing: float) -> str:
    """The class of a target, or the shares of those of a mixed one, without the smoothing.

    Of several classes their names, and of values the numbers.
    """
    classes = images.classes
    if images.task.problem_type == REGRESSION:
        return short(", ".join(f"{value:.4g}" for value in target.tolist()), WIDTH)
    if images.task.problem_type == MULTI_LABEL:
        return _names([classes[i] for i in torch.nonzero(target).flatten().tolist()])
    if not target.ndim:
        return short(classes[int(target)], WIDTH)
    shares = (target - smoothing / len(classes)) / (1 - smoothing) if smoothing < 1 else target
    named = torch.nonzero(shares > SHOWN_SHARE).flatten().tolist()
    named.sort(key=lambda i: -shares[i])
    if len(named) == 1:
        return short(classes[named[0]], WIDTH)
    return "\n".join(f"{100 * shares[i]:.0f} % {short(classes[i], WIDTH - 5)}" for i in named)
