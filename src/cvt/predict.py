"""From image files to labels and scores."""

import glob
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cvt.configuration import CvtConfig
from cvt.datasets import images_below
from cvt.images import ImageError, decode
from cvt.modeling import CvtForImageClassification


@dataclass(frozen=True)
class Result:
    """What became of an image file: logits, (K,) in float32 on the CPU, or the reason for none."""

    path: Path
    logits: Tensor | None = None
    error: str | None = None


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image, best first, and their scores from 0 to 1."""

    path: Path
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


@torch.inference_mode()
def classify(
    model: CvtForImageClassification,
    processor: Callable,
    paths: Iterable[Path],
    batch_size: int = 32,
) -> Iterator[Result]:
    """Classify image files, batch by batch, in their order.

    Args:
        model: used in eval mode, on the device it is on.
        processor: its image processor.
        paths: the files; read as they are needed.
        batch_size: images decoded, and run through the model, at a time.
    """
    model.eval()
    remaining = iter(paths)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        while batch := list(islice(remaining, batch_size)):
            decoded = list(pool.map(_decoded, batch))
            images = [image for image in decoded if not isinstance(image, ImageError)]
            logits = iter(())
            if images:
                pixels = processor(images, return_tensors="pt")["pixel_values"]
                logits = iter(model(pixels.to(model.device)).logits.float().cpu())
            for path, image in zip(batch, decoded, strict=True):
                if isinstance(image, ImageError):
                    yield Result(path, error=str(image))
                else:
                    yield Result(path, logits=next(logits))


def _decoded(path: Path) -> Image.Image | ImageError:
    try:
        return decode(path)
    except ImageError as error:
        return error


def scores(logits: Tensor, config: CvtConfig) -> Tensor:
    """Scores from 0 to 1, as by transformers' pipeline: sigmoid where labels are independent."""
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return logits.sigmoid()
    return logits.softmax(dim=-1)


def predict(
    model: CvtForImageClassification,
    processor: Callable,
    paths: Iterable[Path],
    topk: int = 5,
    batch_size: int = 32,
) -> Iterator[Prediction | Result]:
    """The best classes of image files; one that cannot be decoded gives a `Result` with the error.

    Args:
        model: a classifier.
        processor: its image processor.
        paths: the files.
        topk: how many classes to name, at most all.
        batch_size: as in `classify`.
    """
    names = model.config.class_names
    for result in classify(model, processor, paths, batch_size):
        if result.logits is None:
            yield result
            continue
        best = scores(result.logits, model.config).topk(min(topk, len(names)))
        labels = [names[i] for i in best.indices.tolist()]
        yield Prediction(result.path, labels, best.values.tolist())
