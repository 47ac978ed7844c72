"""Equal and nearly equal images, and splits that keep equal ones on one side."""

import os
import random
from collections import Counter

import datasets
import numpy as np
import pytest
from PIL import Image
from scipy.sparse.csgraph import connected_components

from cvt.data import LabelledImages, StoredImage, duplicates, open_training, split, write_split
from cvt.data.duplicates import equal_groups, near_groups

HEADER = b"P5 1 1 255\n."  # an image of one pixel; what follows is ignored


def files(folder, contents, header=HEADER):
    """An image folder of files with these contents behind the header, by their paths."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(header + content)
    paths = [folder / name for name in sorted(contents)]
    return LabelledImages(paths, [path.parent.name for path in paths])


def random_files(folder, seed=0, classes="abc", count=30, contents=1000):
    """Files whose contents, numbers, are drawn from so many; all of one size."""
    generator = random.Random(seed)
    return files(
        folder,
        {
            f"{name}/{i:02d}.png": f"{generator.randrange(contents):05d}".encode()
            for name in classes
            for i in range(count)
        },
    )


def before(images, seed):
    """The split as it was drawn when equal images were not looked at."""
    train, validation = [], []
    for name in images.classes:
        indices = [i for i, label in enumerate(images.labels) if label == name]
        random.Random(f"{seed} {name}").shuffle(indices)
        cut = max(1, round(len(indices) / 5))
        validation += sorted(indices[:cut])
        train += sorted(indices[cut:])
    return [images[i] for i in train], [images[i] for i in validation]


# ------------------------------------------------------------------------------ groups


def test_equal_images_are_grouped_by_what_is_in_them(tmp_path):
    tail = bytes(5000)
    contents = {"a/0": b"x", "a/1": b"y", "b/2": b"x", "b/3": b"1" + tail, "b/4": b"2" + tail}
    images = files(tmp_path, contents | {"c/5": b"1" + tail})
    os.symlink(tmp_path / "a/1", tmp_path / "a/link")
    sources = [*images.sources, tmp_path / "a/link", tmp_path / "missing"]
    assert equal_groups(sources) == [[0, 2], [1, 6], [3, 5]]


def test_stored_images_are_grouped_by_bytes_or_pixels():
    red, blue = (Image.new("RGB", (2, 2), name) for name in ("red", "blue"))
    x, y = HEADER + b"x", HEADER + b"y"
    contents = [x, y, lambda: x, red, blue, red.copy(), red.convert("P"), y, b"", b""]
    sources = [StoredImage(str(i), content) for i, content in enumerate(contents)]
    assert equal_groups(sources) == [[0, 2], [1, 7], [3, 5]]


def test_only_files_of_one_size_and_end_are_read_whole(tmp_path, monkeypatch):
    contents = {f"a/{i:02d}": bytes([i]) + bytes(5000 + i) for i in range(20)}  # sizes differ
    contents |= {f"b/{i:02d}": bytes(9000) + bytes([i]) for i in range(20)}  # ends differ
    images = files(tmp_path, contents | {"c/0": bytes(9001), "c/1": bytes(9001)})
    read, digest = [], duplicates.digest
    monkeypatch.setattr(duplicates, "digest", lambda source: read.append(source) or digest(source))
    assert equal_groups(images.sources) == [[20, 40, 41]]
    assert sorted(read) == [images.sources[i] for i in (20, 40, 41)]


def test_what_is_no_image_is_equal_to_nothing(tmp_path):
    images = files(tmp_path, {f"a/{i}": b"no image" for i in range(3)}, header=b"")
    assert equal_groups(images.sources) == []


def test_groups_are_those_of_a_comparison_of_all(tmp_path):
    images = random_files(tmp_path, contents=40)
    by_content = {}
    for i, path in enumerate(images.sources):
        by_content.setdefault(path.read_bytes(), []).append(i)
    assert equal_groups(images.sources) == [each for each in by_content.values() if each[1:]]


def close_hashes(seed, count=200, centres=12, flipped=6):
    """Hashes of 128 bits around some centres, and others."""
    generator = np.random.default_rng(seed)
    bits = generator.integers(0, 2, (centres, 128), dtype=np.uint8)[
        generator.integers(0, centres, count)
    ]
    for row in bits:
        row[generator.integers(0, 128, generator.integers(0, flipped))] ^= 1
    others = generator.integers(0, 2, (count, 128), dtype=np.uint8)
    return np.packbits(np.concatenate([bits, others]), axis=1).view(np.uint64)


@pytest.mark.parametrize("distance", [0, 1, 4, 16])
def test_nearly_equal_hashes_are_grouped_as_by_a_comparison_of_all(distance):
    hashes = close_hashes(distance)
    near = np.bitwise_count(hashes[:, None] ^ hashes).sum(-1) <= distance
    _, expected = connected_components(near)
    found = near_groups(hashes, distance)
    assert len(set(zip(found, expected, strict=True))) == len(set(found)) == len(set(expected))
    assert len(set(found)) < len(hashes)  # some are near


def test_no_hashes_have_no_groups():
    assert near_groups(np.empty((0, 4), np.uint64), 8).tolist() == []


# ------------------------------------------------------------------------------ splits


def test_without_equal_images_the_split_is_what_it_was(tmp_path):
    images = files(tmp_path, {f"{i % 4}/{i}": str(i).encode() for i in range(137)})
    for seed in range(50):
        train, validation = split(images, seed)
        assert (list(train), list(validation)) == before(images, seed)


@pytest.mark.parametrize("contents", [3, 10, 40, 200])
def test_equal_images_are_on_one_side_in_every_class(tmp_path, contents):
    images = random_files(tmp_path, contents=contents)
    for seed in range(20):
        train, validation = split(images, seed)
        assert sorted([*train, *validation]) == sorted(images)
        sides = [{path.read_bytes() for path, _ in side} for side in (train, validation)]
        assert not sides[0] & sides[1]
        assert set(train.labels) == set(validation.labels) == set("abc")
        assert list(split(images, seed)[1]) == list(validation)
        if contents >= 40:  # groups are small: a fifth, but for a group
            assert all(4 <= count <= 8 for count in Counter(validation.labels).values())


def test_a_class_that_shares_its_images_with_another_gets_both_sides(tmp_path):
    contents = {f"a/{i}": bytes([i]) for i in range(20)} | {f"b/{i}": bytes([i]) for i in range(2)}
    images = files(tmp_path, contents)
    for seed in range(20):
        assert sorted(split(images, seed)[1].labels)[-1] == "b"


def test_a_class_of_equal_images_alone_is_named(tmp_path):
    contents = {f"a/{i}.png": bytes([i]) for i in range(5)}
    images = files(tmp_path, contents | {"b/0.png": b"same", "b/1.png": b"same"})
    with pytest.raises(ValueError, match=r"class b has too few images that differ.*/b/[01]\.png"):
        split(images, 0)


def test_rows_of_a_table_are_kept_on_one_side(tmp_path, monkeypatch):
    values = [HEADER + b"%03d" % (i % 15) for i in range(30)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    rows = {"image": [{"bytes": value, "path": None} for value in values], "label": [0, 1] * 15}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(tmp_path / "all.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    train, validation, _ = open_training(tmp_path / "all.parquet")
    assert train.sources.sources.sizes() == [len(values[0])] * 30
    sides = [{source.content for source, _ in side} for side in (train, validation)]
    assert (len(sides[0] | sides[1]), sides[0] & sides[1]) == (15, set())


def test_the_split_in_a_file_is_taken_if_it_is_of_these_images(tmp_path):
    contents = {f"{name}/{i}.png": bytes([i]) for name in "ab" for i in range(10)}
    images = files(tmp_path / "data", contents)
    images = open_training(tmp_path / "data", seed=1)
    write_split(tmp_path / "split.csv", images.train, images.validation)
    assert list(open_training(tmp_path / "data", seed=2).validation) != list(images.validation)
    again = open_training(tmp_path / "data", seed=2, split_file=tmp_path / "split.csv")
    assert list(map(list, again[:2])) == list(map(list, images[:2]))
    assert again.drawn
    (tmp_path / "data/a/new.png").write_bytes(HEADER + b"new")
    drawn = open_training(tmp_path / "data", seed=2)
    again = open_training(tmp_path / "data", seed=2, split_file=tmp_path / "split.csv")
    assert list(again.validation) == list(drawn.validation)


def test_the_most_similar_image_of_another_group_is_that_of_all_cosines(monkeypatch):
    """Compared in chunks, against the whole matrix of cosines and a search through its graph."""
    monkeypatch.setattr(duplicates, "COMPARED", 7)
    draw = np.random.default_rng(0)
    values = draw.normal(size=(60, 4)) * draw.uniform(0.1, 9, (60, 1))
    values[11] = 0
    given = draw.integers(0, 50, 60) * 10
    unit = np.where(values.any(1, keepdims=True), values, np.nan)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = np.nan_to_num(unit @ unit.T)
    cosines[given[:, None] == given] = -np.inf
    nearest, largest, groups = duplicates.most_similar(values, given, 0.8)
    assert (nearest >= 0).sum() > 30
    expected = np.where(cosines.max(1) >= 0.8, cosines.argmax(1), -1)
    assert nearest.tolist() == expected.tolist()
    np.testing.assert_allclose(largest, cosines.max(1), atol=1e-6)
    together = (cosines >= 0.8) | (given[:, None] == given)
    for _ in range(6):  # paths of up to 64 steps
        together = together @ together
    assert ((groups[:, None] == groups) == together).all()
