import csv
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.model_selection import StratifiedKFold

from cvt.data import LabelledImages, StoredImage, Task, fold, open_labelled, open_training, split
from cvt.data.folds import fold_numbers
from cvt.data.labelled import kept_together


def images(labels, groups=None, equal=()):
    """Images of one byte string each; those of the pairs in `equal` have the same."""
    contents = list(range(len(labels)))
    for one, other in equal:
        contents[other] = contents[one]
    sources = [
        StoredImage(str(i), Image.new("RGB", (2, 2), (content % 256, content // 256, 0)))
        for i, content in enumerate(contents)
    ]
    return LabelledImages(sources, labels, groups=groups)


def test_images_of_equal_content_or_one_group_and_theirs_are_kept_together():
    found = kept_together(images(list("aabbab"), list("xyxzwv"), equal=[(1, 3), (2, 5)]))
    assert found == {0: [0, 2, 5], 2: [0, 2, 5], 5: [0, 2, 5], 1: [1, 3], 3: [1, 3]}


def test_folds_without_groups_are_those_of_scikit_learn():
    digits = open_labelled("digits")
    numbers = fold_numbers(digits, 4, seed=7)
    drawn = StratifiedKFold(4, shuffle=True, random_state=7).split(digits.labels, digits.labels)
    for number, (_, held) in enumerate(drawn, start=1):
        assert np.flatnonzero(numbers == number).tolist() == held.tolist()
        train, validation = fold(digits, 4, number, seed=7)
        assert sorted(validation.positions) == held.tolist()
        assert sorted([*train.positions, *validation.positions]) == list(range(len(digits)))
    assert not np.array_equal(numbers, fold_numbers(digits, 4, seed=8))


def test_folds_keep_groups_whole_and_classes_even():
    generator = np.random.default_rng(0)
    groups = [f"object {number}" for number in generator.integers(0, 60, 400)]
    labels = ["abc"[int(name.split()[1]) % 3] for name in groups]  # each object is of one class
    photos = images(labels, groups, equal=[(3, 200), (17, 399)])
    numbers = fold_numbers(photos, 5, seed=0)
    joined = kept_together(photos)
    assert all(len(set(numbers[members])) == 1 for members in joined.values())
    assert len(joined[3]) > Counter(groups)[groups[3]]  # with the group of its equal
    counts = np.array([[sum(numbers[i] == k for i in range(400) if labels[i] == name)
                        for k in range(1, 6)] for name in "abc"])  # fmt: skip
    assert counts.sum() == 400
    assert counts.min() > 0.5 * counts.mean()


def test_a_drawn_split_keeps_groups_whole():
    groups = [str(i // 4) for i in range(100)]
    photos = images(["ab"[i // 4 % 2] for i in range(100)], groups)
    train, validation = split(photos, seed=0)
    assert not set(train.groups) & set(validation.groups)
    assert {name: validation.labels.count(name) for name in "ab"} == {"a": 8, "b": 8}
    with pytest.raises(ValueError, match=r"class a .* or of one group, such as 0, are"):
        split(images(["a"] * 4 + ["b"] * 4, list("xxxxyzvw")), seed=0)


def test_every_fold_has_its_share_of_rare_classes_of_which_an_image_may_have_several():
    generator = np.random.default_rng(0)
    has = np.zeros((300, 10), bool)
    for column in has.T:
        column[generator.choice(300, 12, replace=False)] = True
    labels = [";".join(f"c{k}" for k in np.flatnonzero(row)) for row in has]
    groups = [str(i // 2) if i < 40 else f"alone {i}" for i in range(300)]
    task, drawn = Task("multi_label_classification"), []
    for seed in range(5):
        photos = images(labels, groups)
        photos = LabelledImages(photos.sources, labels, task=task, groups=groups)
        drawn.append(fold_numbers(photos, 5, seed))
        counts = np.array([has[drawn[-1] == number].sum(axis=0) for number in range(1, 6)])
        assert counts.min() >= 1
        assert counts.max() <= 4
        assert np.ptp(np.bincount(drawn[-1])[1:]) < 12
        assert (drawn[-1][:40:2] == drawn[-1][1:40:2]).all()
    assert not np.array_equal(drawn[0], drawn[1])


def test_folds_of_images_with_values_are_of_equal_size():
    photos = images([f"{i}.0" for i in range(31)])
    photos = LabelledImages(photos.sources, photos.labels, ["age"], Task("regression"))
    assert sorted(np.bincount(fold_numbers(photos, 4, seed=0))) == [0, 7, 8, 8, 8]


def test_a_class_for_too_few_folds_is_named():
    with pytest.raises(ValueError, match=r"folds = 3: class b has images for 2 folds"):
        fold_numbers(images(list("aaaabbb"), equal=[(4, 5)]), 3, seed=0)
    with pytest.raises(ValueError, match=r"fold = 4: there are the folds 1 to 3"):
        fold(images(list("aaabbb")), 3, 4, seed=0)


@pytest.fixture
def table(tmp_path):
    """A csv file and a parquet file of 40 images of 2 classes, two of each object."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    (tmp_path / "files").mkdir()
    rows = []
    for i in range(40):
        path = tmp_path / f"files/{i}.png"
        Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
        rows.append((f"files/{i}.png", "cat" if i % 4 < 2 else "dog", f"object {i // 2}"))
    with open(tmp_path / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "thing"), *rows])
    columns = {
        "image": [str(tmp_path / path) for path, _, _ in rows],
        "label": [label for _, label, _ in rows],
        "thing": [i // 2 for i in range(40)],
    }
    features = {"image": ImageFeature(), "label": Value("string"), "thing": Value("int64")}
    Dataset.from_dict(columns, Features(features)).to_parquet(tmp_path / "table.parquet")
    return tmp_path


@pytest.mark.parametrize("file", ["table.csv", "table.parquet"])
def test_a_column_gives_the_groups(table, file):
    how = {"label_column": "label", "group_column": "thing"}
    for folds in (None, 4):
        for seed in range(3):
            splits = open_training(
                table / file, seed=seed, folds=folds, fold=2 if folds else 1, **how
            )
            train, validation = ([i // 2 for i in each.positions] for each in splits[:2])
            assert not set(train) & set(validation)
            assert len(validation) == (10 if folds else 8)
            assert splits.drawn


def test_a_table_says_which_groups_it_lacks(table):
    path = table / "table.csv"
    with pytest.raises(ValueError, match=r"path, label, thing: none is called object"):
        open_training(path, group_column="object")
    with pytest.raises(ValueError, match=r"table.parquet has no column object .* group_column"):
        open_training(table / "table.parquet", label_column="label", group_column="object")
    path.write_text(path.read_text().replace(",object 3", ","))
    with pytest.raises(ValueError, match=r"table.csv, line 8: has no group"):
        open_training(path, group_column="thing")
    with pytest.raises(ValueError, match=r"has no columns to choose from: .*cvt check .* --groups"):
        open_training(table / "files", group_column="thing")


def test_splits_of_the_data_that_share_a_group_are_refused(table):
    path = table / "table.csv"
    header, *lines = path.read_text().splitlines()
    for splits, shared in (
        (["train", "val", "val"], "14 groups, such as object 0, have images in the training and"),
        (["train"] * 4 + ["val"] * 4 + ["train"] * 3 + ["test"], "training and in the test split"),
        (["val"] * 4 + ["train"] * 4 + ["val"] * 3 + ["test"], "validation and in the test split"),
    ):
        marked = [f"{line},{splits[i % len(splits)]}" for i, line in enumerate(lines)]
        path.write_text("\n".join([f"{header},split", *marked]))
        with pytest.raises(ValueError, match=shared):
            open_training(path, group_column="thing")
    with pytest.raises(ValueError, match=r"folds = 2: .*table.csv has a validation split, whose"):
        open_training(path, folds=2)


def test_a_test_split_stays_held_out_of_the_folds():
    splits = [open_training("digits", folds=3, fold=number) for number in (1, 2, 3)]
    assert sum(len(each.validation) for each in splits) == 1437
    assert {len(each.test) for each in splits} == {360}
