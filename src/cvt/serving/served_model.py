"""A model of a service: one image at a time in, computed in batches."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cvt.data.decoding import Source
from cvt.data.preprocessing import AnyPreprocessing, Preprocessing
from cvt.inference.predict import namer, reader
from cvt.runtime.base import Runtime
from cvt.serving.metrics import Metrics
from cvt.serving.settings import Settings

Outputs = dict[str, np.ndarray]  # of an image: its logits (K,), its features (C,)
# From a function of several images to one of a single image, which is called in batches of at most
# so many; `Batcher` is one, `ray.serve.batch` another.
Compute = Callable[[list[np.ndarray]], list[Outputs]]
Batched = Callable[[Compute, int], Callable[[np.ndarray], Awaitable[Outputs]]]


class OpenedModel(NamedTuple):
    """What a service is given of a model.

    Attributes:
        runtime: what runs it; with features it answers embeddings, too.
        processor: its preprocessing.
        sha256: of its files.
    """

    runtime: Runtime
    processor: AnyPreprocessing
    sha256: str | None = None


class ServedModel:
    """A model in a service.

    Args:
        name: how requests call it.
        opened: the model.
        settings: of the service.
        batched: how images come together.
        metrics: of the service.

    Raises:
        ValueError: it has no classes.
    """

    def __init__(
        self,
        name: str,
        opened: OpenedModel,
        settings: Settings,
        batched: Batched,
        metrics: Metrics,
    ) -> None:
        self.name, self.metrics = name, metrics
        self.runtime, self.processor, self.sha256 = opened
        self.read = reader(self.processor, exact=False, max_pixels=settings.max_pixels)
        namer(self.runtime.config, 1)  # raises
        # Without resizing, images are of different sizes.
        max_batch = settings.max_batch if self.processor.do_resize else 1
        self.outputs = batched(self._outputs, max_batch)
        # What a runtime does once, the first request need not wait for.
        height, width = self.runtime.image_size or [self.runtime.minimum_image_size] * 2
        self.runtime(self.processor([Image.new("RGB", (width, height))]), preprocessed=True)

    def pixels(self, source: Source) -> np.ndarray:
        """An image as the model takes it, (1, C, H, W); called in any thread.

        Raises:
            ImageError: it cannot be decoded.
            PixelError: the model does not take images of its size.
        """
        return self.runtime.checked(self.processor([self.read(source)]), preprocessed=True)

    def _outputs(self, images: list[np.ndarray]) -> list[Outputs]:
        """Logits and features of preprocessed images, (1, C, H, W) each."""
        begin = time.perf_counter()
        found = self.runtime.run(np.concatenate(images), preprocessed=True)
        self.metrics.batch_seconds.labels(self.name).observe(time.perf_counter() - begin)
        self.metrics.batch_images.labels(self.name).observe(len(images))
        return [dict(zip(found, rows, strict=True)) for rows in zip(*found.values(), strict=True)]

    @property
    def about(self) -> dict[str, Any]:
        """What clients may want to know of it."""
        config: Any = self.runtime.config
        processor, features = self.processor, self.runtime.feature_settings
        return {
            "name": self.name,
            "sha256": self.sha256,
            "labels": list(config.class_names),
            "problem_type": config.problem_type,
            "thresholds": config.thresholds,
            "embedding": features and features.width(config),
            "preprocessing": asdict(processor) if isinstance(processor, Preprocessing) else None,
            "runtime": {
                "name": self.runtime.name,
                "precision": self.runtime.precision,
                "device": self.runtime.device,
                "threads": self.runtime.threads,
            },
        }
