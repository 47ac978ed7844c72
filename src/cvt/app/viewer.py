"""What the page asks of the model: the classes of a picture, and the heat map of a class."""

import io
import threading
from pathlib import Path

import numpy as np
from PIL import Image

from cvt.app.limits import PIXELS, SHOWN_SIDE
from cvt.app.sessions import Picture
from cvt.checkpoints import image_size_of
from cvt.data.class_names import distinct_names
from cvt.data.decoding import StoredImage, decode
from cvt.inference import explanation
from cvt.inference.classifier import Classifier
from cvt.inference.explain import Explainer
from cvt.inference.page import page_name
from cvt.inference.predict import Result, predict
from cvt.profile import profile
from cvt.text import printable

SMALL_SIDE = 448  # pixels of the longer side; smaller pictures are shown enlarged


class Viewer:
    """A model with its explanations; one picture at a time, whichever thread asks.

    Args:
        model: the name of a model, a model folder or a file of weights.
        device: as in `cvt.Classifier`.
        threads: likewise.

    Attributes:
        name: what the page calls the model: never the path of a folder.
        names: of the classes, safe to show, each another, in the order of the model's outputs.
        classifier: what answers.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is no classifier of pictures with classes to show, or has no explanations.
    """

    def __init__(self, model: str, device: str = "auto", threads: int | None = None) -> None:
        self.name = page_name(model)
        self.explainer = Explainer(model, device=device, threads=threads)
        self.classifier = Classifier(
            *(self.explainer.model, "fused", None, device, threads),
            processor=self.explainer.processor,
        )
        config = self.classifier.runtime.config
        if config.problem_type == "regression":
            raise ValueError(f"{model} is a regression: the page shows classes and their scores")
        if not config.class_names:
            raise ValueError(f"{model} has no classes to show: num_labels = 0")
        self.names = distinct_names(map(printable, config.class_names))
        self._lock = threading.Lock()

    def look(self, name: str, source: Path | StoredImage) -> Picture:
        """Decode a picture and classify it.

        Args:
            name: of its file, for the page.
            source: the picture.

        Raises:
            OversizedError: it has too many pixels; found before a pixel is decoded.
            ImageError: it cannot be decoded.
            ArithmeticError: the model has no finite scores for it.
        """
        image = decode(source, max_pixels=PIXELS, least_of_large=2 * SHOWN_SIDE)
        running, processor = self.classifier.runtime, self.classifier.processor
        with self._lock:
            (found,) = predict(running, processor, [StoredImage(name, image)], topk=1)
        if isinstance(found, Result):
            raise ArithmeticError(found.error)
        assert found.probabilities is not None
        scores = found.probabilities.tolist()
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)  # a fifth of the time for a sixth more bytes
        return Picture(name, buffer.getvalue(), scores)

    def heat_map(self, picture: Picture, index: int) -> Image.Image:
        """The heat map of a class, laid over the picture.

        Args:
            picture: that `look` returned.
            index: of the class.
        """
        with self._lock:
            explained = self.explainer(decode(picture.content), class_name=index)
        return explained.resized(SHOWN_SIDE).overlay()  # smooth, over the pixels of a tiny one

    def top(self, picture: Picture, count: int) -> dict[str, float]:
        """The classes with the highest scores, the highest first."""
        return {self.names[i]: picture.scores[i] for i in self.best(picture)[:count]}

    def best(self, picture: Picture) -> list[int]:
        """All classes by their scores, the highest first; of equal ones the first comes first."""
        return np.argsort(-np.array(picture.scores), kind="stable").tolist()


def enlarged(image: Image.Image) -> Image.Image:
    """A picture of a few pixels by a whole factor, so that a browser does not blur it."""
    return explanation.enlarged(image, SMALL_SIDE)


def shown(picture: Picture) -> Image.Image:
    """The picture as the page shows it."""
    return enlarged(Image.open(io.BytesIO(picture.content)).convert("RGB"))


def facts(viewer: Viewer) -> tuple[str, ...]:
    """Numbers of the model's card: classes, parameters, multiply-adds, pixels, activation, runtime.

    In the order of `Texts.facts`.
    """
    config = viewer.explainer.model.config
    size = image_size_of(viewer.explainer.processor)
    counted = profile(config, size)
    return (
        f"{config.num_labels:,}",
        f"{counted.parameters / 1e6:,.1f} M",
        f"{counted.macs / 1e9:,.2f} G",
        f"{size} × {size}",
        config.hidden_act,
        viewer.classifier.runtime.describe,
    )
