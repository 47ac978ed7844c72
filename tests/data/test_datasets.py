"""Data sets: the same images whatever they are stored in, and clear words for what is amiss."""

import io
import itertools
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers.dataset_server import DatasetServer
from PIL import Image

from cvt.data import (
    LabelledImages,
    StreamedImages,
    image_folder,
    images_below,
    open_labelled,
    open_training,
    read_split,
    split,
    without_trained,
    write_digits,
    write_split,
)
from cvt.data.decoding import ImageError, decode

datasets.disable_progress_bars()

CLASSES = ["cat", "dog"]
NAMED = datasets.ClassLabel(names=CLASSES)
TRAIN, TEST = range(12), range(100, 104)  # the images, by their red; odd ones are dogs


@pytest.fixture(autouse=True)
def library(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    # Its pause, 5 seconds, whenever a stream of parquet files ends or is left.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.02)


def picture(red):
    return Image.new("RGB", (8, 8), (red, 0, 0))


def png(red):
    file = io.BytesIO()
    picture(red).save(file, "PNG")
    return file.getvalue()


def table(reds=TRAIN, label=NAMED, **columns):
    """Of images, labels of a type, and other columns as pairs of values and type."""
    labels = [red % 2 for red in reds]
    if label == datasets.Value("string"):
        labels = [CLASSES[i] for i in labels]
    values = {"picture": [{"bytes": png(red), "path": None} for red in reds], "label": labels}
    features = {"picture": datasets.Image(), "label": label}
    for name, (column, feature) in columns.items():
        values[name], features[name] = [column for _ in reds], feature
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def write_folder(root):
    for half, reds in (("train", TRAIN), ("val", TEST)):
        for red in reds:
            path = root / half / CLASSES[red % 2] / f"{red:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(red))
    return root


def write_csv(root):
    write_folder(root / "images")
    lines = ["Path,label,split"]
    for half, reds in (("train", TRAIN), ("val", TEST)):
        lines += [
            f"images/{half}/{CLASSES[i % 2]}/{i:03d}.png,{CLASSES[i % 2]},{half}" for i in reds
        ]
    (root / "list.csv").write_text("\n".join(lines))
    return root / "list.csv"


def write_saved(root):
    datasets.DatasetDict({"train": table(), "validation": table(TEST)}).save_to_disk(root)
    return root


def write_parquet(root):
    root.mkdir(parents=True)
    for i in range(3):
        table(TRAIN[4 * i : 4 * i + 4]).to_parquet(root / f"train-{i:05d}-of-00003.parquet")
    table(TEST).to_parquet(root / "validation-00000-of-00001.parquet")
    return root


def write_shards(root, kind="cls"):
    root.mkdir()
    for half, shards in (("train", [TRAIN[:4], TRAIN[4:8], TRAIN[8:]]), ("val", [TEST])):
        for i, reds in enumerate(shards):
            with tarfile.open(root / f"{half}-{i:03d}.tar", "w") as shard:
                for red in reds:
                    number, name = red % 2, CLASSES[red % 2]
                    text = {"cls": number, "txt": name, "json": json.dumps({"animal": name})}[kind]
                    for suffix, data in (("png", png(red)), (kind, str(text).encode())):
                        member = tarfile.TarInfo(f"{red:03d}.{suffix}")
                        member.size = len(data)
                        shard.addfile(member, io.BytesIO(data))
    return root


def red(source):
    return decode(source).getpixel((0, 0))[0]


def content(images):
    return [(red(source), label) for source, label in images]


def expected(reds):
    return [(red, CLASSES[red % 2]) for red in reds]


@pytest.fixture
def names(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    return tmp_path / "names.txt"


# ------------------------------------------------------------------------------ every kind


@pytest.mark.parametrize(
    "write", [write_folder, write_csv, write_saved, write_parquet, write_shards]
)
def test_the_same_images_come_from_every_kind_of_storage(write, names, tmp_path):
    data = write(tmp_path / "da[t]a")  # of which a pattern would make "data"
    train, test, _ = open_training(data, classes=names)
    assert train.classes == test.classes == CLASSES
    assert sorted(content(train)) == expected(TRAIN)
    assert sorted(content(test)) == expected(TEST)
    assert sorted(content(open_labelled(data, classes=names))) == expected(TEST)


@pytest.mark.parametrize("write", [write_folder, write_csv, write_saved, write_parquet])
def test_looked_up_images_know_their_number_and_labels(write, tmp_path):
    train, _, _ = open_training(write(tmp_path / "data"))
    assert isinstance(train, LabelledImages)
    assert len(train) == len(train.labels) == len(TRAIN)
    assert Counter(train.labels) == {"cat": 6, "dog": 6}
    assert [train[i] for i in range(len(train))] == list(train)
    assert pickle.loads(pickle.dumps(train))[5] == train[5]  # as to a worker


@pytest.mark.parametrize("write", [write_saved, write_parquet, write_shards])
def test_encoded_images_stay_encoded_and_have_names_that_tell_where_they_are(
    write, names, tmp_path
):
    train, _, _ = open_training(write(tmp_path / "data"), classes=names)
    source, _ = next(iter(train))
    assert source.content == png(0)
    where = "train-000.tar: 000" if write is write_shards else "data train#0"
    assert str(source).endswith(where)


@pytest.mark.parametrize("write", [write_saved, write_parquet])
def test_a_split_of_its_own_can_be_given_as_test_data(write, tmp_path):
    data = write(tmp_path / "data")
    train, test, _ = open_training(data, write_folder(tmp_path / "other") / "val")
    assert content(train) == expected(TRAIN)
    assert sorted(content(test)) == expected(TEST)


def test_a_single_table_is_split_by_the_seed(tmp_path):
    table().to_parquet(tmp_path / "all.parquet")
    splits = [open_training(tmp_path / "all.parquet", seed=seed)[:2] for seed in (0, 0, 1)]
    found = [[content(split) for split in pair] for pair in splits]
    assert found[0] == found[1] != found[2]
    assert sorted(found[0][0] + found[0][1]) == expected(TRAIN)
    assert Counter(label for _, label in found[0][1]) == {"cat": 1, "dog": 1}


def test_a_file_of_classes_gives_their_order_and_the_meaning_of_numbers(tmp_path):
    (tmp_path / "names.txt").write_text("dog\ncat\nfox\n")
    folder = write_folder(tmp_path / "data")
    assert open_labelled(folder, classes=tmp_path / "names.txt").classes == ["dog", "cat", "fox"]
    with pytest.raises(ValueError, match="without training images: fox"):
        open_training(folder, classes=tmp_path / "names.txt")
    table(label=datasets.Value("int64")).to_parquet(tmp_path / "all.parquet")
    with pytest.raises(ValueError, match="numbers its classes, in label, and does not name them"):
        open_labelled(tmp_path / "all.parquet")
    images = open_labelled(tmp_path / "all.parquet", classes=tmp_path / "names.txt")
    assert images.labels[:2] == ["dog", "cat"]
    table().to_parquet(tmp_path / "named.parquet")
    images = open_labelled(tmp_path / "named.parquet", classes=tmp_path / "names.txt")
    assert images.classes == ["dog", "cat", "fox"]
    assert content(images) == expected(TRAIN)  # its own names are right, whatever the order
    (tmp_path / "names.txt").write_text("cat\n")
    for data in (folder, tmp_path / "all.parquet", tmp_path / "named.parquet"):
        with pytest.raises(ValueError, match="none of the classes"):
            open_labelled(data, classes=tmp_path / "names.txt")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("nowhere", FileNotFoundError, "nowhere is not a folder, nor a file$"),
        ("someone/photos", FileNotFoundError, "is written hub:someone/photos$"),
        ("hub:photos", ValueError, "is written hub:OWNER/NAME"),
        ("stream:nowhere", FileNotFoundError, "^nowhere is not a folder, nor a file$"),
        ("stream:notes.md", ValueError, "nor hub:OWNER/NAME to stream"),
        ("notes.md", ValueError, "is neither a .csv nor a .parquet file"),
        ("broken.parquet", ValueError, "broken.parquet cannot be read"),
        ("broken.tar", ValueError, "cannot be read"),
        ("broken.tar.gz", ValueError, "broken.tar.gz is not a whole archive"),
        ("part-{000..003}.tar", FileNotFoundError, r"4 files .* part-000.tar, part-001.tar"),
        ("part-{0..7}.tar", FileNotFoundError, r"8 files .* part-4.tar and 3 more$"),
        ("none-*.tar", FileNotFoundError, r"^none-\*\.tar matches no file$"),
        ("mixed", ValueError, "a.parquet: its name gives no split .train"),
        ("digits", ValueError, "digits has no columns to choose from"),
    ],
)
def test_data_that_is_none_is_named(data, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mixed").mkdir()
    files = ("notes.md", "broken.parquet", "broken.tar", "broken.tar.gz", "mixed/a.parquet")
    for name in (*files, "mixed/test.parquet"):
        Path(name).write_bytes(b"no such thing" * 100)
    column = "x" if data == "digits" else None
    with pytest.raises(error, match=message):
        open_labelled(data, image_column=column)


# ------------------------------------------------------------------------------ classes


def test_splits_that_differ_in_their_classes_are_named(tmp_path):
    folder = write_folder(tmp_path / "data")
    (folder / "val/dog").rename(folder / "val/fox")
    with pytest.raises(ValueError, match=r"split of .*data only one has the class dog, fox"):
        open_training(folder)


def test_of_many_classes_without_images_twenty_are_named(tmp_path):
    folder = write_folder(tmp_path / "data")
    for i in range(10, 60):
        (folder / f"train/{i}").mkdir()
    with pytest.raises(ValueError, match=r"classes without images: 10, 11, .*, 29 and 30 more$"):
        open_training(folder)


def test_a_class_of_a_table_without_images_in_one_split_is_named(tmp_path):
    splits = {"train": table(), "test": table([2, 4])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="classes without validation images: dog"):
        open_training(tmp_path / "data")


def test_unused_splits_are_listed(tmp_path):
    datasets.DatasetDict({"train": table(), "other": table()}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="splits train, other and none of val"):
        open_training(tmp_path / "data")


# ------------------------------------------------------------------------------ image folders


def test_a_split_is_stratified_repeatable_and_whole(photos):
    images = image_folder(photos)
    train, test = split(images, seed=3)
    assert sorted([*train, *test]) == sorted(images)
    assert all(test.labels.count(name) == 2 for name in images.classes)
    assert list(split(images, seed=3)[1]) == list(test)
    assert list(split(images, seed=4)[1]) != list(test)


def test_folders_that_cannot_be_trained_on_are_named(tmp_path):
    data = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match="data is not a folder"):
        image_folder(data)
    data.mkdir()
    with pytest.raises(ValueError, match="no folder per class"):
        open_training(data)
    (data / "ant").mkdir()
    for i in range(3):
        (data / "ant" / f"{i}.png").write_bytes(png(i))
    with pytest.raises(ValueError, match="single class, ant"):
        open_training(data)
    (data / "bee").mkdir()
    with pytest.raises(ValueError, match="without images: bee"):
        open_training(data)
    (data / "bee/0.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"class bee has one image, .*0\.png"):
        open_training(data)


def test_a_missing_split_is_named(tmp_path):
    folder = write_folder(tmp_path / "data")
    (folder / "val").rename(folder / "holdout")
    with pytest.raises(ValueError, match="has a train folder and none of val"):
        open_training(folder)
    train, test, _ = open_training(folder / "train", folder / "holdout")
    assert (len(train), len(test)) == (len(TRAIN), len(TEST))


def test_images_below_a_folder_are_sorted_by_folder_and_none_is_hidden(tmp_path):
    names = ("a/c/1.png", "a/c.PNG", "a.b/0.jpg", "a/.0.png", ".d/0.png", "a/0.txt", "0.webp")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in images_below(tmp_path)]
    assert found == ["0.webp", "a/c/1.png", "a/c.PNG", "a.b/0.jpg"]


# ------------------------------------------------------------------------------ splits


def write_classes(folder, reds=TRAIN):
    for number in reds:
        path = folder / CLASSES[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return folder


HELD_OUT = range(200, 204)


def test_a_test_split_beside_a_validation_split_is_held_out(tmp_path):
    folder = write_folder(tmp_path / "data")
    assert open_training(folder).test is None
    write_classes(folder / "test", HELD_OUT)
    splits = open_training(folder)
    assert sorted(content(splits.validation)) == expected(TEST)
    assert sorted(content(splits.test)) == expected(HELD_OUT)
    assert not splits.drawn
    assert sorted(content(open_labelled(folder))) == expected(TEST)
    # With other validation images it is held out likewise.
    other = open_training(folder, write_classes(tmp_path / "other", TEST))
    assert sorted(content(other.test)) == expected(HELD_OUT)
    (folder / "val").rename(folder / "elsewhere")
    alone = open_training(folder)
    assert sorted(content(alone.validation)) == expected(HELD_OUT)
    assert alone.test is None
    (folder / "test/dog").rename(folder / "test/fox")
    (folder / "elsewhere").rename(folder / "val")
    with pytest.raises(ValueError, match="only the test split has the class fox"):
        open_training(folder)


def test_a_test_split_of_a_table_is_held_out(tmp_path):
    splits = {"train": table(), "validation": table(TEST), "test": table(HELD_OUT)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    found = open_training(tmp_path / "data")
    assert [content(images) for images in found] == [*map(expected, (TRAIN, TEST, HELD_OUT))]
    datasets.DatasetDict(splits | {"val": table()}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match="two splits of one kind: validation, val"):
        open_training(tmp_path / "two")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["val", "test"], "has the splits .* and none of train, training"),
        (["val"], "has the split val alone, and none to train on"),
        (["train", "Train", "val"], "two folders of one split, Train and train"),
        (["train_set"], "has a train_set folder and none of val"),
        (["mytrain", "myval"], "folders mytrain, myval, which may be splits or not"),
        (["trainset", "testset"], "folders testset, trainset, which may be splits or not"),
        (["val_set", "cat"], "the folder val_set, which is a split, beside cat"),
    ],
)
def test_folders_of_splits_are_never_classes(names, message, tmp_path):
    for name in names:
        write_classes(tmp_path / "data" / name)
    if "cat" in names:
        write_classes(tmp_path / "data", [0])
    with pytest.raises(ValueError, match=message):
        open_training(tmp_path / "data")


@pytest.mark.parametrize(
    "names", [("train_set", "val_set"), ("train2017", "val2017"), ("Train", "VALID")]
)
def test_folders_of_splits_are_recognised_by_a_word_of_their_names(names, tmp_path):
    write_classes(tmp_path / names[0])
    write_classes(tmp_path / names[1], TEST)
    train, validation, _ = open_training(tmp_path)
    assert sorted(content(train)) == expected(TRAIN)
    assert sorted(content(validation)) == expected(TEST)


def test_a_class_may_be_called_train_and_have_folders_in_it(tmp_path):
    for i in range(4):
        for name in ("train", "test tube", "carnival/2019", "boat"):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / f"{i}.png").write_bytes(png(i))
    assert open_training(tmp_path).train.classes == ["boat", "carnival", "test tube", "train"]


def test_parquet_files_whose_names_may_be_splits_are_refused(tmp_path):
    for name in ("mytrain", "myval"):
        table().to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"mytrain, myval may be splits or not; .* as val_data"):
        open_training(tmp_path)
    train, validation, _ = open_training(tmp_path / "mytrain.parquet", tmp_path / "myval.parquet")
    assert len(train) == len(validation) == len(TRAIN)


def test_runs_models_and_exports_are_no_classes(tmp_path, caplog):
    write_classes(tmp_path)
    for name, file, text in (
        ("runs/one", "args.yaml", "epochs: 1"),
        ("model", "config.json", '{"model_type": "cvt"}'),
        ("exported", "export.json", '{"format": "onnx"}'),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / file).write_text(text)
        (tmp_path / name / "mistakes.png").write_bytes(png(0))
    (tmp_path / "runs/one/results.csv").touch()
    (tmp_path / "cat/config.json").write_text('{"camera": 1}')  # no model
    splits = open_training(tmp_path)
    assert splits.train.classes == CLASSES
    assert len(splits.train) + len(splits.validation) == len(TRAIN)
    assert caplog.messages == [
        f"{tmp_path}: not read: 3 folders of runs and models (exported, model, runs/one)"
    ]


def test_the_split_that_is_drawn_is_written_and_read(tmp_path):
    folder = write_classes(tmp_path / "data")
    (folder / "cat/000.png").rename(folder / os.fsdecode(b"cat/caf\xe9, 0.png"))
    splits = open_training(folder)
    assert splits.drawn
    write_split(tmp_path / "split.csv", splits.train, splits.validation)
    assert "cat/002.png,train\n" in (tmp_path / "split.csv").read_text(errors="replace")
    folder = folder.rename(tmp_path / "moved")
    images, trained = without_trained(open_labelled(folder), tmp_path / "split.csv")
    assert trained == 0
    assert images.labels == splits.validation.labels
    assert images[1] == (folder / splits.validation.name(1), splits.validation.labels[1])
    (folder / "dog/new.png").write_bytes(png(1))
    images, trained = without_trained(open_labelled(folder), tmp_path / "split.csv")
    assert (len(images), trained) == (len(TRAIN) + 1, len(splits.train))


def test_the_split_of_a_table_names_its_rows_wherever_it_is(tmp_path):
    table().to_parquet(tmp_path / "all.parquet")
    splits = open_training(tmp_path / "all.parquet")
    write_split(tmp_path / "split.csv", splits.train, splits.validation)
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "all.parquet").rename(tmp_path / "elsewhere/all.parquet")
    images, _ = without_trained(open_labelled(moved), tmp_path / "split.csv")
    assert content(images) == content(splits.validation)


@pytest.mark.parametrize(
    ("text", "message"),
    [("path,label\n", "line 1: must be path,split"), ("path,split\na.png,x\n", "line 2: must be")],
)
def test_a_malformed_split_is_named_by_line(text, message, tmp_path):
    (tmp_path / "split.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_split(tmp_path / "split.csv")


# ------------------------------------------------------------------------------ what is not read


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes, links need rights")
def test_links_are_followed_and_what_is_not_read_is_named_once(tmp_path, caplog, monkeypatch):
    write_classes(tmp_path / "elsewhere", range(4))
    data = write_classes(tmp_path / "data")
    (data / "cat/more").symlink_to(tmp_path / "elsewhere/cat")
    (data / "cat/loop").symlink_to(data)
    (data / "cat/itself.png").symlink_to(data / "cat/itself.png")
    (data / "dog/gone.png").symlink_to(data / "nowhere.png")
    (data / "fox").symlink_to(tmp_path / "nowhere")
    os.mkfifo(data / "dog/pipe.png")
    for name in ("1.jxl", "2.ico", "3.jpg.1", "4", "5.jpg~", "6.jpg_large", "notes", "7.jpg.json"):
        held = b"words" if name in ("notes", "7.jpg.json") else png(0)
        (data / "dog" / name).write_bytes(held)
    (data / "loose.png").write_bytes(png(0))
    images = image_folder(data)
    assert Counter(images.labels) == {"cat": 8, "dog": 6}
    (message,) = caplog.messages
    assert message == (
        f"{data}: not read: 3 broken links (cat/itself.png, dog/gone.png, fox); 4 images without "
        "the suffix of one (dog/3.jpg.1, dog/4, dog/5.jpg~, ...); 1 links to a folder that they "
        "are in (cat/loop); 1 of the suffix .ico (dog/2.ico); 1 of the suffix .jxl (dog/1.jxl); 1 "
        "outside the folders of the classes (loose.png); 1 pipes, sockets or devices "
        "(dog/pipe.png)"
    )
    caplog.clear()
    monkeypatch.setenv("RANK", "1")  # of several processes one logs
    assert len(list(images_below(data))) == 15
    assert not caplog.messages


def test_class_names_that_are_equal_or_cannot_be_written_are_refused(tmp_path):
    for name in ("cat", "cat ", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "data" / name / f"{i}.png").write_bytes(png(i))
    with pytest.raises(ValueError, match="differ in spaces alone: 'cat', 'cat '"):
        open_training(tmp_path / "data")
    (tmp_path / "data/cat ").rename(tmp_path / "data" / os.fsdecode(b"caf\xe9"))
    with pytest.raises(ValueError, match=r"whose name is not UTF-8, 'caf\\udce9'; rename it"):
        open_training(tmp_path / "data")


def test_a_folder_called_digits_differs_from_the_data_set(tmp_path, monkeypatch):
    write_classes(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"for the folder write \./digits"):
        open_training("digits")
    assert open_training("./digits").train.classes == CLASSES


def test_capital_suffixes_are_recognised(tmp_path):
    table().to_parquet(tmp_path / "ALL.PARQUET")
    write_csv(tmp_path / "csv").rename(tmp_path / "csv/LIST.CSV")
    assert len(open_labelled(tmp_path / "ALL.PARQUET")) == len(TRAIN)
    assert len(open_labelled(tmp_path / "csv/LIST.CSV")) == len(TEST)
    (tmp_path / "csv/LIST.CSV").unlink()
    folder = tmp_path / "tables"
    folder.mkdir()
    (tmp_path / "ALL.PARQUET").rename(folder / "Train.PARQUET")
    assert len(open_training(folder, write_classes(tmp_path / "val", TEST)).train) == len(TRAIN)


@pytest.mark.parametrize("name", ["names.json", "names.txt"])
def test_a_file_of_classes_may_be_json_on_one_line(name, tmp_path):
    (tmp_path / name).write_text('["dog", "cat"]')
    images = open_labelled(write_classes(tmp_path / "data"), classes=tmp_path / name)
    assert images.classes == ["dog", "cat"]


# ------------------------------------------------------------------------------ csv


@pytest.mark.parametrize(
    "lines",
    [
        'cat.png,cat\n"a, dog.png",dog\n',
        '\ufefffilename,class\r\ncat.png, cat\r\n\r\n"a, dog.png", dog\r\n',
        'id,label,path\n7,cat,cat.png\n8,dog,"a, dog.png"\n',
        'path , label\ncat.png , cat\n./cat.png,cat\n"a, dog.png",dog \n,\n',
        "image,kind\ncat.png,cat\n{folder}/a%2C dog.png,dog\n",
    ],
    ids=[
        "no header",
        "byte order mark",
        "more columns",
        "spaces, twice",
        "absolute path, named column",
    ],
)
def test_a_csv_file_lists_paths_and_labels(lines, tmp_path):
    (tmp_path / "cat.png").write_bytes(png(0))
    (tmp_path / "a, dog.png").write_bytes(png(1))
    (tmp_path / "a%2C dog.png").write_bytes(png(1))
    (tmp_path / "list.csv").write_text(lines.format(folder=tmp_path), encoding="utf-8", newline="")
    column = "kind" if "kind" in lines else None
    images = open_labelled(tmp_path / "list.csv", label_column=column)
    assert content(images) == [(0, "cat"), (1, "dog")]


def test_two_csv_files_are_the_two_splits(tmp_path):
    write_csv(tmp_path / "data")
    lines = (tmp_path / "data/list.csv").read_text().splitlines()
    for name, half in (("a.csv", "train"), ("b.csv", "val")):
        rows = [line.rpartition(",")[0] for line in lines[1:] if line.endswith(half)]
        (tmp_path / "data" / name).write_text("\n".join(rows))
    train, test, _ = open_training(tmp_path / "data/a.csv", tmp_path / "data/b.csv")
    assert (content(train), content(test)) == (expected(TRAIN), expected(TEST))


def test_labels_of_a_csv_file_may_be_positions_in_the_file_of_classes(names, tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "list.csv").write_text("0.png,1\n")
    assert open_labelled(tmp_path / "list.csv").labels == ["1"]
    assert open_labelled(tmp_path / "list.csv", classes=names).labels == ["dog"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "list.csv is empty"),
        ("path,label\n", "lists no images"),
        ("0.png,cat\n0.png,\n", "line 2: has no label"),
        ("0.png,cat\n,cat\n", "line 2: has no path"),
        ("0.png,cat\n\n0.png,cat,dog\n", "line 3: 3 columns, expected 2"),
        ("0.png,cat\n0.png,dog\n", r"line 2: 0.png is dog, and cat on an earlier line"),
        ("0.png,cat\n./0.png,dog\n", r"line 2: ./0.png is dog, and cat on an earlier line"),
        ("img,kind\n0.png,cat\n", "line 1: img, kind is neither a file, relative"),
        (
            "path,label,split\n0.png,cat,train\nx/../0.png,cat,val\n",
            "line 3: x/../0.png is cat val, and cat train on an earlier line",
        ),
        (
            "path,label,split\n0.png,cat,train\n0.png,cat,val\n",
            "line 3: 0.png is cat val, and cat train on an earlier line",
        ),
        ("0.png,cat,dog\n", "3 columns, separated by commas, and no header"),
        ("path,kind\n0.png,cat\n", "columns path, kind: name the one to use with label_column"),
        ("path,label,split\n0.png,cat,hold\n", "line 2: split is 'hold', not one of train"),
        ('0.png,"cat\n', "line 1: unexpected end of data"),
        ("0.png,c\udce4t\n", "is not UTF-8 text"),
        (
            "0.png,cat\n" + "".join(f"{i}.png,cat\n" for i in range(1, 9)),
            r"lists 8 images that are not in .*: 1.png, 2.png, 3.png, 4.png, 5.png and 3 more$",
        ),
    ],
)
def test_a_malformed_csv_file_is_refused_by_line(lines, message, tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "list.csv").write_bytes(lines.encode(errors="surrogateescape"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_labelled(tmp_path / "list.csv")


# ------------------------------------------------------------------------------ tables


NUMBERS = datasets.List(datasets.Value("int64"))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (table().remove_columns("picture"), {}, "no column of images; .* are label.*image_column"),
        (table(other=({"bytes": png(0)}, datasets.Image())), {}, "several columns of images"),
        (table(other=(0, NAMED)), {}, "several columns that could be the label"),
        (table().remove_columns("label"), {}, "no column that could be the label.*label_column"),
        (table(), {"label_column": "kind"}, "no column kind that could be the label"),
        (table(), {"image_column": "photo"}, "no column photo of images"),
        (table(label=datasets.Value("float32")), {"label_column": "label"}, "neither names nor"),
        (table(other=([0], NUMBERS)).remove_columns("label"), {}, "several labels .* in other"),
        (table(other=([0], NUMBERS)), {"label_column": "other"}, "several labels .* in other"),
        (table([1]).map(lambda row: {"label": None}), {}, "train#0: label is None, which is none"),
    ],
)
def test_ambiguous_columns_are_listed(rows, options, message, tmp_path):
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        open_labelled(tmp_path / "data", **options)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (table(label=datasets.Value("string")), {}),
        (table(label=datasets.Value("large_string")), {"label_column": "label"}),
        (table(label=datasets.Value("string"), caption=("a", datasets.Value("string"))), {}),
        (table(other=({"bytes": png(9)}, datasets.Image())), {"image_column": "picture"}),
        (table(other=(1, NAMED)), {"label_column": "label"}),
        (table(other=([1], NUMBERS)), {}),
    ],
)
def test_columns_are_recognised_by_type_or_by_name(rows, options, tmp_path):
    if rows.features["label"].dtype == "large_string":
        rows = table(label=datasets.Value("string")).cast_column("label", rows.features["label"])
    rows.save_to_disk(tmp_path / "data")
    assert content(open_labelled(tmp_path / "data", **options)) == expected(TRAIN)


def test_images_as_plain_bytes_are_read_too(tmp_path):
    raw = datasets.Dataset.from_dict({"data": [png(0)], "label": ["cat"]})
    raw.to_parquet(tmp_path / "raw.parquet")
    assert content(open_labelled(tmp_path / "raw.parquet", image_column="data")) == [(0, "cat")]


def test_an_image_that_is_missing_from_its_row_fails_when_it_is_decoded(tmp_path):
    rows = table([0, 1]).to_dict()
    rows["picture"][1] = None
    features = table([0, 1]).features
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    images = open_labelled(tmp_path / "data")
    with pytest.raises(ImageError, match="data#1: is empty"):
        decode(images[1][0])


# ------------------------------------------------------------------------------ streams


@pytest.fixture(scope="module", params=["parquet", "shards"])
def stream(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("streams")
    (root / "names.txt").write_text("cat\ndog\n")
    write = {"parquet": write_parquet, "shards": write_shards}[request.param]
    train, _, _ = open_training(f"stream:{write(root / 'data')}", classes=root / "names.txt")
    return train


def shuffled(stream, passes=1, *arguments):
    return [red(s) for s, _ in itertools.islice(stream.shuffled(*arguments), passes * len(TRAIN))]


def test_a_stream_is_in_the_stored_order_and_knows_its_length_where_that_is_stored(stream):
    assert isinstance(stream, StreamedImages)
    assert content(stream) == content(stream) == expected(TRAIN)
    assert stream.length in (None, len(TRAIN))
    assert all(isinstance(source.content, bytes) for source, _ in stream)


def test_the_order_of_a_shuffled_stream_follows_from_its_arguments(stream):
    first = shuffled(stream, 3, 0)
    assert shuffled(stream, 3, 0) == first
    assert shuffled(stream, 3, 1) != first
    passes = [first[i : i + len(TRAIN)] for i in range(0, len(first), len(TRAIN))]
    assert all(sorted(order) == list(TRAIN) for order in passes)
    assert passes[0] != passes[1] != passes[2]
    assert all(label == CLASSES[red(s) % 2] for s, label in itertools.islice(stream.shuffled(0), 9))


@pytest.mark.parametrize("sizes", [[8, 4], [4, 4, 4], [3, 3, 3, 3]])
def test_ranks_share_the_images_of_a_pass(sizes, stream):
    """There are 3 shards: each is one rank's, but if there are more ranks than shards."""
    shares = [
        red(source)
        for rank, size in enumerate(sizes)
        for source, _ in itertools.islice(stream.shuffled(5, rank, len(sizes)), size)
    ]
    assert sorted(shares) == list(TRAIN)


def test_a_small_buffer_shuffles_too(stream):
    assert sorted(shuffled(stream, 1, 0, 0, 1, 2)) == list(TRAIN)


def test_a_rank_without_images_raises(stream):
    with pytest.raises(ValueError, match="no image for rank 19 of 20"):
        next(iter(stream.shuffled(0, 19, 20)))


def test_a_stream_needs_a_test_split_and_the_names_of_its_classes(names, tmp_path):
    shards = write_shards(tmp_path / "data")
    with pytest.raises(ValueError, match="numbers its classes, in cls"):
        open_training(shards)
    with pytest.raises(ValueError, match="streams are not split: give val_data"):
        open_training(f"{shards}/train-*.tar", classes=names)
    write_shards(tmp_path / "named", "txt")
    with pytest.raises(ValueError, match="does not list the names of its classes, in txt"):
        open_training(tmp_path / "named")


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_shards_name_their_classes_as_text_or_json_and_are_given_by_patterns(kind, names, tmp_path):
    data = write_shards(tmp_path / "data", kind)
    patterns = (f"{data}/train-{{000..002}}.tar", f"{data}/val-*.tar")
    train, test, _ = open_training(*patterns, classes=names)
    assert (content(train), content(test)) == (expected(TRAIN), expected(TEST))
    assert content(open_labelled(data / "train-001.tar", classes=names)) == expected(TRAIN[4:8])


def test_a_label_that_is_no_class_is_named_with_its_image(tmp_path):
    (tmp_path / "names.txt").write_text("cat\nfox\n")
    images = open_labelled(write_shards(tmp_path / "data", "txt"), classes=tmp_path / "names.txt")
    with pytest.raises(ValueError, match=r"val-000.tar: 101: txt is 'dog', which is none of"):
        list(images)


def test_a_damaged_shard_ends_the_stream_with_the_last_image_before_it(names, tmp_path):
    data = write_shards(tmp_path / "data")
    shard = data / "train-002.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    train, _, _ = open_training(data, classes=names)
    with pytest.raises(OSError, match=r"broke off after .*train-002.tar: 008: unexpected end"):
        list(train)
    with pytest.raises(OSError, match="broke off after"):
        list(train.shuffled(0))


# ------------------------------------------------------------------------------ CIFAR


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, in whose time CIFAR was packed."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_python2_string(self, value):
        data = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_python2_string


def python2_pickle(value):
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_cifar(folder, classes, version):
    """Ten images a file, by the names, keys and layouts of the authors' files."""
    labels = [i * classes // 10 for i in range(10)]
    red = np.arange(10, dtype=np.uint8)[:, None, None] * np.ones((1, 32, 32), np.uint8)
    pixels = np.stack([red, 0 * red, 0 * red], axis=1).reshape(10, 3072)
    class_names = [f"class{i:02d}" for i in reversed(range(classes))]
    ten = classes == 10
    train = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    folder.mkdir()
    for name in (*train, "test_batch" if ten else "test"):
        if version == "binary":
            coarse = b"" if ten else b"\x07"
            rows = zip(labels, pixels, strict=True)
            data = b"".join(coarse + bytes([label]) + row.tobytes() for label, row in rows)
            (folder / f"{name}.bin").write_bytes(data)
        else:
            batch = {"batch_label": name, "labels" if ten else "fine_labels": labels}
            (folder / name).write_bytes(python2_pickle({"data": pixels, **batch}))
    if version == "binary":
        name = "batches.meta.txt" if ten else "fine_label_names.txt"
        (folder / name).write_text("\n".join([*class_names, "", ""]))
    else:
        name, key = ("batches.meta", "label_names") if ten else ("meta", "fine_label_names")
        (folder / name).write_bytes(python2_pickle({key: class_names}))
    return folder


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_is_read_from_its_original_files(classes, version, packed, tmp_path):
    data = write_cifar(tmp_path / "cifar", classes, version)
    if packed:
        with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
            archive.add(data, f"cifar-{classes}-batches")
        data = tmp_path / "cifar.tar.gz"
    test = open_labelled(data)
    assert test.classes == [f"class{i:02d}" for i in reversed(range(classes))]
    assert test.labels == [test.classes[i * classes // 10] for i in range(10)]
    assert [red(source) for source, _ in test] == list(range(10))
    file = "test_batch" if classes == 10 else "test"
    assert test[7][0].name == file + (".bin" if version == "binary" else "") + "#7"
    assert test[7][0].content.size == (32, 32)
    if classes == 10:
        train, _, _ = open_training(data)
        assert len(train) == 50


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    data = write_cifar(tmp_path / "cifar", 10, "python")
    (data / "test_batch").write_bytes(pickle.dumps({"data": Evil(), "labels": [0]}))
    with pytest.raises(ValueError, match=r"test_batch was not read: it asks to run \w+.mkdir"):
        open_labelled(data)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-100], "test_batch.* (is damaged|was not read)"),
        (lambda data: b"", "test_batch.* (is damaged|was not read)"),
        (lambda data: data.replace(b"\x09", b"\xf9"), "test_batch.* (is damaged|was not read)"),
        (None, "is not all of CIFAR-10: no test_batch"),
    ],
    ids=["truncated", "empty", "wrong labels", "missing"],
)
def test_damaged_and_missing_files_of_cifar_are_named(version, damage, message, tmp_path):
    data = write_cifar(tmp_path / "cifar", 10, version)
    (file,) = data.glob("test_batch*")
    if damage:
        file.write_bytes(damage(file.read_bytes()))
    else:
        file.unlink()
    with pytest.raises(ValueError, match=message):
        open_labelled(data)


def test_a_truncated_archive_of_cifar_is_named(tmp_path):
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(write_cifar(tmp_path / "cifar", 10, "binary"), "cifar")
    content = (tmp_path / "cifar.tar.gz").read_bytes()
    (tmp_path / "cifar.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cifar.tar.gz is not a whole archive"):
        open_labelled(tmp_path / "cifar.tar.gz")


# ------------------------------------------------------------------------------ digits


def test_digits_are_the_same_in_memory_and_written_as_an_image_folder(tmp_path):
    write_digits(tmp_path / "digits")
    in_memory = open_training("digits", seed=3)
    for half, written in zip(in_memory[:2], open_training(tmp_path / "digits")[:2], strict=True):
        assert half.classes == written.classes == list("0123456789")
        ours = sorted((label, decode(s).tobytes()) for s, label in half)
        assert ours == sorted((label, decode(s).tobytes()) for s, label in written)
        with Image.open(written[0][0]) as image:
            assert (image.size, image.mode) == ((8, 8), "L")
    train, test, _ = in_memory
    assert (len(train), len(test)) == (1437, 360)
    shares = [test.labels.count(c) / train.labels.count(c) for c in "0123456789"]
    assert all(abs(share - 0.25) < 0.02 for share in shares)
    # However a model was trained, `cvt evaluate` takes images that it has not seen.
    assert [str(source) for source, _ in open_labelled("digits")] == list(map(str, test.sources))
    with pytest.raises(FileExistsError):
        write_digits(tmp_path / "digits")


# ------------------------------------------------------------------------------ the hub

# A process of its own, as the hub library reads its settings when it is imported.
OPENS = """
import json, sys, time
pauses = []
time.sleep = pauses.append  # between the hub library's attempts: noted instead of slept
from cvt.data import open_labelled, open_training
from cvt.data.decoding import decode

def content(images):
    return sorted([decode(source).getpixel((0, 0))[0], label] for source, label in images)

answer = {}
for name in sys.argv[1:]:
    pauses.clear()
    try:
        if "@" in name:
            answer[name] = content(open_labelled(name))
        else:
            answer[name] = [content(half) for half in open_training(name)[:2]]
    except Exception as error:
        answer[name] = f"{type(error).__name__}: {error}"
    assert sum(pauses) < 20, name  # of a hub that does not answer they would be 23 seconds
print(json.dumps(answer))
"""


def open_in_a_process(names, home, endpoint, **variables):
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # would call a third host
    done = subprocess.run(
        [sys.executable, "-c", OPENS, *names],
        env={**inherited, **settings, **variables},
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr  # no progress bars
    return json.loads(done.stdout)


def test_data_sets_of_the_hub_are_downloaded_or_streamed(tmp_path):
    root = tmp_path / "hub"
    write_parquet(root / "tables" / "data")
    write_folder(root / "photos")
    (root / "script").mkdir()
    (root / "script/script.py").write_text("open('ran', 'w')")
    splits = [[list(pair) for pair in expected(reds)] for reds in (TRAIN, TEST)]
    good = {
        "hub:someone/tables": splits,
        "hub:someone/photos": splits,
        "stream:hub:someone/tables": splits,
        "stream:hub:someone/photos": splits,
        "hub:someone/tables@train": splits[0],
    }
    bad = {
        "hub:someone/nothing": "doesn't exist on the Hub or cannot be accessed",
        "hub:someone/script": "scripts are no longer supported",
        "hub:someone/tables:small": "Available: ['default']",
        "hub:someone/tables@holdout": "Should be one of ['train', 'validation']",
    }
    repositories = {f"someone/{name}": root / name for name in ("tables", "photos", "script")}
    with DatasetServer(repositories) as server:
        answer = open_in_a_process([*good, *bad], tmp_path / "home", server.endpoint)
    assert {name: answer[name] for name in good} == good
    for name, message in bad.items():
        assert answer[name].startswith(f"ValueError: {name} cannot be read: ")
        assert message in answer[name]
    assert not list(tmp_path.rglob("ran"))

    # The same without the hub: what was downloaded opens, the rest raises at once.
    for reason, variables in (("refused", {}), ("HF_HUB_OFFLINE", {"HF_HUB_OFFLINE": "1"})):
        answer = open_in_a_process(answer, tmp_path / "home", server.endpoint, **variables)
        assert answer["hub:someone/tables"] == splits
        for name in ("hub:someone/nothing", "stream:hub:someone/tables"):
            message = f"UnavailableError: the data set {name.rpartition(':')[2]} could not be read"
            assert answer[name].startswith(f"{message} from {server.endpoint}")
            assert reason in answer[name]


def test_a_hub_that_does_not_answer_is_given_up_soon(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # and never accepts
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        names = ["hub:someone/tables", "stream:hub:someone/tables"]
        answer = open_in_a_process(names, tmp_path / "home", address, HF_HUB_ETAG_TIMEOUT="1")
    assert all("timed out" in message for message in answer.values())
