"""Batches for training: decoded, augmented, normalised."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from cvt.datasets import LabelledImages
from cvt.images import decode


class TrainingImages(Dataset):
    """Pairs of an augmented image (3, H, W), normalised, and the index of its class."""

    def __init__(self, images: LabelledImages, augment: Callable) -> None:
        self.paths = images.paths
        indices = {name: i for i, name in enumerate(images.classes)}
        self.targets = [indices[label] for label in images.labels]
        self.augment = augment

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.augment(decode(self.paths[index])), self.targets[index]


def augmentation(
    image_size: int,
    mean: list[float],
    std: list[float],
    flip: bool,
    crop_scale: float,
    rotate: float,
) -> Callable:
    """A random rotation, resized crop and flip, and the normalisation of evaluation.

    Args:
        image_size: height and width of the result in pixels.
        mean: per channel, of values from 0 to 1.
        std: likewise.
        flip: mirror half of the images.
        crop_scale: smallest share of the image's area that a crop keeps.
        rotate: largest angle in degrees, either way.
    """
    bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
    rotation = [v2.Resize(2 * image_size), v2.RandomRotation(rotate, interpolation=bilinear)]
    return v2.Compose(
        [
            *(rotation if rotate else []),
            v2.RandomResizedCrop(image_size, scale=(crop_scale, 1.0), interpolation=bicubic),
            v2.RandomHorizontalFlip(0.5 if flip else 0.0),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )


def training_batches(
    dataset: TrainingImages, batch_size: int, seed: int, workers: int
) -> DataLoader:
    """The batches of an epoch, shuffled by `seed`; a smaller last one is left out."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=len(dataset) >= batch_size,
        num_workers=workers,
        generator=generator,
    )
