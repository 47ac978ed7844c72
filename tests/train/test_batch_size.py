import pytest
import torch
import yaml
from accelerate import Accelerator
from helpers.training_runs import equal
from helpers.watcher import Watcher, final_state

from cvt import CvtForImageClassification
from cvt.checkpoints import load_config, model_source
from cvt.profile import LiveMemory
from cvt.train import Recipe, batch_size, resume, train
from cvt.train.batch_size import chosen_batch_size, step_bytes
from cvt.train.trainer import Stopped, isolated

CPU = torch.device("cpu")
CLASSES = ["blue", "green", "red"]


def counted(settings, size):
    config = load_config(model_source(settings.model))
    config.class_names = CLASSES
    return step_bytes(settings, config, size, CPU)


@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd"}, {"head_only": True}], ids=str)
def test_the_count_is_what_a_step_takes(recipe, changes):
    settings = recipe(precision="fp32", recompute_activations=False, drop_rate=0.0, **changes)
    config = load_config(model_source(settings.model))
    config.class_names, config.drop_rate = CLASSES, [0.0] * 3
    model = CvtForImageClassification(config).train()
    if settings.head_only:
        model.cvt.requires_grad_(False).eval()
    pixels = torch.randn(16, 3, 32, 32)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    kind = torch.optim.SGD if "optimizer" in changes else torch.optim.AdamW
    options = {"momentum": 0.9, "lr": 1e-3} if kind is torch.optim.SGD else {}
    optimizer = kind(trained, fused=True, **options)
    with LiveMemory([*model.state_dict().values(), pixels]) as memory:
        for _ in range(2):
            logits = model(pixels).logits
            torch.nn.functional.cross_entropy(logits, torch.zeros_like(logits)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert counted(settings, 16) == pytest.approx(memory.peak, rel=0.02)


def test_every_recipe_is_counted(recipe):
    plain = counted(recipe(precision="fp32"), 8)
    averaged = counted(recipe(precision="fp32", ema_decay=0.9), 8)
    assert averaged > plain
    for changes in ({"optimizer": "muon"}, {"lora_r": 4}):
        assert counted(recipe(precision="fp32", **changes), 8) == plain
    assert counted(recipe(precision="bf16", gradient_checkpointing=True), 8) < plain


def chosen(settings, images, free, monkeypatch):
    monkeypatch.setattr(batch_size, "free_memory", lambda device: free)
    with isolated():
        return chosen_batch_size(settings, CLASSES, images, Accelerator(cpu=True))


def test_the_largest_power_of_two_that_fits_is_taken(recipe, monkeypatch):
    settings = recipe(batch_size="auto", precision="fp32", accumulate=2)
    needed = counted(settings, 16)
    for images, share, size in (
        (10**6, 100, 128),  # 256 images a step, as lr_base is given for
        (700, 100, 32),  # ten steps of an epoch
        (10**6, 1.01, 16), (10**6, 0.99, 8), (5, 100, 2),
    ):  # fmt: skip
        found, sentence = chosen(settings, images, share * needed / batch_size.SHARE, monkeypatch)
        assert found == size
        assert sentence.startswith(f"batch_size = {size}: ")
    with pytest.raises(ValueError, match=r"batch_size = auto: a step of 2 images takes 0\.0\d GiB"):
        chosen(settings, 100, 2**20, monkeypatch)


def test_a_run_keeps_the_size_that_it_began_with(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_size, "STEPS", 4)
    watcher, run = Watcher(stop_after=9), tmp_path / "found"
    with pytest.raises(Stopped):
        train(recipe(batch_size="auto", mixup=0.5), run, watcher)
    assert any(line.startswith("batch_size = 4: ") for line in watcher.lines)
    assert yaml.safe_load((run / "args.yaml").read_text())["batch_size"] == 4
    monkeypatch.setattr(batch_size, "free_memory", lambda device: 0)
    resume(run, {"batch_size": "auto"})
    train(recipe(batch_size=4, mixup=0.5), tmp_path / "given")
    equal(final_state(run), final_state(tmp_path / "given"))


def test_a_recipe_has_a_number_or_the_word():
    assert Recipe(batch_size="auto", mixup=0.8).batch_size == "auto"
    for wrong in ("automatic", 0, None):
        with pytest.raises(ValueError, match=r"^batch_size = "):
            Recipe(batch_size=wrong)
