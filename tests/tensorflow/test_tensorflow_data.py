"""`cvt.keras.data`: images as a `tf.data.Dataset`."""

import re
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from cvt import CvtConfig, image_processor
from cvt.data import LabelledImages, Task, image_folder
from cvt.data.decoding import decode
from cvt.keras import digits
from cvt.keras.data import image_dataset

import tensorflow as tf  # isort: skip  # behind cvt, which keeps Triton apart from it

DEVIATION = np.float32([0.229, 0.224, 0.225]).reshape(3, 1, 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Photographs, and files of the kinds that readers treat differently."""
    folder = tmp_path_factory.mktemp("pictures")
    photo = Image.fromarray(load_sample_images().images[0])
    sideways = Image.Exif()
    sideways[274] = 6
    alpha = photo.convert("RGBA")
    alpha.putalpha(photo.convert("L"))
    photo.save(folder / "down.jpg", quality=90)
    photo.resize((150, 100)).save(folder / "up.jpg", quality=75)
    photo.resize((90, 400)).save(folder / "tall.jpg", exif=sideways)
    photo.convert("L").save(folder / "grey.png")
    alpha.save(folder / "alpha.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def little():
    """The processor of a small model, which returns 16 x 16 pixels."""
    return image_processor(CvtConfig(), image_size=16)


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("name", ["cvt-13", "cvt-13-384"])
def test_pixels_are_those_of_pytorch(pictures, name, data_format):
    processor = image_processor(name)
    images = LabelledImages(pictures, ["photo"] * len(pictures))
    found = np.concatenate(
        [pixels for pixels, _ in image_dataset(images, processor, 2, data_format=data_format)]
    )
    if data_format == "channels_last":
        found = found.transpose(0, 3, 1, 2)
    expected = processor([decode(path) for path in pictures], return_tensors="pt")["pixel_values"]
    assert found.dtype == "float32"
    assert np.abs((found - expected.numpy()) * DEVIATION).max() < 1 / 255


def test_evaluation_keeps_the_order_and_the_last_batch(photos, little):
    images = image_folder(photos)
    dataset = image_dataset(photos, little, 10)
    assert dataset.element_spec == (
        tf.TensorSpec((None, 3, 16, 16), tf.float32),
        tf.TensorSpec((None,), tf.int32),
    )
    labels = [label.numpy() for _, label in dataset]
    assert [len(batch) for batch in labels] == [10, 10, 10, 6]
    assert [images.classes[i] for i in np.concatenate(labels)] == images.labels


def test_classes_give_the_labels_of_a_models_outputs(photos, little):
    classes = ["red", "yellow", "green", "blue"]
    ((_, labels),) = image_dataset(photos, little, 36, classes=classes)
    assert [classes[i] for i in labels] == image_folder(photos).labels


def test_several_classes_and_values_are_targets_of_every_output(pictures, little):
    for problem, labels, expected in (
        ("multi_label_classification", ["a;b", "", "b", "a", ""], [[1, 1], [0, 0], [0, 1]]),
        ("regression", ["1.5;2.0"] * 5, [[1.5, 2.0]] * 3),
    ):
        images = LabelledImages(pictures, labels, ["a", "b"], Task(problem))
        dataset = image_dataset(images, little, 3)
        assert dataset.element_spec[1] == tf.TensorSpec((None, 2), tf.float32)
        _, targets = next(iter(dataset))
        assert targets.numpy().tolist() == expected


def views(photos, little, **options):
    dataset = image_dataset(photos, little, 36, training=True, **options)
    return [[value.numpy() for value in batch] for _ in range(2) for batch in dataset]


def test_training_gives_new_views_in_a_new_order_each_time_and_all_by_the_seed(photos, little):
    first, second = views(photos, little)
    for batches in zip((first, second), views(photos, little), strict=True):
        for values, again in zip(*batches, strict=True):
            np.testing.assert_array_equal(values, again)
    other = views(photos, little, seed=1)[0]
    for one, two in ((first, second), (first, other)):
        assert (one[0] != two[0]).any()
        assert (one[1] != two[1]).any()
        assert sorted(one[1]) == sorted(two[1])


def test_a_view_is_a_crop_of_its_image_perhaps_mirrored(tmp_path, little):
    (tmp_path / "a").mkdir()
    ramp = np.tile(np.arange(64, dtype="uint8") * 4, (40, 1))  # brighter to the right
    for i in range(64):
        Image.fromarray(ramp).save(tmp_path / "a" / f"{i}.png")

    def brightness(**options):
        """Of every view's rows from left to right, 0 to 255: (64, 16)."""
        ((pixels, _),) = image_dataset(tmp_path, little, 64, training=True, **options)
        return (pixels.numpy()[:, 0].mean(1) * 0.229 + 0.485) * 255

    rises = np.diff(brightness(flip=0.5)).mean(1)
    assert 16 < (rises < 0).sum() < 48
    unmirrored = brightness(flip=0, crop_scale=0.25)
    widths = (unmirrored[:, -1] - unmirrored[:, 0]) / 252 * 16 / 15
    assert (np.diff(unmirrored) > 0).all()
    # A crop of a quarter to all of 64 x 40 pixels is 22 to 58 wide, 4/3 the height at most.
    assert widths.min() < 0.45
    assert 0.3 < widths.min() < widths.max() < 1
    assert np.std(unmirrored[:, 0]) > 5


@pytest.fixture
def noise(tmp_path):
    """A folder of one square picture of noise, and the picture."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "noise.png")
    return tmp_path, Image.fromarray(pixels)


def test_a_view_is_cropped_and_resized_once_by_pillows_bicubic(noise, little):
    folder, picture = noise  # of all of its area there is one crop: a square
    ((pixels, _),) = image_dataset(folder, little, training=True, crop_scale=1.0, flip=0.0)
    expected = np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)) / 255
    expected = (expected.transpose(2, 0, 1) - np.reshape(little.image_mean, (3, 1, 1))) / DEVIATION
    np.testing.assert_allclose(pixels[0], expected, rtol=0, atol=1e-5)


def test_a_picture_has_another_view_each_time(noise, little):
    folder, _ = noise
    dataset = image_dataset(folder, little, training=True)
    first, second = (next(iter(dataset))[0].numpy() for _ in range(2))
    assert np.abs(first - second).max() > 0.1


def test_crops_are_as_often_wide_as_tall(tmp_path, little):
    (tmp_path / "a").mkdir()
    rows, columns = np.mgrid[0:64, 0:64].astype("uint8") * 3
    for i in range(64):  # redder to the right, greener to the bottom
        Image.fromarray(np.stack([columns, rows, rows], axis=2)).save(tmp_path / "a" / f"{i}.png")
    ((pixels, _),) = image_dataset(tmp_path, little, 64, training=True, crop_scale=0.5, flip=0.0)
    values = pixels.numpy() * DEVIATION
    ratios = np.diff(values[:, 0], axis=2).mean((1, 2)) / np.diff(values[:, 1], axis=1).mean((1, 2))
    assert 0.7 < ratios.min() < 0.85
    assert 1.15 < ratios.max() < 1.4  # of width to height, 4/3 at most


def test_all_pictures_are_shuffled_however_many(photos, little):
    first = set()
    for seed in range(12):  # twelve blue ones lead the folder
        dataset = image_dataset(photos, little, 1, training=True, seed=seed)
        first.add(int(next(iter(dataset))[1][0]))
    assert first == {0, 1, 2}


def test_a_picture_too_narrow_for_any_crop_gives_a_square(tmp_path, little):
    (tmp_path / "a").mkdir()
    ramp = np.tile(np.arange(200, dtype="uint8"), (8, 1))
    Image.fromarray(ramp).save(tmp_path / "a" / "wide.png")
    ((pixels, _),) = image_dataset(tmp_path, little, training=True, crop_scale=0.9)
    values = (pixels.numpy()[0, 0] * 0.229 + 0.485) * 255
    assert np.ptp(values) < 8.5


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path, little):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 is no picture")
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"a/broken\.jpg: cannot be decoded"):
        list(image_dataset(tmp_path, little))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_format": "NCHW"}, "data_format = 'NCHW': must be one of"),
        ({"crop_scale": 2}, "crop_scale = 2: must be from 0 to 1"),
        ({"flip": -0.5}, "flip = -0.5: must be from 0 to 1"),
        ({"classes": ["blue", "red"]}, "none of the classes: green"),
    ],
)
def test_illegal_arguments_are_refused(photos, little, options, message):
    with pytest.raises(ValueError, match=message):
        image_dataset(photos, little, **options)


def test_a_folder_of_splits_is_no_folder_of_classes(tmp_path, little):
    for half in ("train", "val"):
        (tmp_path / half / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="has the splits train, val: name one of them"):
        image_dataset(tmp_path, little)


@pytest.mark.parametrize(
    ("epochs", "least"), [(2, 40), pytest.param(30, 98, marks=pytest.mark.slow)]
)
def test_fit_learns_the_digits(monkeypatch, capsys, epochs, least):
    monkeypatch.setattr(sys, "argv", ["digits.py", "--epochs", str(epochs)])
    digits.main()
    accuracy = re.search(r"([\d.]+) % of the 360 held-out images", capsys.readouterr().out)[1]
    assert float(accuracy) > least
