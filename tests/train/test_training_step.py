"""What the steps of a run compute, beside the same computed here: losses, updates, averages."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from helpers.training_runs import equal, without_pictures
from PIL import Image

from cvt import CvtConfig, CvtForImageClassification
from cvt.checkpoints import load_processor
from cvt.data import open_training
from cvt.inference.evaluate import evaluate
from cvt.modeling import Attention, ConvEmbedding
from cvt.train import Recipe, resume, train
from cvt.train.checkpointing import newest_checkpoint

COLOURS = {"blue": (30, 60, 220), "red": (220, 40, 30)}
STAGES = 3
SGD = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """Drawing the pictures of a run takes longer than the run."""
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch.setattr)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images to train on, two to evaluate on, and a configuration."""
    folder, generator = tmp_path_factory.mktemp("steps"), np.random.default_rng(0)
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            (folder / "images" / split / name).mkdir(parents=True)
            pixels = np.clip(np.array(colour) + generator.normal(0, 40, (16, 16, 3)), 0, 255)
            path = folder / "images" / split / name / f"{split}-{name}.png"
            Image.fromarray(pixels.astype("uint8")).save(path)
    config = CvtConfig(
        embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 1, 2], drop_path_rate=[0.0] * STAGES,
        qkv_projection_method=["linear"] * STAGES,
    )  # fmt: skip
    config.save_pretrained(folder / "config")
    return folder


@pytest.fixture(scope="module")
def recipe(folder):
    """Makes a recipe of one step an epoch, always on the same two images, with nothing random.

    The learning rate is practically 0, so that every step has the same loss.
    """

    def make(**changes):
        settings = {
            "data": str(folder / "images"), "model": str(folder / "config"), "image_size": 16,
            "batch_size": 2, "epochs": 3, "eval_every": 99, "keep": 99, "lr": 1e-12,
            "warmup_epochs": 0, "crop_scale": 1.0, "crop_ratio": 1.0, "crop_pct": 1.0, "flip": 0.0,
            "label_smoothing": 0.0,
        }  # fmt: skip
        return Recipe(**{**settings, **changes})

    return make


@pytest.fixture(scope="module")
def plain(recipe, folder):
    """The loss of every step of a run without chance."""
    (loss, *others) = losses(recipe(), folder / "plain")
    assert others == pytest.approx([loss] * 2, abs=1e-5)
    return loss


def state_after(run, step):
    """The state of a run after so many steps."""
    (path,) = (run / "checkpoints").glob(f"step-{step:08d}*")
    return torch.load(path / "state.pt", weights_only=True)


def newest(run):
    return newest_checkpoint(run / "checkpoints")[1]


def losses(recipe, run):
    """The loss of every epoch, which is that of a step."""
    train(recipe, run)
    return [row["train_loss"] for row in newest(run)["history"]]


def resume_after(run, step):
    """Resume a run as if it had been killed after so many steps."""
    for path in (run / "checkpoints").iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    resume(run)


# ------------------------------------------------------------------------------ averaged weights


def test_averaged_weights_follow_timms_formula(recipe, tmp_path):
    """After step k the average keeps min(ema_decay, 1 - k^(-2/3)) of itself: at first nothing."""
    train(recipe(epochs=5, lr=0.01, ema_decay=0.5), tmp_path / "run")
    decays = [min(0.5, 1 - k ** (-2 / 3)) for k in range(1, 6)]
    assert decays[0] == 0 < decays[1] < decays[2] == decays[4] == 0.5
    expected = {
        name: weight.double().numpy()
        for name, weight in state_after(tmp_path / "run", 0)["model"].items()
    }
    for step, decay in enumerate(decays, start=1):
        state = state_after(tmp_path / "run", step)
        for name, weight in state["model"].items():
            new = weight.double().numpy()
            expected[name] = decay * expected[name] + (1 - decay) * new
            np.testing.assert_allclose(
                state["ema"][name].numpy(), expected[name], rtol=0, atol=1e-6, err_msg=name
            )
    name = "cvt.encoder.stages.0.layers.0.intermediate.dense.weight"
    assert (state["ema"][name] - state["model"][name]).abs().max() > 1e-3


def test_the_figures_of_an_epoch_are_of_the_weights_that_they_name(recipe, folder, tmp_path):
    row = train(recipe(lr=0.01, ema_decay=0.9), tmp_path / "run")
    state = newest(tmp_path / "run")
    model = CvtForImageClassification(CvtConfig.from_dict(state["config"]))
    processor = load_processor(tmp_path / "run/last", model.config)
    _, images, _ = open_training(folder / "images")
    for prefix, which in (("val", "model"), ("ema", "ema")):
        model.load_state_dict(state[which])
        found = evaluate(model, processor, images)
        assert row[f"{prefix}_loss"] == pytest.approx(found.loss, rel=1e-6)
    assert row["val_loss"] != pytest.approx(row["ema_loss"], rel=1e-4)


# ------------------------------------------------------------------------------ random numbers


@pytest.mark.parametrize(
    "chance", [{"drop_rate": 0.5}, {"drop_path": 0.5}, {"mixup": 1.0}, {"cutmix": 1.0}], ids=str
)
@pytest.mark.usefixtures("plain")  # without chance, the losses are equal
def test_every_step_draws_other_numbers_and_a_resumed_run_the_same(recipe, tmp_path, chance):
    drawn = losses(recipe(**chance), tmp_path / "run")
    assert len({round(loss, 4) for loss in drawn}) == 3
    resume_after(tmp_path / "run", 1)
    assert [row["train_loss"] for row in newest(tmp_path / "run")["history"]] == drawn


def test_every_batch_of_a_step_draws_numbers_of_its_own(recipe, tmp_path, monkeypatch):
    """They depend on the batch's number in the run, not on how many batches a step has."""
    forward, found = CvtForImageClassification.forward, {1: [], 2: []}

    def noting(self, *arguments, **named):
        if self.training:
            found[accumulate].append(torch.get_rng_state().numpy().tobytes())
        return forward(self, *arguments, **named)

    monkeypatch.setattr(CvtForImageClassification, "forward", noting)
    for accumulate in found:
        train(recipe(accumulate=accumulate, epochs=2 // accumulate), tmp_path / str(accumulate))
    assert len(set(found[1])) == 2
    assert found[1] == found[2]


def test_nothing_is_mixed_after_the_epochs_of_the_recipe(recipe, plain, tmp_path):
    mixed = losses(recipe(mixup=1.0, mixup_off_epoch=2), tmp_path / "run")
    assert [loss == pytest.approx(plain, abs=1e-5) for loss in mixed] == [False, False, True]


# ------------------------------------------------------------------------------ losses and updates


def test_the_loss_is_cross_entropy_with_the_recipes_smoothing(recipe, folder, tmp_path):
    (found,) = losses(recipe(label_smoothing=0.3, epochs=1), tmp_path / "run")
    state = state_after(tmp_path / "run", 0)
    model = CvtForImageClassification(CvtConfig.from_dict(state["config"])).train()
    model.load_state_dict(state["model"])
    images, _, _ = open_training(folder / "images")
    processor = load_processor(tmp_path / "run/last", model.config)
    pixels = processor([Image.open(file) for file in images.sources], return_tensors="pt")
    with torch.no_grad():
        logits = model(**pixels).logits.double().numpy()
    logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    right = np.array([[label == name for name in images.classes] for label in images.labels])
    assert found == pytest.approx(-((0.7 * right + 0.3 / 2) * logs).sum(1).mean(), abs=1e-5)


def moved(run):
    """By how much the first step of a run moves the weights, as one vector."""
    first, last = (state_after(run, step)["model"] for step in (0, 1))
    return torch.cat([(last[name] - first[name]).flatten() for name in first])


def test_accumulated_batches_give_the_gradient_of_one(recipe, tmp_path):
    for n in (1, 2):
        changes = {"batch_size": 4 // n, "accumulate": n, "epochs": 1, "lr": 0.1}
        train(recipe(**changes, **SGD), tmp_path / str(n))
    whole, accumulated = moved(tmp_path / "1"), moved(tmp_path / "2")
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(accumulated, whole, rtol=0, atol=1e-6)


def test_a_clipped_step_is_as_long_as_the_recipe_allows(recipe, tmp_path):
    for clip in (None, 0.01):
        train(recipe(epochs=1, lr=0.1, clip_grad=clip, **SGD), tmp_path / str(clip))
    free, clipped = moved(tmp_path / "None"), moved(tmp_path / "0.01")
    assert free.norm() > 2 * 0.1 * 0.01
    assert clipped.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=0, atol=1e-4)


@pytest.fixture
def scaled(monkeypatch):
    """The gradients are scaled as in fp16, though a CPU computes in fp32."""
    scaler = partial(torch.amp.GradScaler, init_scale=1024.0, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device))


@pytest.mark.usefixtures("scaled")
def test_clipping_sees_gradients_without_the_scale_of_fp16(recipe, tmp_path):
    train(recipe(epochs=1, lr=0.1, clip_grad=0.01, **SGD), tmp_path / "run")
    assert newest(tmp_path / "run")["scaler"]["scale"] == 1024
    assert moved(tmp_path / "run").norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.usefixtures("scaled")
def test_a_resumed_run_keeps_the_scale_of_fp16(recipe, tmp_path):
    train(recipe(), tmp_path / "run")
    whole = newest(tmp_path / "run")
    assert whole["scaler"]["scale"] == 2048  # doubled after two steps
    resume_after(tmp_path / "run", 2)
    equal(newest(tmp_path / "run"), whole)


# ------------------------------------------------------------------------------ settings that act


def test_epochs_of_cool_down_follow_at_the_lowest_rate(recipe, tmp_path):
    train(recipe(epochs=2, cooldown_epochs=2, lr=1e-3, min_lr=1e-5), tmp_path / "run")
    rates = [row["learning_rate"] for row in newest(tmp_path / "run")["history"]]
    assert rates == pytest.approx([1e-3, (1e-3 + 1e-5) / 2, 1e-5, 1e-5])


@pytest.mark.parametrize("on", [False, True])
def test_memory_is_saved_by_the_recipe(recipe, tmp_path, monkeypatch, on):
    """Checkpointed blocks compute twice; convolutions are channels-last."""
    forward, calls, layouts = Attention.forward, [], set()
    embed = ConvEmbedding.forward

    def counting(self, *arguments, **named):
        calls.append(self.training)
        return forward(self, *arguments, **named)

    def noting(self, image):
        if self.training:
            weight = self.projection.weight
            layouts.add(weight.is_contiguous(memory_format=torch.channels_last))
        return embed(self, image)

    monkeypatch.setattr(Attention, "forward", counting)
    monkeypatch.setattr(ConvEmbedding, "forward", noting)
    train(recipe(epochs=1, gradient_checkpointing=on), tmp_path / "run")
    assert sum(calls) == (8 if on else 4)
    assert layouts == {True}


# ------------------------------------------------------------------------------ the run's images


def relabel(images):
    """The same names in the same order, one of them in the next class."""
    (images / "train/blue/b.png").rename(images / "train/red/b.png")


def rename_held_out(images):
    (images / "val/red/val-red.png").rename(images / "val/red/another.png")


@pytest.mark.parametrize("change", [relabel, rename_held_out])
def test_a_run_resumes_with_the_same_labels_and_evaluation_images_only(
    recipe, folder, tmp_path, change
):
    shutil.copytree(folder / "images", tmp_path / "images")
    for name, kept in (("blue", "ab"), ("red", "cd")):
        (file,) = (tmp_path / "images/train" / name).iterdir()
        for letter in kept:
            shutil.copy(file, file.with_name(f"{letter}.png"))
        file.unlink()
    train(recipe(data=str(tmp_path / "images"), epochs=1), tmp_path / "run")
    change(tmp_path / "images")
    with pytest.raises(ValueError, match="are not those of the run"):
        resume(tmp_path / "run")
