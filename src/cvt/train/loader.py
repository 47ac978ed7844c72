"""The order of the images, and their way through worker processes into batches.

Everything random is drawn from the seed and a place in the run: the order from the epoch, a view
of an image from its slot in the epoch, dropout and mixup from the batch's number. So a run resumes
at any step as if it had never stopped, with any number of workers, and processes can be traded for
accumulated batches.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cvt.data import LabelledImages, StreamedImages
from cvt.data.decoding import ImageError, Source, decode
from cvt.data.preprocessing import REDUCED
from cvt.data.workers import POLL_SECONDS, answer_nothing
from cvt.train.balance import balanced_order
from cvt.train.image_cache import ImageCache
from cvt.train.plan import Plan
from cvt.train.recipe import Recipe
from cvt.train.workers import fetch_batches, received, shared


def seed_all(*numbers: int) -> None:
    """Start Python's, NumPy's and torch's generators, a GPU's too, from these numbers."""
    # Their count too: a sequence of seeds is the same with a 0 behind it.
    mixed = int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.default_generator.manual_seed(mixed)
    if torch.cuda.is_initialized():  # torch.manual_seed would take 0.5 ms to note it for later
        torch.cuda.manual_seed(mixed)


class Draw(NamedTuple):
    """One view of one image: which, its target, and the numbers that seed the view."""

    image: Source
    target: Any
    seed: tuple[int, ...]
    number: int | None = None  # of the image; none in a stream


class Batch(NamedTuple):
    """Views (B, 3, H, W), classes (B,) or targets (B, K), and the images that could not be read."""

    pixels: Tensor
    targets: Tensor
    failures: dict[str, str]


def draws(
    images: LabelledImages | StreamedImages, recipe: Recipe, plan: Plan, start: int
) -> Iterator[list[Draw]]:
    """This process's batches from step `start` to the end of the run, image by image."""
    if isinstance(images, StreamedImages):
        mine = range(plan.rank, plan.batches_per_step, plan.world)
        count = plan.batch_size * plan.accumulate
        stream = images.shuffled(recipe.seed, plan.rank, plan.world)
        views = (pair for pair in stream for _ in range(recipe.repeats))
        pairs = islice(views, start * count, None)
        for step in range(start, plan.steps):
            for batch in mine:
                yield [
                    Draw(image, images.target(label), (recipe.seed, step, batch, i))
                    for i, (image, label) in enumerate(islice(pairs, plan.batch_size))
                ]
        return
    for epoch, slots, indices in slots_of(images, recipe, plan, start):
        yield [
            Draw(image, images.target(label), (recipe.seed, epoch, slot), index)
            for slot, index in zip(slots, indices, strict=True)
            for image, label in [images[index]]
        ]


def slots_of(
    images: LabelledImages, recipe: Recipe, plan: Plan, start: int
) -> Iterator[tuple[int, range, list[int]]]:
    """Of this process's batches from step `start` on: epoch, slots in it, indices of images."""
    classes = images.targets if recipe.sampler else None
    order, ordered_epoch = np.empty(0, dtype=np.int64), -1
    for step in range(start, plan.steps):
        epoch, in_epoch = divmod(step, plan.steps_per_epoch)
        if epoch != ordered_epoch:
            generator = np.random.default_rng((recipe.seed, epoch))
            if classes is None:
                shuffled = generator.permutation(len(images))
            else:
                shuffled = balanced_order(classes, generator)
            order, ordered_epoch = np.repeat(shuffled, recipe.repeats), epoch
        for batch in range(plan.rank, plan.batches_per_step, plan.world):
            # The views of an image go to different batches of the step, as timm's sampler does it.
            first = in_epoch * plan.images_per_step + batch
            slots = range(first, first + plan.images_per_step, plan.batches_per_step)
            yield epoch, slots, [int(order[slot % len(order)]) for slot in slots]


class Views(Dataset):
    """Reads and augments; what cannot be read is given back as its error."""

    def __init__(
        self,
        augment: Callable[[Any], Tensor],
        read: Callable = decode,
        cache: ImageCache | None = None,
    ) -> None:
        self.augment, self.read, self.cache = augment, read, cache

    def __getitem__(self, draw: Draw) -> tuple[Tensor | ImageError, Draw]:
        seed_all(*draw.seed)
        try:
            if self.cache is None or draw.number is None:
                return self.augment(self.read(draw.image)), draw
            return self.augment(self.cache.get(draw.number, partial(self.read, draw.image))), draw
        except ImageError as error:
            return error, draw


def collate(views: list[tuple[Any, Draw]]) -> Batch:
    """Puts a batch together, without the images that could not be read, which are its failures."""
    read = [view for view, _ in views if not isinstance(view, ImageError)]
    targets = torch.tensor([d.target for view, d in views if not isinstance(view, ImageError)])
    failures = {str(d.image): str(view) for view, d in views if isinstance(view, ImageError)}
    batch = Batch(torch.stack(read) if read else torch.empty(0), targets, failures)
    return with_tensors(batch, shared) if get_worker_info() else batch


def with_tensors(batch: Batch, change: Callable) -> Batch:
    """A batch with its tensors changed, or the arrays that stand for them."""
    return batch._replace(pixels=change(batch.pixels), targets=change(batch.targets))


def batches(
    images: LabelledImages | StreamedImages,
    augment: Callable[[Any], Tensor],
    recipe: Recipe,
    plan: Plan,
    start: int,
    interrupted: Callable[[], bool] = lambda: False,
    cache: ImageCache | None = None,
) -> Iterator[Batch]:
    """This process's batches from step `start` to the end of the run; raises as `loaded`."""
    batched = draws(images, recipe, plan, start)
    return loaded(batched, training_views(augment, recipe, cache), recipe, interrupted)


def pixels_needed(recipe: Recipe) -> int:
    """What the short side of an image must keep for its smallest crop to be that of the image."""
    crop = recipe.image_size * math.sqrt(recipe.crop_ratio / recipe.crop_scale)
    return math.ceil(REDUCED * crop)


def training_views(
    augment: Callable[[Any], Tensor], recipe: Recipe, cache: ImageCache | None = None
) -> Views:
    """Random views of images; of large ones no more is decoded than their smallest crop keeps."""
    least = pixels_needed(recipe)
    read = partial(decode, max_pixels=recipe.max_pixels, least_of_large=least)
    return Views(augment, read if cache is None else partial(read, least=least), cache)


def loaded(
    batched: Iterable[list[Draw]], views: Views, recipe: Recipe, interrupted: Callable[[], bool]
) -> Iterator[Batch]:
    """The batches of such draws.

    Each worker builds whole batches, two ahead, on one thread, which is torch's way with workers.

    Raises:
        cvt.data.workers.Interrupted: `interrupted` was true, and no batch came for
            `POLL_SECONDS`.
    """
    loader: DataLoader = DataLoader(
        views,
        batch_sampler=batched,
        collate_fn=collate,
        num_workers=recipe.workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=answer_nothing,
        timeout=POLL_SECONDS if recipe.workers else 0,
    )
    return (with_tensors(batch, received) for batch in fetch_batches(loader, interrupted))
