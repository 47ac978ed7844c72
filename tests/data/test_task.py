"""Labels of several classes, and values: read, divided, and reported where they are others."""

import io

import numpy as np
import pytest
from PIL import Image

from cvt.data import Task, open_labelled, open_splits, open_training


@pytest.fixture
def table(tmp_path):
    """Writes a csv file of the lines, and the images 0.png, 1.png, ... that they name."""

    def write(header, *rows):
        for i in range(len(rows)):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        lines = [header, *(f"{i}.png,{row}" for i, row in enumerate(rows))]
        (tmp_path / "t.csv").write_text("".join(f"{line}\n" for line in lines))
        return tmp_path / "t.csv"

    return write


def test_several_classes_are_read_from_one_column_and_from_columns_alike(table):
    path = table("path,tags,dog,cat", "cat; dog,1,1", ",0,0", "dog ;dog,true,false", "cat,0,1.0")
    one = open_labelled(path, label_column="tags", label_separator=";")
    columns = {"label_column": "dog,cat", "problem_type": "multi_label_classification"}
    several = open_labelled(path, **columns)
    assert one.labels == several.labels == ["cat;dog", "", "dog", "cat"]
    assert (one.classes, several.classes) == (["cat", "dog"], ["dog", "cat"])
    assert one.targets.tolist() == [[1, 1], [0, 0], [0, 1], [1, 0]]
    assert several.targets.tolist() == [[1, 1], [0, 0], [1, 0], [0, 1]]
    assert one.select([2]).targets.tolist() == [[0, 1]]
    assert one.targets.dtype == np.float32


def test_a_file_of_classes_orders_several_classes_and_names_them(table, tmp_path):
    path = table("path,label", "0|1", "1")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    images = open_labelled(path, classes=tmp_path / "classes.txt", label_separator="|")
    assert images.labels == ["cat|dog", "cat"]
    assert images.targets.tolist() == [[1, 1], [0, 1]]


def test_values_are_read(table):
    path = table("path,age,mass", "3,1e-3", "4.25,7")
    images = open_labelled(path, label_column="age,mass", problem_type="regression")
    assert images.classes == ["age", "mass"]
    np.testing.assert_array_equal(images.targets, np.array([[3, 1e-3], [4.25, 7]], np.float32))
    assert open_splits(path, label_column="age", problem_type="regression")[""].classes == ["age"]


def test_a_fifth_of_every_class_is_drawn_of_several(table):
    generator = np.random.default_rng(0)
    flags = generator.random((100, 4)) < [0.7, 0.4, 0.2, 0.04]
    flags[:2, 3] = True
    rows = [",".join(str(int(flag)) for flag in row) for row in flags]
    how = {"label_column": "a,b,c,d", "problem_type": "multi_label_classification"}
    splits = open_training(table("path,a,b,c,d", *rows), **how)
    counts = splits.train.targets.sum(0), splits.validation.targets.sum(0)
    assert (counts[0] + counts[1]).tolist() == flags.sum(0).tolist()
    assert (counts[0] > 0).all()
    assert (counts[1] > 0).all()
    assert 14 <= len(splits.validation) <= 20
    shares = counts[1] / flags.sum(0)
    assert (abs(shares - 0.2) < 0.06).all() or flags[:, 3].sum() < 8
    again = open_training(table("path,a,b,c,d", *rows), **how)
    assert [*again.validation.labels] == [*splits.validation.labels]


def test_a_fifth_is_drawn_of_images_with_values(table):
    path = table("path,age", *(str(i / 7) for i in range(25)))
    splits = open_training(path, label_column="age", problem_type="regression")
    assert (len(splits.train), len(splits.validation)) == (20, 5)


MULTI = "multi_label_classification"


@pytest.mark.parametrize(
    ("rows", "options", "fault"),
    [
        (["a;b", "a", "b", "b;c", "a;c", "c"], {}, r'such as a;b: give label_separator=";"'),
        (["a|b", "a", "b", "a|b"], {}, r'give label_separator="|"'),
        ([f"{i / 7}" for i in range(9)], {}, "9 different numbers as the labels of 9 images"),
        (["a", "b", "a", "b"], {"label_separator": ";"}, "no label of .* has several classes"),
        (["a", "b"], {"label_separator": ";", "problem_type": "regression"}, "no regression"),
        (["a", "b"], {"problem_type": "regression"}, "line 2: label is 'a', not a number"),
        (["nan", "1"], {"problem_type": "regression"}, "line 2: label is 'nan', not a number"),
        (["a", "b"], {"problem_type": MULTI}, "give label_separator for a column of several"),
        (["a", "b"], {"problem_type": "both"}, "problem_type = both: must be one of"),
        (["1,0"], {"label_column": "label,x"}, "label_column = label,x are several columns"),
        (["1,2"], {"label_column": "label,x", "problem_type": MULTI}, "x is '2', neither 0 nor 1"),
        (["1,0"], {"label_column": "label,y", "problem_type": MULTI}, "none is called y"),
        (["1,0"], {"label_column": "x,x", "problem_type": MULTI}, "x,x: a column is named twice"),
        (["1,0"], {"label_column": "x,", "problem_type": MULTI}, "x,: a name is missing"),
    ],
    ids=str,
)
def test_labels_of_another_task_are_reported(table, rows, options, fault):
    header = "path,label,x" if "," in rows[0] else "path,label"
    with pytest.raises(ValueError, match=fault.replace("|", r"\|")):
        open_training(table(header, *rows), **options)


def test_a_column_that_is_there_twice_is_no_choice(table):
    path = table("path,label,label", "a,b", "b,a")
    with pytest.raises(ValueError, match="path, label, label: name the one to use with label_col"):
        open_training(path)
    with pytest.raises(ValueError, match="path, label, label: several are called label"):
        open_training(path, label_column="label")
    path = table("path,label,split,split", "a,train,val", "b,train,val")
    with pytest.raises(ValueError, match="path, label, split, split: several are called split"):
        open_training(path)


def test_one_class_is_not_mistaken_for_others(table):
    synonyms = ['"tench, Tinca tinca"', '"goldfish, Carassius auratus"', '"hen, Gallus"'] * 4
    assert len(open_training(table("path,label", *synonyms)).train.classes) == 3
    numbers = ["0.5", "1.5"] * 6
    assert open_training(table("path,label", *numbers)).train.classes == ["0.5", "1.5"]
    both = ["a;b", "a", "b"] * 4
    kept = open_training(table("path,label", *both), problem_type="single_label_classification")
    assert kept.train.classes == ["a", "a;b", "b"]


def test_such_labels_are_in_columns(photos):
    with pytest.raises(ValueError, match=r"in columns of a csv or parquet file .*, and .*photos"):
        open_training(photos, problem_type="regression")


@pytest.fixture
def parquet(tmp_path):
    """Writes a parquet file of 20 images and the columns given."""
    import datasets

    def write(features=None, **columns):
        images = []
        for i in range(20):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), (i, 0, 0)).save(file, "PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        types = datasets.Features({"image": datasets.Image()} | (features or {}))
        for name, values in columns.items():
            if name not in types:
                types[name] = datasets.Dataset.from_dict({name: values}).features[name]
        rows = datasets.Dataset.from_dict({"image": images} | columns, features=types)
        path = tmp_path / "table.parquet"
        rows.to_parquet(path)
        return path

    return write


def labels_of(images):
    return [label for _, label in images]


def test_several_classes_of_a_table(parquet):
    import datasets

    named = datasets.List(datasets.ClassLabel(names=["dog", "cat", "outdoor"]))
    path = parquet({"tags": named}, tags=[[0, 2], [], [1], [2, 1]] * 5, age=[1.5] * 20)
    images = open_labelled(path, problem_type=MULTI)
    assert images.classes == ["dog", "cat", "outdoor"]
    assert labels_of(images)[:4] == ["dog;outdoor", "", "cat", "cat;outdoor"]
    assert images.targets[:2].tolist() == [[1, 0, 1], [0, 0, 0]]
    splits = open_training(path, problem_type=MULTI, label_separator="|")
    assert len(splits.train) == 16
    assert {"dog|outdoor", "cat|outdoor"} < set(splits.train.labels)

    texts = parquet(tags=["b;a", "a", "", "b"] * 5)
    separated = open_labelled(texts, label_separator=";")
    assert separated.classes == ["a", "b"]
    assert labels_of(separated)[:3] == ["a;b", "a", ""]

    flags = parquet(cat=[True, False] * 10, dog=[1, 1, 0, 0] * 5, image_id=[1] * 20)
    how = {"label_column": "cat,dog", "problem_type": MULTI}
    assert open_labelled(flags, **how).classes == ["cat", "dog"]
    assert labels_of(open_labelled(flags, **how))[:4] == ["cat;dog", "dog", "cat", ""]


@pytest.mark.parametrize("cells", [["y;x", None], [["x", "y"], None]], ids=["text", "lists"])
def test_an_empty_cell_of_several_classes_is_none_of_them(parquet, cells):
    images = open_labelled(parquet(tags=cells * 10), problem_type=MULTI, label_separator=";")
    assert images.classes == ["x", "y"]
    assert labels_of(images)[:2] == ["x;y", ""]


def test_values_of_a_table(parquet, tmp_path):
    path = parquet(age=[i / 4 for i in range(20)], height=list(range(20)))
    one = open_training(path, label_column="age", problem_type="regression")
    assert one.train.classes == ["age"]
    assert one.train.targets.shape == (16, 1)
    both = open_labelled(path, label_column="age,height", problem_type="regression")
    assert both.targets[:3].tolist() == [[0, 0], [0.25, 1], [0.5, 2]]


@pytest.mark.parametrize(
    ("columns", "options", "fault"),
    [
        ({"tags": [["a"], []] * 10}, {}, f"in tags: give problem_type={MULTI}"),
        ({"tags": [["a;b"], []] * 10}, {"problem_type": MULTI}, "'a;b' has a ; in it"),
        ({"tags": ["a", "b"] * 10}, {"problem_type": MULTI}, "give label_separator for a column"),
        ({"tags": [1.5] * 20}, {"problem_type": MULTI}, "no column that could be the label"),
        ({"age": ["x"] * 20}, {"problem_type": "regression"}, "no column that could be the label"),
        ({"age": [1.0, None] * 10}, {"problem_type": "regression"}, "#1: age is '', not a number"),
        (
            {"a": [0, 2] * 10, "b": [1] * 20},
            {"label_column": "a,b", "problem_type": MULTI},
            "#1: a is '2', neither 0 nor 1",
        ),
        (
            {"a": [0, None] * 10, "b": [1] * 20},
            {"label_column": "a,b", "problem_type": MULTI},
            "#1: a is '', neither 0 nor 1",
        ),
        ({"a": ["x"] * 20, "b": ["y"] * 20}, {"label_column": "a,b"}, "are several columns"),
        ({"a": [1] * 20}, {"label_column": "a,c", "problem_type": MULTI}, "no column c"),
    ],
    ids=str,
)
def test_labels_of_a_table_that_do_not_fit_are_named(parquet, columns, options, fault):
    with pytest.raises(ValueError, match=fault):
        open_training(parquet(**columns), **options)


def test_a_target_follows_the_order_of_the_outputs():
    indices = {"b": 0, "a": 1}
    assert Task().target("a", indices) == 1
    assert Task("multi_label_classification", "|").target("a|b", indices) == [1.0, 1.0]
    assert Task("regression").target("1.5;-2.0", indices) == [1.5, -2.0]
