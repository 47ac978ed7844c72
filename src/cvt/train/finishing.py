"""Finishes views on the training device, a batch at a time: Pillow's operations, for tensors.

Each operation takes images (n, 3, H, W) in uint8 and a row of numbers for each, (n, 256), and gives
images again. The arithmetic is Pillow's, roundings included, since that is how timm's policies are
defined. Nothing of it asks the device for a value, so nothing waits for the device: indices come
with the batch, every shape is known beforehand. Only JPEGs, which differ in size, are decoded and
cropped one by one.

None of this has been run on a GPU yet.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cvt.images import ImageError, StoredImage, decode, normalisation
from cvt.train.batches import Batch
from cvt.train.recipe import Recipe
from cvt.train.unfinished import Jpeg

logger = logging.getLogger(__name__)
DECODED_AT_ONCE = 2**27  # pixels of 3 bytes


# ------------------------------------------------------------------------------ colours


def looked_up(images: Tensor, tables: Tensor) -> Tensor:
    """Each value replaced by its entry in the table of its image or channel, (n, 1 or 3, 256)."""
    entries = tables.clamp(0, 255).to(torch.uint8).expand(-1, 3, -1)
    return entries.gather(2, images.flatten(2).long()).view_as(images)


def table(images: Tensor, numbers: Tensor) -> Tensor:
    """Whatever changes each value by itself: the numbers are what becomes of 0, of 1, and so on."""
    return looked_up(images, numbers[:, None])


def auto_contrast(images: Tensor, numbers: Tensor) -> Tensor:
    """Each channel stretched to the range from 0 to 255."""
    values = images.flatten(2)
    lowest, highest = (end(2, keepdim=True).double() for end in (values.amin, values.amax))
    scale = torch.full_like(lowest, 255) / (highest - lowest).clamp(min=1)
    ramp = torch.arange(256, dtype=torch.float64, device=images.device)
    stretched = ramp * scale + -lowest * scale
    return looked_up(images, torch.where(highest > lowest, stretched, ramp))


def equalize(images: Tensor, numbers: Tensor) -> Tensor:
    """The values of each channel spread evenly."""
    values = images.flatten(2).long()
    counts = values.new_zeros(*values.shape[:2], 256)
    counts.scatter_add_(2, values, values.new_ones(()).expand_as(values))
    of_highest = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - of_highest) // 255
    below = counts.cumsum(2) - counts
    spread = (step // 2 + below) // step.clamp(min=1)
    return looked_up(images, torch.where(step > 0, spread, torch.arange(256, device=images.device)))


def grey(images: Tensor) -> Tensor:
    """Pillow's mode L, (n, 1, H, W)."""
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def blended(plain: Tensor, images: Tensor, numbers: Tensor) -> Tensor:
    """From plain images, where the number is 0, to the images, where it is 1, and beyond."""
    factor = numbers[:, :1, None, None].float()
    return (plain + factor * (images - plain.float())).clamp(0, 255).to(torch.uint8)


def color(images: Tensor, numbers: Tensor) -> Tensor:
    """From grey to more colour."""
    return blended(grey(images), images, numbers)


def contrast(images: Tensor, numbers: Tensor) -> Tensor:
    """From the mean grey of the image to more contrast."""
    count = images.shape[2] * images.shape[3]
    total = grey(images).sum((1, 2, 3), keepdim=True)
    return blended((2 * total + count) // (2 * count), images, numbers)


def sharpness(images: Tensor, numbers: Tensor) -> Tensor:
    """From Pillow's filter SMOOTH, which leaves the border alone, to sharper."""
    values = images.float()
    smooth, inner = values.clone(), values[..., 1:-1, 1:-1]
    around = F.avg_pool2d(values, 3, stride=1, divisor_override=1)
    smooth[..., 1:-1, 1:-1] = ((around + 4 * inner + 6.5) / 13).floor()
    return blended(smooth, images, numbers)


# ------------------------------------------------------------------------------ places


def mirror(images: Tensor, numbers: Tensor) -> Tensor:
    """Left to right."""
    return images.flip(3)


def upside_down(images: Tensor, numbers: Tensor) -> Tensor:
    """Top to bottom."""
    return images.flip(2)


def linear(points: list[Tensor], part: Tensor) -> Tensor:
    """The value at a part of the way from the first point to the second."""
    p, q = points
    return p + part * (q - p)


def cubic(points: list[Tensor], part: Tensor) -> Tensor:
    """The same from the second of four to the third; Pillow's `transform` has a = -1 in it."""
    p, q, r, s = points
    return q + part * (r - p + part * (2 * (p - q) + r - s + part * (q - p + s - r)))


def transformed(
    images: Tensor,
    numbers: Tensor,
    curve: Callable[[list[Tensor], Tensor], Tensor],
    columns: tuple[int, ...],
    rows: tuple[int, ...],
) -> Tensor:
    """Each pixel taken from where a matrix, six numbers, sends it; outside a colour, three more.

    Between pixels lies a curve through those of some columns and rows, 0 being the one before.
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = numbers[:, :6, None, None].unbind(1)  # each (n, 1, 1), in float64
    x = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
    y = torch.arange(height, dtype=torch.float64, device=images.device)[:, None] + 0.5
    across, down = a * x + b * y + c, d * x + e * y + f  # (n, H, W)
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    across, down = across - 0.5, down - 0.5
    left, top = across.floor(), down.floor()
    flat, lines = images.flatten(2), []
    for row in rows:
        begin = (top + row).clamp(0, height - 1).long() * width
        points = []
        for column in columns:
            place = begin + (left + column).clamp(0, width - 1).long()
            found = flat.gather(2, place.flatten(1)[:, None].expand(-1, 3, -1))
            points.append(found.view_as(images).double())
        lines.append(curve(points, (across - left)[:, None]) if len(columns) > 1 else points[0])
    values = curve(lines, (down - top)[:, None]) if len(rows) > 1 else lines[0]
    outside = numbers[:, 6:9, None, None]
    return torch.where(inside[:, None], values.clamp(0, 255), outside).to(torch.uint8)


ONE, TWO, FOUR = (0,), (0, 1), (-1, 0, 1, 2)
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "table": table,
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "color": color,
    "contrast": contrast,
    "sharpness": sharpness,
    "mirror": mirror,
    "upside_down": upside_down,
    # Most of timm's operations move pixels along x or y alone, which costs a quarter.
    "bilinear": partial(transformed, curve=linear, columns=TWO, rows=TWO),
    "bilinear_x": partial(transformed, curve=linear, columns=TWO, rows=ONE),
    "bilinear_y": partial(transformed, curve=linear, columns=ONE, rows=TWO),
    "bicubic": partial(transformed, curve=cubic, columns=FOUR, rows=FOUR),
    "bicubic_x": partial(transformed, curve=cubic, columns=FOUR, rows=ONE),
    "bicubic_y": partial(transformed, curve=cubic, columns=ONE, rows=FOUR),
}


# ------------------------------------------------------------------------------ batches


class Finishing:
    """Finishes the views of batches on a device: decodes, changes, normalises and erases.

    Args:
        recipe: its settings of the groups Images and Machine.
        processor: the image processor of evaluation; its mean and std are read.
        device: where the model is trained.

    Raises:
        ValueError: the device cannot do it.
    """

    def __init__(self, recipe: Recipe, processor: Any, device: torch.device) -> None:
        if device.type == "mps":
            raise ValueError("augment_on_device: needs float64, which mps does not have")
        self.device, self.side = device, recipe.image_size
        self.erases = recipe.random_erase > 0
        self.mean, self.std = (
            torch.tensor([*values]).view(3, 1, 1).to(device) for values in normalisation(processor)
        )
        if recipe.decode_on_device:
            self.check_decoder()

    def check_decoder(self) -> None:
        """Decode a small JPEG; a ValueError says why the device cannot."""
        file = BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG")
        try:
            self.decode([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)])
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"decode_on_device: torchvision decodes no JPEG on {self.device.type} here "
                f"({error}); take augment_on_device instead"
            ) from error

    def decode(self, files: list[Tensor]) -> list[Tensor]:
        """JPEGs in memory of the CPU to images (3, H, W) on the device."""
        from torchvision.io import ImageReadMode, decode_jpeg

        return decode_jpeg(files, ImageReadMode.RGB, self.device)

    def __call__(self, batch: Batch) -> Batch:
        """A batch from the workers with its views finished, (B, 3, H, W) in float32.

        What is erased becomes noise of torch's generator for the device. JPEGs that turn out to be
        damaged join the failures.
        """
        if batch.unfinished is None:
            return batch
        jpegs, files, groups, *tensors = batch.unfinished
        moved = [tensor.to(self.device, non_blocking=True, copy=True)
                 for tensor in (batch.pixels, batch.targets, *tensors)]  # fmt: skip
        images, targets, members, numbers, erased = moved
        damaged: dict[str, str] = {}
        if any(jpegs):
            crops, decoded = iter(images), self.decoded(jpegs, files, damaged)
            images = torch.stack([next(decoded if jpeg else crops) for jpeg in jpegs])
        start = 0
        for name, count in groups:
            part = slice(start, start + count)
            changed = OPERATIONS[name](images[members[part]], numbers[part])
            images.index_copy_(0, members[part], changed)
            start += count
        pixels = (images / 255 - self.mean) / self.std
        if self.erases:
            pixels = torch.where(self.inside(erased), torch.randn_like(pixels), pixels)
        if damaged:
            read = [i for i, jpeg in enumerate(jpegs) if not jpeg or jpeg.name not in damaged]
            pixels, targets = pixels[read], targets[read]
        return Batch(pixels, targets, batch.failures | damaged)

    def inside(self, boxes: Tensor) -> Tensor:
        """Which pixels lie in boxes (B, 4) of top, bottom, left and right; (B, 1, H, W)."""
        top, bottom, left, right = boxes[:, :, None, None, None].unbind(1)
        column = torch.arange(self.side, device=self.device)
        row = column[:, None]
        return (top <= row) & (row < bottom) & (left <= column) & (column < right)

    def decoded(
        self, jpegs: list[Jpeg | None], files: Tensor, damaged: dict[str, str]
    ) -> Iterator[Tensor]:
        """The crop of each JPEG, (3, H, W); of a damaged one black, and its error goes there."""
        from torchvision.transforms.functional import resized_crop

        found = [jpeg for jpeg in jpegs if jpeg]
        each = files.split([jpeg.length for jpeg in found])
        sizes = accumulate(jpeg.pixels for jpeg in found)
        parts = groupby(zip(found, each, sizes, strict=True), lambda of: of[2] // DECODED_AT_ONCE)
        side = [self.side, self.side]
        for _, part in parts:
            some = [(jpeg, file) for jpeg, file, _ in part]
            for (jpeg, _), image in zip(some, self.images(some), strict=True):
                if isinstance(image, Tensor):
                    yield resized_crop(image, *jpeg.box, side, jpeg.interpolation)
                else:
                    damaged[jpeg.name] = str(image)
                    yield torch.zeros(3, *side, dtype=torch.uint8, device=self.device)

    def images(self, jpegs: list[tuple[Jpeg, Tensor]]) -> Sequence[Tensor | ImageError]:
        """The images in JPEGs; by Pillow where the device refuses, though only one be at fault."""
        try:
            return self.decode([file for _, file in jpegs])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning("%d JPEGs are decoded by Pillow instead: %s", len(jpegs), error)
            return [self.by_pillow(jpeg, file) for jpeg, file in jpegs]

    def by_pillow(self, jpeg: Jpeg, file: Tensor) -> Tensor | ImageError:
        """The image in a JPEG, on the device, or why there is none."""
        from torchvision.transforms.functional import pil_to_tensor

        try:
            image = decode(StoredImage(jpeg.name, file.numpy().tobytes()))
        except ImageError as error:
            return error
        return pil_to_tensor(image).to(self.device)
