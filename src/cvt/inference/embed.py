"""From images to features."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from cvt.data import open_splits
from cvt.data.csv_file import has_labels
from cvt.data.decoding import IMAGE_SUFFIXES, Source
from cvt.inference.predict import TABLES, Result, classify, find_images
from cvt.runtime.base import Runtime
from cvt.runtime.features import FEATURES


def open_images(data: Sequence[str], **how_labelled: Any) -> Iterator[tuple[Source, str | None]]:
    """Images, each with its class where that is known.

    Args:
        data: the name of a data set, all splits of which are read, see `cvt.data`; or image files,
            glob patterns, csv files that list them and folders that have images directly in them,
            whose images have no class. One csv file that has a label column is a data set.
        how_labelled: arguments of `cvt.data.open_splits`, for a data set.

    Raises:
        FileNotFoundError: there is no such data, or no image in it.
        ValueError: the data set is malformed, or images are read as labelled.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from cvt.inference.embed import open_images
        >>> for label in ("cat", "dog"):
        ...     Path("to-embed", label).mkdir(parents=True)
        ...     Image.new("RGB", (8, 8)).save(f"to-embed/{label}/0.png")
        >>> [label for _, label in open_images(["to-embed"])]
        ['cat', 'dog']
    """
    given = [name for name, value in how_labelled.items() if value is not None]
    if len(data) == 1 and _is_data_set(data[0], bool(given)):
        splits = open_splits(data[0], **how_labelled).values()
        return ((source, label or None) for source, label in chain.from_iterable(splits))
    if given:
        raise ValueError(f"{given[0]}: {', '.join(data)} are images without labels")
    return ((path, None) for path in find_images(data))


def _is_data_set(name: str, is_described: bool) -> bool:
    path = Path(name)
    if path.suffix.lower() == ".csv" and path.is_file():
        return is_described or has_labels(path)
    if path.is_dir():
        entries = (entry for entry in path.iterdir() if entry.suffix.lower() in IMAGE_SUFFIXES)
        return not any(entry.is_file() for entry in entries)
    if path.is_file():
        return name.lower().endswith(TABLES)
    of_tables = name.startswith(("hub:", "stream:")) or name.lower().endswith(TABLES)
    return of_tables or name == "digits"


def embed(
    runtime: Runtime,
    processor: Callable,
    sources: Iterable[Source],
    batch_size: int = 32,
    workers: int = 0,
    exact: bool = False,
    max_pixels: int | None = None,
    tta: str | None = None,
    normalize: bool = False,
) -> Iterator[Result]:
    """The features of images, in their order; one without finite features gives the error.

    Args:
        runtime: computes features, see `cvt.runtime.open_runtime`.
        processor: the image processor of its model.
        sources: the images.
        batch_size: as in `cvt.inference.predict.classify`.
        workers: likewise.
        exact: likewise.
        max_pixels: likewise.
        tta: likewise; the features of an image are the mean of those of its views.
        normalize: scale the features of an image to length 1, so that the product of those of two
            images is their cosine.

    Raises:
        ValueError: the runtime computes no features, or as `classify`.

    Example:
        >>> import cvt
        >>> from PIL import Image
        >>> from cvt.data import StoredImage
        >>> from cvt.inference.embed import embed
        >>> from cvt.runtime import FeatureSettings, open_runtime
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> model = cvt.CvtForImageClassification(config)
        >>> runtime = open_runtime(model, "fused", features=FeatureSettings(stage=2))
        >>> images = [StoredImage("grey", Image.new("L", (32, 32))), StoredImage("bytes", b"?")]
        >>> results = [*embed(runtime, cvt.image_processor(config, image_size=32), images)]
        >>> results[0].features.shape, results[1].features  # results[1].error has the reason
        ((64,), None)
    """
    settings = (batch_size, workers, exact, max_pixels)
    for result in classify(runtime, processor, sources, *settings, tta=tta, needed=FEATURES):
        yield finite_features(result, normalize)


def finite_features(result: Result, normalize: bool) -> Result:
    """The result with its features as `embed` gives them; an error if they are not finite."""
    if result.features is None:
        return result
    if not np.isfinite(result.features).all():
        reason = "its features are not finite; fp16 may overflow where bf16 does not"
        return Result(result.path, error=f"{result.path}: {reason}")
    if not normalize:
        return result
    length = np.linalg.norm(result.features)
    return replace(result, features=result.features / (length or np.float32(1)))
