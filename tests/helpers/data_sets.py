"""Data sets in the layouts that they come in, with a few images."""

import pickle

import numpy as np
from helpers.pictures import encoded, photo
from scipy.io import savemat

WORDNET_IDS = ("n01440764", "n01443537", "n01484850", "n01491361")
BREEDS = ("Abyssinian", "american_bulldog", "Bengal")


def write_jpeg(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(photo(seed=seed), "JPEG"))


def write_imagenet(root, classes=WORDNET_IDS[:3]):
    """A folder of a folder per class, to train on, and one with the names of the validation."""
    number = 0
    for i, name in enumerate(classes):
        for j in range(4):
            write_jpeg(root / "train" / name / f"{name}_{j}.JPEG", 10 * i + j)
        for j in range(2):
            number += 1
            path = root / "val" / name / f"ILSVRC2012_val_{number:08d}.JPEG"
            write_jpeg(path, 100 + 10 * i + j)
    return root


def write_imagenet_22k(root):
    """Classes of different size, one of a single image, without images to validate with."""
    for i, name in enumerate(WORDNET_IDS):
        for j in range(4 if i else 1):
            write_jpeg(root / name / f"{name}_{j}.JPEG", 10 * i + j)
    return root


def write_cifar(root):
    """The python version of CIFAR-10."""
    root.mkdir()
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = generator.integers(0, 256, (10, 3072), dtype=np.uint8)
        batch = {"data": pixels, "labels": list(range(10))}
        (root / name).write_bytes(pickle.dumps(batch, protocol=4))
    names = {"label_names": [f"class {i}" for i in range(10)]}
    (root / "batches.meta").write_bytes(pickle.dumps(names, protocol=4))
    return root


def write_pets(root):
    """Three breeds, four images each, two to train and two to test on, and one that is not listed.

    The classes are numbered otherwise than in the alphabet; the comments are those of list.txt.
    """
    lists = {"trainval.txt": [], "test.txt": [], "list.txt": []}
    for number, breed in enumerate(BREEDS, start=1):
        species = 2 if breed.islower() else 1
        for i in range(1, 6):
            write_jpeg(root / "images" / f"{breed}_{i}.jpg", 10 * number + i)
            if i < 5:
                line = f"{breed}_{i} {number} {species} {number}"
                lists["trainval.txt" if i < 3 else "test.txt"].append(line)
                lists["list.txt"].append(line)
    comments = ["#Image CLASS-ID SPECIES BREED ID", "#ID: 1:37 Class ids"]
    (root / "annotations").mkdir()
    for name, lines in lists.items():
        lines = comments + lines if name == "list.txt" else lines
        (root / "annotations" / name).write_text("\n".join([*lines, ""]))
    return root


def write_flowers(root, classes=3):
    """Of each class two images to train, one to validate and one to test with; in no order."""
    labels = np.arange(4 * classes) % classes + 1
    for i in range(len(labels)):
        write_jpeg(root / "jpg" / f"image_{i + 1:05d}.jpg", i)
    numbers = np.arange(1, len(labels) + 1, dtype=np.uint16)
    savemat(root / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    sets = {
        "trnid": numbers[: 2 * classes][::-1],
        "valid": numbers[2 * classes : 3 * classes],
        "tstid": numbers[3 * classes :],
    }
    savemat(root / "setid.mat", {name: array[None] for name, array in sets.items()})
    return root
