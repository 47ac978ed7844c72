"""What `cvt check` finds: each kind in data that has it, and nothing in data that is clean."""

import csv
import io
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from cvt.data import LabelledImages, StreamedImages, check, open_splits, open_training
from cvt.data.decoding import StoredImage
from cvt.data.findings import KINDS, write_findings, write_groups


def picture(seed, size=48):
    """A picture of smooth areas, unlike those of other seeds."""
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype="uint8")
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} | options))
    return file.getvalue()


def write(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else encoded(content))
    return folder


@pytest.fixture
def clean(tmp_path):
    names = [f"{name}/{i:02d}.png" for name in ("cat", "dog") for i in range(12)]
    return write(tmp_path / "clean", {name: picture(seed) for seed, name in enumerate(names)})


def found_in(folder, **options):
    """The findings in a folder, as (kind, path in it, label), and their details."""
    found = check(open_splits(folder), **options)
    return {
        (each.kind, each.path.removeprefix(f"{folder}/"), each.label): each.detail
        for each in found.findings
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_found_in_clean_data(clean, workers):
    steps = []
    found = check(open_splits(clean), workers=workers, step=lambda: steps.append(1))
    assert found.findings == []
    assert [each.path for each in found.images] == [str(p) for p in sorted(clean.rglob("*.png"))]
    assert (len(set(found.groups)), len(steps)) == (24, 24)
    assert [(each.name, each.images, each.distinct) for each in found.classes] == [
        ("cat", 12, 12),
        ("dog", 12, 12),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_trained_on_is_found(clean, workers):
    white = Image.new("RGBA", (30, 30), (200, 10, 10, 0))
    contents = {"cat/cut.png": encoded(picture(90))[:-100], "cat/white.png": white}
    write(clean, contents | {"dog/empty.png": b"", "dog/large.png": picture(91, 50)})
    found = found_in(clean, max_pixels=2400, workers=workers)
    assert set(found) == {
        ("unreadable", "cat/cut.png", "cat"),
        ("unreadable", "dog/empty.png", "dog"),
        ("oversized", "dog/large.png", "dog"),
        ("blank", "cat/white.png", "cat"),
    }
    assert found["unreadable", "dog/empty.png", "dog"] == "is empty"
    assert found["blank", "cat/white.png", "cat"] == "#ffffff"
    assert "is 50 x 50 pixels" in found["oversized", "dog/large.png", "dog"]


def test_the_same_picture_is_found_by_bytes_and_by_looks(clean):
    near = encoded(picture(0, 96), format="JPEG", quality=80)
    write(clean, {"cat/again.png": picture(1), "dog/same.png": picture(0), "dog/near.jpg": near})
    os.symlink(clean / "dog/05.png", clean / "dog/link.png")
    assert found_in(clean) == {
        ("link", "dog/link.png", "dog"): f"leads to {clean}/dog/05.png",
        ("two_labels", "cat/00.png", "cat"): "equal: dog",
        ("two_labels", "dog/same.png", "dog"): "equal: cat",
        ("two_labels", "dog/near.jpg", "dog"): "alike: cat",
        ("exact_duplicate", "cat/00.png", "cat"): "2 images of these bytes",
        ("exact_duplicate", "dog/same.png", "dog"): "2 images of these bytes",
        ("exact_duplicate", "cat/01.png", "cat"): "2 images of these bytes",
        ("exact_duplicate", "cat/again.png", "cat"): "2 images of these bytes",
        ("exact_duplicate", "dog/05.png", "dog"): "2 images of these bytes",
        ("exact_duplicate", "dog/link.png", "dog"): "2 images of these bytes",
        ("near_duplicate", "cat/00.png", "cat"): "3 images that look alike",
        ("near_duplicate", "dog/same.png", "dog"): "3 images that look alike",
        ("near_duplicate", "dog/near.jpg", "dog"): "3 images that look alike",
    }


def test_pictures_in_two_splits_and_small_classes_are_found(clean, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    clean.rename(data / "train")
    write(data / "val", {"cat/a.png": picture(3), "dog/b.png": picture(50)})
    write(data / "train", {f"ant/{i}.png": picture(60) for i in range(11)})
    write(data / "val", {"ant/a.png": picture(61)})
    found = check(open_splits(data))
    leaks = [(each.path, each.detail) for each in found.of_kind("across_splits")]
    assert leaks == [
        (f"{data}/train/cat/03.png", "equal: val"),
        (f"{data}/val/cat/a.png", "equal: train"),
    ]
    (small,) = found.of_kind("small_class")
    detail = "1 different images to train on, fewer than 10"
    assert (small.label, small.path, small.detail) == ("ant", "", detail)
    assert [each.kind for each in found.findings] == sorted(
        (each.kind for each in found.findings), key=list(KINDS).index
    )
    counts = {each.name: (dict(each.by_split), each.distinct) for each in found.classes}
    assert counts["cat"] == ({"train": 12, "val": 1}, 12)


def test_tables_and_streams_are_checked(clean, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.02)
    contents = [encoded(picture(i)) for i in (*range(12), *range(11))] + [b"damaged"]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    rows = {"image": [{"bytes": each, "path": None} for each in contents]}
    rows["label"] = [0] * 12 + [1] * 12
    (tmp_path / "tables").mkdir()
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(tmp_path / "tables/all.parquet")
    stored = check(open_splits(tmp_path / "tables"))
    streams = open_splits(f"stream:{tmp_path}/tables")
    assert isinstance(streams[""], StreamedImages)
    streamed = check(streams)
    assert stored.groups == streamed.groups
    for found in (stored, streamed):
        kinds = [each.kind for each in found.findings]
        assert (kinds.count("two_labels"), kinds.count("unreadable")) == (22, 1)
    leak = stored.of_kind("two_labels")[1]
    assert stored.source(leak).content == contents[12]
    assert streamed.source(leak) is None


def test_the_files_of_findings_and_groups_can_be_read(clean, tmp_path):
    write(clean, {"dog/=1+1, é.png": picture(0)})
    found = check(open_splits(clean))
    write_findings(found, tmp_path / "findings.csv")
    rows = list(csv.DictReader((tmp_path / "findings.csv").open(encoding="utf-8")))
    assert len(rows) == len(found.findings) == 4
    assert rows[0]["path"] == f"{clean}/cat/00.png"
    assert {row["group"] for row in rows} == {"1"}
    write_groups(found, tmp_path / "groups.csv", tmp_path)
    rows = list(csv.DictReader((tmp_path / "groups.csv").open(encoding="utf-8")))
    equal = [row["path"] for row in rows if row["group"] == "1"]
    assert equal == ["clean/cat/00.png", "clean/dog/=1+1, é.png"]
    assert len({row["group"] for row in rows}) == 24
    train, validation, _ = open_training(tmp_path / "groups.csv")
    assert len(train) + len(validation) == len(found.images) == 25


def test_the_file_of_groups_of_several_values_is_a_data_set(clean, tmp_path):
    rows = "".join(f"{path},{i},{i / 4}\n" for i, path in enumerate(sorted(clean.rglob("*.png"))))
    (tmp_path / "all.csv").write_text(f"path,age,mass\n{rows}")
    how = {"label_column": "age,mass", "problem_type": "regression"}
    splits = open_splits(tmp_path / "all.csv", **how)
    write_groups(check(splits), tmp_path / "groups.csv", tmp_path)
    again = open_splits(tmp_path / "groups.csv", **how)[""]
    assert (again.classes, again.labels) == (["age", "mass"], splits[""].labels)


def test_names_in_a_csv_file_are_as_a_spreadsheet_takes_them(tmp_path):
    images = LabelledImages([StoredImage("=1+1", b"damaged")], ["=cat"])
    write_findings(check({"": images}), tmp_path / "findings.csv")
    rows = list(csv.reader((tmp_path / "findings.csv").open()))
    assert rows[1][:4] == ["unreadable", "'=1+1", "'=cat", ""]


def test_without_imagehash_the_extra_is_named(clean, monkeypatch):
    monkeypatch.setattr("cvt.libraries.is_installed", lambda name: name != "imagehash")
    with pytest.raises(ImportError, match=r"imagehash: pip install 'cvt-vision\[train\]'"):
        check(open_splits(clean))


def test_images_that_look_alike_to_a_model_are_found(clean, tmp_path):
    """The first cat and the fourth dog have a cosine of 0.97; another image has no features."""
    values = np.eye(24, dtype="float32")
    values[15, [0, 15]] = 0.97, (1 - 0.97**2) ** 0.5
    values[5] = 0
    given = []

    def features(sources):
        given.extend(map(str, sources))
        return 3 * values  # of any length

    found = check(open_splits(clean), features=features, similarity=0.96)
    assert given == [image.path for image in found.images]
    cat, dog = given[0], given[15]
    assert [(each.kind, each.path, each.detail) for each in found.findings] == [
        ("similar", cat, f"0.970 to {dog}, labelled dog"),
        ("similar", dog, f"0.970 to {cat}, labelled cat"),
    ]
    assert len(set(found.groups)) == 23
    assert found.groups[0] == found.groups[15] == found.findings[1].group
    write_findings(found, tmp_path / "findings.csv")
    assert f'similar,{dog},dog,1,"0.970 to' in (tmp_path / "findings.csv").read_text()
    assert not check(open_splits(clean), features=features, similarity=0.98).findings
    with pytest.raises(ValueError, match=r"similarity = 0: must be above 0 and at most 1"):
        check(open_splits(clean), features=features, similarity=0)


def test_a_group_of_the_same_picture_is_joined_with_what_looks_alike_to_the_model(tmp_path):
    """The copies are an exact duplicate as without the model, and similar to the other image."""
    names = ("cat/0.png", "cat/copy.png", "dog/1.png", "dog/2.png")
    data = write(tmp_path / "data", dict(zip(names, map(picture, (0, 0, 1, 2)), strict=True)))
    values = np.array([[1, 0, 0], [1, 0, 0], [0.96, 0.28, 0], [0, 0, 1]])
    found = check(open_splits(data), features=lambda _: values, min_images=0)
    details = {(each.kind, each.path.removeprefix(f"{data}/")): each for each in found.findings}
    assert {key: each.group for key, each in details.items()} == {
        ("exact_duplicate", "cat/0.png"): 1,
        ("exact_duplicate", "cat/copy.png"): 1,
        ("similar", "cat/0.png"): 1,
        ("similar", "cat/copy.png"): 1,
        ("similar", "dog/1.png"): 1,
    }
    assert details["exact_duplicate", "cat/0.png"].detail == "2 images of these bytes"
    assert list(found.groups) == [1, 1, 1, 3]
