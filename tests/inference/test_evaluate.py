import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_recall_fscore_support
from timm.data.real_labels import RealLabelsImagenet
from torch import nn

from cvt import CvtConfig, CvtForImageClassification, image_processor
from cvt.cli import verbs
from cvt.data import LabelledImages, StreamedImages, image_folder
from cvt.data.class_names import imagenet_classes
from cvt.inference.class_matching import (
    class_indices,
    match_classes,
    read_class_map,
    read_real_labels,
)
from cvt.inference.evaluate import evaluate, write_evaluation
from cvt.inference.metrics import (
    COUNTED,
    METRIC_NAMES,
    MOST_CONFIDENT,
    Evaluation,
    metric_text,
)
from cvt.inference.predict import classify, predict
from cvt.train.recipe import METRICS, METRICS_OF


@pytest.fixture
def images(photos):
    return image_folder(photos)


@pytest.fixture
def broken(tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 this is no photo")
    return path


@pytest.fixture
def with_broken(images, broken):
    """The 36 images with two broken ones among them."""
    sources, labels = list(images.sources), list(images.labels)
    for position in (3, 20):
        sources.insert(position, broken)
        labels.insert(position, "red")
    return LabelledImages(sources, labels)


def streamed(images, length):
    return StreamedImages(images.classes, length, list(images), sample=lambda row: row)


def tiny(names):
    """A classifier of these classes, with random weights, and its preprocessing."""
    torch.manual_seed(0)
    config = CvtConfig(embed_dim=[8, 8, 16], num_heads=[1, 1, 2], depth=[1, 1, 1])
    config.class_names = list(names)
    return CvtForImageClassification(config).eval(), image_processor(config, image_size=32)


def by_hand(labels, rows):
    """An evaluation of (true, predicted, score)."""
    counted = [
        (i, f"{i}.png", true, best, score, true == best, 1.0, np.nan)
        for i, (true, best, score) in enumerate(rows)
    ]
    return Evaluation(labels, np.array(counted, COUNTED), [], [])


def same(a, b):
    """Whether two evaluations agree in every bit."""
    return (
        a.labels == b.labels
        and a.counted.dtype == b.counted.dtype
        and all(np.array_equal(a.counted[n], b.counted[n]) for n in COUNTED.names if n != "real")
        and np.array_equal(a.counted["real"], b.counted["real"], equal_nan=True)
        and a.mistakes == b.mistakes
        and a.failures == b.failures
        and a.metrics == b.metrics
    )


# ------------------------------------------------------------------------------ figures


@pytest.mark.parametrize("batch_size", [5, 36, 100])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluate_and_predict_agree_in_every_bit(
    classifier, processor, with_broken, batch_size, workers
):
    evaluation = evaluate(classifier, processor, with_broken, batch_size, workers)
    results = list(predict(classifier, processor, with_broken.sources, 1, batch_size, workers))
    failures = [failure.error for failure in evaluation.failures]
    assert failures == [result.error for result in results if hasattr(result, "error")]
    predictions = [result for result in results if hasattr(result, "labels")]
    assert list(evaluation.counted["name"]) == [str(p.path) for p in predictions]
    predicted = [evaluation.labels[i] for i in evaluation.counted["predicted"]]
    assert predicted == [p.labels[0] for p in predictions]
    assert list(evaluation.counted["score"]) == [p.scores[0] for p in predictions]
    right = [p.labels[0] == p.path.parent.name for p in predictions]
    assert evaluation.top1 == sum(right) / len(right)


def test_the_confusion_matrix_counts_predictions(classifier, processor, images):
    evaluation = evaluate(classifier, processor, images)
    best = [p.labels[0] for p in predict(classifier, processor, images.sources)]
    pairs = list(zip(images.labels, best, strict=True))
    names = evaluation.labels
    expected = [[pairs.count((true, label)) for label in names] for true in names]
    assert evaluation.confusion.tolist() == expected
    assert evaluation.images == 36
    assert {name: each.images for name, each in evaluation.per_class.items()} == dict.fromkeys(
        ["blue", "green", "red"], 12
    )


def test_macro_f1_is_that_of_scikit_learn():
    generator = np.random.default_rng(0)
    rows = [(*pair, 0.5) for pair in generator.integers(0, 4, (30, 2)).tolist()]
    evaluation = by_hand(list("abcdef"), rows)  # e and f are neither true nor predicted
    true, predicted, _ = zip(*rows, strict=True)
    assert evaluation.f1_macro == pytest.approx(f1_score(true, predicted, average="macro"))


def logits_of(results):
    """(B, K)."""
    return torch.stack([torch.from_numpy(result.logits) for result in results])


def test_the_loss_is_the_models_own(classifier, processor, images):
    logits = logits_of(classify(classifier, processor, images.sources))
    targets = torch.tensor([classifier.config.label2id[label] for label in images.labels])
    expected = nn.functional.cross_entropy(logits, targets).item()
    assert evaluate(classifier, processor, images).loss == pytest.approx(expected, abs=1e-5)


def test_scores_of_independent_labels_are_those_of_predict(photos, images):
    model, processor = tiny(["blue", "green", "red"])
    model.config.problem_type = "multi_label_classification"
    evaluation = evaluate(model, processor, images)
    predictions = predict(model, processor, images.sources, 1)
    assert list(evaluation.counted["score"]) == [p.scores[0] for p in predictions]


def test_large_photographs_are_decoded_whole(tmp_path):
    """Predicting decodes them at a part of their size, which moves the loss a little."""
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "red.jpg")
    model, processor = tiny(["blue", "green", "red"])
    images = LabelledImages([tmp_path / "red.jpg"], ["red"])
    whole, part = (
        torch.from_numpy(
            next(classify(model, processor, images.sources, exact=exact)).logits
        ).log_softmax(0)[2]
        for exact in (True, False)
    )
    assert evaluate(model, processor, images).loss == pytest.approx(-whole.item(), abs=1e-6)
    assert whole.item() != pytest.approx(part.item(), abs=1e-5)


def test_the_calibration_error_is_that_of_its_definition():
    generator = np.random.default_rng(0)
    scores = generator.uniform(0, 1, 75)  # few, so that scores are too high in some bins only
    scores[:4] = (0, 1 / 15, 1, 1)  # on the edges
    right = generator.uniform(0, 1, 75) < 0.5
    evaluation = by_hand(
        ["a", "b"], [(0, int(not r), s) for r, s in zip(right, scores, strict=True)]
    )
    expected, images = 0.0, []
    for low in range(15):
        inside = (scores > low / 15) & (scores <= (low + 1) / 15)
        inside |= (low == 0) & (scores == 0)
        expected += inside.mean() * abs(right[inside].mean() - scores[inside].mean())
        images.append(inside.sum())
    assert evaluation.calibration_error == pytest.approx(expected, abs=1e-12)
    assert evaluation.reliability.images.tolist() == images
    assert sum(images) == 75


def test_each_bin_has_its_mean_score_and_its_share_of_right_images():
    rows = [(0, 0, 0.97), (0, 1, 0.95), (0, 1, 0.99), (0, 1, 0.51), (0, 0, 0.53)]
    images, score, top1 = by_hand(["a", "b"], rows).reliability
    assert images.nonzero()[0].tolist() == [7, 14]
    assert score[[7, 14]] == pytest.approx([0.52, 0.97])
    assert top1[[7, 14]] == pytest.approx([1 / 2, 1 / 3])


def test_a_perfect_model_is_calibrated_and_empty_bins_count_nothing():
    evaluation = by_hand(["a", "b"], [(0, 0, 1.0)] * 4)
    assert evaluation.calibration_error == 0
    assert evaluation.reliability.images.tolist() == [0] * 14 + [4]
    assert np.isnan(evaluation.reliability.top1[:14]).all()


def test_a_class_is_mistaken_for_the_most_frequent_other():
    rows = [(0, 0, 0.9), (0, 0, 0.9), (0, 2, 0.9), (0, 1, 0.9), (0, 2, 0.9), (1, 1, 0.9)]
    evaluation = by_hand(["a", "b", "c"], rows)
    assert [evaluation.mistaken_for(name) for name in "abc"] == ["c", "", ""]
    assert evaluation.per_class == {"a": (5, 0.4, 1.0, 4 / 7), "b": (1, 1.0, 0.5, 2 / 3)}


@pytest.mark.parametrize("seed", range(8))
def test_the_figures_of_classes_are_those_of_scikit_learn(seed):
    """Of five classes, some have no images, some are never predicted, some neither."""
    generator = np.random.default_rng(seed)
    true = generator.choice(generator.permutation(5)[:3], 20)
    predicted = np.where(generator.random(20) < 0.5, true, generator.integers(0, 4, 20))
    evaluation = by_hand([*"abcde"], [(*pair, 0.9) for pair in zip(true, predicted, strict=True)])
    assert evaluation.f1_macro == pytest.approx(f1_score(true, predicted, average="macro"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of classes that are predicted without images
        expected = balanced_accuracy_score(true, predicted)
    assert evaluation.balanced_accuracy == pytest.approx(expected)
    columns = precision_recall_fscore_support(true, predicted, labels=range(5), zero_division=0)
    expected = {
        "abcde"[i]: (images, recall, precision, f1)
        for i, (precision, recall, f1, images) in enumerate(zip(*columns, strict=True))
        if images
    }
    assert list(evaluation.per_class) == list(expected)
    for name, figures in evaluation.per_class.items():
        assert figures == pytest.approx(expected[name])
    assert evaluation.lowest_recall == min(recall for _, recall, *_ in expected.values())


def test_macro_f1_counts_a_class_that_is_predicted_without_images_as_torchmetrics_does():
    """There a class counts unless true positives, false positives and false negatives are 0."""
    evaluation = by_hand(["a", "b", "c", "d"], [(0, 0, 0.9), (0, 2, 0.9), (1, 1, 0.9)])
    assert evaluation.f1_macro == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert evaluation.balanced_accuracy == (1 / 2 + 1) / 2
    assert evaluation.lowest_recall == 1 / 2


def test_every_metric_has_a_name_and_a_text():
    evaluation = by_hand(["a", "b"], [(0, 0, 0.9), (0, 1, 0.9), (1, 1, 0.9)])
    assert METRIC_NAMES.keys() == set().union(*METRICS_OF.values())
    texts = [metric_text(name, evaluation.metrics[name]) for name in Evaluation.METRICS]
    assert texts == [
        "top-1 66.67 %", "top-5 66.67 %", "loss 1.0000", "balanced accuracy 75.00 %",
        "macro F1 66.67 %", "lowest recall 50.00 %",
    ]  # fmt: skip


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 7])
def test_the_best_five_of_fewer_classes_are_all(photos, classes):
    names = [*"abcdef", "red"][-classes:]
    model, processor = tiny(names)
    images = LabelledImages([photos / "red" / f"{i:02d}.png" for i in range(4)], ["red"] * 4)
    evaluation = evaluate(model, processor, images)
    logits = logits_of(classify(model, processor, images.sources))
    assert evaluation.images == 4
    in_top5 = logits.topk(min(5, classes)).indices.eq(classes - 1).any(1)
    assert evaluation.top5 == in_top5.double().mean().item()
    assert evaluation.top5 == 1.0 or classes > 5
    (prediction, *_) = predict(model, processor, images.sources, topk=1)
    assert evaluation.counted["score"][0] == prediction.scores[0]


def test_the_fifth_class_is_among_the_best_five_and_the_sixth_is_not(photos):
    model, processor = tiny("abcdefgh")
    nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.arange(8, 0, -1.0)  # every image ranks a, b, c, ...
    paths = [photos / "red" / f"{i:02d}.png" for i in range(8)]
    evaluation = evaluate(model, processor, LabelledImages(paths, [*"abcdefgh"]))
    assert evaluation.counted["in_top5"].tolist() == [True] * 5 + [False] * 3
    assert (evaluation.top5, evaluation.top1) == (5 / 8, 1 / 8)


def test_ties_go_to_the_first_class_in_both(photos, images):
    model, processor = tiny(["x", "blue", "green", "red", "y", "z"])
    nn.init.zeros_(model.classifier.weight)
    nn.init.zeros_(model.classifier.bias)
    evaluation = evaluate(model, processor, images)
    assert set(evaluation.counted["predicted"]) == {0}
    assert evaluation.top5 == 1.0
    for topk in (1, 3):
        for prediction in predict(model, processor, list(images.sources)[:3], topk):
            assert prediction.labels == ["x", "blue", "green"][:topk]


def test_the_most_confident_mistakes_are_kept(classifier, processor, photos):
    paths = [photos / "red" / f"{i % 12:02d}.png" for i in range(MOST_CONFIDENT + 10)]
    labels = ["blue", "green"] * (len(paths) // 2)
    evaluation = evaluate(classifier, processor, LabelledImages(paths, labels))
    wrong = evaluation.counted[~evaluation.right]
    assert len(wrong) >= 30
    expected = sorted(zip(wrong["score"], wrong["position"], strict=True), reverse=True)
    kept = [(mistake.score, mistake.position) for mistake in evaluation.mistakes]
    assert kept == expected[:MOST_CONFIDENT]
    first = evaluation.mistakes[0]
    assert (first.source, first.true) == (paths[first.position], labels[first.position])
    assert first.predicted != first.true


def test_broken_images_are_not_counted_but_kept(classifier, processor, with_broken, broken):
    evaluation = evaluate(classifier, processor, with_broken)
    assert evaluation.images == 36
    assert [(f.position, f.name) for f in evaluation.failures] == [
        (3, str(broken)),
        (20, str(broken)),
    ]
    with pytest.raises(ValueError, match=r"none of the 1 images could be decoded: .*broken\.jpg"):
        evaluate(classifier, processor, LabelledImages([broken], ["red"]))


def test_no_images_are_no_evaluation(classifier, processor):
    with pytest.raises(ValueError, match="no images to evaluate with"):
        evaluate(classifier, processor, StreamedImages(["red"], 0, [], lambda row: row))


def test_an_answer_that_is_not_finite_stops(photos, images):
    model, processor = tiny(["blue", "green", "red"])
    nn.init.constant_(model.classifier.bias, torch.nan)
    with pytest.raises(FloatingPointError, match=r"00\.png: .* not finite"):
        evaluate(model, processor, images)


def test_evaluating_leaves_the_random_numbers_alone(classifier, processor, images):
    state = torch.get_rng_state()
    evaluate(classifier, processor, images, 16, workers=1)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------ several processes


class Counting(nn.Module):
    """Counts how often a model is called."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.calls = model, model.config, 0

    def forward(self, pixels, **options):
        self.calls += 1
        return self.model(pixels, **options)


@pytest.mark.parametrize(("world", "batch_size"), [(2, 7), (3, 4), (50, 1)])
@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_shares_join_to_what_one_process_gives(
    classifier, processor, with_broken, world, batch_size, kind
):
    images = with_broken if kind == "folder" else streamed(with_broken, len(with_broken))
    whole = evaluate(classifier, processor, images, batch_size)
    parts, calls = [], []
    for rank in range(world):
        model = Counting(classifier)
        parts.append(evaluate(model, processor, images, batch_size, rank=rank, world=world))
        calls.append(model.calls)
    assert same(Evaluation.joined(parts), whole)
    assert same(Evaluation.joined(parts[::-1]), whole)
    assert set(calls) == {-(-len(with_broken) // (batch_size * world))}


@pytest.mark.parametrize("kind", ["folder", "stream"])
def test_an_image_has_the_neighbours_that_it_has_in_one_process(
    classifier, processor, images, kind
):
    given = images if kind == "folder" else streamed(images, len(images))
    for rank in range(3):
        part = evaluate(classifier, processor, given, 4, rank=rank, world=3)
        expected = [i for i in range(36) if i // 4 % 3 == rank]
        assert part.counted["position"].tolist() == expected


def test_a_share_may_be_broken_but_not_all(classifier, processor, photos, broken):
    images = LabelledImages([broken, photos / "red" / "00.png"], ["red", "red"])
    parts = [
        evaluate(classifier, processor, images, batch_size=1, rank=rank, world=2) for rank in (0, 1)
    ]
    assert [part.images for part in parts] == [0, 1]
    assert Evaluation.joined(parts).images == 1
    with pytest.raises(ValueError, match="none of the 1 images could be decoded"):
        Evaluation.joined(parts[:1])


def test_progress_is_called_for_every_image_of_the_share(classifier, processor, with_broken):
    calls = []
    for rank in (0, 1):
        evaluate(
            classifier,
            processor,
            with_broken,
            8,
            progress=lambda rank=rank: calls.append(rank),
            rank=rank,
            world=2,
        )
    assert calls == [0] * 22 + [1] * 16


@pytest.mark.parametrize(
    ("length", "message"),
    [(None, "length is not known"), (20, "more than the 20 images")],
)
def test_streams_are_shared_only_when_their_length_is_known(
    classifier, processor, images, length, message
):
    stream = streamed(images, length)
    with pytest.raises(ValueError, match=message):
        evaluate(classifier, processor, stream, 4, rank=0, world=2)
    assert evaluate(classifier, processor, stream, 4).images == 36


# ------------------------------------------------------------------------------ classes


def test_classes_are_matched_by_name_never_by_place(classifier, processor, images):
    red = images.select([i for i, label in enumerate(images.labels) if label == "red"])
    evaluation = evaluate(classifier, processor, LabelledImages(red.sources, red.labels))
    assert evaluation.confusion[2].sum() == 12
    assert list(evaluation.per_class) == ["red"]


def test_classes_the_model_does_not_know_are_named(classifier, processor, photos):
    paths = [photos / "red" / "00.png", photos / "red" / "01.png"]
    with pytest.raises(ValueError, match=r"'reed' \(is it 'red'\?\), 'x9'"):
        evaluate(classifier, processor, LabelledImages(paths, ["reed", "x9"]))


def test_of_many_unknown_classes_the_first_are_named(classifier):
    names = [f"{i}" for i in range(100)]
    with pytest.raises(ValueError, match=r"'19' and 80 more$"):
        class_indices(names, classifier.config)


def test_imagenet_folders_may_be_called_by_wordnet_ids():
    config = CvtConfig.from_variant("cvt-13")
    config.class_names = list(imagenet_classes().values())
    indices = class_indices(["n02123045", "tiger cat"], config)
    assert indices["n02123045"] == 281
    assert indices["tiger cat"] == 282


def test_two_classes_of_one_name_are_counted_apart(images):
    names = list(imagenet_classes().values())
    names[134] = names[517] = "crane"
    model, processor = tiny(names)
    cranes = LabelledImages(images.sources[:6], ["n02012849", "n03126707"] * 3)
    evaluation = evaluate(model, processor, cranes)
    assert {name: figures.images for name, figures in evaluation.per_class.items()} == {
        "crane (134)": 3,
        "crane (517)": 3,
    }
    assert {mistake.true for mistake in evaluation.mistakes} <= {"crane (134)", "crane (517)"}
    assert evaluation.labels[133:135] == [names[133], "crane (134)"]


def test_a_class_map_renames_and_leaves_out(classifier, processor, photos, images):
    german = {"blue": "blau", "green": "grün", "red": "red"}
    renamed = LabelledImages(images.sources, [german[label] for label in images.labels])
    evaluation = evaluate(
        classifier, processor, renamed, class_map={"blau": "blue", "grün": None}, batch_size=8
    )
    kept = [i for i, label in enumerate(images.labels) if label != "green"]
    assert evaluation.counted["position"].tolist() == kept
    of_kept = evaluate(classifier, processor, images.select(kept), batch_size=8)
    assert evaluation.loss == of_kept.loss
    assert list(evaluation.per_class) == ["blue", "red"]
    stream = streamed(renamed, 36)
    parts = [
        evaluate(
            classifier,
            processor,
            stream,
            8,
            class_map={"blau": "blue", "grün": None},
            rank=rank,
            world=2,
        )
        for rank in (0, 1)
    ]
    assert same(Evaluation.joined(parts), evaluation)


def test_several_classes_of_the_data_may_be_one_of_the_model(classifier):
    indices = match_classes(["crimson", "red", "blue"], classifier.config, {"crimson": "red"})
    assert indices == {"crimson": 2, "red": 2, "blue": 0}


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ({"bleu": "blue"}, r"the data has no such classes to map: 'bleu' \(is it 'blue'\?\)"),
        ({"blue": "gren"}, r"the model does not know these classes: 'gren' \(is it 'green'\?\)"),
        ({"blue": None, "green": None, "red": None}, "leaves all classes of the data out"),
    ],
)
def test_a_class_map_that_does_not_fit_is_refused(
    classifier, processor, images, class_map, message
):
    with pytest.raises(ValueError, match=message):
        evaluate(classifier, processor, images, class_map=class_map)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.json", '{"a, b": "x", "c": null, "d": ""}'),
        ("map.csv", '"a, b",x\n\nc,\nd,""\n'),
        ("map.csv", '\ufeff"a, b",x\nc,\nd,\n'),  # as spreadsheets write UTF-8
        ("map.json", '\ufeff{"a, b": "x", "c": null, "d": ""}'),
    ],
)
def test_class_maps_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_map(tmp_path / name) == {"a, b": "x", "c": None, "d": None}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("map.json", '["a", "b"]', "must be a JSON object"),
        ("map.json", '{"a": 1}', "must be a JSON object"),
        ("map.json", '{"a": {"b": "c"}}', "must be a JSON object"),
        ("map.json", '{"a": "x", "a": "y"}', "maps classes twice: a"),
        ("map.json", '{"a"', r"map\.json: "),
        ("map.csv", "a,b,c\n", "csv file of two columns"),
        ("map.csv", "a\n", "csv file of two columns"),
        ("map.csv", "a,b\na,c\n", "maps classes twice: a"),
    ],
)
def test_a_malformed_class_map_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_class_map(tmp_path / name)


def test_in_a_subset_only_the_classes_of_the_data_compete(photos, images):
    names = ["x", "blue", "y", "green", "red", "z"]
    model, processor = tiny(names)
    nn.init.constant_(model.classifier.bias, 0.0)
    with torch.no_grad():
        model.classifier.bias[0] = 9.0  # x always wins
    assert evaluate(model, processor, images).top1 == 0
    evaluation = evaluate(model, processor, images, subset=True)
    logits = logits_of(classify(model, processor, images.sources))
    targets = torch.tensor([["blue", "green", "red"].index(label) for label in images.labels])
    competing = logits[:, [1, 3, 4]]
    assert evaluation.top1 == (competing.argmax(1) == targets).double().mean().item()
    expected = nn.functional.cross_entropy(competing, targets).item()
    assert evaluation.loss == pytest.approx(expected, abs=1e-5)
    best = competing.softmax(1).amax(1)
    assert evaluation.counted["score"] == pytest.approx(best.numpy(), abs=1e-6)


# ------------------------------------------------------------------------------ real labels


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory, photos):
    """A classifier of ImageNet's classes and twelve validation images."""
    model, processor = tiny(imagenet_classes().values())
    folder = tmp_path_factory.mktemp("imagenet") / "n01440764"
    folder.mkdir()
    for i in range(12):
        content = (photos / ["red", "blue"][i % 2] / f"{i:02d}.png").read_bytes()
        (folder / f"ILSVRC2012_val_{i + 1:08d}.JPEG").write_bytes(content)
    return model, processor, image_folder(folder.parent)


def test_real_labels_are_timms(imagenet, tmp_path):
    model, processor, images = imagenet
    logits = logits_of(classify(model, processor, images.sources))
    real = [
        [[best, 5], [(best + 1) % 1000], []][i % 3]
        for i, best in enumerate(logits.argmax(1).tolist())
    ]
    real[-2] = [7, int(logits[-2].argmax())]
    (tmp_path / "real.json").write_text(json.dumps(real))
    theirs = RealLabelsImagenet([str(path) for path in images.sources], tmp_path / "real.json")
    theirs.add_result(logits)
    evaluation = evaluate(
        model, processor, images, real_labels=read_real_labels(tmp_path / "real.json")
    )
    assert 100 * evaluation.real_top1 == pytest.approx(theirs.get_accuracy(1))
    assert 100 * evaluation.real_top5 == pytest.approx(theirs.get_accuracy(5))
    assert 0.5 < evaluation.real_top1 < 1
    assert evaluation.metrics["real_top1"] == evaluation.real_top1
    assert evaluation.metrics["real_top5"] == evaluation.real_top5
    reversed_images = images.select(range(11, -1, -1))
    again = evaluate(model, processor, reversed_images, real_labels=real)
    assert again.real_top1 == evaluation.real_top1


def test_real_labels_are_matched_by_wordnet_id_where_a_model_has_another_order(imagenet):
    _, _, images = imagenet
    ids = list(imagenet_classes())
    model, processor = tiny([*ids[1:], ids[0]])
    logits = logits_of(classify(model, processor, images.sources))
    best = [(i + 1) % 1000 for i in logits.argmax(1).tolist()]  # as real.json counts them
    real = [[label] if i % 3 else [(label + 1) % 1000] for i, label in enumerate(best)]
    evaluation = evaluate(model, processor, images, real_labels=real)
    assert evaluation.real_top1 == 8 / 12


def test_without_real_labels_there_is_no_such_figure(imagenet):
    model, processor, images = imagenet
    for labels in (None, [[]] * 12):
        evaluation = evaluate(model, processor, images, real_labels=labels)
        assert evaluation.real_top1 is None
        assert not {"real_top1", "real_top5"} & evaluation.metrics.keys()


def test_an_image_without_a_place_in_the_real_labels_is_named(imagenet, photos):
    model, processor, images = imagenet
    with pytest.raises(ValueError, match=r"val_00000012\.JPEG: has no real labels"):
        evaluate(model, processor, images, real_labels=[[1]] * 11)
    other = LabelledImages([photos / "red" / "00.png"], ["n01440764"])
    with pytest.raises(ValueError, match=r"00\.png: has no real labels"):
        evaluate(model, processor, other, real_labels=[[1]])


def test_real_labels_are_of_imagenets_classes_only(classifier, processor, images):
    with pytest.raises(ValueError, match="the model does not know these classes: 'n01440764'"):
        evaluate(classifier, processor, images, real_labels=[[1]])


@pytest.mark.parametrize("text", ["{}", "[1]", "[[1000]]", "[[-1]]", '[["1"]]', "[[true]]", "[["])
def test_malformed_real_labels_are_refused(tmp_path, text):
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(ValueError, match=r"real\.json"):
        read_real_labels(tmp_path / "real.json")


# ------------------------------------------------------------------------------ files


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_an_evaluation_is_written_whole(classifier, processor, with_broken, broken, tmp_path):
    evaluation = evaluate(classifier, processor, with_broken)
    write_evaluation(evaluation, tmp_path / "out")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics.pop("failures") == [str(broken)] * 2
    assert metrics == evaluation.metrics
    assert metrics.keys() == {"images", *METRICS, "calibration_error"}
    header, *rows = read(tmp_path / "out/confusion_matrix.csv")
    assert header[1:] == evaluation.labels == [row[0] for row in rows]
    assert [list(map(int, row[1:])) for row in rows] == evaluation.confusion.tolist()
    _, *rows = read(tmp_path / "out/predictions.csv")
    assert len(rows) == 36
    assert np.mean([row[1] == row[2] for row in rows]) == evaluation.top1
    assert [float(row[3]) for row in rows] == evaluation.counted["score"].tolist()
    header, *rows = read(tmp_path / "out/per_class.csv")
    assert header == ["class", "images", "recall", "precision", "f1"]
    assert {row[0]: tuple(map(float, row[1:])) for row in rows} == evaluation.per_class
    with pytest.raises(FileExistsError):
        write_evaluation(evaluation, tmp_path / "out")


def test_malicious_names_are_no_formulas_in_the_tables(tmp_path):
    evaluation = by_hand(["=1+1", "-2", "a\x1b\u202e"], [(0, 1, 0.5), (2, 2, 0.6)])
    write_evaluation(evaluation, tmp_path / "out")
    safe = ["'=1+1", "'-2", r"a\x1b\u202e"]
    header, *rows = read(tmp_path / "out/confusion_matrix.csv")
    assert header[1:] == [row[0] for row in rows] == safe
    _, *rows = read(tmp_path / "out/predictions.csv")
    assert [(row[1], row[2], float(row[3])) for row in rows] == [
        (safe[0], safe[1], 0.5), (safe[2], safe[2], 0.6),
    ]  # fmt: skip


def test_of_many_classes_only_the_cells_that_count_are_written(tmp_path):
    labels = [f"class {i}" for i in range(21_841)]
    rows = [(21_840, 3, 0.5), (21_840, 3, 0.6), (5, 5, 0.9)]
    evaluation = by_hand(labels, rows)
    write_evaluation(evaluation, tmp_path / "out")
    assert read(tmp_path / "out/confusion_matrix.csv") == [
        ["true", "predicted", "count"],
        ["class 5", "class 5", "1"],
        ["class 21840", "class 3", "2"],
    ]
    assert evaluation.mistaken_for("class 21840") == "class 3"


def test_up_to_a_thousand_classes_are_a_matrix(tmp_path):
    labels = [f"class {i}" for i in range(1000)]
    write_evaluation(by_hand(labels, [(999, 3, 0.5), (999, 3, 0.6)]), tmp_path / "out")
    header, *rows = read(tmp_path / "out/confusion_matrix.csv")
    assert header[1:] == labels == [row[0] for row in rows]
    assert rows[999][1:] == ["2" if i == 3 else "0" for i in range(1000)]


# ------------------------------------------------------------------------------ cvt evaluate


@pytest.fixture
def cli(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: CliRunner().invoke(
        verbs, ["evaluate", "--runtime", "torch", *map(str, arguments)]
    )


def test_the_command_writes_figures_and_page(cli, model_folder, photos, tmp_path):
    (tmp_path / "map.csv").write_text("green,\n")
    options = ("--output", tmp_path / "out", "--report", tmp_path / "page.html", "--subset")
    options += ("--class-map", tmp_path / "map.csv", "--workers", 1, "--batch-size", 7)
    answer = cli(model_folder, photos, *options)
    assert answer.exit_code == 0, answer.output
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["images"] == 24
    assert f"calibration error {100 * metrics['calibration_error']:.2f} %" in answer.output
    assert str(photos) in (tmp_path / "page.html").read_text()
    assert "of the model's" not in answer.output


def test_the_command_prints_which_classes_are_not_tested(cli, model_folder, photos, tmp_path):
    data = tmp_path / "data" / "red"
    data.mkdir(parents=True)
    (data / "a.png").write_bytes((photos / "red" / "00.png").read_bytes())
    answer = cli(model_folder, data.parent)
    assert answer.exit_code == 0
    assert "no images of 2 of the model's 3 classes" in answer.output


@pytest.mark.parametrize("option", ["--output", "--report"])
def test_what_is_there_already_is_refused_before_the_work(cli, photos, tmp_path, option):
    target = tmp_path / "mine"
    target.write_text("mine")
    (tmp_path / "no model").mkdir()
    answer = cli(tmp_path / "no model", photos, option, target)
    assert isinstance(answer.exception, FileExistsError)
    assert target.read_text() == "mine"


def test_the_command_reports_real_labels(cli, imagenet, tmp_path):
    model, processor, images = imagenet
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "real.json").write_text(json.dumps([[1]] * 12))
    data = Path(images.sources[0]).parent.parent
    for option in ("--real", "--real-labels"):
        answer = cli(tmp_path / "model", data, option, tmp_path / "real.json")
        assert "top-1 by real labels 0.00 %  top-5 " in answer.output
