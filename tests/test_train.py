import csv
import math

import pytest
import torch
from PIL import Image

from cvt import CvtConfig, CvtForImageClassification
from cvt.checkpoints import load_classifier, load_processor, transformers_to_authors
from cvt.configuration import VARIANTS
from cvt.datasets import image_folder, split, train_and_test, write_digits
from cvt.evaluate import evaluate
from cvt.train import Recipe, train
from cvt.train.data import augmentation
from cvt.train.loop import Silence, parameter_groups, set_learning_rate
from cvt.train.models import classifier_for


@pytest.fixture
def config_folder(tmp_path):
    """A folder with a configuration and no weights; dropout and drop path draw random numbers."""
    config = CvtConfig(
        embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 1, 2], drop_rate=[0.1, 0.1, 0.1],
        drop_path_rate=[0.0, 0.0, 0.3],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


def recipe(config_folder, **changes):
    settings = {"epochs": 3, "batch_size": 8, "lr": 3e-3, "image_size": 32, "warmup_epochs": 0.5}
    return Recipe(model=str(config_folder), **{**settings, **changes})


class StopAfter(Silence):
    def __init__(self, epochs):
        self.epochs = epochs

    def epoch(self, row):
        if row["epoch"] == self.epochs:
            raise KeyboardInterrupt


def test_training_learns_and_leaves_a_run_folder(photos, config_folder, tmp_path):
    run = tmp_path / "run"
    best = train(photos, run, recipe(config_folder, epochs=6))
    assert best.top1 > 0.9
    assert {path.name for path in run.iterdir()} == {
        "best", "results.csv", "learning_curve.png", "confusion_matrix.png", "checkpoint.pt",
    }  # fmt: skip
    with open(run / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == list("123456")
    assert max(float(row["test_top1"]) for row in rows) == pytest.approx(best.top1)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    for name in ("learning_curve.png", "confusion_matrix.png"):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 200

    model = load_classifier(run / "best")
    assert model.config.class_names == ["blue", "green", "red"]
    _, held_out = train_and_test(photos)
    again = evaluate(model, load_processor(run / "best", model.config), held_out)
    assert (again.confusion == best.confusion).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_run_resumes_to_the_same_weights(photos, config_folder, tmp_path, workers):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    settings = recipe(config_folder, workers=workers)
    train(photos, whole, settings)
    with pytest.raises(KeyboardInterrupt):
        train(photos, stopped, settings, progress=StopAfter(2))
    train(photos, stopped, Recipe(epochs=99), resume=True)
    one, other = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (whole, stopped))
    assert one["history"] == other["history"]
    assert one["recipe"] == other["recipe"]
    assert all(torch.equal(weight, other["model"][name]) for name, weight in one["model"].items())
    for key, moments in one["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, other["optimizer"]["state"][key][name])
    assert (whole / "results.csv").read_text() == (stopped / "results.csv").read_text()


def test_a_run_stopped_in_its_first_epoch_resumes_too(photos, config_folder, tmp_path):
    class StopAtOnce(Silence):
        def stage(self, name, total):
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(photos, run, recipe(config_folder), progress=StopAtOnce())
    train(photos, run, Recipe(), resume=True)
    train(photos, tmp_path / "whole", recipe(config_folder))
    assert (run / "results.csv").read_text() == (tmp_path / "whole/results.csv").read_text()


def test_a_run_resumes_only_on_its_own_images(photos, config_folder, tmp_path):
    train(photos, tmp_path / "run", recipe(config_folder, epochs=1))
    for name in ("ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"):
        picture(tmp_path / "other" / name)
    with pytest.raises(ValueError, match=r"images in .*other are not those of the run"):
        train(tmp_path / "other", tmp_path / "run", Recipe(), resume=True)


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        train(tmp_path, tmp_path, Recipe(), resume=True)


def test_data_that_cannot_be_used_leaves_no_run(config_folder, tmp_path):
    with pytest.raises(FileNotFoundError):
        train(tmp_path / "nowhere", tmp_path / "run", recipe(config_folder))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_resumes_to_itself(photos, config_folder, tmp_path):
    first = train(photos, tmp_path / "run", recipe(config_folder, epochs=1))
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    again = train(photos, tmp_path / "run", Recipe(), resume=True)
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert again.top1 == first.top1


def test_a_run_is_neither_overwritten_nor_made_up(photos, config_folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"run exists already; --resume"):
        train(photos, tmp_path / "run", recipe(config_folder))
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt does not exist; .* no run"):
        train(photos, tmp_path / "none", recipe(config_folder), resume=True)
    assert not (tmp_path / "none").exists()


def test_a_loss_that_is_not_finite_says_where_and_what_to_try(photos, config_folder, tmp_path):
    with pytest.raises(FloatingPointError, match=r"epoch 1, step \d+, at learning rate .*--lr"):
        train(photos, tmp_path / "run", recipe(config_folder, lr=1e30))


@pytest.mark.parametrize(
    ("field", "value"), [("epochs", 0), ("batch_size", -1), ("lr", math.nan), ("crop_scale", 2.0)]
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        Recipe(**{field: value})


def test_fine_tuning_keeps_the_body_and_makes_a_new_head(model_folder, caplog):
    trained = CvtForImageClassification.from_pretrained(model_folder)
    model = classifier_for(model_folder, ["ant", "bee"])
    assert model.config.class_names == ["ant", "bee"]
    assert model.config.label2id == {"ant": 0, "bee": 1}
    assert torch.equal(model.layernorm.weight, trained.layernorm.weight)
    name = "cvt.encoder.stages.2.layers.0.intermediate.dense.weight"
    assert torch.equal(model.state_dict()[name], trained.state_dict()[name])
    assert "New classifier of 2 classes" in caplog.text
    fresh = classifier_for(model_folder, ["ant", "bee"], from_scratch=True)
    assert not torch.equal(fresh.state_dict()[name], trained.state_dict()[name])


def test_a_variant_starts_from_scratch():
    model = classifier_for("cvt-13", ["ant", "bee"], from_scratch=True)
    assert model.config.depth == [1, 2, 10]
    assert model.config.hidden_act == "quick_gelu"
    with pytest.raises(FileNotFoundError, match="no model cvt-99"):
        classifier_for("cvt-99", ["ant", "bee"])


def test_norms_biases_and_class_tokens_do_not_decay(model_folder):
    model = CvtForImageClassification.from_pretrained(model_folder)
    decay, keep = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {names[id(parameter)] for parameter in keep["params"]}
    assert len(decay["params"]) + len(kept) == len(names)
    assert kept == {n for n in names.values() if "norm" in n or n.endswith(("bias", "cls_token"))}
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.1, 0.0)


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    settings = Recipe(epochs=10, lr=1.0, warmup_epochs=2)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0)
    rates = []
    for tenth in range(101):
        set_learning_rate(optimizer, settings, tenth / 10)
        rates.append(optimizer.param_groups[0]["lr"])
    assert 0 < rates[0] < 0.01
    assert rates[10] == pytest.approx(0.5, abs=0.01)
    assert max(rates) == rates[20] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert Recipe(batch_size=256).peak_lr == pytest.approx(0.00025)


# ------------------------------------------------------------------------------ data


def slopes(image, **changes):
    """How the brightness of an augmented picture runs, to the right and downwards, in 40 draws."""
    settings = {"flip": False, "crop_scale": 1.0, "rotate": 0.0, **changes}
    torch.manual_seed(0)
    draws = [augmentation(16, [0.0] * 3, [1.0] * 3, **settings)(image)[0] for _ in range(40)]
    assert all(draw.shape == (16, 16) for draw in draws)
    middle = [draw[4:12, 4:12] for draw in draws]
    right = torch.stack([(m[:, -1] - m[:, 0]).mean() for m in middle])
    return right, torch.stack([(m[-1] - m[0]).mean() for m in middle])


def test_each_augmentation_does_what_it_says_and_no_more():
    image = Image.linear_gradient("L").resize((16, 16)).rotate(90).convert("RGB")  # to the right
    right, down = slopes(image)
    assert right.min() > 0.3
    assert down.abs().max() < 0.02
    flipped, _ = slopes(image, flip=True)
    assert 8 < (flipped < 0).sum() < 32
    turned, tilted = slopes(image, rotate=30.0)
    assert turned.min() > 0.2
    assert tilted.min() < -0.1
    assert tilted.max() > 0.1
    assert slopes(image, crop_scale=0.2)[0].min() < 0.8 * right.min()


def test_digits_are_written_as_an_image_folder(tmp_path):
    write_digits(tmp_path / "digits")
    train_images, test_images = train_and_test(tmp_path / "digits")
    assert (len(train_images), len(test_images)) == (1437, 360)
    assert train_images.classes == test_images.classes == list("0123456789")
    with Image.open(test_images.paths[0]) as image:
        assert (image.size, image.mode) == ((8, 8), "L")
    shares = [test_images.labels.count(c) / train_images.labels.count(c) for c in "0123456789"]
    assert all(abs(share - 0.25) < 0.02 for share in shares)
    with pytest.raises(FileExistsError):
        write_digits(tmp_path / "digits")


def test_a_split_is_stratified_repeatable_and_whole(photos):
    images = image_folder(photos)
    train_images, test_images = split(images, seed=3)
    assert sorted(train_images.samples + test_images.samples) == sorted(images.samples)
    assert all(test_images.labels.count(name) == 2 for name in images.classes)
    assert split(images, seed=3) == (train_images, test_images)
    assert split(images, seed=4) != (train_images, test_images)


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_folders_that_cannot_be_trained_on_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        train_and_test(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no folder per class"):
        train_and_test(tmp_path)
    for i in range(3):
        picture(tmp_path / "data" / "ant" / f"{i}.png")
    with pytest.raises(ValueError, match="single class, ant"):
        train_and_test(tmp_path / "data")
    (tmp_path / "data" / "bee").mkdir()
    with pytest.raises(ValueError, match="without images: bee"):
        train_and_test(tmp_path / "data")
    picture(tmp_path / "data" / "bee" / "0.png")
    with pytest.raises(ValueError, match=r"class bee has one image, .*0\.png"):
        train_and_test(tmp_path / "data")


def test_hidden_files_are_no_images_and_a_missing_half_is_named(tmp_path):
    for name in ("train/ant/0.png", "train/bee/0.png", "train/ant/._0.png"):
        picture(tmp_path / name)
    assert len(image_folder(tmp_path / "train")) == 2
    with pytest.raises(ValueError, match="has a train folder and none of val"):
        train_and_test(tmp_path)


def test_training_starts_from_an_authors_file_too(model_folder, tmp_path, monkeypatch):
    trained = CvtForImageClassification.from_pretrained(model_folder)
    fields = {name: getattr(trained.config, name) for name in ("embed_dim", "num_heads", "depth")}
    monkeypatch.setitem(VARIANTS, "cvt-tiny", fields)
    torch.save(transformers_to_authors(trained.state_dict()), tmp_path / "weights.pth")
    model = classifier_for(tmp_path / "weights.pth", ["ant", "bee"])
    assert model.config.class_names == ["ant", "bee"]
    assert torch.equal(model.layernorm.weight, trained.layernorm.weight)


def test_halves_with_differing_classes_are_refused(tmp_path):
    for name in ("train/ant", "train/bee", "val/ant", "val/cow"):
        picture(tmp_path / name / "0.png")
    with pytest.raises(ValueError, match=r"only one of .*train and .*val has bee, cow"):
        train_and_test(tmp_path)
