import copy
import math
import re

import pytest
import torch

from cvt import CvtForImageClassification
from cvt.train import Recipe
from cvt.train.optim import Schedule, optimizer_for, parameter_groups
from cvt.train.plan import Plan
from cvt.train.recipe import OPTIMIZERS


@pytest.fixture
def model(model_folder):
    return CvtForImageClassification.from_pretrained(model_folder)


def rates(recipe, steps_per_epoch, steps):
    """The learning rate of every step."""
    plan = Plan(steps_per_epoch, 1, 1, 0, 1, recipe.epochs + recipe.cooldown_epochs, recipe.steps)
    schedule = Schedule(recipe, plan)
    assert plan.steps == steps
    return [schedule.rate(step) for step in range(steps)]


def test_norms_biases_and_class_tokens_do_not_decay(model):
    groups = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {names[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert kept == {n for n in names.values() if "norm" in n or n.endswith(("bias", "cls_token"))}
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


def test_frozen_parameters_are_in_no_group(model):
    model.cvt.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(model, 0.1)) == 4


def test_layer_decay_falls_from_the_head_to_the_first_embedding(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {
        names[id(p)]: group["lr_scale"]
        for group in parameter_groups(model, 0.1, layer_decay=0.5)
        for p in group["params"]
    }
    expected = [
        (r"classifier|layernorm\.", 0), (r"cvt.*stages\.2\.layers\.1\.", 1),
        (r"cvt.*stages\.2\.layers\.0\.", 2), (r"cvt.*stages\.2\.(embedding|cls_token)", 3),
        (r"cvt.*stages\.1\.layers", 4), (r"cvt.*stages\.1\.embedding", 5),
        (r"cvt.*stages\.0\.layers", 6), (r"cvt.*stages\.0\.embedding", 7),
    ]  # fmt: skip
    for name, scale in scales.items():
        power = next(power for pattern, power in expected if re.match(pattern, name))
        assert scale == 0.5**power, name
    optimizer = optimizer_for(model, Recipe(layer_decay=0.5), lr=1.0)
    Schedule(Recipe(lr=1.0, epochs=4), Plan(1, 1, 1, 0, 1, 4)).set(optimizer, 1)
    rates = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    assert all(rate == pytest.approx(rates[1.0] * scale) for scale, rate in rates.items())


def test_the_learning_rate_warms_up_and_falls_along_half_a_cosine():
    recipe = Recipe(epochs=10, lr=1.0, warmup_epochs=2, warmup_lr=0.1, min_lr=0.05)
    found = rates(recipe, 10, 100)
    assert found[0] == pytest.approx(0.1)
    assert found[10] == pytest.approx(0.55)
    for step in range(20, 100):
        share = (1 + math.cos(math.pi * (step - 20) / 80)) / 2
        assert found[step] == pytest.approx(0.05 + 0.95 * share)
    assert max(found) == found[20] == 1.0


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"warmup_epochs": 10}, "warmup_epochs = 10"), ({"min_lr": 2.0}, "min_lr = 2"),
     ({"warmup_epochs": 5, "steps": 40}, "warmup_epochs = 5")],
)  # fmt: skip
def test_a_schedule_that_would_not_be_one_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        rates(Recipe(epochs=10, lr=1.0, **changes), 10, changes.get("steps", 100))


@pytest.mark.parametrize("updates", ["step", "epoch"])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_the_learning_rate_is_timms_bit_for_bit(updates, warmup):
    from timm.scheduler import CosineLRScheduler

    epochs, steps_per_epoch = 7, 5
    recipe = Recipe(epochs=epochs, cooldown_epochs=2, lr=0.3, min_lr=1e-5, warmup_lr=1e-6,
                    warmup_epochs=warmup, lr_updates=updates)  # fmt: skip
    unit = 1 if updates == "step" else steps_per_epoch
    length, warmup_t = epochs * steps_per_epoch // unit, warmup * steps_per_epoch // unit
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    scheduler = CosineLRScheduler(
        optimizer, length - (warmup_t if unit == 1 else 0), lr_min=1e-5, warmup_t=warmup_t,
        warmup_prefix=unit == 1, warmup_lr_init=1e-6, t_in_epochs=False,
    )  # fmt: skip
    expected = []
    for step in range(45):
        scheduler.step_update(step // unit)
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(recipe, steps_per_epoch, 45) == expected


def test_one_epoch_warns_of_nothing(caplog):
    rates(Recipe(epochs=1, lr=1.0, lr_updates="epoch", warmup_epochs=0), 3, 3)
    assert not caplog.records


def test_the_authors_change_the_rate_once_an_epoch_and_cool_down():
    recipe = Recipe(epochs=4, lr=1.0, warmup_epochs=1, lr_updates="epoch", cooldown_epochs=2,
                    min_lr=0.01)  # fmt: skip
    found = rates(recipe, 5, 30)
    assert [len(set(found[i : i + 5])) for i in range(0, 30, 5)] == [1] * 6
    assert found[0] == 1e-6
    assert found[5] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2)
    assert found[20:] == [0.01] * 10


def test_steps_set_the_length_of_the_schedule():
    found = rates(Recipe(steps=8, lr=1.0, warmup_epochs=0), 3, 8)
    assert found == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])


def test_a_single_epoch_warms_up_for_half_of_it():
    found = rates(Recipe(epochs=1, lr=1.0), 10, 10)
    assert found.index(max(found)) == 5
    assert found[5] == 1.0


def test_the_optimizers_are_the_recipes(model):
    sgd = optimizer_for(model, Recipe(optimizer="sgd", momentum=0.7, weight_decay=0.2), lr=0.5)
    assert isinstance(sgd, torch.optim.SGD)
    assert {group["momentum"] for group in sgd.param_groups} == {0.7}
    assert {group["weight_decay"] for group in sgd.param_groups} == {0.0, 0.2}
    adamw = optimizer_for(model, Recipe(), lr=0.5)
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.9, 0.999)


def stepped(model, optimizer, step):
    """The weights after a step whose gradients are drawn by its number."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_without_decay_of_norms_and_resumes_to_the_bit(model, name):
    recipe = Recipe(optimizer=name, weight_decay=0.5)
    resumed = copy.deepcopy(model)
    optimizer = optimizer_for(model, recipe, lr=1e-3)
    decays = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert all(decays[id(p)] == (0 if p.ndim == 1 else 0.5) for n, p in model.named_parameters()
               if not n.endswith("cls_token"))  # fmt: skip
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for step in range(2):
        after = stepped(model, optimizer, step)
    assert all(not torch.equal(after[name], weight) for name, weight in before.items())
    resumed.load_state_dict(model.state_dict())
    again = optimizer_for(resumed, recipe, lr=1e-3)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    whole, rest = stepped(model, optimizer, 2), stepped(resumed, again, 2)
    assert all(torch.equal(whole[name], rest[name]) for name in whole)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_muon_multiplies_in_fp32_where_the_processor_has_no_bf16(model, monkeypatch, has_bf16):
    from timm.optim import muon

    used, of_timm = [], muon.zeropower_via_newtonschulz

    def recorded(*args, **kwargs):
        found = of_timm(*args, **kwargs)
        used.append(found.dtype)
        return found

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", recorded)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    optimizer = optimizer_for(model, Recipe(optimizer="muon"), lr=1e-3)
    stepped(model, optimizer, 0)
    assert set(used) == {torch.bfloat16 if has_bf16 else torch.float32}
    assert muon.zeropower_via_newtonschulz is recorded  # also for others in this process
