"""`cvt.Classifier` as Ray Data's worker, as its documentation shows it, on a local Ray."""

import os
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pyarrow
import pytest
import ray
from pyarrow import dataset, parquet

import cvt
from cvt.inference.predict import find_images, predict


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    """Ray on this machine: one processor to read, one to classify."""
    ray.init(
        num_cpus=2,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


def classified(rows, model_folder, options={"threads": 1}):  # noqa: B006
    """The rows with the answers of one worker, as a data set of Ray."""
    return rows.map_batches(
        cvt.Classifier,
        fn_constructor_args=(model_folder, "torch"),
        fn_constructor_kwargs=options,
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_size=5,
    )


@pytest.fixture(scope="module")
def expected(classifier, processor, photos):
    """What `predict` returns for every third image."""
    paths = list(find_images([photos]))[::3]
    return {str(found.path): found for found in predict(classifier, processor, paths, topk=1)}


def check(rows, expected):
    assert len(rows) == len(expected)
    for row in rows:
        prediction = expected[row["path"]]
        assert row["label"] == prediction.labels[0]
        assert row["score"] == pytest.approx(prediction.scores[0], abs=1e-6)
        assert row["error"] is None


def test_images_are_classified_as_predict_does(model_folder, expected):
    rows = ray.data.read_images([*expected], mode="RGB", include_paths=True)
    check(classified(rows, model_folder).take_all(), expected)


@pytest.mark.slow
def test_parquet_files_are_classified_as_predict_does(model_folder, expected, tmp_path):
    structs = [{"bytes": Path(path).read_bytes(), "path": "name.png"} for path in expected]
    structs.insert(3, {"bytes": b"no", "path": "broken.png"})
    names = [*expected]
    names.insert(3, "broken")
    table = pyarrow.table({"image": structs, "path": names})
    parquet.write_table(table, tmp_path / "photos.parquet", row_group_size=4)
    rows = ray.data.read_parquet(str(tmp_path / "photos.parquet"))
    answers = {row["path"]: row for row in classified(rows, model_folder).take_all()}
    broken = answers.pop("broken")
    check(answers.values(), expected)
    assert broken["label"] is None
    assert np.isnan(broken["score"])
    assert "broken.png: is not an image" in broken["error"]


def test_files_of_good_and_of_bad_images_are_one_table(model_folder, expected, tmp_path):
    contents = {"good": [Path(next(iter(expected))).read_bytes()], "bad": [b"no", None]}
    for name, content in contents.items():
        rows = ray.data.from_arrow(pyarrow.table({"bytes": pyarrow.array(content, "binary")}))
        classified(rows, model_folder).write_parquet(str(tmp_path / "labels" / name))
    for file in (tmp_path / "labels").rglob("*.parquet"):
        schema = parquet.read_schema(file)
        assert [schema.field(name).type for name in ("label", "error")] == [pyarrow.string()] * 2
    table = dataset.dataset(tmp_path / "labels").to_table()
    assert table["label"].null_count == 2
    assert table["error"].null_count == 1


def test_features_are_a_column_beside_the_labels(model_folder, expected, tmp_path):
    structs = [{"bytes": Path(path).read_bytes(), "path": path} for path in [*expected][:3]]
    structs.insert(1, {"bytes": b"no", "path": "broken.png"})
    rows = ray.data.from_arrow(pyarrow.table({"image": structs}))
    options = {"threads": 1, "features": True}
    classified(rows, model_folder, options).write_parquet(str(tmp_path / "features"))
    table = dataset.dataset(tmp_path / "features").to_table()
    assert table["features"].type == pyarrow.list_(pyarrow.float32(), 32)
    values = table["features"].to_pylist()
    assert values.pop(1) is None
    wanted = cvt.Classifier(model_folder, "torch").embed([*expected][:3])
    np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-6)
    assert table["label"].to_pylist()[0] == next(iter(expected.values())).labels[0]
