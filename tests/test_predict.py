import json

import numpy as np
import pytest
import torch
from transformers import pipeline

from cvt import CvtConfig
from cvt.checkpoints import load_classifier, load_processor
from cvt.datasets import LabelledImages, image_folder
from cvt.evaluate import class_indices, evaluate, write_evaluation
from cvt.labels import imagenet_classes
from cvt.predict import Prediction, classify, find_images, predict, scores


@pytest.fixture(scope="module")
def classifier(model_folder):
    return load_classifier(model_folder).eval()


@pytest.fixture(scope="module")
def processor(model_folder, classifier):
    return load_processor(model_folder, classifier.config)


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 this is no photo")
    return path


def test_images_are_found_in_files_folders_and_globs(photos):
    one = photos / "red" / "03.png"
    assert find_images([one]) == [one]
    assert len(find_images([photos])) == 36
    firsts = [photos / name / "00.png" for name in ("blue", "green", "red")]
    assert find_images([f"{photos}/*/00.png"]) == firsts
    assert find_images([one, str(photos / "green")])[:2] == [one, photos / "green" / "00.png"]


@pytest.mark.parametrize("source", ["missing.png", "nowhere/", "*.webp"])
def test_a_source_without_images_is_named(photos, source):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_images([photos, str(photos / source)])


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no images in it"):
        find_images([tmp_path])


def test_predictions_are_those_of_transformers_pipeline(classifier, processor, photos):
    paths = find_images([photos])[::5]
    ours = list(predict(classifier, processor, paths, topk=3, batch_size=4))
    pipe = pipeline("image-classification", model=classifier, image_processor=processor)
    for prediction, records in zip(ours, pipe([str(path) for path in paths]), strict=True):
        assert prediction.labels == [record["label"] for record in records]
        assert prediction.scores == pytest.approx([r["score"] for r in records], abs=1e-6)


def test_the_batch_size_changes_nothing(classifier, processor, photos):
    paths = find_images([photos])
    one, many = (list(classify(classifier, processor, paths, size)) for size in (1, 100))
    for a, b in zip(one, many, strict=True):
        assert a.path == b.path
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-5)


def test_a_broken_image_is_reported_in_its_place(classifier, processor, photos, broken):
    paths = [photos / "red" / "00.png", broken, photos / "blue" / "00.png"]
    results = list(predict(classifier, processor, paths, batch_size=2))
    assert [isinstance(result, Prediction) for result in results] == [True, False, True]
    assert "broken.jpg" in results[1].error


def test_files_are_read_as_they_are_needed(classifier, processor, photos):
    def endless():
        while True:
            yield photos / "red" / "00.png"

    assert next(classify(classifier, processor, endless(), batch_size=2)).logits.shape == (3,)


def test_topk_beyond_the_classes_gives_all(classifier, processor, photos):
    (prediction,) = predict(classifier, processor, [photos / "red" / "00.png"], topk=99)
    assert sorted(prediction.labels) == ["blue", "green", "red"]
    assert sum(prediction.scores) == pytest.approx(1, abs=1e-6)


def test_independent_labels_get_independent_scores():
    logits = torch.tensor([0.0, 2.0])
    single, multi = CvtConfig(num_labels=2), CvtConfig(num_labels=2)
    multi.problem_type = "multi_label_classification"
    torch.testing.assert_close(scores(logits, single), logits.softmax(0))
    torch.testing.assert_close(scores(logits, multi), logits.sigmoid())


# ------------------------------------------------------------------------------ evaluation


def test_evaluation_counts_what_predict_says(classifier, processor, photos):
    images = image_folder(photos)
    evaluation = evaluate(classifier, processor, images)
    best = [p.labels[0] for p in predict(classifier, processor, images.paths)]
    right = np.mean([label == truth for label, truth in zip(best, images.labels, strict=True)])
    assert evaluation.top1 == pytest.approx(right)
    assert evaluation.top5 == 1.0
    assert evaluation.images == 36
    for i, truth in enumerate(evaluation.labels):
        for j, label in enumerate(evaluation.labels):
            pairs = zip(best, images.labels, strict=True)
            assert evaluation.confusion[i, j] == sum(pair == (label, truth) for pair in pairs)
    assert {name: count for name, (count, _) in evaluation.per_class.items()} == dict.fromkeys(
        ["blue", "green", "red"], 12
    )


def test_the_loss_is_the_models_own(classifier, processor, photos):
    images = image_folder(photos)
    logits = torch.stack([r.logits for r in classify(classifier, processor, images.paths)])
    targets = torch.tensor([classifier.config.label2id[label] for label in images.labels])
    expected = torch.nn.functional.cross_entropy(logits, targets).item()
    assert evaluate(classifier, processor, images).loss == pytest.approx(expected, abs=1e-5)


def test_broken_images_are_not_counted_but_kept(classifier, processor, photos, broken):
    images = image_folder(photos)
    with_broken = LabelledImages([*images.samples, (broken, "red")])
    evaluation = evaluate(classifier, processor, with_broken)
    assert evaluation.images == 36
    assert [failure.path for failure in evaluation.failures] == [broken]
    with pytest.raises(ValueError, match=r"none of the 1 images could be decoded: .*broken\.jpg"):
        evaluate(classifier, processor, LabelledImages([(broken, "red")]))


def test_classes_are_matched_by_name_never_by_place(classifier, processor, photos):
    red = LabelledImages([s for s in image_folder(photos).samples if s[1] == "red"])
    evaluation = evaluate(classifier, processor, red)
    assert evaluation.confusion[2].sum() == 12
    assert list(evaluation.per_class) == ["red"]


def test_classes_the_model_does_not_know_are_named(classifier, processor, photos):
    images = LabelledImages(
        [(photos / "red" / "00.png", "reed"), (photos / "red" / "01.png", "x9")]
    )
    with pytest.raises(ValueError, match=r"'reed' \(is it 'red'\?\), 'x9'"):
        evaluate(classifier, processor, images)


def test_imagenet_folders_may_be_called_by_wordnet_ids():
    config = CvtConfig.from_variant("cvt-13")
    config.class_names = list(imagenet_classes().values())
    indices = class_indices(["n02123045", "tiger cat"], config)
    assert indices["n02123045"] == 281
    assert indices["tiger cat"] == 282


def test_an_evaluation_is_written_whole(classifier, processor, photos, tmp_path):
    evaluation = evaluate(classifier, processor, image_folder(photos))
    write_evaluation(evaluation, tmp_path / "out")
    assert json.loads((tmp_path / "out/metrics.json").read_text())["top1"] == evaluation.top1
    matrix = np.loadtxt(
        tmp_path / "out/confusion_matrix.csv", delimiter=",", skiprows=1, usecols=(1, 2, 3)
    )
    assert (matrix == evaluation.confusion).all()
    with pytest.raises(FileExistsError):
        write_evaluation(evaluation, tmp_path / "out")
