"""The data sets of the paper's transfer experiments, in the layouts that they come in."""

import logging

import numpy as np
import pytest
from helpers.data_sets import (
    BREEDS,
    WORDNET_IDS,
    write_flowers,
    write_imagenet,
    write_imagenet_22k,
    write_pets,
)
from scipy.io import savemat

from cvt.data import open_labelled, open_splits, open_training

# ------------------------------------------------------------------------------ Oxford-IIIT Pet


def test_pets_are_read_from_their_lists(tmp_path):
    folder = write_pets(tmp_path / "pets")
    train, validation, test = open_training(folder)
    assert train.classes == list(BREEDS)  # by their numbers, not by the alphabet
    names = [train.name(i) for i in range(len(train))]
    assert names == [f"{breed}_{i}.jpg" for breed in BREEDS for i in (1, 2)]
    assert train.labels == [name.rpartition("_")[0] for name in names]
    assert [validation.name(i) for i in range(6)] == [
        f"{breed}_{i}.jpg" for breed in BREEDS for i in (3, 4)
    ]
    assert test is None  # the test images validate
    assert train.sources[0] == folder / "images" / "Abyssinian_1.jpg"


def test_of_pets_with_the_list_of_all_alone_a_fifth_validates(tmp_path):
    folder = write_pets(tmp_path / "pets")
    for name in ("trainval", "test"):
        (folder / "annotations" / f"{name}.txt").unlink()
    assert list(open_splits(folder)) == [""]
    train, validation, _ = open_training(folder)
    assert (len(train), len(validation)) == (9, 3)


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("test.txt", None, ValueError, "is not all of Oxford-IIIT Pet: no annotations/test.txt"),
        ("test.txt", "", ValueError, "test.txt lists no images"),
        (
            "test.txt",
            "Bengal_3 3 1 3\nBengal 4\n",
            ValueError,
            "line 2: must be an image.*Bengal 4",
        ),
        ("test.txt", "Bengal_3 1 1 1\n", ValueError, "line 1: class 1 is Abyssinian on another"),
        ("test.txt", "Bengal_9 3 1 3\n", FileNotFoundError, "lists 1 images .*: Bengal_9.jpg"),
    ],
)
def test_damaged_lists_of_pets_are_named(tmp_path, name, text, error, message):
    path = write_pets(tmp_path / "pets") / "annotations" / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(error, match=message):
        open_labelled(tmp_path / "pets")


# ------------------------------------------------------------------------------ Flowers-102


def test_flowers_are_read_from_their_files(tmp_path):
    folder = write_flowers(tmp_path / "flowers", classes=11)
    train, validation, test = open_training(folder)
    assert train.classes == [str(i + 1) for i in range(11)]  # by number: 2 before 10
    for images in (train, validation, test):
        for i in range(len(images)):
            number = int(images.name(i)[6:11])
            assert images.labels[i] == str((number - 1) % 11 + 1)
    assert [len(images) for images in (train, validation, test)] == [22, 11, 11]
    assert train.name(0) == "image_00022.jpg"


def test_a_file_of_classes_names_the_flowers_by_their_numbers(tmp_path):
    folder = write_flowers(tmp_path / "flowers")
    (tmp_path / "names.txt").write_text("rose\naster\nlily\n")
    images = open_training(folder, classes=tmp_path / "names.txt").train
    assert images.classes == ["rose", "aster", "lily"]
    assert dict(zip((images.name(i) for i in range(6)), images.labels, strict=True)) == {
        f"image_{i + 1:05d}.jpg": ["rose", "aster", "lily"][i % 3] for i in range(6)
    }
    (tmp_path / "names.txt").write_text("rose\naster\n")
    with pytest.raises(ValueError, match="has 3 classes, and 2 names are given"):
        open_training(folder, classes=tmp_path / "names.txt")


NUMBERS = np.array([[1, 2, 3]])


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("setid.mat", None, ValueError, "is not all of Flowers-102: no setid.mat"),
        ("imagelabels.mat", None, ValueError, "is not all of Flowers-102: no imagelabels.mat"),
        ("setid.mat", b"no mat file", ValueError, "setid.mat was not read"),
        ("imagelabels.mat", b"", ValueError, "imagelabels.mat was not read"),
        ("imagelabels.mat", {"other": NUMBERS}, ValueError, "imagelabels.mat was not read"),
        ("imagelabels.mat", {"labels": NUMBERS}, ValueError, "setid.mat: image 12 has no label"),
        ("imagelabels.mat", {"labels": NUMBERS / 2}, ValueError, "labels must be whole numbers"),
        ("imagelabels.mat", {"labels": NUMBERS - 1}, ValueError, "labels must be whole numbers"),
    ],
)
def test_damaged_files_of_flowers_are_named(tmp_path, name, content, error, message):
    path = write_flowers(tmp_path / "flowers") / name
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        savemat(path, content)
    with pytest.raises(error, match=message):
        open_labelled(tmp_path / "flowers")


def test_flowers_that_are_not_there_are_named(tmp_path):
    folder = write_flowers(tmp_path / "flowers")
    (folder / "jpg" / "image_00003.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"setid.mat lists 1 images .*: image_00003.jpg"):
        open_labelled(folder)


# ------------------------------------------------------------------------------ ImageNet-22k


def test_images_of_some_classes_validate_where_all_are_listed(tmp_path, caplog):
    folder = write_imagenet_22k(tmp_path / "22k")
    some = write_imagenet(tmp_path / "1k", WORDNET_IDS[1:3]) / "val"
    with pytest.raises(ValueError, match="class n01440764 has one image"):
        open_training(folder)
    with pytest.raises(ValueError, match="only one has the class n01440764, n01491361"):
        open_training(folder, some)
    names = tmp_path / "classes.txt"
    names.write_text("\n".join(sorted(path.name for path in folder.iterdir())))
    with caplog.at_level(logging.WARNING):
        train, validation, _ = open_training(folder, some, classes=names)
    assert "2 of the 4 classes have validation images" in caplog.text
    assert train.classes == validation.classes == list(WORDNET_IDS)
    assert (len(train), len(validation)) == (13, 4)
    (folder / WORDNET_IDS[3]).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="classes without training images: n01491361"):
        open_training(folder, some, classes=names)
