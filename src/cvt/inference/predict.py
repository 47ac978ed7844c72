"""From images to labels and scores."""

import glob
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from PIL import Image

from cvt.architecture import Architecture
from cvt.data import images_below
from cvt.data.csv_file import csv_images
from cvt.data.decoding import ImageError, Source, StoredImage, decode
from cvt.data.folder import Skipped, unreadable
from cvt.data.preprocessing import (
    AnyPreprocessing,
    FiveCrops,
    Preprocessing,
    check_range,
    preprocessing_of,
)
from cvt.data.workers import computed_ahead
from cvt.files import check_path
from cvt.problem_type import MULTI_LABEL, REGRESSION
from cvt.runtime.base import PixelError, Runtime
from cvt.runtime.features import LOGITS

if TYPE_CHECKING:
    from torch import nn

    from cvt.modeling import CvtForImageClassification

logger = logging.getLogger(__name__)
TTA = ("flip", "five-crop")
TABLES = (".parquet", ".tar", ".tgz", ".tar.gz")  # and archives, of labelled images
BLANK = Image.new("RGB", (32, 32), "grey")  # in the place of what cannot be decoded
# Returns the image of a number, which it may have kept; else it calls what prepares it.
Keep = Callable[[int, Callable[[], Image.Image]], Image.Image]


@dataclass(frozen=True)
class Result:
    """What became of an image: logits, (K,) in float32, or the reason for none.

    Where the runtime computes features, these too, (C,); those of an earlier stage come alone.
    """

    path: Source
    logits: np.ndarray | None = None
    error: str | None = None
    features: np.ndarray | None = None


@dataclass(frozen=True)
class Prediction:
    """The classes of one image with the highest scores, the highest first.

    Attributes:
        path: the image.
        labels: names of the classes; those that the image has come first.
        scores: from 0 to 1; of a regression, the values that the model gives.
        are_values: whether the scores are values of a regression.
        has: which of the classes the image has: their scores reach the model's thresholds. None
            of a model that has none, which gives one class or values.
        logits: of all classes, (K,), in the model's order.
        probabilities: the scores of all classes, likewise.
        features: of the image, (C,), where the runtime computes them.
    """

    path: Source
    labels: list[str]
    scores: list[float]
    are_values: bool = False
    has: list[bool] | None = None
    logits: np.ndarray | None = field(default=None, compare=False, repr=False)
    probabilities: np.ndarray | None = field(default=None, compare=False, repr=False)
    features: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def records(self) -> list[dict[str, Any]]:
        """Label and score of each class, in the form of transformers' pipeline.

        Where there are thresholds, also `predicted`: whether the image has the class.
        """
        pairs = zip(self.labels, self.scores, strict=True)
        records: list[dict[str, Any]] = [{"label": label, "score": score} for label, score in pairs]
        for record, has in zip(records, self.has or [], strict=False):
            record["predicted"] = has
        return records


def find_images(sources: Iterable[str | Path]) -> Iterator[Path]:
    """The image files that files, folders (with all below them) and glob patterns name, in order.

    A csv file names the images that it lists, see `cvt.data.csv_file.csv_images`. Folders are read
    while one walks on: a million images are never in a list.

    Raises:
        FileNotFoundError: a source names no image, or one that is missing; raised before the first
            image is read.
        ValueError: a source is another table or an archive, or a malformed csv file; likewise.
    """
    return chain.from_iterable([_found(source) for source in sources])


def _found(source: str | Path) -> Iterator[Path]:
    check_path(source, "source")
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() == ".csv":
            return iter(csv_images(path))
        if path.name.lower().endswith(TABLES):
            raise ValueError(
                f"{source} is neither an image nor a csv file of paths: `cvt evaluate` and "
                "`cvt embed` read the labelled images in it"
            )
        return iter([path])
    if path.is_dir():
        images, fault = images_below(path), "has no images in it"
    elif os.path.lexists(path):
        raise FileNotFoundError(f"{source} is none of the files that are read: {unreadable(path)}")
    else:
        images = _matching(str(source))
        fault = "matches no file" if set(str(source)) & set("*?") else "does not exist"
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
    needed = preprocessing_of(processor).pixels_needed
    read = partial(decode, max_pixels=max_pixels, least_of_large=needed)
    return read if exact else partial(read, least=needed)


def classify(
    model: "Runtime | nn.Module",
    processor: Callable,
    sources: Iterable[Source],
    batch_size: int = 32,
    workers: int = 0,
    exact: bool = False,
    max_pixels: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    tta: str | None = None,
    needed: str = LOGITS,
    keep: Keep | None = None,
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
        tta: test-time augmentation. "flip": an image and its mirror image; "five-crop": the centre
            and the four corners of the resized image. All views of a batch run at once, and the
            scores of an image are the mean of those of its views, and so are its features.
        needed: what the runtime must compute, `logits` or `features`.
        keep: keeps resized images for the next call, by their number among the sources; unused
            where the images are not resized, or by another image processor than CvT's.

    Raises:
        ValueError: the processor is not for decoded images; names its setting. `tta` is none of
            these, or the processor crops nothing. The runtime does not compute what is needed.
        Interrupted: `interrupted` was true, and `POLL_SECONDS` passed without a batch.
    """
    runtime = runtime_of(model)
    preprocessing = with_crops(preprocessing_of(processor), tta)
    read = reader(preprocessing, exact, max_pixels)
    if not (isinstance(preprocessing, Preprocessing) and preprocessing.do_resize):
        keep = None
    batch_size = batch_size if preprocessing.do_resize else 1
    batches, sent = tee(_batches(enumerate(sources), batch_size))
    prepared = _prepared(preprocessing, read, keep, sent, workers, interrupted)
    for (images, errors), numbered in zip(prepared, batches, strict=True):
        batch = [source for _, source in numbered]
        pixels = preprocessing.normalise(images)
        if tta == "flip":
            pixels = np.concatenate([pixels, pixels[..., ::-1]])
        try:
            outputs = runtime.run(pixels, True, needed)
        except PixelError as refusal:
            if preprocessing.do_resize:
                raise
            yield Result(batch[0], error=errors[0] or f"{batch[0]}: {refusal}")
            continue
        for name, values in outputs.items():
            of_views = values.reshape(-1, len(batch), values.shape[1])  # (V, B, K)
            if not tta:
                outputs[name] = of_views[0]
            elif name == LOGITS:
                outputs[name] = mean_of_views(of_views, runtime.config)
            else:
                outputs[name] = of_views.mean(axis=0)
        for i, (source, error) in enumerate(zip(batch, errors, strict=True)):
            found = {} if error else {name: values[i] for name, values in outputs.items()}
            yield Result(source, error=error, **found)


def with_crops(preprocessing: AnyPreprocessing, tta: str | None) -> AnyPreprocessing:
    """The preprocessing, with the crops of a test-time augmentation.

    Raises:
        ValueError: `tta` is unknown, or nothing is cropped.
    """
    if tta not in (None, *TTA):
        raise ValueError(f"tta = {tta}: must be one of {', '.join(TTA)}")
    return FiveCrops.of(preprocessing) if tta == "five-crop" else preprocessing


def mean_of_views(logits: np.ndarray, config: Architecture) -> np.ndarray:
    """Logits, (B, K), whose `scores` are the mean of those of the logits of views, (V, B, K)."""
    if config.problem_type == "regression":
        return logits.mean(axis=0)

    def log_mean(logs: np.ndarray) -> np.ndarray:
        return np.logaddexp.reduce(logs, axis=0) - np.float32(np.log(len(logs)))

    if has_independent_scores(config):
        # The logit of p is log p - log(1 - p), and 1 - p is the sigmoid of the negative logit.
        positive, negative = (log_mean(-np.logaddexp(0, -sign * logits)) for sign in (1, -1))
        return positive - negative
    return log_mean(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))


def runtime_of(model: "Runtime | nn.Module") -> Runtime:
    """What runs a classifier; one of PyTorch, or what wraps it, runs as it is."""
    if isinstance(model, Runtime):
        return model
    from cvt.runtime.torch_runtime import TorchRuntime

    return TorchRuntime(model)


Numbered = tuple[int, Source]


def _batches(sources: Iterable[Numbered], batch_size: int) -> Iterator[list[Numbered]]:
    remaining = iter(sources)
    while batch := list(islice(remaining, batch_size)):
        yield batch


Prepared = tuple[np.ndarray, list[str | None]]


def _prepared(
    preprocessing: AnyPreprocessing,
    read: Callable[[Source], Image.Image],
    keep: Keep | None,
    batches: Iterable[list[Numbered]],
    workers: int,
    interrupted: Callable[[], bool],
) -> Iterator[Prepared]:
    """Of each batch what `resize` returns, and what is wrong with each image, if anything."""
    first = list(islice(batches, 2))
    batches = chain(first, batches)
    # A single batch is there sooner without a process; in a daemonic one there may be none.
    if workers and len(first) > 1 and not multiprocessing.current_process().daemon:
        portable = ([(i, _portable(source, read)) for i, source in batch] for batch in batches)
        prepare = partial(_prepare, preprocessing, read, keep, map)
        yield from computed_ahead(prepare, portable, workers, interrupted)
        return
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        for batch in batches:
            yield _prepare(preprocessing, read, keep, pool.map, batch)


def _prepare(
    preprocessing: AnyPreprocessing,
    read: Callable[[Source], Image.Image],
    keep: Keep | None,
    each: Callable,
    batch: list[Numbered],
) -> Prepared:
    """Decode and resize a batch."""

    def resized(image: Image.Image) -> Image.Image:
        return Image.fromarray(preprocessing.resize([image])[0])

    def decoded(numbered: Numbered) -> tuple[Image.Image, str | None]:
        number, source = numbered
        try:
            return (keep(number, lambda: resized(read(source))) if keep else read(source)), None
        except ImageError as error:
            return (resized(BLANK) if keep else BLANK), str(error)

    images, errors = zip(*each(decoded, batch), strict=True)
    return (preprocessing.unresized if keep else preprocessing).resize(images), list(errors)


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


def ranked(logits: np.ndarray) -> np.ndarray:
    """The classes from the most to the least likely; of equal ones the first comes first."""
    return np.argsort(-logits, kind="stable")


def scores(logits: np.ndarray, config: Architecture) -> np.ndarray:
    """Scores, (K,), as by transformers' pipeline.

    Softmax; sigmoid where labels are independent; of a regression the values themselves.
    """
    if config.problem_type == REGRESSION:
        return logits
    if has_independent_scores(config):
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def has_independent_scores(config: Architecture) -> bool:
    """Whether the score of a class is a sigmoid, whatever those of the others are."""
    return config.problem_type == MULTI_LABEL or config.num_labels == 1


def scores_per_image(topk: int, config: Architecture) -> int:
    """How many scores `predict` gives of an image: `topk`, at most all; of a regression all."""
    is_regression = config.problem_type == REGRESSION
    return len(config.class_names) if is_regression else min(topk, len(config.class_names))


def predict(
    model: "Runtime | CvtForImageClassification",
    processor: Callable,
    sources: Iterable[Source],
    topk: int = 5,
    batch_size: int = 32,
    workers: int = 0,
    exact: bool = False,
    max_pixels: int | None = None,
    tta: str | None = None,
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
        tta: as in `classify`.

    Raises:
        ValueError: the model has no classes, or as `classify`.
    """
    named = namer(model.config, topk)
    settings = (batch_size, workers, exact, max_pixels)
    for result in classify(model, processor, sources, *settings, tta=tta):
        yield named(result)


def namer(config: Architecture, topk: int) -> Callable[[Result], Prediction | Result]:
    """What turns the logits of an image into its best classes, as `predict` describes it.

    Args:
        config: the classifier's.
        topk: how many classes to name, at most all.

    Raises:
        ValueError: the model has no classes.
    """
    names = config.class_names
    if not names:
        raise ValueError("num_labels = 0: the model has no classes to name")
    count = scores_per_image(topk, config)
    are_values = config.problem_type == REGRESSION

    def named(result: Result) -> Prediction | Result:
        if result.logits is None:
            return result
        if not np.isfinite(result.logits).all():
            reason = "its scores are not finite; fp16 may overflow where bf16 does not"
            return Result(result.path, error=f"{result.path}: {reason}")
        found = scores(result.logits, config)
        best, has = ranked(result.logits), None
        if config.thresholds and config.problem_type == MULTI_LABEL:
            reached = found >= np.array(config.thresholds)
            best = np.concatenate([best[reached[best]], best[~reached[best]]])
            has = reached[best[:count]].tolist()
        best = best[:count]
        labels = [names[i] for i in best.tolist()]
        return Prediction(
            *(result.path, labels, found[best].tolist(), are_values, has),
            logits=result.logits,
            probabilities=found,
            features=result.features,
        )

    return named
