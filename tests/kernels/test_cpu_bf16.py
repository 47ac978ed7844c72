"""On a CPU in bfloat16 the fast operators compute what PyTorch's own do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.small_models import images, make, tiny
from torch import nn

from cvt import CvtForImageClassification
from cvt.kernels import apply_cpu_bf16, cpu_bf16
from cvt.modeling import eager_attention


def random(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def assert_same_in_bfloat16(actual, expected):
    atol = 0.1 * expected.std().item()
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=atol)


def with_gradients(compute, *inputs):
    """What is computed and the gradients of the inputs, for an upstream gradient of varied size."""
    output = compute(*inputs)
    upstream = torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype)
    return output, *torch.autograd.grad(output, inputs, upstream)


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), [(7, 3, 2, 1), (8, 5, 3, 0)])
def test_a_depthwise_convolution_trains_as_pytorchs(size, kernel, stride, padding):
    geometry = (6, 6, kernel, stride, padding)
    reference = nn.Conv2d(*geometry, groups=6, bias=False)
    convolution = cpu_bf16.DenseDepthwiseConv(*geometry, groups=6, bias=False).bfloat16()
    reference.load_state_dict(convolution.state_dict())

    def results(module, x):
        return with_gradients(lambda x, weight: module(x), x, module.weight)

    x = random(2, 6, size, size)
    expected = results(reference, x.detach().float().requires_grad_())
    for actual, value in zip(results(convolution, x), expected, strict=True):
        assert_same_in_bfloat16(actual, value)


@pytest.mark.parametrize("tokens", [5, 1500], ids=["one chunk", "an image a chunk"])
def test_chunked_attention_is_attention(tokens):
    module = nn.Module().train()
    inputs = random(3, 2, tokens, 4), random(3, 2, 1000, 4, seed=1), random(3, 2, 1000, 4, seed=2)
    singles = [x.detach().float().requires_grad_() for x in inputs]

    def attend(attention):
        return lambda q, k, v: attention(module, q, k, v, None, 0.5, 0.0)[0]

    expected = with_gradients(attend(eager_attention), *singles)
    actual = with_gradients(attend(cpu_bf16.chunked_attention), *inputs)
    for value, reference in zip(actual, expected, strict=True):
        assert_same_in_bfloat16(value, reference)


def test_chunked_attention_drops_weights():
    query, key, value = random(3, 2, 5, 4), random(3, 2, 7, 4), torch.ones(3, 2, 7, 4)
    context, _ = cpu_bf16.chunked_attention(None, query, key, value.bfloat16(), None, 1.0, 0.5)
    assert context.std() > 0.1  # all ones without dropout
    assert context.shape == (3, 5, 2, 4)


def test_a_gradient_behind_a_class_token_becomes_dense():
    seen = []
    norm = cpu_bf16.DenseGradientBatchNorm(3).bfloat16()
    dense = norm(random(2, 3, 4, 4))
    dense.register_hook(seen.append)
    token = torch.zeros(2, 1, 3, dtype=torch.bfloat16)
    F.gelu(torch.cat((token, dense.flatten(2).transpose(1, 2)), dim=1)).sum().backward()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------ whole models


def step(model, dtype, autocast=False):
    """Logits and gradients of a step in training."""
    model = copy.deepcopy(model).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(images().to(dtype), labels=torch.arange(4) % 2)
    output.loss.backward()
    return torch.cat([output.logits.flatten(), *(p.grad.flatten() for p in model.parameters())])


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_a_model_trains_as_exactly_as_without(autocast):
    model = make(tiny(stride_kv=[2, 2, 2])).train()
    exact = step(model, torch.float64)
    errors = []
    for apply in (lambda model: None, apply_cpu_bf16):
        apply(model)
        dtype = torch.float32 if autocast else torch.bfloat16
        found = step(model, dtype, autocast).double()
        errors.append((found - exact).norm() / exact.norm())
    assert 0 < errors[1] < 1.3 * errors[0]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_in_another_type_computes_the_same_to_the_bit(mode):
    model = getattr(make(tiny()), mode)()
    expected = step(model, torch.float32)
    apply_cpu_bf16(model)
    assert torch.equal(step(model, torch.float32), expected)


def test_an_attention_that_was_chosen_stays():
    model = make(tiny())
    model.set_attn_implementation("eager")
    apply_cpu_bf16(model)
    assert model.config._attn_implementation == "eager"


def test_it_leaves_no_trace_in_what_is_saved(tmp_path):
    model = make(tiny())
    names = list(model.state_dict())
    config = model.config.to_json_string()
    apply_cpu_bf16(model)
    apply_cpu_bf16(model)
    assert list(model.state_dict()) == names
    assert model.config.to_json_string() == config
    model.save_pretrained(tmp_path / "after")
    loaded = CvtForImageClassification.from_pretrained(tmp_path / "after").eval()
    assert torch.equal(loaded(images()).logits, model.eval()(images()).logits)
