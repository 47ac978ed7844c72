"""From images to labels and scores."""

import glob
import logging
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cvt.configuration import CvtConfig
from cvt.data import images_below
from cvt.data.decoding import ImageError, Source, StoredImage, decode
from cvt.data.folder import Skipped, unreadable
from cvt.data.preprocessing import check_range, pixels_needed
from cvt.data.workers import POLL_SECONDS, answer_nothing, fetch_batches, received, shared
from cvt.files import check_path
from cvt.modeling import CvtForImageClassification
from cvt.runtime.base import PixelError, Runtime
from cvt.runtime.torch_runtime import TorchRuntime

logger = logging.getLogger(__name__)
BLANK = Image.new("RGB", (32, 32), "grey")  # in the place of what cannot be decoded


@dataclass(frozen=True)
class Result:
    """What became of an image: logits, (K,) in float32 on the CPU, or the reason for none."""

    path: Source
    logits: Tensor | None = None
    error: str | None = None


@dataclass(frozen=True)
class Prediction:
    """The classes of one image with the highest scores, the highest first.

    Attributes:
        path: the image.
        labels: names of the classes.
        scores: from 0 to 1; of a regression, the values that the model gives.
        are_values: whether the scores are values of a regression.
    """

    path: Source
    labels: list[str]
    scores: list[float]
    are_values: bool = False

    @property
    def records(self) -> list[dict[str, Any]]:
        """Label and score of each class, in the form of transformers' pipeline."""
        pairs = zip(self.labels, self.scores, strict=True)
        return [{"label": label, "score": score} for label, score in pairs]


def find_images(sources: Iterable[str | Path]) -> Iterator[Path]:
    """The image files that files, folders (with all below them) and glob patterns name, in order.

    Folders are read while one walks on: a million images are never in a list.

    Raises:
        FileNotFoundError: a source names no image; raised before the first image is read.
    """
    return chain.from_iterable([_found(source) for source in sources])


def _found(source: str | Path) -> Iterator[Path]:
    check_path(source, "source")
    path, fault = Path(source), "does not exist"
    if path.is_file():
        return iter([path])
    if path.is_dir():
        images, fault = images_below(path), "has no images in it"
    elif os.path.lexists(path):
        raise FileNotFoundError(f"{source} is none of the files that are read: {unreadable(path)}")
    else:
        images = _matching(str(source))
    first = next(images, None)
    if first is None:
        raise FileNotFoundError(f"{source} {fault}")
    return chain([first], images)


def _matching(pattern: str) -> Iterator[Path]:
    """The files that match a pattern, sorted; what is neither a file nor a folder is logged."""
    skipped = Skipped(pattern)
    for match in map(Path, sorted(glob.iglob(pattern, recursive=True))):
        if match.is_file():
            yield match
        elif not match.is_dir():
            skipped.add(unreadable(match), str(match))
    skipped.log()


def reader(
    processor: Callable, exact: bool, max_pixels: int | None
) -> Callable[[Source], Image.Image]:
    """What decodes images for an image processor, as `classify` describes it.

    Raises:
        ValueError: the processor is not for decoded images; names its setting.
    """
    check_range(processor)
    needed = pixels_needed(processor)
    read = partial(decode, max_pixels=max_pixels, least_of_large=needed)
    return read if exact else partial(read, least=needed)


def classify(
    model: Runtime | nn.Module,
    processor: Callable,
    sources: Iterable[Source],
    batch_size: int = 32,
    workers: int = 0,
    exact: bool = False,
    max_pixels: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[Result]:
    """Classify images, batch by batch, in their order.

    An image that cannot be decoded is a grey one to the model, whose logits are dropped: neither
    the logits of its neighbours nor the number of calls of the model depend on it. Nor does
    anything depend on the number of workers.

    Large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, where that leaves 1.5
    times the pixels that preprocessing resizes to. The preprocessed pixels of photographs then
    differ by less than 2/255 on average and 32/255 anywhere: no more than if they had been saved at
    quality 75 instead of 90. For pictures of small print those are 6/255 and 48/255.

    Args:
        model: what runs a classifier; or a classifier, or what wraps one, which is used as it is,
            in eval mode, on the device it is on.
        processor: its image processor.
        sources: the images; read as they are needed, at most two batches per worker ahead.
        batch_size: images run through the model at a time; one where the processor does not resize,
            so that they may be of different sizes.
        workers: processes that decode and preprocess; with 0, threads of this one decode. So they
            do in a daemonic process, which may have no processes of its own.
        exact: decode every image whole, but for those above `cvt.data.decoding.LARGE_PIXELS`.
        max_pixels: the pixels that an image may have, see `cvt.data.decoding.decode`.
        interrupted: whether to give up while a worker is stuck.

    Raises:
        ValueError: the processor is not for decoded images; names its setting.
        Interrupted: `interrupted` was true, and `POLL_SECONDS` passed without a batch.
    """
    runtime = model if isinstance(model, Runtime) else TorchRuntime(model)
    read = reader(processor, exact, max_pixels)
    resizes = getattr(processor, "do_resize", True)
    batch_size = batch_size if resizes else 1
    prepare = partial(_Prepare, processor, read)
    batches, sent = tee(_batches(sources, batch_size))
    prepared = _prepared(prepare, sent, workers, interrupted)
    for (pixels, errors), batch in zip(prepared, batches, strict=True):
        try:
            batch_logits = runtime(pixels, preprocessed=True)
        except PixelError as refusal:
            if resizes:
                raise
            yield Result(batch[0], error=errors[0] or f"{batch[0]}: {refusal}")
            continue
        for source, error, logits in zip(batch, errors, batch_logits, strict=True):
            yield Result(source, error=error) if error else Result(source, logits)


def _batches(sources: Iterable[Source], batch_size: int) -> Iterator[list[Source]]:
    remaining = iter(sources)
    while batch := list(islice(remaining, batch_size)):
        yield batch


def _prepared(
    prepare: Callable[..., "_Prepare"],
    batches: Iterable[list[Source]],
    workers: int,
    interrupted: Callable[[], bool],
) -> Iterator[tuple[Tensor, list[str | None]]]:
    """Of each batch the pixels, (B, 3, H, W), and what is wrong with each image, if anything."""
    if workers and not multiprocessing.current_process().daemon:
        # The data set's indices are the batches themselves: they travel to the workers one by one.
        # They are pickled here: the loader would wait forever for one that cannot be.
        # Of its own generator the loader draws a seed; the global one stays where it was.
        each = prepare()
        loader = DataLoader(
            each,
            sampler=(pickle.dumps([_portable(s, each.read) for s in batch]) for batch in batches),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=workers,
            worker_init_fn=answer_nothing,
            generator=torch.Generator(),
            timeout=POLL_SECONDS,
        )
        for pixels, errors in fetch_batches(loader, interrupted):
            yield received(pixels), errors
    else:
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
            prepared = prepare(pool.map)
            for pixels, errors in (prepared[batch] for batch in batches):
                yield received(pixels), errors


class _Prepare(Dataset):
    """What decodes and preprocesses a batch."""

    def __init__(self, processor: Callable, read: Callable, each: Callable = map) -> None:
        self.processor, self.read, self.each = processor, read, each

    def __getitem__(
        self, batch: list[Source] | bytes
    ) -> tuple[Tensor | np.ndarray, list[str | None]]:
        in_worker = isinstance(batch, bytes)
        sources = pickle.loads(batch) if isinstance(batch, bytes) else batch
        images, errors = zip(*self.each(self.decoded, sources), strict=True)
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        return shared(pixels) if in_worker else pixels, list(errors)

    def decoded(self, source: Source) -> tuple[Image.Image, str | None]:
        try:
            return self.read(source), None
        except ImageError as error:
            return BLANK, str(error)


def _portable(source: Source, read: Callable) -> Source:
    """A source for a worker: Pillow forgets the format of an image that it pickles."""
    if not isinstance(source, StoredImage) or not isinstance(source.content, Image.Image):
        return source
    try:
        return replace(source, content=read(source))
    except ImageError as error:
        return replace(source, content=partial(_raise, error))


def _raise(error: ImageError) -> NoReturn:
    raise error


def _unchanged(prepared: Any) -> Any:
    return prepared


def ranked(logits: Tensor) -> Tensor:
    """The classes from the most to the least likely; of equal ones the first comes first."""
    return logits.argsort(descending=True, stable=True)


def scores(logits: Tensor, config: CvtConfig) -> Tensor:
    """Scores as by transformers' pipeline.

    Softmax; sigmoid where labels are independent; of a regression the values themselves.
    """
    if config.problem_type == "regression":
        return logits
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return logits.sigmoid()
    return logits.softmax(dim=-1)


def scores_per_image(topk: int, config: CvtConfig) -> int:
    """How many scores `predict` gives of an image: `topk`, at most all; of a regression all."""
    is_regression = config.problem_type == "regression"
    return len(config.class_names) if is_regression else min(topk, len(config.class_names))


def predict(
    model: Runtime | CvtForImageClassification,
    processor: Callable,
    sources: Iterable[Source],
    topk: int = 5,
    batch_size: int = 32,
    workers: int = 0,
    exact: bool = False,
    max_pixels: int | None = None,
) -> Iterator[Prediction | Result]:
    """The best classes of images; one without finite scores gives a `Result` with the error.

    Args:
        model: a classifier, or what runs one.
        processor: its image processor.
        sources: the images.
        topk: how many classes to name, at most all; of a regression all values are given.
        batch_size: as in `classify`.
        workers: as in `classify`.
        exact: as in `classify`.
        max_pixels: as in `classify`.

    Raises:
        ValueError: the model has no classes.
    """
    names = model.config.class_names
    if not names:
        raise ValueError("num_labels = 0: the model has no classes to name")
    count = scores_per_image(topk, model.config)
    are_values = model.config.problem_type == "regression"
    for result in classify(model, processor, sources, batch_size, workers, exact, max_pixels):
        if result.logits is None:
            yield result
            continue
        if not result.logits.isfinite().all():
            reason = "its scores are not finite; fp16 may overflow where bf16 does not"
            yield Result(result.path, error=f"{result.path}: {reason}")
            continue
        best = ranked(result.logits)[:count]
        labels = [names[i] for i in best.tolist()]
        best_scores = scores(result.logits, model.config)[best].tolist()
        yield Prediction(result.path, labels, best_scores, are_values)
