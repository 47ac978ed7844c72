"""The fast operators compute what PyTorch's own do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cvt import kernels
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


def test_quick_gelu_and_its_first_and_second_gradients_are_exact():
    x = random(64, dtype=torch.float64)
    torch.testing.assert_close(kernels.QuickGELU.apply(x), x * torch.sigmoid(1.702 * x))
    assert torch.autograd.gradcheck(kernels.QuickGELU.apply, x)
    assert torch.autograd.gradgradcheck(kernels.QuickGELU.apply, x)


def test_quick_gelu_has_gradients_by_sample():
    x = random(3, 5, dtype=torch.float64)
    gradient = torch.func.grad(lambda row: kernels.QuickGELU.apply(row).sum())
    rows = torch.stack([gradient(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(gradient)(x), rows)


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), [(7, 3, 2, 1), (8, 5, 3, 0)])
def test_a_depthwise_convolution_trains_as_pytorchs(size, kernel, stride, padding):
    convolution = kernels.DepthwiseConv(6, kernel, stride, padding).to(torch.bfloat16)
    reference = nn.Conv2d(6, 6, kernel, stride, padding, groups=6, bias=False)
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
    actual = with_gradients(attend(kernels.chunked_attention), *inputs)
    for value, reference in zip(actual, expected, strict=True):
        assert_same_in_bfloat16(value, reference)


def test_chunked_attention_drops_weights():
    query, key, value = random(3, 2, 5, 4), random(3, 2, 7, 4), torch.ones(3, 2, 7, 4)
    context, _ = kernels.chunked_attention(None, query, key, value.bfloat16(), None, 1.0, 0.5)
    assert context.std() > 0.1  # all ones without dropout
    assert context.shape == (3, 5, 2, 4)


def test_a_gradient_behind_a_class_token_is_made_dense():
    image = random(2, 3, 4, 4)
    seen = []
    dense = kernels.with_dense_gradient(image * 1)
    dense.register_hook(seen.append)
    tokens = torch.cat((torch.zeros(2, 1, 3), dense.flatten(2).transpose(1, 2)), dim=1)
    F.gelu(tokens).sum().backward()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
