"""Our model learns as the authors' did; `golden/make_authors_losses.py` tells how."""

import numpy as np
import pytest
import torch
from golden.cases import (
    LEARNER,
    LEARNER_CLASSES,
    LOSSES_FILE,
    SCHEDULE,
    STEPS,
    TRAININGS,
    describe,
    fill,
    training_images,
    training_targets,
)

from cvt import CvtConfig, CvtForImageClassification
from cvt.checkpoints import authors_to_transformers, transformers_to_authors
from cvt.train import setup, train
from cvt.train.loader import Batch
from cvt.train.optim import Schedule, optimizer_for, parameter_groups
from cvt.train.plan import Plan
from cvt.train.progress import NullProgress
from cvt.train.recipe import Recipe

TOLERANCE = 1e-4


def golden(name):
    """The arrays of a training, by their names within it."""
    with np.load(LOSSES_FILE) as file:
        return {part: file[f"{name}/{part}"] for part in ("learning_rates", "losses", "logits")}


def build(hidden_act="quick_gelu"):
    """Our model with the weights from which the authors' started."""
    config = CvtConfig(
        hidden_act=hidden_act,
        num_labels=LEARNER_CLASSES,
        problem_type="single_label_classification",
        **LEARNER.settings,
    )
    model = CvtForImageClassification(config)
    theirs = transformers_to_authors(model.state_dict())
    weights = fill(describe(k, v.shape) for k, v in theirs.items())
    weights = {k: torch.from_numpy(v) for k, v in weights.items()}
    model.load_state_dict(authors_to_transformers(weights), strict=True)
    return model


def our_optimizer(name, model):
    training = TRAININGS[name]
    recipe = Recipe(optimizer=training.optimizer.lower(), weight_decay=training.weight_decay)
    return optimizer_for(model, recipe, training.learning_rate)


def learn(name, model, optimizer):
    """The losses at the authors' learning rates, then the logits in evaluation mode."""
    images = torch.from_numpy(training_images())
    targets = torch.from_numpy(training_targets(TRAININGS[name]))
    losses = []
    model.train()
    for step, rate in enumerate(golden(name)["learning_rates"]):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(images[step % 2], labels=targets[step % 2]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, model.eval()(images.flatten(0, 1)).logits


@pytest.mark.parametrize("name", TRAININGS)
def test_twenty_steps_follow_the_authors_losses(name):
    expected, model = golden(name), build()
    losses, logits = learn(name, model, our_optimizer(name, model))
    np.testing.assert_allclose(losses, expected["losses"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_whole_loop_follows_the_authors_losses(name, tmp_path, monkeypatch):
    training, losses = TRAININGS[name], []
    images, targets = map(torch.from_numpy, (training_images(), training_targets(training)))
    batches = [Batch(images[step % 2], targets[step % 2], {}) for step in range(STEPS)]
    monkeypatch.setattr(setup, "batches", lambda *_, **__: iter(batches))
    monkeypatch.setattr(
        NullProgress, "stage", lambda *_, **__: lambda **figures: losses.append(figures.get("loss"))
    )
    start = build()
    start.config.class_names = [str(digit) for digit in range(LEARNER_CLASSES)]
    start.save_pretrained(tmp_path / "start")
    recipe = Recipe(
        data="digits",  # of as many classes; its batches are not used
        model=str(tmp_path / "start"),
        image_size=48,
        steps=STEPS,
        optimizer=training.optimizer.lower(),
        lr=training.learning_rate,
        min_lr=training.learning_rate,
        warmup_epochs=0,
        weight_decay=training.weight_decay,
        label_smoothing=0.0,
    )
    train(recipe, tmp_path / "run")
    np.testing.assert_allclose(losses[:STEPS], golden(name)["losses"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mistake", ["gelu", "norm", "bias", "cls_token"])
def test_another_activation_or_more_weight_decay_leaves_the_tolerance(mistake):
    model = build("gelu" if mistake == "gelu" else "quick_gelu")
    weight_decay = TRAININGS["SGD"].weight_decay
    groups = parameter_groups(model, weight_decay)
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    decays |= {p: weight_decay for name, p in model.named_parameters() if mistake in name}
    groups = [{"params": [p], "weight_decay": decay} for p, decay in decays.items()]
    losses, _ = learn("SGD", model, torch.optim.SGD(groups, momentum=0.9))
    assert np.abs(losses - golden("SGD")["losses"]).max() > 10 * TOLERANCE


def test_the_learning_rate_changes_each_epoch_as_the_authors():
    name = next(name for name, training in TRAININGS.items() if training.cosine)
    optimizer = our_optimizer(name, build())
    plan = Plan(images=16, batch_size=8, accumulate=1, rank=0, world=1, epochs=SCHEDULE["epochs"])
    lr = TRAININGS[name].learning_rate
    schedule = Schedule(Recipe(lr=lr, lr_updates="epoch", **SCHEDULE), plan)
    for step in range(plan.steps):
        schedule.set(optimizer, step)
        expected = golden(name)["learning_rates"][step // plan.steps_per_epoch]
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([expected] * len(rates), rel=1e-9)
