"""A classifier of images in one object, for services, notebooks and Ray Data."""

import os
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cvt.checkpoints import ModelSource, load_preprocessing, model_source
from cvt.data.decoding import ImageError, Source, StoredImage, decode, is_content
from cvt.data.preprocessing import preprocessing_of
from cvt.inference.embed import embed
from cvt.inference.predict import Prediction, Result, find_images, predict, with_crops
from cvt.libraries import require
from cvt.limits import check_counts
from cvt.runtime import FeatureSettings, is_classifier, open_runtime
from cvt.runtime.features import FEATURES, LOGITS

if TYPE_CHECKING:
    from cvt.modeling import CvtForImageClassification
    from cvt.runtime.base import Runtime

DOWNLOAD_BYTES = 2**26  # that an image behind a URL may have
DOWNLOAD_SECONDS = 30.0  # that fetching one may take
ROUNDING = 0.5 / 255  # beyond 0 and 1, floats still round to 0 and 255


def check_processor(model: Any, processor: Callable | None) -> None:
    """Raise a ValueError if a loaded model comes without its image processor."""
    if processor is None and is_classifier(model):
        raise ValueError(
            "a loaded model does not know its preprocessing: give its processor, such as "
            "cvt.image_processor(folder)"
        )


class Classifier:
    """Labels and scores of images; several threads may share one.

        clf = cvt.Classifier("cvt-13")
        clf("cat.jpg", top_k=5)  # [{"label": "tabby, tabby cat", "score": 0.51}, ...]
        clf(["cat.jpg", Image.open("dog.jpg"), array])  # a list of such lists
        for record in clf.stream("photos", workers=2):  # {"path": ..., "predictions": [...]}
            ...
        clf.embed(["cat.jpg", "dog.jpg"])  # features, (2, 384) in float32
        for record in clf.embed_stream("photos"):  # {"path": ..., "features": array}
            ...

    An image is a path, the bytes of a file, a PIL image, or an array (H, W, 3) of uint8 or of
    floats from 0 to 1; with `allow_urls`, also a URL.

    It is also a class for Ray Data's `map_batches`, over images or parquet files; each worker
    loads the model once. Batches get the columns `label` and `score` of the best class, and
    `error`: null, or why the image could not be decoded; there is then no label, and the score is
    NaN. Label and error are arrays of strings of Arrow. The images are the column `image` (arrays,
    or what parquet files of the hub have: structs of `bytes` and `path`) or `bytes`. With
    `features`, batches get a column of that name, too: lists of float32 of one length, null where
    there is an error.

        ds = ray.data.read_parquet("photos.parquet")  # or read_images("photos", mode="RGB")
        ds = ds.map_batches(
            cvt.Classifier,
            fn_constructor_args=("cvt-13",),
            fn_constructor_kwargs={"threads": 2},
            compute=ray.data.ActorPoolStrategy(size=4),
            num_cpus=2,
            batch_size=32,
        )
        ds.write_parquet("labels")

    Args:
        model: a published name, USER/NAME or USER/NAME@REVISION of the hub, a model folder, an
            authors' file, an exported folder, or a loaded model.
        runtime: what runs it, see `cvt.runtime.open_runtime`.
        precision: likewise.
        device: likewise.
        threads: likewise.
        batch_size: images run through the model at a time.
        processor: the image processor, if not the model's own; a loaded model needs one.
        exact: decode large JPEGs whole, see `cvt.inference.predict.classify`.
        max_pixels: the pixels that an image may have, see `cvt.data.decoding.decode`.
        tta: test-time augmentation, "flip" or "five-crop", see `cvt.inference.predict.classify`.
        allow_urls: fetch images whose http or https URL is given, of up to 64 MiB and within 30
            seconds. Whoever chooses the URLs then reaches what this machine can reach.
        features: compute features in the same pass, for `embed` and batches of Ray Data; True for
            what the model's own classifier receives. Those of an earlier stage come without labels.
            Without it, `embed` opens the model a second time.
        verify: see `cvt.runtime.open_runtime`.

    Attributes:
        runtime: what runs the model; `runtime.describe` describes it.
        processor: the preprocessing, in Pillow and numpy.

    Raises:
        FileNotFoundError: there is no such model.
        TypeError: an argument is of a wrong type; names it.
        ValueError: an argument is illegal, or a loaded model comes without its processor.
        ImportError: the runtime is not installed.

    Example:
        >>> import cvt, numpy
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> model = cvt.CvtForImageClassification(config)
        >>> processor = cvt.image_processor(config, image_size=32)
        >>> classifier = cvt.Classifier(model, runtime="torch", processor=processor)
        >>> image = numpy.zeros((48, 64, 3), "uint8")
        >>> [sorted(prediction) for prediction in classifier(image, top_k=2)]
        [['label', 'score'], ['label', 'score']]
        >>> len(list(classifier.stream([image] * 3, workers=0)))
        3
        >>> classifier.embed([image] * 3).shape
        (3, 128)
    """

    def __init__(
        self,
        model: "str | Path | ModelSource | CvtForImageClassification",
        runtime: str = "auto",
        precision: str | None = None,
        device: str = "auto",
        threads: int | None = None,
        *,
        batch_size: int = 32,
        processor: Callable | None = None,
        exact: bool = False,
        max_pixels: int | None = None,
        tta: str | None = None,
        allow_urls: bool = False,
        features: bool | FeatureSettings = False,
        verify: bool = True,
    ) -> None:
        check_counts(batch_size=batch_size)
        check_processor(model, processor)
        self._rebuild = partial(
            Classifier,
            *(model, runtime, precision, device, threads),
            batch_size=batch_size,
            processor=processor,
            exact=exact,
            max_pixels=max_pixels,
            tta=tta,
            allow_urls=allow_urls,
            features=features,
            verify=verify,
        )
        given: Any = model
        source = given if is_classifier(given) else model_source(given)
        how = (source, runtime, precision, device, threads)
        self._open: Callable[..., Runtime] = partial(open_runtime, *how, verify=verify)
        self.with_features = bool(features)
        wanted = FeatureSettings() if features is True else features or None
        self.runtime = self._open(features=wanted)
        self.processor = (
            load_preprocessing(source, self.runtime.config)
            if processor is None
            else preprocessing_of(processor)
        )
        with_crops(self.processor, tta)  # raises
        self.batch_size, self.allow_urls = batch_size, allow_urls
        self.exact, self.max_pixels, self.tta = exact, max_pixels, tta

    def __reduce__(self) -> tuple:
        return self._rebuild, ()  # a runtime does not travel; its arguments do

    def __call__(self, images: Any, top_k: int = 5) -> Any:
        """Classify an image or a list of them, or a batch of Ray Data.

        Args:
            images: an image, a list of images, or a batch: columns by name.
            top_k: how many classes to name of each image, at most all; of a batch always one. Of a
                regression all values are given.

        Returns:
            Of an image a list of `{"label", "score"}`, the best first; of a list, a list of those;
            scores are those of transformers' pipeline: of a regression, its values, unchanged;
            of a batch, the batch with more columns, see the class.

        Raises:
            ImageError: an image cannot be decoded or has wrong pixels; names which and why.
            TypeError: something is no image at all, or a single image in place of a batch.
            ValueError: a URL is given and not allowed, or a batch has no column of images.
        """
        if isinstance(images, Mapping):
            return self._with_columns(images)
        several = isinstance(images, list | tuple)
        answers = []
        for result in self._predict(map(self._source, images if several else [images]), top_k):
            if isinstance(result, Result):
                raise ImageError(result.error)
            answers.append(result.records)
        return answers if several else answers[0]

    def stream(
        self,
        images: str | os.PathLike | Iterable[Any],
        batch_size: int | None = None,
        workers: int = 1,
        top_k: int = 5,
    ) -> Iterator[dict[str, Any]]:
        """Classify any number of images, one batch after the other, in their order.

        Worker processes decode ahead: each holds two batches, and no more images than that are
        taken from an iterable in advance.

        Args:
            images: a folder (with all below it), a file, a glob pattern, or an iterable of images.
            batch_size: images at a time; the classifier's by default.
            workers: processes that decode; with 0, threads of this process, and not ahead. So it
                is in a daemonic process, as of `multiprocessing.Pool`, which may start none.
            top_k: how many classes to name of each image, at most all.

        Returns:
            An iterator of `{"path", "predictions"}`, with predictions as a call gives them, or of
            `{"path", "error"}` for an image that cannot be used.

        Raises:
            FileNotFoundError: there is no such folder, file or match, or no image in it.
            TypeError: something is no image at all, or an argument is of a wrong type.
            ValueError: an argument is illegal, or a URL is not allowed.
        """
        results = self._predict(self._sources(images), top_k, batch_size, workers)
        return (_streamed(result) for result in results)

    def embed(self, images: Any, *, normalize: bool = False) -> np.ndarray:
        """The features of images: what the model's own classifier receives.

        Args:
            images: an image, or a list of images.
            normalize: scale each row to length 1, so that the product of two is their cosine.

        Returns:
            (N, C) in float32, a row for each image.

        Raises:
            ImageError: as a call does.
            TypeError: likewise.
            ValueError: a URL is given and not allowed, or the model is an export without features.
        """
        several = isinstance(images, list | tuple)
        rows = []
        sources = map(self._source, images if several else [images])
        for result in self._embed(sources, normalize=normalize):
            if result.features is None:
                raise ImageError(result.error)
            rows.append(result.features)
        return np.stack(rows) if rows else np.empty((0, self._width), np.float32)

    def embed_stream(
        self,
        images: str | os.PathLike | Iterable[Any],
        batch_size: int | None = None,
        workers: int = 1,
        *,
        normalize: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """The features of any number of images, one batch after the other, in their order.

        Args:
            images: as in `stream`.
            batch_size: likewise.
            workers: likewise.
            normalize: as in `embed`.

        Returns:
            An iterator of `{"path", "features"}`, with features (C,), or of `{"path", "error"}` for
            an image that cannot be used.

        Raises:
            FileNotFoundError: as in `stream`.
            TypeError: likewise.
            ValueError: likewise, or the model is an export without features.
        """
        results = self._embed(self._sources(images), batch_size, workers, normalize)
        return (
            {"path": str(result.path), "error": result.error}
            if result.features is None
            else {"path": str(result.path), FEATURES: result.features}
            for result in results
        )

    @cached_property
    def _embedder(self) -> "Runtime":
        """What computes features."""
        if self.runtime.feature_settings:
            return self.runtime
        return self._open(features=FeatureSettings())

    @property
    def _width(self) -> int:
        runtime = self._embedder
        assert runtime.feature_settings
        return runtime.feature_settings.width(runtime.config)

    def _sources(self, images: str | os.PathLike | Iterable[Any]) -> Iterator[Source]:
        """The images of a stream."""
        if not isinstance(images, str | os.PathLike):
            return map(self._source, images)
        if isinstance(images, str) and is_content(images):
            decode(images)  # raises
        return find_images([os.fspath(images)])

    def _embed(
        self,
        sources: Iterable[Source],
        batch_size: int | None = None,
        workers: int = 0,
        normalize: bool = False,
    ) -> Iterator[Result]:
        size = self.batch_size if batch_size is None else batch_size
        check_counts(batch_size=size, workers=workers)
        settings = (size, workers, self.exact, self.max_pixels, self.tta, normalize)
        return embed(self._embedder, self.processor, sources, *settings)

    def _predict(
        self,
        sources: Iterable[Source],
        top_k: int,
        batch_size: int | None = None,
        workers: int = 0,
    ) -> Iterator[Prediction | Result]:
        size = self.batch_size if batch_size is None else batch_size
        check_counts(top_k=top_k, batch_size=size, workers=workers)
        settings = (top_k, size, workers, self.exact, self.max_pixels, self.tta)
        return predict(self.runtime, self.processor, sources, *settings)

    def _source(self, image: Any) -> Source:
        return image_source(image, self.allow_urls)

    def _with_columns(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of Ray Data with the columns `label`, `score` and `error`, and `features`.

        Strings are Arrow's: of objects, Ray would take the type from the values, and tables of good
        images alone and of bad ones alone would differ.
        """
        require("a batch of Ray Data", "pyarrow", extra="ray")
        import pyarrow

        has_labels = LOGITS in self.runtime.outputs
        names = [*(("label", "score") if has_labels else ()), "error"]
        names += [FEATURES] if self.with_features else []
        if taken := [name for name in names if name in batch]:
            raise ValueError(
                f"the batch has a column {', '.join(taken)} already: rename or drop it before"
            )
        name = next((name for name in ("image", "bytes") if name in batch), None)
        if name is None:
            raise ValueError(
                f"the batch has the columns {', '.join(batch)}: expected image (arrays or structs "
                "of bytes and path) or bytes"
            )
        column = batch[name]
        if isinstance(column, bytes | Image.Image) or getattr(column, "shape", ())[2:] == (3,):
            raise TypeError(
                f"{name} is one image: Ray Data's map_batches gives batches; classify one image as "
                f"classifier(row[{name!r}])"
            )
        cells = map(self._cell, column)
        results: list[Any] = [*(self._predict(cells, 1) if has_labels else self._embed(cells))]
        columns: dict[str, Any] = {}
        if has_labels:
            best = [result if isinstance(result, Prediction) else None for result in results]
            columns["label"] = pyarrow.array([b and b.labels[0] for b in best], pyarrow.string())
            columns["score"] = np.array([b.scores[0] if b else np.nan for b in best])
        if self.with_features:
            row = pyarrow.list_(pyarrow.float32(), self._width)
            columns[FEATURES] = pyarrow.array([result.features for result in results], row)
        errors = [getattr(result, "error", None) for result in results]
        return {**batch, **columns, "error": pyarrow.array(errors, pyarrow.string())}

    def _cell(self, cell: Any) -> Source:
        """The image in a cell; an empty one is an image that cannot be decoded."""
        if isinstance(cell, Mapping):
            name, content = cell.get("path") or "<bytes>", cell.get("bytes")
            cell = Path(name) if content is None else StoredImage(name, content)
        return StoredImage("<null>", b"") if cell is None else self._source(cell)


def _streamed(result: Prediction | Result) -> dict[str, Any]:
    if isinstance(result, Prediction):
        return {"path": str(result.path), "predictions": result.records}
    return {"path": str(result.path), "error": result.error}


# ------------------------------------------------------------------------------ images


def image_source(image: Any, allow_urls: bool = False) -> Source:
    """What `cvt.data.decoding.decode` takes, of an image as a `Classifier` takes it.

    Raises:
        ImageError: a string is an image in base64.
        TypeError: it is no image at all.
        ValueError: it is a URL, and these are not allowed.
    """
    if isinstance(image, str) and image.lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise ValueError(f"{image}: URLs are fetched only by Classifier(allow_urls=True)")
        return StoredImage(image, partial(fetched, image))
    if isinstance(image, str) and is_content(image):
        return StoredImage("<text>", partial(decode, image))  # which raises
    if isinstance(image, str | os.PathLike):
        return Path(image)
    if isinstance(image, StoredImage):
        return image
    if isinstance(image, bytes):
        return StoredImage("<bytes>", image)
    if isinstance(image, np.ndarray):
        return StoredImage("<array>", partial(from_array, image))
    if isinstance(image, Image.Image):
        return StoredImage(getattr(image, "filename", "") or "<PIL image>", image)
    raise TypeError(
        "an image is a path, bytes, a PIL image, an array or a URL, "
        f"not {type(image).__module__}.{type(image).__qualname__}"
    )


def from_array(array: np.ndarray) -> Image.Image:
    """The image of an array, (H, W, 3), of uint8 or of floats from 0 to 1.

    Raises:
        ImageError: it is another array; names what was expected.
    """
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ImageError(f"<array>: has shape {array.shape}; expected (height, width, 3)")
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    if array.dtype.kind != "f":
        raise ImageError(f"<array>: is of {array.dtype}; expected uint8, or floats from 0 to 1")
    low, high = array.min(), array.max()
    if not -ROUNDING < low <= high < 1 + ROUNDING:  # nor NaN
        raise ImageError(
            f"<array>: has floats from {low:g} to {high:g}; expected 0 to 1, or uint8 of 0 to 255"
        )
    return Image.fromarray(np.rint(array.clip(0, 1) * np.float32(255)).astype(np.uint8))


def fetched(url: str) -> bytes:
    """What is behind an http or https URL.

    Raises:
        ImageError: it cannot be fetched, is too large or takes too long.
    """
    # Not urllib's own opener: that would follow a redirection to ftp.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    end, content = time.monotonic() + DOWNLOAD_SECONDS, bytearray()
    try:
        with opener.open(url, timeout=DOWNLOAD_SECONDS) as response:
            while piece := response.read1(2**16):
                content += piece
                if len(content) > DOWNLOAD_BYTES:
                    raise ImageError(f"{url}: is larger than {DOWNLOAD_BYTES} bytes")
                if time.monotonic() > end:
                    raise ImageError(f"{url}: takes longer than {DOWNLOAD_SECONDS:g} seconds")
    except (OSError, HTTPException) as error:
        raise ImageError(f"{url}: cannot be fetched: {error}") from error
    return bytes(content)
