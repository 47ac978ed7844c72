import copy
import csv
import io
import itertools
import multiprocessing
import os
import pickle
import socket
import sys
from multiprocessing import resource_sharer

import numpy as np
import pytest
import torch
from helpers.small_models import make, tiny
from PIL import Image
from transformers import pipeline

from cvt import Classifier, CvtConfig, image_processor
from cvt.data import LabelledImages
from cvt.data.decoding import StoredImage
from cvt.data.preprocessing import IMAGE_MEAN, IMAGE_STD, LARGEST
from cvt.data.workers import answer_nothing
from cvt.inference.evaluate import evaluate
from cvt.inference.predict import (
    Prediction,
    classify,
    find_images,
    predict,
    ranked,
    scores,
    scores_per_image,
)
from cvt.runtime import open_runtime


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 this is no photo")
    return path


def test_images_are_found_in_files_folders_and_globs(photos):
    one = photos / "red" / "03.png"
    assert list(find_images([one])) == [one]
    assert len(list(find_images([photos]))) == 36
    firsts = [photos / name / "00.png" for name in ("blue", "green", "red")]
    assert list(find_images([f"{photos}/*/00.png"])) == firsts
    assert list(find_images([one, str(photos / "green")]))[:2] == [one, photos / "green" / "00.png"]


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("missing.png", r"missing\.png does not exist"),
        ("nowhere/", "nowhere/ does not exist"),
        ("*.webp", r"\*\.webp matches no file"),
    ],
)
def test_a_source_without_images_is_named(photos, source, fault):
    with pytest.raises(FileNotFoundError, match=f"{fault}$"):
        find_images([photos, f"{photos}/{source}"])


@pytest.mark.parametrize(
    "lines",
    [
        "ID,Image,note\n7,red/03.png,a\n8,blue/00.png,\n9,red/03.png,b\n",  # unlabelled, one twice
        "path,label\nred/03.png,red\nblue/00.png,blue\n",
        "red/03.png\nblue/00.png\n",
        "red/03.png,red\nblue/00.png,blue\n",
    ],
)
def test_a_csv_file_names_the_images_that_it_lists(photos, lines):
    (photos / "LIST.CSV").write_text(lines)
    listed = [photos / "red/03.png", photos / "blue/00.png"]
    assert list(find_images([photos / "LIST.CSV"])) == listed
    assert list(find_images([photos / "LIST.CSV", listed[0]])) == [*listed, listed[0]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "is empty"),
        ("path\n", "lists no images"),
        ("path,note\n,x\n", "line 2: has no path"),
        ("path,note\nred/03.png\n", "line 2: 1 columns, expected 2"),
        (
            "id,score\n1,2\n",
            "line 1: id, score is neither a file, .* header that names a column",
        ),
        ("path\nred/03.png\nx.png\n", "lists 1 images that are not in .*: x.png"),
        ("path,image\nred/03.png,x.png\n", "several could have the paths"),
    ],
)
def test_a_malformed_csv_file_is_named(photos, lines, message):
    (photos / "list.csv").write_text(lines)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"list\.csv.*{message}"):
        find_images([photos / "list.csv"])


def test_another_table_is_named_with_what_reads_it(tmp_path):
    (tmp_path / "TEST.PARQUET").touch()
    with pytest.raises(ValueError, match=r"TEST\.PARQUET is neither .*: `cvt evaluate` and"):
        find_images([tmp_path / "TEST.PARQUET"])


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no images in it"):
        find_images([tmp_path])


def test_a_folder_is_read_when_its_turn_comes(tmp_path):
    for name in ("a", "b/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").touch()
    images = find_images([tmp_path])
    assert next(images) == tmp_path / "a/1.png"
    (tmp_path / "b/c/0.png").touch()
    assert list(images) == [tmp_path / "b/c/0.png", tmp_path / "b/c/1.png"]


@pytest.mark.parametrize("runtime", ["torch", "fused"])
def test_a_runtime_gives_what_its_model_gives(classifier, processor, photos, runtime):
    paths = list(find_images([photos]))[::5]
    ours = classify(open_runtime(classifier, runtime), processor, paths)
    for a, b in zip(ours, classify(classifier, processor, paths), strict=True):
        np.testing.assert_allclose(a.logits, b.logits, rtol=0, atol=1e-5)


def test_predictions_are_those_of_transformers_pipeline(classifier, processor, photos):
    paths = list(find_images([photos]))[::5]
    ours = list(predict(classifier, processor, paths, topk=3, batch_size=4))
    pipe = pipeline("image-classification", model=classifier, image_processor=processor)
    for prediction, records in zip(ours, pipe([str(path) for path in paths]), strict=True):
        assert prediction.labels == [record["label"] for record in records]
        assert prediction.scores == pytest.approx([r["score"] for r in records], abs=1e-6)


def test_the_batch_size_changes_nothing(classifier, processor, photos):
    paths = list(find_images([photos]))
    one, many = (list(classify(classifier, processor, paths, size)) for size in (1, 100))
    for a, b in zip(one, many, strict=True):
        assert a.path == b.path
        np.testing.assert_allclose(a.logits, b.logits, rtol=0, atol=1e-5)


def test_a_broken_image_is_reported_in_its_place(classifier, processor, photos, broken):
    paths = [photos / "red" / "00.png", broken, photos / "blue" / "00.png"]
    results = list(predict(classifier, processor, paths, batch_size=2))
    assert [isinstance(result, Prediction) for result in results] == [True, False, True]
    assert "broken.jpg" in results[1].error


def test_a_broken_image_changes_nothing_for_its_neighbours(classifier, processor, photos, broken):
    paths = list(find_images([photos / "red"]))[:3]
    blank = StoredImage("blank", Image.new("RGB", (9, 9)))
    with_broken, with_blank = (
        list(classify(classifier, processor, [*paths, source])) for source in (broken, blank)
    )
    for a, b in zip(with_broken[:3], with_blank[:3], strict=True):
        assert np.array_equal(a.logits, b.logits)


@pytest.mark.parametrize("batch_size", [4, 7, 100])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_not_a_bit(classifier, processor, photos, broken, batch_size, workers):
    paths = list(find_images([photos]))[::2]
    stored = StoredImage("stored", paths[3].read_bytes())
    sources = [*paths[:6], broken, stored, *paths[6:]]
    random_state = torch.get_rng_state()
    alone, shared = (
        list(classify(classifier, processor, sources, batch_size, count)) for count in (0, workers)
    )
    assert [result.path for result in alone] == [result.path for result in shared] == sources
    assert [result.error for result in alone] == [result.error for result in shared]
    for a, b in zip(alone, shared, strict=True):
        assert (a.logits is None and b.logits is None) or np.array_equal(a.logits, b.logits)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_read_as_they_are_needed(classifier, processor, photos, workers):
    taken = itertools.count()
    endless = (photos / "red" / f"{next(taken) % 12:02d}.png" for _ in itertools.count())
    results = classify(classifier, processor, endless, batch_size=2, workers=workers)
    first = list(itertools.islice(results, 3))
    assert [result.path.name for result in first] == ["00.png", "01.png", "02.png"]
    results.close()
    assert next(taken) <= 4 + 2 * (2 * workers)  # what was asked for, and two batches per worker


@pytest.mark.parametrize("workers", [0, 1])
def test_an_open_image_that_cannot_be_loaded_is_reported(classifier, processor, photos, workers):
    content = (photos / "red" / "00.png").read_bytes()
    images = [Image.open(io.BytesIO(content[:size])) for size in (len(content), len(content) // 2)]
    sources = [StoredImage(f"image {i}", image) for i, image in enumerate(images)]
    good, bad = classify(classifier, processor, sources, workers=workers)
    assert good.error is None
    assert bad.error == "image 1: cannot be decoded: image file is truncated"


def test_what_cannot_be_sent_to_a_worker_is_an_error(classifier, processor):
    sources = [StoredImage("local", lambda: b"")] * 2
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        list(classify(classifier, processor, sources, batch_size=1, workers=1))


def lose_a_connection(start):
    """As a worker does whose main process ends just when it fetches a batch."""
    start(0)
    shared = resource_sharer.DupFd(os.open(os.devnull, os.O_RDONLY))
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(shared._id[0])
    os.close(shared.detach())  # the thread that shares has met them all
    thread = resource_sharer._resource_sharer._thread
    sys.excepthook(RuntimeError, RuntimeError("another error"), None)
    assert thread.is_alive()


@pytest.mark.skipif(sys.platform == "win32", reason="no sockets of files")
@pytest.mark.parametrize("start", [answer_nothing, int], ids=["ours", "torch"])
def test_a_worker_whose_main_process_has_ended_prints_nothing(start, capfd):
    process = multiprocessing.get_context("fork").Process(target=lose_a_connection, args=[start])
    process.start()
    process.join(60)
    assert process.exitcode == 0
    message = capfd.readouterr().err
    assert "another error" in message
    assert ("resource_sharer" in message) == (start is not answer_nothing)


def test_a_batch_of_broken_images_is_reported(classifier, processor, broken):
    (result,) = classify(classifier, processor, [broken])
    assert result.logits is None
    assert "broken.jpg" in result.error


def test_of_equally_likely_classes_the_first_comes_first():
    assert ranked(np.array([1.0, 3.0, 3.0, 0.0, 3.0])).tolist() == [1, 2, 4, 0, 3]


def test_topk_beyond_the_classes_gives_all(classifier, processor, photos):
    (prediction,) = predict(classifier, processor, [photos / "red" / "00.png"], topk=99)
    assert sorted(prediction.labels) == ["blue", "green", "red"]
    assert sum(prediction.scores) == pytest.approx(1, abs=1e-6)


def test_scores_that_are_not_finite_are_reported(classifier, processor, photos):
    overflowing = copy.deepcopy(classifier)
    torch.nn.init.constant_(overflowing.classifier.bias, torch.nan)
    (result,) = predict(overflowing, processor, [photos / "red" / "00.png"])
    assert "00.png: its scores are not finite" in result.error


def test_a_model_without_classes_is_refused(processor, photos):
    headless = make(tiny(num_labels=0))
    with pytest.raises(ValueError, match="num_labels = 0: the model has no classes"):
        next(predict(headless, processor, [photos / "red" / "00.png"]))


def test_independent_labels_get_independent_scores():
    logits = torch.tensor([0.0, 2.0])
    single, multi = CvtConfig(num_labels=2), CvtConfig(num_labels=2)
    multi.problem_type = "multi_label_classification"
    for config, expected in ((single, logits.softmax(0)), (multi, logits.sigmoid())):
        np.testing.assert_allclose(scores(logits.numpy(), config), expected, rtol=1e-6)


# ------------------------------------------------------------------------------ regression


def regression(*values, labels=None):
    """A model that gives these values for every image."""
    model = make(tiny(num_labels=len(values), problem_type="regression"))
    if labels:
        model.config.class_names = labels
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor(values)
    return model


@pytest.mark.parametrize("values", [(37.0,), (37.0, -2.0, 5.0), (1e-7, 3.0, -1e6, 4.0, 5.0, 6.0)])
def test_the_values_of_a_regression_are_pipelines_and_all_are_given(processor, photos, values):
    model, path = regression(*values), photos / "red" / "00.png"
    (prediction,) = predict(model, processor, [path], topk=1)
    pipe = pipeline("image-classification", model=model, image_processor=processor)
    records = pipe(str(path), top_k=len(values))
    classifier = Classifier(model, "torch", processor=processor)
    assert prediction.records == records == classifier(path, top_k=1)
    expected = torch.tensor(values).sort(descending=True).values.tolist()
    assert prediction.scores == expected
    assert prediction.are_values
    assert scores_per_image(1, model.config) == len(values)


def test_values_are_printed_and_written_as_values(cvt, processor, photos, tmp_path):
    model, folder = regression(37.0, -2.5, 1e-7, labels=["mass", "shift", "rest"]), tmp_path / "m"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    image, csv_file = str(photos / "red" / "00.png"), tmp_path / "values.csv"
    command = ("predict", folder, image, "--runtime=torch", "--workers=0", "--topk=1")
    assert cvt(*command)[:2] == (0, f"{image}: mass 37  rest 1e-07  shift -2.5\n")
    assert cvt(*command, "--output", csv_file)[0] == 0
    assert list(csv.reader(csv_file.open())) == [
        ["path", "rank", "label", "score"],
        [image, "1", "mass", "37"],
        [image, "2", "rest", "1.00000001e-07"],
        [image, "3", "shift", "-2.5"],
    ]


def test_a_regression_has_no_classes_to_evaluate(processor):
    with pytest.raises(ValueError, match="problem_type = regression of the model, and the labels"):
        evaluate(regression(37.0, 1.0), processor, LabelledImages([], []))


def test_several_independent_labels_are_scored_as_by_pipeline(processor, photos):
    model, path = make(tiny(problem_type="multi_label_classification")), photos / "red" / "00.png"
    pipe = pipeline("image-classification", model=model, image_processor=processor)
    (prediction,) = predict(model, processor, [path])
    for record, expected in zip(prediction.records, pipe(str(path)), strict=True):
        assert record["label"] == expected["label"]
        assert record["score"] == pytest.approx(expected["score"], abs=1e-6)
    assert not prediction.are_values
    assert sum(prediction.scores) != pytest.approx(1, abs=1e-3)


def test_classes_that_reach_their_threshold_come_first(processor, photos):
    model, path = make(tiny(problem_type="multi_label_classification")), photos / "red" / "00.png"
    (plain,) = predict(model, processor, [path])
    assert all(record.keys() == {"label", "score"} for record in plain.records)
    lowest = model.config.label2id[plain.labels[-1]]
    model.config.thresholds = [0.0 if i == lowest else 1.0 for i in range(len(plain.labels))]
    (prediction,) = predict(model, processor, [path], topk=2)
    assert prediction.labels == [plain.labels[-1], plain.labels[0]]
    assert [record["predicted"] for record in prediction.records] == [True, False]


# ------------------------------------------------------------------------------ processors


def test_a_processor_that_does_not_resize_gets_images_one_by_one(classifier, processor, tmp_path):
    own_size = image_processor(classifier.config, do_resize=False)
    sizes = [(40, 64), (64, 40), (2, 64), (48, 48)]
    paths = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        Image.effect_noise(size, 64).convert("RGB").save(path)
    results = list(predict(classifier, own_size, paths, batch_size=4))
    for result, path in zip(results, paths, strict=True):
        if path == paths[2]:
            assert f"{path}: images are 64 x 2 pixels: this model needs at least" in result.error
            continue
        pixels = own_size(Image.open(path), return_tensors="pt")["pixel_values"]
        expected = classifier(pixels).logits.softmax(1).max().item()
        assert result.scores[0] == pytest.approx(expected, abs=1e-5)


def test_a_processor_of_a_small_deviation_is_taken_as_it_is(classifier, photos):
    deviating = image_processor(classifier.config, image_std=[0.01] * 3)
    path = photos / "red" / "00.png"
    pixels = deviating(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
    assert pixels.abs().max() > LARGEST
    (result,) = classify(classifier, deviating, [path])
    np.testing.assert_allclose(result.logits, classifier(pixels).logits[0].detach(), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"do_rescale": False}, "do_rescale = False, as for pixels that are 0 to 1 already"),
        ({"do_rescale": False, "do_normalize": False}, "do_rescale = False"),
        ({"rescale_factor": 1.0}, "rescale_factor = 1, as for pixels"),
        ({"image_std": [0.2, 0.0, 0.2]}, r"image_std = \[0.2, 0.0, 0.2\]: must be above 0"),
    ],
)
def test_a_processor_that_is_not_for_decoded_images_is_named(classifier, photos, settings, named):
    with pytest.raises(ValueError, match=named):
        list(classify(classifier, image_processor(classifier.config, **settings), [photos]))


def test_a_processor_in_units_of_bytes_is_taken(classifier, processor, photos):
    mean, std = ([255 * value for value in values] for values in (IMAGE_MEAN, IMAGE_STD))
    settings = {"do_rescale": False, "image_mean": mean, "image_std": std}
    in_bytes = image_processor(classifier.config, image_size=32, **settings)
    path = photos / "red" / "00.png"
    (expected,), (result,) = (classify(classifier, p, [path]) for p in (processor, in_bytes))
    np.testing.assert_allclose(result.logits, expected.logits, atol=1e-4, rtol=0)
