import shutil

import numpy as np
import pytest
import torch
from helpers.training_runs import equal
from helpers.watcher import Watcher, final_state
from PIL import Image

from cvt import CvtForImageClassification, image_processor
from cvt.train import resume, train
from cvt.train.teacher import Teacher, soft_loss
from cvt.train.trainer import Stopped

FIXED = {
    "crop_scale": 1.0, "crop_ratio": 1.0, "flip": 0, "drop_path": 0.0, "drop_rate": 0.0,
    "warmup_epochs": 0, "lr": 1e-12, "steps": 1, "eval_every": 9,
}  # fmt: skip


@pytest.fixture
def teacher(model_folder, tmp_path):
    """The small classifier, its classes in another order among more, with another mean and std."""
    model = CvtForImageClassification.from_pretrained(model_folder)
    model.classifier = torch.nn.Linear(32, 5)
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.config.class_names = ["red", "pink", "blue", "grey", "green"]
    model.save_pretrained(tmp_path / "teacher")
    processor = image_processor(model.config, image_size=64)
    processor.image_mean, processor.image_std = [0.5, 0.4, 0.3], [0.1, 0.2, 0.3]
    processor.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def test_the_soft_loss_is_its_formula():
    generator = np.random.default_rng(0)
    logits, soft, weights = generator.normal(0, 4, (2, 6, 3)), None, generator.uniform(0, 2, 6)
    logits, soft = logits
    p, q = softmax(soft / 3), softmax(logits / 3)
    divergences = [sum(p[i, c] * np.log(p[i, c] / q[i, c]) for c in range(3)) for i in range(6)]
    for own in (np.ones(6), weights):
        found = soft_loss(*map(torch.tensor, (logits, soft)), 3.0, torch.tensor(own))
        assert found.item() == pytest.approx(9 * np.mean(own * divergences))
    gradients = []
    for temperature in (1.0, 50.0):
        moving = torch.tensor(logits, requires_grad=True)
        soft_loss(moving, torch.tensor(soft), temperature).backward()
        gradients.append(moving.grad.norm().item())
    assert 0.1 < gradients[0] / gradients[1] < 10


@pytest.mark.parametrize("changes", [{}, {"class_weights": "balanced"}], ids=["plain", "weighted"])
def test_a_step_has_the_loss_of_the_formula(recipe, teacher, photos, tmp_path, changes):
    data = tmp_path / "square"
    shutil.copytree(photos, data / "train")
    for path in data.rglob("*.png"):  # so that a crop is the whole image
        Image.open(path).resize((32, 32)).save(path)
    images = sorted(data.rglob("*.png"))
    for path in images[:4] + images[-13::12]:  # four blue ones, one each of the others
        (data / "val" / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(data / "val" / path.parent.name / path.name)
    run = tmp_path / "run"
    settings = {"teacher": str(teacher), "teacher_weight": 0.3, "temperature": 4.0}
    best = train(recipe(data=str(data), batch_size=30, keep=9, **settings, **FIXED, **changes), run)
    first = sorted((run / "checkpoints").glob("step-*"))[0]
    state = torch.load(first / "state.pt", weights_only=True)
    config = CvtForImageClassification.config_class.from_dict(state["config"])
    model = CvtForImageClassification(config)
    model.load_state_dict(state["model"])
    model.train()
    own = CvtForImageClassification.from_pretrained(teacher).eval()

    images = sorted((data / "train").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) / 255 for path in images])  # (30, H, W, 3)

    def logits(model, mean, std):
        normal = torch.tensor((pixels - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
        with torch.no_grad():
            return model(normal).logits.double().numpy()

    found = logits(model, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    soft = logits(own, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))[:, [2, 4, 0]]  # blue, green, red
    labels = np.array([["blue", "green", "red"].index(path.parent.name) for path in images])
    counts = np.bincount(labels)
    weights = 30 / (3 * counts[labels]) if changes else np.ones(30)
    smoothed = 0.9 * np.eye(3)[labels] + 0.1 / 3
    hard = -(smoothed * np.log(softmax(found))).sum(1)
    p, q = softmax(soft / 4), softmax(found / 4)
    divergence = (p * np.log(p / q)).sum(1)
    expected = np.mean(weights * (0.7 * hard + 0.3 * 16 * divergence))
    assert best["train_loss"] == pytest.approx(expected, rel=1e-4)
    assert abs(expected - np.mean(weights * hard)) > 0.01


def test_the_teacher_sees_the_mixed_views(recipe, teacher, tmp_path, monkeypatch):
    seen = {"teacher": [], "model": []}
    ask, forward = Teacher.logits, CvtForImageClassification.forward
    monkeypatch.setattr(
        Teacher, "logits", lambda self, pixels: seen["teacher"].append(pixels) or ask(self, pixels)
    )

    def watched(self, pixel_values=None, *arguments, **options):
        if self.training:
            seen["model"].append(pixel_values)
        return forward(self, pixel_values, *arguments, **options)

    monkeypatch.setattr(CvtForImageClassification, "forward", watched)
    changes = {"mixup": 1.0, "random_erase": 0.5, "accumulate": 2}
    train(recipe(teacher=str(teacher), epochs=1, **changes), tmp_path / "run")
    assert len(seen["teacher"]) == len(seen["model"]) == 2
    for one, other in zip(*seen.values(), strict=True):
        assert torch.equal(one, other)


def test_a_distilled_run_resumes_to_the_bit_wherever_its_teacher_is(recipe, teacher, tmp_path):
    settings = recipe(
        teacher=str(teacher), head_only=True, mixup=0.8, ema_decay=0.8, class_weights="balanced"
    )
    train(settings, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    with pytest.raises(Stopped):
        train(settings, stopped, Watcher(stop_after=5))
    moved = teacher.rename(tmp_path / "moved")
    other = shutil.copytree(moved, tmp_path / "other")
    model = CvtForImageClassification.from_pretrained(other)
    with torch.no_grad():
        model.classifier.bias[0] += 1
    model.save_pretrained(other)
    with pytest.raises(ValueError, match=r"teacher = .*other: is not the one of the run"):
        resume(stopped, {"teacher": other})
    resume(stopped, {"teacher": moved})
    equal(*(final_state(tmp_path / run) | {"recipe": {}} for run in ("whole", "stopped")))


def test_a_teacher_that_does_not_fit_is_refused(recipe, teacher, tmp_path):
    with pytest.raises(ValueError, match="views = 2: a teacher sees pixels"):
        recipe(teacher=str(teacher), head_only=True, views=2)
    model = CvtForImageClassification.from_pretrained(teacher)
    for names, kind, fault in (
        (["red", "green", "blau", "a", "b"], None, r"does not know these classes: 'blue'"),
        (model.config.class_names, "multi_label_classification", "of which one is right"),
    ):
        model.config.class_names, model.config.problem_type = names, kind
        model.save_pretrained(teacher)
        with pytest.raises(ValueError, match=rf"teacher = .*{fault}"):
            train(recipe(teacher=str(teacher)), tmp_path / "run")
    (teacher / "export.json").touch()
    with pytest.raises(ValueError, match=r"teacher = .*is an export"):
        train(recipe(teacher=str(teacher)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
