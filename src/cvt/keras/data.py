"""Labelled images as a `tf.data.Dataset`, which `fit` and `evaluate` accept on every backend."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cvt.data import LabelledImages, image_folder
from cvt.data.decoding import decode
from cvt.data.folder import folder_splits
from cvt.data.preprocessing import check_range, preprocessing_of
from cvt.keras.modeling import check_data_format

if TYPE_CHECKING:
    import tensorflow as tf

BLANK = Image.new("RGB", (32, 32))
MAX_CROP_TRIES = 10  # draws of a crop's shape before the largest square is taken
MAX_ASPECT_RATIO = 4 / 3  # of a crop, in either direction


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
    """Create a dataset of images preprocessed as by `cvt evaluate`, or of random training views.

    Pixels equal those of the PyTorch pipeline to the last bit: the same Pillow and the same image
    processor compute them, in threads. TensorFlow's own decoding and resizing takes half the time
    but differs by up to 7/255 on photographs.

    Args:
        images: a folder with one folder per class, or images that `cvt.data` opened.
        processor: from `cvt.image_processor`.
        batch_size: images in a batch; the last batch may have fewer.
        training: crop every image at random, mirror some crops, and shuffle anew in each epoch.
            By default the images keep their order.
        classes: class names in the order of the model's outputs; by default those of `images`, and
            always those of several classes for one image, or of values.
        data_format: that of the model, `channels_first` or `channels_last`.
        crop_scale: the smallest area of a crop, as a fraction of the image's area.
        flip: the probability that a crop is mirrored.
        seed: seeds the order, the crops and the flips; two new datasets with the same seed yield
            the same views.
        max_pixels: the limit of `cvt.data.decoding.decode`.

    Returns:
        Batches of pixels, (B, 3, H, W) or (B, H, W, 3) in float32, and class indices, (B,) in
        int32, or a target for each output, (B, K) in float32. An image that cannot be decoded
        raises a `tf.errors.InvalidArgumentError`.

    Raises:
        ValueError: an argument is out of its range, a label is none of the classes, the folder has
            splits such as `train` and `val`, or the processor does not accept decoded images.
        OSError: the folder does not exist.
        ImportError: TensorFlow is not installed.
    """
    import tensorflow as tf

    check_data_format(data_format)
    check_fractions(crop_scale=crop_scale, flip=flip)
    check_range(processor)
    preprocessing = preprocessing_of(processor)
    if training:
        preprocessing = preprocessing.unresized
    images = images if isinstance(images, LabelledImages) else open_folder(images)

    def preprocess(image: Image.Image, view_seed: int) -> np.ndarray:
        if training:
            draw = np.random.default_rng(view_seed)
            image = random_view(image, processor, crop_scale, flip, draw)
        pixels = preprocessing([image])[0]
        return pixels if data_format == "channels_first" else pixels.transpose(1, 2, 0)

    samples = indexed_samples(label_indices(images, classes), seed, shuffle=training)
    samples = load_pixels(samples, images.sources, preprocess, max_pixels)
    return samples.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def check_fractions(**fractions: float) -> None:
    """Raise a ValueError that names the first argument outside 0 to 1."""
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} = {value}: must be from 0 to 1")


def open_folder(folder: str | Path) -> LabelledImages:
    """Open a folder with one folder per class.

    Raises:
        ValueError: the folder has splits such as `train` and `val`.
        OSError: the folder does not exist.
    """
    if splits := sorted(filter(None, folder_splits(Path(folder)))):
        raise ValueError(
            f"{folder} has the splits {', '.join(splits)}: name one of them, or give what "
            "cvt.data.open_training returns for one of them"
        )
    return image_folder(folder)


def label_indices(images: LabelledImages, classes: Sequence[str] | None) -> np.ndarray:
    """Return the class index of every image, (N,) in int32, or its targets, (N, K) in float32.

    Raises:
        ValueError: a label is none of the classes.
    """
    if not images.task.has_one_class:
        return images.targets
    indices = {name: i for i, name in enumerate(images.classes if classes is None else classes)}
    if unknown := sorted(set(images.labels) - indices.keys()):
        raise ValueError(f"images have labels that are none of the classes: {', '.join(unknown)}")
    return np.array([indices[label] for label in images.labels], np.int32)


def indexed_samples(labels: np.ndarray, seed: int, *, shuffle: bool) -> "tf.data.Dataset":
    """Create a dataset of (image index, label, view seed); view seeds change in each epoch."""
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices((np.arange(len(labels)), labels))
    if shuffle:
        dataset = dataset.shuffle(len(labels), seed)
    view_seeds = tf.data.Dataset.random(seed, rerandomize_each_iteration=True)
    return tf.data.Dataset.zip(dataset, view_seeds).map(lambda sample, view: (*sample, view))


def load_pixels(
    samples: "tf.data.Dataset",
    sources: Sequence[Any],
    preprocess: Callable[[Image.Image, int], np.ndarray],
    max_pixels: int | None,
) -> "tf.data.Dataset":
    """Map (image index, label, view seed) to (pixels, label)."""
    import tensorflow as tf

    shape = preprocess(BLANK, 0).shape

    def decode_and_preprocess(index: int, view_seed: int) -> np.ndarray:
        return preprocess(decode(sources[int(index)], max_pixels=max_pixels), view_seed)

    def load(index: Any, label: Any, view_seed: Any) -> tuple[Any, Any]:
        pixels = tf.numpy_function(
            decode_and_preprocess, (index, view_seed), tf.float32, stateful=False
        )
        return tf.ensure_shape(pixels, shape), label

    return samples.map(load, tf.data.AUTOTUNE)


def random_view(
    image: Image.Image, processor: Any, crop_scale: float, flip: float, draw: np.random.Generator
) -> Image.Image:
    """Crop an image at random, resize the crop to the processor's size, and perhaps mirror it."""
    side = processor.size.shortest_edge or processor.size.height
    for _ in range(MAX_CROP_TRIES):
        area = image.width * image.height * draw.uniform(crop_scale, 1)
        ratio = MAX_ASPECT_RATIO ** draw.uniform(-1, 1)
        width, height = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        if width <= image.width and height <= image.height:
            break
    else:
        width = height = min(image.size)
    left = draw.uniform(0, image.width - width)
    top = draw.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    view = image.resize((side, side), Image.Resampling.BICUBIC, box)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < flip else view
