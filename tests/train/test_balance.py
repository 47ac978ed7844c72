"""Classes of different size: weights of the loss, balanced epochs, and what they are good for."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from helpers.training_runs import equal, without_pictures
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from cvt import CvtConfig
from cvt.data import LabelledImages, StreamedImages
from cvt.data.decoding import StoredImage
from cvt.train import Recipe, resume, train
from cvt.train.augmentation import mixing
from cvt.train.balance import (
    advice,
    balanced_order,
    class_weights,
    weighted_cross_entropy,
)
from cvt.train.checkpointing import newest_checkpoint
from cvt.train.loader import draws, seed_all
from cvt.train.plan import Plan
from cvt.train.progress import NullProgress

COUNTS = {"a": 40, "b": 40, "c": 5}


def images(counts=COUNTS, classes=None):
    """Images that are called by their number, so many of each class."""
    labels = [name for name, count in counts.items() for _ in range(count)]
    sources = [StoredImage(str(i), Image.new("RGB", (4, 4))) for i in range(len(labels))]
    return LabelledImages(sources, labels, classes)


# ------------------------------------------------------------------------------ the loss


def test_the_weights_are_those_of_scikit_learn():
    found = class_weights(images())
    expected = compute_class_weight("balanced", classes=np.array([*"abc"]), y=images().labels)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert found.tolist() == pytest.approx([85 / 120, 85 / 120, 85 / 15])
    with_another = class_weights(images(classes=[*"abxc"]))
    assert with_another.tolist() == [found[0], found[1], 0, found[2]]


def mean_by_hand(logits, mixed, weights, smoothing):
    """The loss of unsmoothed targets (B, K), in float64, image by image."""
    total = 0.0
    for row, target in zip(logits.double().numpy(), mixed.double().numpy(), strict=True):
        logs = row - np.log(np.exp(row).sum())
        smoothed = (1 - smoothing) * target + smoothing / len(row)
        total -= (target @ weights.double().numpy()) * (smoothed @ logs)
    return total / len(logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("settings", [{}, {"mixup": 0.8}, {"cutmix": 1.0, "mixup_mode": "elem"}])
def test_every_image_is_weighted_by_its_class_or_by_the_mix_of_its_classes(smoothing, settings):
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(8, 3, generator=generator), class_weights(images())
    pixels, targets = torch.zeros(8, 3, 4, 4), torch.tensor([0, 0, 1, 1, 1, 2, 0, 2])

    def mixed(smoothing):
        seed_all(3)
        return mixing(Recipe(**settings, label_smoothing=smoothing), 3)(pixels.clone(), targets)[1]

    one_hot = torch.eye(3)[targets]
    expected = mean_by_hand(logits, mixed(0.0) if settings else one_hot, weights, smoothing)
    found = weighted_cross_entropy(logits, mixed(smoothing), weights, smoothing)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    if not settings:  # batches of a step, of however many processes, add up
        parts = [
            weighted_cross_entropy(logits[rank::2], targets[rank::2], weights, smoothing)
            for rank in (0, 1)
        ]
        assert torch.stack(parts).mean().item() == pytest.approx(expected, rel=1e-5)


def test_smoothing_does_not_make_a_rare_class_the_answer_to_every_image():
    """The weights of terms, as torch applies them, would: 0.05 of 1000 is more than 0.95 of 1."""
    weights, logits = torch.tensor([1.0, 1000.0]), torch.zeros(1, 2, requires_grad=True)
    weighted_cross_entropy(logits, torch.tensor([0]), weights, 0.1).backward()
    assert logits.grad[0, 0] < 0 < logits.grad[0, 1]
    by_torch = torch.zeros(1, 2, requires_grad=True)
    torch.nn.functional.cross_entropy(
        by_torch, torch.tensor([0]), weights, label_smoothing=0.1
    ).backward()
    assert by_torch.grad[0, 1] < 0


# ------------------------------------------------------------------------------ the order


@pytest.mark.parametrize("counts", [(40, 40, 5), (1, 1, 1), (100, 3, 1, 7), (2, 9)], ids=str)
def test_an_epoch_has_every_class_and_every_image_of_a_class_equally_often(counts):
    classes = np.repeat(np.arange(len(counts)), counts)
    for epoch in range(3):
        drawn = balanced_order(classes, np.random.default_rng(epoch))
        assert len(drawn) == len(classes)
        of_class = np.bincount(classes[drawn], minlength=len(counts))
        assert of_class.max() - of_class.min() <= 1
        times = np.bincount(drawn, minlength=len(classes))
        for i in range(len(counts)):
            assert np.ptp(times[classes == i]) <= 1


def order(plan, start=0, **settings):
    """The names and seeds of every batch of a process."""
    recipe = Recipe(sampler="balanced", **settings)
    return [
        [(d.image.name, d.seed) for d in batch] for batch in draws(images(), recipe, plan, start)
    ]


def test_balanced_epochs_follow_from_the_seed_and_differ():
    plan = Plan(images=85, batch_size=5, accumulate=1, rank=0, world=1, epochs=2)
    whole = order(plan)
    assert whole == order(plan) != order(plan, seed=1)
    for start in (1, 17, 20):
        assert order(plan, start) == whole[start:]
    epochs = [[name for name, _ in chain(*part)] for part in (whole[:17], whole[17:])]
    assert sorted(epochs[0]) != sorted(epochs[1])  # other images of the large classes
    for epoch in epochs:
        assert sorted(Counter(images().labels[int(name)] for name in epoch).values()) == [
            28,
            28,
            29,
        ]


def test_processes_can_be_traded_for_accumulated_batches_and_repeats_are_kept():
    alone = Plan(images=85, batch_size=2, accumulate=4, rank=0, world=1, epochs=1)
    for repeats in (1, 2):
        whole = order(alone, repeats=repeats)
        plans = [Plan(85, 2, 2, rank, 2, 1) for rank in (0, 1)]
        shares = [order(plan, repeats=repeats) for plan in plans]
        assert [*chain(*zip(*shares, strict=True))] == whole
        if repeats == 2:  # in different batches of a step
            for batches in (whole[i : i + 4] for i in range(0, len(whole), 4)):
                names = [sorted(name for name, _ in batch) for batch in batches]
                assert names[0] == names[1]
                assert names[2] == names[3]


# ------------------------------------------------------------------------------ advice


def test_settings_are_advised_where_a_class_was_missed_and_classes_differ_in_size():
    row = {"epoch": 3, "val_lowest_recall": 0.0}
    sentence = advice(row, Recipe(), images())
    assert sentence == (
        "epoch 3, the best by top1, recognises no validation image of at least one class, and the "
        "smallest class, c, has 5 of 85 training images; try sampler=balanced or "
        "class_weights=balanced or metric=balanced_accuracy"
    )
    weighted = advice(row, Recipe(class_weights="balanced"), images())
    assert weighted.endswith("try metric=balanced_accuracy")
    assert advice(row, Recipe(sampler="balanced", metric="f1_macro"), images()) == ""
    assert advice(row, Recipe(), images({"a": 9, "b": 5})) == ""
    assert advice(row | {"val_lowest_recall": 0.1}, Recipe(), images()) == ""
    assert advice(row | {"ema_lowest_recall": 0.1}, Recipe(), images()) == ""
    assert advice({"epoch": 3}, Recipe(), images()) == ""  # of a run before there was this metric
    assert advice(row, Recipe(), StreamedImages(["a"], None, None, None)) == ""


# ------------------------------------------------------------------------------ runs


COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "yellow": (230, 220, 40)}
# Classes by the colours of their images. Of the 19 yellow ones, most are grass, but a balanced
# look gives grass 14/40 of them and chick 5/5.
TRAIN = {"sky": {"blue": 40}, "grass": {"green": 26, "yellow": 14}, "chick": {"yellow": 5}}
VALIDATION = {"sky": {"blue": 8}, "grass": {"green": 5, "yellow": 3}, "chick": {"yellow": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of one colour each, and the configuration of a model without anything random."""
    folder = tmp_path_factory.mktemp("unbalanced")
    for split, classes in (("train", TRAIN), ("val", VALIDATION)):
        for name, colours in classes.items():
            (folder / "images" / split / name).mkdir(parents=True)
            for colour, count in colours.items():
                for i in range(count):
                    path = folder / "images" / split / name / f"{split}-{name}-{colour}-{i}.png"
                    Image.new("RGB", (16, 16), COLOURS[colour]).save(path)
    config = CvtConfig(
        embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 1, 1], drop_path_rate=[0.0] * 3,
        qkv_projection_method=["linear"] * 3,
    )  # fmt: skip
    config.save_pretrained(folder / "config")
    return folder


@pytest.fixture
def recipe(folder, monkeypatch):
    without_pictures(monkeypatch.setattr)

    def make(**changes):
        settings = {
            "data": str(folder / "images"), "model": str(folder / "config"), "image_size": 16,
            "batch_size": 17, "epochs": 16, "eval_every": 8, "lr": 1e-3, "crop_scale": 1.0,
            "crop_ratio": 1.0, "crop_pct": 1.0, "flip": 0.0,
        }  # fmt: skip
        return Recipe(**{**settings, **changes})

    return make


class Log(NullProgress):
    """Keeps the lines of the log."""

    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)


def state(run):
    return newest_checkpoint(run / "checkpoints")[1]


@pytest.mark.parametrize(
    ("changes", "is_found"),
    [
        ({}, False),
        ({"class_weights": "balanced"}, True),
        ({"sampler": "balanced"}, True),
    ],
    ids=str,
)
def test_a_small_class_is_found_with_balance_and_not_without(recipe, tmp_path, changes, is_found):
    log = Log()
    metric = "balanced_accuracy" if is_found else "top1"
    best = train(recipe(**changes, metric=metric), tmp_path / "run", log)
    last = state(tmp_path / "run")["history"][-1]
    for row in (best, last):
        assert (row["val_lowest_recall"] > 0) is is_found
        assert row["val_top1"] == pytest.approx((14 if is_found else 16) / 17)
    advised = [line for line in log.lines if "try sampler=balanced or class_weights" in line]
    assert len(advised) == (not is_found)


@pytest.mark.parametrize("name", ["class_weights", "sampler"])
def test_a_balanced_run_resumes_to_the_bit(recipe, tmp_path, name):
    settings = recipe(
        **{name: "balanced"}, epochs=2, save_steps=1, keep=99, mixup=0.5, batch_size=8
    )
    train(settings, tmp_path / "run")
    whole = state(tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("step-*"):
        if path.name > "step-00000007":
            path.rename(tmp_path / path.name)
    resume(tmp_path / "run")
    equal(state(tmp_path / "run"), whole)


def test_batches_of_a_step_are_weighted_as_one(recipe, tmp_path):
    for n in (1, 2):
        changes = {"batch_size": 20 // n, "accumulate": n, "steps": 1, "label_smoothing": 0.2}
        train(recipe(class_weights="balanced", **changes), tmp_path / str(n))
    one, two = (state(tmp_path / str(n))["history"][0]["train_loss"] for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("name", ["class_weights", "sampler"])
def test_classes_of_a_stream_are_not_balanced(recipe, tmp_path, monkeypatch, name):
    from cvt.data import Splits
    from cvt.train import setup

    stream = StreamedImages(["a", "b"], 8, None, None)
    monkeypatch.setattr(setup, "open_training", lambda *_, **__: Splits(stream, stream, None))
    with pytest.raises(ValueError, match=f"^{name} = balanced: the classes of a stream cannot"):
        train(recipe(**{name: "balanced"}), tmp_path / "run")
