"""`cvt embed`, `Classifier.embed`, and the table of `cvt predict`."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

import cvt as package
from cvt.data import decode, images_below
from cvt.data.decoding import ImageError
from cvt.inference.embed import open_images
from cvt.inference.embedding_file import read_embeddings
from cvt.inference.predict import classify, scores
from cvt.runtime import FeatureSettings

CVT = Path(sys.executable).with_name("cvt")
TORCH = ("--runtime", "torch", "--device", "cpu", "--threads", 1, "--workers", 0)


@pytest.fixture(scope="module")
def paths(photos):
    return list(images_below(photos))


@pytest.fixture(scope="module")
def expected(classifier, processor, paths):
    """The normed class token of the model, image by image."""
    rows = []
    for path in paths:
        pixels = processor(decode(path), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            rows.append(classifier.layernorm(classifier.cvt(pixels).cls_token_value)[0, 0].numpy())
    return np.stack(rows)


def test_a_classifier_embeds(classifier, processor, paths, expected):
    for features in (False, True):
        clf = package.Classifier(
            *(classifier, "fused", None, "cpu", 1), processor=processor, features=features
        )
        found = clf.embed([*paths[:5], decode(paths[5])])
        assert (found.dtype, found.shape) == (np.float32, (6, 32))
        np.testing.assert_allclose(found, expected[:6], rtol=0, atol=1e-5)
        assert (clf._embedder is clf.runtime) == features
    assert clf(paths[0], top_k=1) == package.Classifier(
        *(classifier, "fused", None, "cpu", 1), processor=processor
    )(paths[0], top_k=1)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(clf.embed(paths[0], normalize=True), unit[:1], rtol=0, atol=1e-6)
    assert clf.embed([]).shape == (0, 32)
    with pytest.raises(ImageError, match="is not an image"):
        clf.embed([paths[0], b"no"])
    stream = clf.embed_stream([*paths[:3], b"no"], batch_size=2, workers=0, normalize=True)
    *good, bad = stream
    assert [record["path"] for record in good] == [str(path) for path in paths[:3]]
    np.testing.assert_allclose([r["features"] for r in good], unit[:3], rtol=0, atol=1e-6)
    assert "is not an image" in bad["error"]


def test_an_earlier_stage_has_features_and_no_labels(classifier, processor, paths):
    clf = package.Classifier(
        classifier, "fused", processor=processor, features=FeatureSettings(stage=1)
    )
    assert clf.embed(paths[:2]).shape == (2, 8)
    with pytest.raises(ValueError, match="features of an earlier stage alone"):
        clf(paths[0])


@pytest.mark.parametrize("suffix", ["parquet", "npz", "npy"])
def test_the_command_writes_paths_classes_and_features(
    cvt, model_folder, photos, paths, expected, suffix, tmp_path
):
    output = tmp_path / f"features.{suffix}"
    code, out, err = cvt("embed", *TORCH, model_folder, photos, "--output", output)
    assert (code, out) == (0, "")
    assert "36 images embedded, 32 numbers each" in err
    found = read_embeddings(output)
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-5)
    assert found.paths == [str(path) for path in paths]
    assert found.labels == [path.parent.name for path in paths]
    about = found.about
    assert (about["stage"], about["pool"], about["image_size"]) == (3, "cls", 32)
    assert about["sha256"] == package.checkpoints.model_source(model_folder).sha256


def test_the_command_skips_what_it_cannot_read(cvt, model_folder, photos, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    words = (photos / "red", tmp_path / "broken.png", f"{photos}/blue/0[0-3].png")
    options = ("--stage", 2, "--normalize", "--output", tmp_path / "f.npz")
    code, _, err = cvt("embed", *TORCH, model_folder, *words, *options)
    assert code == 3
    assert "1 of 17 images skipped" in err
    found = read_embeddings(tmp_path / "f.npz")
    assert found.values.shape == (16, 16)
    np.testing.assert_allclose(np.linalg.norm(found.values, axis=1), 1, rtol=1e-6)
    assert found.labels == [None] * 16


def test_a_csv_file_has_labels_or_none(photos):
    images = [photos / "red/03.png", photos / "blue/00.png"]
    for lines, labels, options in (
        ("path,label\nred/03.png,a\nblue/00.png,b\n", ["a", "b"], {}),
        ("red/03.png,a\nblue/00.png,b\n", ["a", "b"], {}),
        ("path,kind\nred/03.png,a\nblue/00.png,b\n", [None, None], {}),
        ("path,kind\nred/03.png,a\nblue/00.png,b\n", ["a", "b"], {"label_column": "kind"}),
        ("red/03.png\nblue/00.png\n", [None, None], {}),
    ):
        (photos / "list.csv").write_text(lines)
        found = list(open_images([str(photos / "list.csv")], **options))
        assert found == list(zip(images, labels, strict=True)), lines
    with pytest.raises(ValueError, match=r"label_column: .*list\.csv, .* without labels"):
        open_images([str(photos / "list.csv"), str(images[0])], label_column="kind")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--output", "f.txt"), "f.txt must end in .parquet, .npz or .npy"),
        (("--output", "f.npz", "--stage", "7"), "stage = 7: the model has the stages 1 to 3"),
        (("--output", "f.npz", "--pool", "cls", "--stage", "1"), "stage 1 of the model has no"),
    ],
)
def test_a_wrong_option_is_one_sentence(cvt, model_folder, photos, words, message, tmp_path):
    code, _, err = cvt("embed", *TORCH, model_folder, photos, *words[:1], tmp_path / words[1],
                       *words[2:])  # fmt: skip
    assert code == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_is_resumed_to_the_same_file(model_folder, photos, tmp_path):
    words = [CVT, "embed", model_folder, photos, "--runtime", "torch", "--threads", "1",
             "--workers", "0", "--batch-size", "1"]  # fmt: skip
    whole, killed = tmp_path / "whole.npz", tmp_path / "killed.npz"
    rows = tmp_path / "killed.npz.part" / "rows.jsonl"
    subprocess.run([*words, "--output", whole], check=True, capture_output=True)
    with subprocess.Popen([*words, "--output", killed], stderr=subprocess.PIPE) as process:
        while process.poll() is None and (not rows.exists() or not rows.stat().st_size):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not killed.exists()
    done = subprocess.run(
        [*words, "--output", killed, "--resume"], check=True, capture_output=True, text=True
    )
    assert "images are embedded already" in done.stderr
    assert killed.read_bytes() == whole.read_bytes()


# ------------------------------------------------------------------------------ cvt predict


def test_predict_writes_a_table_with_logits(
    cvt, model_folder, photos, paths, classifier, processor, tmp_path
):
    words = ("predict", *TORCH, model_folder, photos, "--topk", 2)
    assert cvt(*words, "--output", tmp_path / "plain.parquet")[0] == 0
    assert cvt(*words, "--output", tmp_path / "logits.parquet", "--logits")[0] == 0
    plain, table = (
        parquet.read_table(tmp_path / f"{name}.parquet") for name in ("plain", "logits")
    )
    assert plain.column_names == ["path", "label", "score", "predictions"]
    assert table.column_names == [*plain.column_names, "logits", "probabilities"]
    assert table.select(plain.column_names).equals(plain)
    expected = [result.logits for result in classify(classifier, processor, paths)]
    rows = table.to_pylist()
    np.testing.assert_allclose([row["logits"] for row in rows], expected, rtol=0, atol=1e-5)
    of_classes = [scores(logits, classifier.config) for logits in expected]
    np.testing.assert_allclose(
        [row["probabilities"] for row in rows], of_classes, rtol=0, atol=1e-5
    )
    assert table.schema.metadata[b"classes"] == b'["blue", "green", "red"]'
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    for row in rows:
        best = row["predictions"][0]
        assert (row["label"], row["score"]) == (best["label"], best["score"])
        assert row["score"] == pytest.approx(max(row["probabilities"]))
        assert len(row["predictions"]) == 2


def test_logits_need_a_table(cvt, model_folder, photos, tmp_path):
    code, _, err = cvt("predict", model_folder, photos, "--logits", "--output", tmp_path / "a.csv")
    assert code == 2
    assert "needs an --output that ends in .parquet" in err
