"""From images to labels and scores."""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, tee
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cvt.configuration import CvtConfig
from cvt.datasets import images_below
from cvt.images import ImageError, Source, decode
from cvt.modeling import CvtForImageClassification

BLANK = Image.new("RGB", (32, 32), "grey")  # in the place of what cannot be decoded


@dataclass(frozen=True)
class Result:
    """What became of an image: logits, (K,) in float32 on the CPU, or the reason for none."""

    path: Source
    logits: Tensor | None = None
    error: str | None = None


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image, best first, and their scores from 0 to 1."""

    path: Source
    labels: list[str]
    scores: list[float]


def find_images(sources: Iterable[str | Path]) -> list[Path]:
    """The image files that files, folders (with all below them) and glob patterns name, in order.

    Raises:
        FileNotFoundError: a source names no image.
    """
    found: list[Path] = []
    for source in sources:
        if Path(source).is_file():
            found.append(Path(source))
            continue
        if Path(source).is_dir():
            images, fault = images_below(Path(source)), "has no images in it"
        else:
            matches = map(Path, glob.glob(str(source), recursive=True))
            images, fault = sorted(path for path in matches if path.is_file()), "does not exist"
        if not images:
            raise FileNotFoundError(f"{source} {fault}")
        found += images
    return found


@torch.no_grad()  # in inference mode FSDP would gather weights that training cannot use after it
def classify(
    model: nn.Module,
    processor: Callable,
    sources: Iterable[Source],
    batch_size: int = 32,
    workers: int = 0,
) -> Iterator[Result]:
    """Classify images, batch by batch, in their order, in the model's own precision.

    An image that cannot be decoded is a grey one to the model, whose logits are dropped: neither
    the logits of its neighbours nor the number of calls of the model depend on it. Nor does
    anything depend on the number of workers.

    Args:
        model: a classifier, or what wraps one; used in eval mode, on the device it is on.
        processor: its image processor.
        sources: the images; read as they are needed.
        batch_size: images run through the model at a time.
        workers: processes that decode and preprocess; with 0, threads of this one decode.
    """
    model.eval()
    device = next(model.parameters()).device
    batches, sent = tee(_batches(sources, batch_size))
    prepared = _prepared(processor, sent, workers)
    for (pixels, errors), batch in zip(prepared, batches, strict=True):
        logits = model(pixels.to(device)).logits.float().cpu()
        for source, error, row in zip(batch, errors, logits, strict=True):
            yield Result(source, error=error) if error else Result(source, logits=row)


def _batches(sources: Iterable[Source], batch_size: int) -> Iterator[list[Source]]:
    remaining = iter(sources)
    while batch := list(islice(remaining, batch_size)):
        yield batch


def _prepared(
    processor: Callable, batches: Iterable[list[Source]], workers: int
) -> Iterator[tuple[Tensor, list[str | None]]]:
    """Of each batch the pixels, (B, 3, H, W), and what is wrong with each image, if anything."""
    if workers:
        # The data set's indices are the batches themselves: they travel to the workers one by one.
        # Of its own generator the loader draws a seed; the global one stays where it was.
        yield from DataLoader(
            _Prepare(processor),
            sampler=batches,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            worker_init_fn=leave_group,
            generator=torch.Generator(),
        )
    else:
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
            prepare = _Prepare(processor, pool.map)
            yield from (prepare[batch] for batch in batches)


class _Prepare(Dataset):
    """What decodes and preprocesses a batch."""

    def __init__(self, processor: Callable, each: Callable = map) -> None:
        self.processor, self.each = processor, each

    def __getitem__(self, batch: list[Source]) -> tuple[Tensor, list[str | None]]:
        images, errors = zip(*self.each(_decoded, batch), strict=True)
        return self.processor(list(images), return_tensors="pt")["pixel_values"], list(errors)


def _decoded(source: Source) -> tuple[Image.Image, str | None]:
    try:
        return decode(source), None
    except ImageError as error:
        return BLANK, str(error)


def leave_group(worker: int) -> None:
    """In a worker: what is sent to the group, as Ctrl-C is, the main process answers alone."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def _unchanged(prepared: Any) -> Any:
    return prepared


def ranked(logits: Tensor) -> Tensor:
    """The classes from the most to the least likely; of equal ones the first comes first."""
    return logits.argsort(descending=True, stable=True)


def scores(logits: Tensor, config: CvtConfig) -> Tensor:
    """Scores from 0 to 1, as by transformers' pipeline: sigmoid where labels are independent."""
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return logits.sigmoid()
    return logits.softmax(dim=-1)


def predict(
    model: CvtForImageClassification,
    processor: Callable,
    sources: Iterable[Source],
    topk: int = 5,
    batch_size: int = 32,
    workers: int = 0,
) -> Iterator[Prediction | Result]:
    """The best classes of images; one that cannot be decoded gives a `Result` with the error.

    Args:
        model: a classifier.
        processor: its image processor.
        sources: the images.
        topk: how many classes to name, at most all.
        batch_size: as in `classify`.
        workers: as in `classify`.
    """
    names = model.config.class_names
    for result in classify(model, processor, sources, batch_size, workers):
        if result.logits is None:
            yield result
            continue
        best = ranked(result.logits)[:topk]
        labels = [names[i] for i in best.tolist()]
        yield Prediction(result.path, labels, scores(result.logits, model.config)[best].tolist())
