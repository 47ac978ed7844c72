"""Our model against what the authors' code computed; `golden/make_authors_golden.py` tells how."""

import json
import math

import numpy as np
import pytest
import torch
from golden.cases import (
    CASES,
    GOLDEN_FILE,
    NUM_CLASSES,
    SEED,
    VARIANTS,
    authors_spec,
    describe,
    fill,
    image,
)
from torch import nn

from cvt import CvtConfig, CvtForImageClassification
from cvt.checkpoints import authors_to_transformers, transformers_to_authors
from cvt.modeling import DropPath, LayerNorm, Stage

TRAINING_CASES = [name for name, case in CASES.items() if case.training]
GRADIENT_CASES = [name for name, case in CASES.items() if case.gradients]


def golden(group):
    """The arrays of a case or a variant, by their names within it."""
    with np.load(GOLDEN_FILE) as file:
        return {
            key.removeprefix(f"{group}/"): file[key] for key in file if key.startswith(f"{group}/")
        }


def golden_part(expected, part):
    return {k.removeprefix(part): v for k, v in expected.items() if k.startswith(part)}


def build(name, expected):
    """Our model of a case with the authors' weights."""
    case = CASES[name]
    config = CvtConfig(hidden_act="quick_gelu", num_labels=NUM_CLASSES, **case.settings)
    model = CvtForImageClassification(config).train(case.training)
    weights = {k: torch.from_numpy(v) for k, v in fill(expected["tensors"]).items()}
    model.load_state_dict(authors_to_transformers(weights), strict=True)
    return model


def run(name, model):
    torch.manual_seed(SEED)
    return model(torch.from_numpy(image(name, CASES[name].image)), output_hidden_states=True)


def assert_near(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual.detach(), torch.from_numpy(expected), rtol=0, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_authors(name):
    expected = golden(name)
    model = build(name, expected)
    features = []
    model.cvt.register_forward_hook(lambda module, args, output: features.append(output))
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        output = run(name, model)
        class_token = features.pop().cls_token_value
        assert_near(output.logits, expected["logits"])
        assert len(output.hidden_states) == len(CASES[name].settings["depth"])
        for i, hidden_state in enumerate(output.hidden_states):
            assert_near(hidden_state, expected[f"hidden_states/{i}"])
        assert (class_token is None) == ("class_token" not in expected)
        if class_token is not None:
            assert_near(class_token, expected["class_token"])


@pytest.mark.parametrize("name", TRAINING_CASES)
def test_training_updates_the_batch_norm_statistics_as_the_authors(name):
    expected = golden(name)
    model = build(name, expected)
    run(name, model)
    buffers = dict(model.named_buffers())
    after = authors_to_transformers(golden_part(expected, "after/"))
    assert buffers.keys() == after.keys()
    for buffer, value in after.items():
        assert_near(buffers[buffer], value)


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_are_the_authors(name):
    expected = golden(name)
    model = build(name, expected)
    run(name, model).logits.square().mean().backward()
    gradients = authors_to_transformers(golden_part(expected, "gradient/"))
    assert len(gradients) == len(CASES[name].gradients)
    for parameter, gradient in gradients.items():
        atol = 1e-4 * np.abs(gradient).max()
        assert_near(model.get_parameter(parameter).grad, gradient, atol)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    """A published variant as `from_variant` builds it, without memory for its weights."""
    config = CvtConfig.from_variant(request.param)
    with torch.device("meta"):
        return CvtForImageClassification(config), golden(request.param)


def test_variants_have_exactly_the_authors_tensors(variant):
    model, expected = variant
    tensors = transformers_to_authors(model.state_dict())
    assert sorted(describe(k, v.shape) for k, v in tensors.items()) == sorted(expected["tensors"])


def test_variants_have_the_settings_of_the_authors_yaml_files(variant):
    model, expected = variant
    theirs = json.loads(str(expected["spec"]))
    assert not any(theirs.pop("POS_EMBED"))  # which their code never reads
    assert {"INIT": model.config.init, **authors_spec(model.config.to_dict())} == theirs


def test_variants_drop_paths_as_often_as_the_authors(variant):
    model, expected = variant
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx(expected["drop_path_rates"], abs=1e-7)


@pytest.mark.parametrize(("rate", "depth"), [(0.0, 3), (0.5, 1), (0.3, 2), (0.7, 5)])
def test_drop_path_rates_rise_linearly_within_a_stage(rate, depth):
    config = CvtConfig(depth=(1, 1, depth), drop_path_rate=(0.0, 0.0, rate))
    expected = torch.linspace(0, rate, depth).tolist()
    assert config.stages[2].drop_path_rates == pytest.approx(expected, abs=1e-7)


# ------------------------------------------------------------------------------ initialisation


@pytest.fixture(scope="module", params=["trunc_norm", "xavier"])
def fresh(request):
    torch.manual_seed(0)
    config = CvtConfig(
        init=request.param, depth=(1, 1, 2), cls_token=(True, True, True), num_labels=100
    )
    return CvtForImageClassification(config)


def modules(model, kind, exclude=()):
    found = [m for m in model.modules() if isinstance(m, kind) and m not in exclude]
    assert found
    return found


def assert_normal(tensor, std=0.02):
    """Normal of that standard deviation, to six standard errors, and not cut at two of them."""
    n = tensor.numel()
    assert abs(tensor.mean().item()) < 6 * std / math.sqrt(n)
    assert abs(tensor.std().item() / std - 1) < 6 / math.sqrt(2 * n)
    assert n < 1000 or tensor.abs().max() > 2.5 * std


def assert_uniform(tensor, bound):
    """Uniform between the bounds, to six standard errors."""
    n, std = tensor.numel(), bound / math.sqrt(3)
    assert tensor.abs().max() <= bound * (1 + 1e-6)
    assert abs(tensor.mean().item()) < 6 * std / math.sqrt(n)
    assert abs(tensor.std().item() / std - 1) < 6 / math.sqrt(2 * n)


def test_linears_start_by_init_with_biases_of_zero(fresh):
    for linear in modules(fresh, nn.Linear, exclude=[fresh.classifier]):
        if fresh.config.init == "xavier":
            assert_uniform(linear.weight, math.sqrt(6 / sum(linear.weight.shape)))
        else:
            assert_normal(linear.weight)
        assert not linear.bias.any()


def test_the_head_starts_normal_with_the_bias_that_torch_gives_a_linear(fresh):
    assert_normal(fresh.classifier.weight)
    assert_uniform(fresh.classifier.bias, fresh.classifier.in_features**-0.5)


def test_class_tokens_start_normal(fresh):
    assert_normal(torch.cat([stage.cls_token.flatten() for stage in modules(fresh, Stage)]))


def test_convolutions_start_as_in_torch(fresh):
    for convolution in modules(fresh, nn.Conv2d):
        bound = convolution.weight[0].numel() ** -0.5
        assert_uniform(convolution.weight, bound)
        if convolution.bias is not None:
            assert_uniform(convolution.bias, bound)


def test_norms_start_at_one_and_zero(fresh):
    for norm in modules(fresh, (LayerNorm, nn.BatchNorm2d)):
        assert (norm.weight == 1).all()
        assert not norm.bias.any()
    for norm in modules(fresh, nn.BatchNorm2d):
        assert not norm.running_mean.any()
        assert (norm.running_var == 1).all()


def test_initializer_range_sets_linears_class_tokens_and_head():
    torch.manual_seed(0)
    model = CvtForImageClassification(CvtConfig(depth=(1, 1, 1), initializer_range=0.1))
    block = model.cvt.encoder.stages[2].layers[0]
    assert_normal(block.intermediate.dense.weight, 0.1)
    assert_normal(model.classifier.weight, 0.1)
    assert_normal(model.cvt.encoder.stages[2].cls_token, 0.1)
