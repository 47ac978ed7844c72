"""A model of a service: one image at a time in, computed in batches."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from cvt.data.decoding import Source
from cvt.data.preprocessing import Preprocessing
from cvt.inference.classifier import Classifier
from cvt.inference.predict import Prediction, Result, namer, reader
from cvt.serving.metrics import Metrics
from cvt.serving.settings import Settings

Compute = Callable[[list[np.ndarray]], list[np.ndarray]]
# From a function of several images to one of a single image, which is called in batches of at most
# so many; `Batcher` is one, `ray.serve.batch` another.
Batched = Callable[[Compute, int], Callable[[np.ndarray], Awaitable[np.ndarray]]]


class ServedModel:
    """A classifier in a service.

    Args:
        name: how requests call it.
        classifier: the classifier.
        sha256: of its files.
        settings: of the service.
        batched: how images come together.
        metrics: of the service.

    Raises:
        ValueError: it has no classes.
    """

    def __init__(
        self,
        name: str,
        classifier: Classifier,
        sha256: str | None,
        settings: Settings,
        batched: Batched,
        metrics: Metrics,
    ) -> None:
        self.name, self.runtime, self.sha256 = name, classifier.runtime, sha256
        self.processor, self.metrics = classifier.processor, metrics
        self.read = reader(self.processor, classifier.exact, settings.max_pixels)
        namer(self.runtime.config, 1)  # raises
        # Without resizing, images are of different sizes.
        max_batch = settings.max_batch if self.processor.do_resize else 1
        self.logits = batched(self._logits, max_batch)
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

    async def prediction(
        self, source: Source, pixels: np.ndarray, top_k: int
    ) -> Prediction | Result:
        """The best classes of an image as `cvt predict` gives them; an error if not finite."""
        result = Result(source, await self.logits(pixels))
        return namer(self.runtime.config, top_k)(result)

    def _logits(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """The logits of preprocessed images, (1, C, H, W) each; called in the computing thread."""
        begin = time.perf_counter()
        logits = self.runtime(np.concatenate(images), preprocessed=True)
        self.metrics.batch_seconds.labels(self.name).observe(time.perf_counter() - begin)
        self.metrics.batch_images.labels(self.name).observe(len(images))
        return list(logits)

    @property
    def about(self) -> dict[str, Any]:
        """What clients may want to know of it."""
        config: Any = self.runtime.config
        processor = self.processor
        return {
            "name": self.name,
            "sha256": self.sha256,
            "labels": list(config.class_names),
            "problem_type": config.problem_type,
            "thresholds": config.thresholds,
            "preprocessing": asdict(processor) if isinstance(processor, Preprocessing) else None,
            "runtime": {
                "name": self.runtime.name,
                "precision": self.runtime.precision,
                "device": self.runtime.device,
                "threads": self.runtime.threads,
            },
        }
