"""How many workers keep a training step fed with JPEGs?

    python benchmarks/feeding.py                 # the step is measured on the spot
    python benchmarks/feeding.py --rate 4000     # images per second of the step
    python benchmarks/feeding.py --large         # what `cache` gives, on photos of 12 megapixels
    python benchmarks/feeding.py --quick         # few pictures and a tiny model: does it run?

Pictures of 500 x 375 pixels, as most of ImageNet's, but of some 70 kB where those have 110, go
through `cvt.train.loader` as in a run of the recipe cvt-13-224x224. One worker process
- decode: decodes them, and throws away what it has;
- crop: decodes, crops, mirrors and normalises;
- recipe: does the whole augmentation.

The rate of the step is that of cvt-13 at 224 in bf16, compiled, with batches of 256 images that are
there already. The workers are as many as then deliver no less than the step takes, if each has a
core of its own.

With --large, 60 pictures of 4000 x 3000 pixels go through two epochs of the recipe `photos` in this
process, without a cache, with one in memory and with one on the disk: images per second of each
epoch, without a step.

Prints a table and writes it to `results/feeding-<device>-torch<version>-<date>.csv`.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from common import (
    CLOCKS,
    QUICK,
    VARIANTS,
    Row,
    command_line,
    count,
    duration,
    result_file,
    show,
    write_pictures,
    write_rows,
)
from peers import Logits, build, shape, training_step
from torch import Tensor

from cvt import image_processor
from cvt.data import LabelledImages
from cvt.inference.benchmark import device_name, in_turns, middle, timed, versions
from cvt.kernels import recompute_activations
from cvt.train.augmentation import augmentation
from cvt.train.image_cache import ImageCache
from cvt.train.loader import Batch, batches, pixels_needed
from cvt.train.plan import Plan
from cvt.train.recipe import Recipe, load_recipe

RECIPE = "cvt-13-224x224"
WAYS: dict[str, dict[str, object]] = {
    "decode": {},
    "crop": {"auto_augment": None, "random_erase": 0.0},
    "recipe": {},
}
COLUMNS = ("way", "worker_images_per_second", "step_images_per_second", "workers")


def nothing(image: object) -> Tensor:
    """The view that is made of an image when it is to be decoded only."""
    return torch.empty(0)


def from_a_worker(recipe: Recipe, paths: list[Path], way: str) -> Iterator[Batch]:
    """The batches of a run, which goes on without end."""
    processor = image_processor(shape(recipe.model), image_size=recipe.image_size)
    augment = nothing if way == "decode" else augmentation(recipe, processor)
    images = LabelledImages(paths, ["picture"] * len(paths))
    plan = Plan(len(paths), recipe.batch_size, accumulate=1, rank=0, world=1, epochs=10**6)
    return batches(images, augment, recipe, plan, start=0)


def rate(
    run: Callable[[], object], images: int, options: argparse.Namespace, clock: Callable = timed
) -> float:
    """Images per second of what deals with so many."""
    times = in_turns({run: run}, options.seconds, options.turns, turn=0, clock=clock)
    return images / middle(times[run])


def worker_rate(way: str, paths: list[Path], options: argparse.Namespace) -> float:
    """Images per second of one worker."""
    recipe = load_recipe(RECIPE, WAYS[way] | {"workers": 1, "batch_size": options.batch_size})
    delivered = from_a_worker(recipe, paths, way)
    next(delivered)  # starts the worker
    return rate(partial(next, delivered), recipe.batch_size, options)


def rate_of_step(options: argparse.Namespace) -> float:
    """Images per second of a training step whose batch is there already."""
    variant, image_size, batch_size = QUICK if options.quick else VARIANTS["cvt-13"]
    with torch.device(options.device):
        model = build("cvt", shape(variant)).to(memory_format=torch.channels_last)
        images = torch.randn(batch_size, 3, image_size, image_size)
    recompute_activations(model)  # as `cvt train` does
    forward = Logits(model if options.quick else torch.compile(model, dynamic=False))
    images = images.contiguous(memory_format=torch.channels_last)
    step = training_step(model, forward, images, torch.bfloat16)
    return rate(step, batch_size, options, CLOCKS[options.device])


def measure(paths: list[Path], options: argparse.Namespace) -> Iterator[Row]:
    """A row for each way."""
    step = options.rate or rate_of_step(options)
    for way in WAYS:
        worker = worker_rate(way, paths, options)
        rates = (round(worker, 1), round(step, 1), math.ceil(step / worker))
        yield dict(zip(COLUMNS, (way, *rates), strict=True))


def measure_caches(paths: list[Path], options: argparse.Namespace) -> Iterator[Row]:
    """A row for each kind of cache."""
    images = LabelledImages(paths, ["picture"] * len(paths))
    size = math.gcd(len(paths), 10)
    plan = Plan(len(paths), size, accumulate=1, rank=0, world=1, epochs=2)
    for kind in (None, "ram", "disk"):
        recipe = load_recipe("photos", {"cache": kind, "batch_size": size})
        processor = image_processor(shape(recipe.model), image_size=recipe.image_size)
        least, folder = pixels_needed(recipe), paths[0].parent
        cache = ImageCache(kind, folder, len(paths), least, 1) if kind else None
        found = batches(images, augmentation(recipe, processor), recipe, plan, 0, cache=cache)
        rates = []
        for _ in range(2):
            took = timed(lambda found=found: [next(found) for _ in range(plan.steps_per_epoch)])
            rates.append(round(len(paths) / took, 1))
        yield {
            "cache": kind or "none",
            "first_epoch_images_per_second": rates[0],
            "second_epoch_images_per_second": rates[1],
        }


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, on_gpu=True)
    parser.add_argument("--rate", type=count, help="images per second of the step")
    parser.add_argument("--quick", action="store_true", help="few pictures and a tiny model")
    parser.add_argument("--large", action="store_true", help="what a cache gives large photos")
    parser.add_argument("--pictures", type=count, help="by default 512, or 60 large ones")
    parser.add_argument("--batch-size", type=count, default=64, help="of the worker")
    parser.add_argument("--seconds", type=duration, default=10.0, help="of each measurement")
    parser.add_argument("--turns", type=count, default=5, help="batches of each, at least")
    options = parser.parse_args(arguments)
    options.pictures = options.pictures or (60 if options.large else 512)
    if options.quick:
        options.pictures, options.batch_size, options.seconds, options.turns = 8, 4, 0.0, 2
    return options


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    name = "feeding" + "-large" * options.large + "-quick" * options.quick
    width, height = (4000, 3000) if options.large and not options.quick else (500, 375)
    path = result_file(options.results, name, options.device, options.overwrite)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "pictures")
        paths = write_pictures(folder, options.pictures, width, height, quality=96)
        rows = list((measure_caches if options.large else measure)(paths, options))
    show(rows)
    about = {
        "batch_size": options.batch_size,
        "device": device_name(options.device),
        "processor": device_name("cpu"),
        **versions(("torch", "torchvision", "PIL", "timm", "cvt")),
    }
    write_rows(path, [row | about for row in rows], "w" if options.overwrite else "x")


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
