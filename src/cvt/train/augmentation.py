"""Random changes of the training images, through timm, as the paper's models were trained."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor

from cvt.data.preprocessing import normalisation
from cvt.train.recipe import Recipe


def augmentation(recipe: Recipe, processor: Any) -> Callable[[Any], Tensor]:
    """From a PIL image to a random, normalised view of it, (3, image_size, image_size).

    It draws from Python's, NumPy's and torch's global generators.

    Args:
        recipe: its settings of the group Images.
        processor: the image processor of evaluation; its mean, std and interpolation are read.

    Raises:
        ValueError: timm does not know the policy `auto_augment`.
    """
    from timm.data import auto_augment, create_transform

    mean, std = normalisation(processor)
    try:
        transform = create_transform(
            recipe.image_size,
            is_training=True,
            scale=(recipe.crop_scale, 1.0),
            ratio=(1 / recipe.crop_ratio, recipe.crop_ratio),
            hflip=recipe.flip,
            vflip=recipe.vertical_flip,
            color_jitter=recipe.color_jitter,
            auto_augment=recipe.auto_augment,
            interpolation=recipe.interpolation or Image.Resampling(processor.resample).name.lower(),
            mean=mean,
            std=std,
            re_prob=recipe.random_erase,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(f"auto_augment = {recipe.auto_augment}: {error!r}") from error
    for step in transform.transforms:
        for operation in operations(step):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
    return transform


def operations(step: Any) -> list[Any]:
    """The operations that one of timm's policies chooses from; of other transforms, none."""
    layers = [getattr(step, "ops", []), *getattr(step, "policy", [])]
    return [operation for layer in layers for operation in layer]


def posterize(image: Image.Image, bits: int, **settings: Any) -> Image.Image:
    """timm's, for 0 bits and fewer too: strong levels ask for them, and Pillow refuses them now.

    Pillow gave a black image for them before, so that is what the paper's models saw.
    """
    from timm.data import auto_augment

    if bits <= 0:
        return Image.new("RGB", image.size)
    return auto_augment.posterize(image, bits, **settings)


def mixing(recipe: Recipe, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mixup and CutMix of a batch, (B, 3, H, W) and (B,), to images and targets (B, classes).

    Without them, the batch as it is. It draws from NumPy's global generator.
    """
    from timm.data import Mixup

    if not recipe.mixes:
        return lambda pixels, targets: (pixels, targets)
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch,
        mode=recipe.mixup_mode,
        label_smoothing=recipe.label_smoothing,
        num_classes=classes,
    )
