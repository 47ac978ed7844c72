"""Labelled images as a `tf.data.Dataset`, which `fit` and `evaluate` take on every backend."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cvt.data import LabelledImages, image_folder
from cvt.data.decoding import decode
from cvt.data.folder import folder_splits
from cvt.data.preprocessing import check_range
from cvt.keras.modeling import DATA_FORMATS

if TYPE_CHECKING:
    import tensorflow as tf

BLANK = Image.new("RGB", (32, 32))
TRIES = 10  # to find a crop of the drawn shape that lies within the image
RATIO = 4 / 3  # of a crop's sides, at most


def image_dataset(
    images: LabelledImages | str | Path,
    processor: Any,
    batch_size: int = 32,
    *,
    training: bool = False,
    classes: Sequence[str] | None = None,
    data_format: str = "channels_first",
    crop_scale: float = 0.35,
    flip: float = 0.5,
    seed: int = 0,
    max_pixels: int | None = None,
) -> "tf.data.Dataset":
    """Images, preprocessed as `cvt evaluate` does, or random views of them to train on.

    Pixels are those of PyTorch to the last bit, because the same Pillow and the same image
    processor make them, in threads. TensorFlow's own decoding and resizing would take half the
    time, but differ by up to 7/255 on photographs.

    Args:
        images: a folder with a folder per class, or what `cvt.data` opened.
        processor: of `cvt.image_processor`; `backend="pil"` would differ by up to 2/255.
        batch_size: images in a batch; the last batch may have fewer.
        training: give a random crop of every image, perhaps mirrored, in a new random order each
            time that the dataset is gone through. Otherwise the order is that of `images`.
        classes: the names of the classes in the order of the model's outputs; by default those of
            `images`.
        data_format: the model's.
        crop_scale: the smallest share of an image's area that a crop has.
        flip: the share of the crops that are mirrored.
        seed: of everything random; the same seed gives the same views, if the dataset is new.
        max_pixels: the pixels that an image may have, see `cvt.data.decoding.decode`.

    Returns:
        Batches of pixels, (B, 3, H, W) or (B, H, W, 3) in float32, and class indices, (B,) in
        int32. While it is gone through, an image that cannot be decoded raises a
        `tf.errors.InvalidArgumentError` that names it.

    Raises:
        ValueError: an argument is out of its range, images have labels that are no classes, the
            folder has splits such as `train` and `val`, or the processor is not for decoded images.
        OSError: there is no such folder.
        ImportError: TensorFlow is not installed.
    """
    import tensorflow as tf

    if data_format not in DATA_FORMATS:
        raise ValueError(f"data_format = {data_format!r}: must be one of {', '.join(DATA_FORMATS)}")
    for name, share in (("crop_scale", crop_scale), ("flip", flip)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} = {share}: must be from 0 to 1")
    check_range(processor)
    if not isinstance(images, LabelledImages):
        if splits := sorted(filter(None, folder_splits(Path(images)))):
            raise ValueError(
                f"{images} has the splits {', '.join(splits)}: name one of them, or give what "
                "cvt.data.open_training returns for one of them"
            )
        images = image_folder(images)
    names = {name: i for i, name in enumerate(images.classes if classes is None else classes)}
    if unknown := sorted(set(images.labels) - names.keys()):
        raise ValueError(f"images have labels that are none of the classes: {', '.join(unknown)}")
    sources = images.sources

    def pixels(image: Image.Image, view: int) -> np.ndarray:
        if training:
            image = random_view(image, processor, crop_scale, flip, np.random.default_rng(view))
        made = np.asarray(processor(image, do_resize=not training)["pixel_values"][0])
        return made if data_format == "channels_first" else made.transpose(1, 2, 0)

    def sample(index: Any, label: Any, view: Any) -> tuple[Any, Any]:
        made = tf.numpy_function(
            lambda index, view: pixels(decode(sources[int(index)], max_pixels=max_pixels), view),
            (index, view),
            tf.float32,
            stateful=False,
        )
        return tf.ensure_shape(made, shape), label

    shape = pixels(BLANK, seed).shape
    indexed = (
        np.arange(len(images)),
        np.array([names[label] for label in images.labels], np.int32),
    )
    dataset = tf.data.Dataset.from_tensor_slices(indexed)
    if training:
        dataset = dataset.shuffle(len(images), seed)
    views = tf.data.Dataset.random(seed, rerandomize_each_iteration=True)
    dataset = tf.data.Dataset.zip(dataset, views).map(lambda image, view: (*image, view))
    dataset = dataset.map(sample, tf.data.AUTOTUNE)
    return dataset.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def random_view(
    image: Image.Image, processor: Any, crop_scale: float, flip: float, draw: np.random.Generator
) -> Image.Image:
    """A random crop of an image in the processor's size, perhaps mirrored."""
    side = processor.size.shortest_edge or processor.size.height
    for _ in range(TRIES):
        area = image.width * image.height * draw.uniform(crop_scale, 1)
        ratio = RATIO ** draw.uniform(-1, 1)
        width, height = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        if width <= image.width and height <= image.height:
            break
    else:  # as large a square as there is
        width = height = min(image.size)
    left = draw.uniform(0, image.width - width)
    top = draw.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    view = image.resize((side, side), Image.Resampling.BICUBIC, box)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < flip else view
