"""Features of images: what a classifier's Linear receives, computed once for each image."""

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvt.checkpoints import ModelSource, load_classifier, load_processor, model_source
from cvt.checkpoints.adapters import model_from_config
from cvt.data.decoding import Source
from cvt.inference.metrics import Failure
from cvt.inference.predict import classify
from cvt.limits import check_counts
from cvt.modeling import CvtForImageClassification
from cvt.runtime import open_runtime
from cvt.runtime.base import Runtime
from cvt.strict_loading import CLASSIFIER


class Features(NamedTuple):
    """The features of images, a row for each that could be decoded.

    Attributes:
        values: (N, C) in float32.
        positions: (N,), the position of each row's image among all images.
        failures: the images that could not be decoded.
    """

    values: np.ndarray
    positions: np.ndarray
    failures: list[Failure]


def with_classifier(
    model: CvtForImageClassification, classes: list[str], weights: Mapping[str, Tensor]
) -> CvtForImageClassification:
    """A copy of a model, in fp32 and eval mode, with another classifier.

    Args:
        model: is left as it is.
        classes: names of the classes; with none, the logits of the copy are the features.
        weights: of the classifier, by their names in the model's state dict.
    """
    config = copy.deepcopy(model.config)
    config.class_names, config.problem_type, config.dtype = classes, None, torch.float32
    config.thresholds = None
    kept = {name: w for name, w in model.state_dict().items() if name not in CLASSIFIER}
    return model_from_config(config, {**kept, **weights}, torch.float32).eval()


def feature_runtime(
    model: CvtForImageClassification, device: str = "auto", threads: int | None = None
) -> Runtime:
    """What computes the features of a model: its fused form without the classifier.

    Args:
        model: is left as it is.
        device: as in `cvt.runtime.open_runtime`.
        threads: likewise.

    Returns:
        A runtime whose logits are the features: the class token, or the mean of the tokens, after
        the last LayerNorm, (B, C).
    """
    return open_runtime(with_classifier(model, [], {}), "fused", None, device, threads)


def features(
    model: Runtime | CvtForImageClassification,
    processor: Callable,
    images: Iterable[Source],
    batch_size: int = 32,
    workers: int = 0,
    progress: Callable[[], Any] = lambda: None,
    *,
    exact: bool = False,
    max_pixels: int | None = None,
) -> Features:
    """Compute the features of images; those that cannot be decoded are listed.

    Args:
        model: what `feature_runtime` returned; or a model, for which it is called.
        processor: its image processor.
        images: read as they are needed.
        batch_size: as in `cvt.inference.predict.classify`.
        workers: likewise.
        progress: called after every image.
        exact: as in `cvt.inference.predict.classify`.
        max_pixels: likewise.

    Raises:
        TypeError: batch size or workers are no whole numbers.
        ValueError: these are out of bounds, there are no images, none could be decoded, or the
            runtime is of a model with classes.
        FloatingPointError: the features of an image are not finite.

    Example:
        >>> import cvt, numpy
        >>> from PIL import Image
        >>> from cvt.data import StoredImage
        >>> from cvt.inference.features import features
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> model = cvt.CvtForImageClassification(config)
        >>> images = [StoredImage("grey", Image.new("L", (32, 32))), StoredImage("bytes", b"?")]
        >>> found = features(model, cvt.image_processor(config, image_size=32), images)
        >>> found.values.shape, found.positions.tolist(), [f.position for f in found.failures]
        ((1, 128), [0], [1])
    """
    check_counts(batch_size=batch_size, workers=workers)
    runtime = model if isinstance(model, Runtime) else feature_runtime(model)
    if runtime.config.num_labels:
        raise ValueError("the runtime returns logits, no features: feature_runtime opens one")
    rows: list[np.ndarray] = []
    positions: list[int] = []
    failures: list[Failure] = []
    results = classify(
        runtime, processor, images, batch_size, workers, exact=exact, max_pixels=max_pixels
    )
    for position, result in enumerate(results):
        progress()
        if result.logits is None:
            failures.append(Failure(position, str(result.path), str(result.error)))
        elif not np.isfinite(result.logits).all():
            raise FloatingPointError(f"{result.path}: the model's features of it are not finite")
        else:
            rows.append(result.logits)
            positions.append(position)
    if not rows and failures:
        raise ValueError(
            f"none of the {len(failures)} images could be decoded: {failures[0].error}"
        )
    if not rows:
        raise ValueError("there are no images to compute features of")
    return Features(np.stack(rows), np.array(positions), failures)


def feature_rows(
    model: str | Path | ModelSource,
    images: Iterable[Source],
    device: str = "auto",
    threads: int | None = None,
    *,
    max_pixels: int | None = None,
    verify: bool = True,
    progress: Callable[[], Any] = lambda: None,
) -> np.ndarray:
    """The features of images, (N, C), with zeros for those that cannot be decoded.

    Args:
        model: a published name, a model folder or a file of weights.
        images: read as they are needed.
        device: as in `cvt.runtime.open_runtime`.
        threads: likewise.
        max_pixels: as in `features`.
        verify: compare a model folder with the SHA-256 that were written with it.
        progress: called after every image.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the model is an export, or no image could be decoded.
        FloatingPointError: the features of an image are not finite.
    """
    source = model_source(model)
    opened = load_classifier(source, verify=verify)
    found = features(
        feature_runtime(opened, device, threads),
        load_processor(source, opened.config),
        images,
        progress=progress,
        max_pixels=max_pixels,
    )
    rows = np.zeros((len(found.positions) + len(found.failures), found.values.shape[1]), np.float32)
    rows[found.positions] = found.values
    return rows
