"""The fast operators compute what PyTorch's own do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from cvt import kernels
from cvt.modeling import Dense, eager_attention


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
    torch.testing.assert_close(kernels.QuickGELU()(x), x * torch.sigmoid(1.702 * x))
    assert torch.autograd.gradcheck(kernels.QuickGELU(), x)
    assert torch.autograd.gradgradcheck(kernels.QuickGELU(), x)


def test_quick_gelu_has_gradients_by_sample():
    x = random(3, 5, dtype=torch.float64)
    gradient = torch.func.grad(lambda row: kernels.QuickGELU()(row).sum())
    rows = torch.stack([gradient(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(gradient)(x), rows)


def halves(activation="quick_gelu", dropout=0.0, dtype=torch.float64):
    """The two halves of an MLP from 4 channels to 4."""
    torch.manual_seed(0)
    return [half.to(dtype) for half in (Dense(4, 8, dropout, activation), Dense(8, 4, dropout, ""))]


def one_by_one(x, expand, contract):
    return contract(expand(x))


def kept(compute, x, *modules):
    """The activations, in numbers, that autograd keeps of what is computed."""
    tensors = {}

    def pack(tensor):
        if tensor.shape[:-1].numel() == x.shape[:-1].numel():
            tensors[tensor.untyped_storage().data_ptr()] = tensor  # alive, so no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute(x, *modules)
    return sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_an_mlp_keeps_no_activation_and_computes_the_same(activation):
    expand, contract = halves(activation)
    x = random(2, 3, 4, dtype=torch.float64)

    def results(compute):
        weights = [*expand.parameters(), *contract.parameters()]
        return with_gradients(lambda x, *_: compute(x, expand, contract), x, *weights)

    torch.testing.assert_close(results(kernels.mlp), results(one_by_one), rtol=1e-12, atol=1e-14)
    assert kept(kernels.mlp, x, expand, contract) == 2 * 3 * (4 + 8)
    assert kept(one_by_one, x, expand, contract) == 2 * 3 * (4 + 8 + 8)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_an_mlp_has_second_gradients(activation):
    x, modules = random(3, 4, dtype=torch.float64), halves(activation)
    assert torch.autograd.gradcheck(lambda x: kernels.mlp(x, *modules), x)
    assert torch.autograd.gradgradcheck(lambda x: kernels.mlp(x, *modules), x)


def test_an_mlp_has_gradients_by_sample():
    modules, x = halves(), random(3, 2, 4, dtype=torch.float64)
    gradient = torch.func.grad(lambda image: kernels.mlp(image, *modules).square().sum())
    images = torch.stack([gradient(image) for image in x])
    torch.testing.assert_close(torch.func.vmap(gradient)(x), images)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_an_mlp_has_tangents(activation):
    modules, x = halves(activation), random(3, 4, dtype=torch.float64)
    with forward_ad.dual_level():
        made = kernels.mlp(forward_ad.make_dual(x, torch.ones_like(x)), *modules)
        tangent = forward_ad.unpack_dual(made).tangent
    jacobian = torch.autograd.functional.jacobian(lambda x: one_by_one(x, *modules), x)
    torch.testing.assert_close(tangent, jacobian.sum((2, 3)))


def test_an_mlp_under_autocast_is_as_exact_as_its_modules():
    exact = random(2, 3, 4, dtype=torch.float64)
    expected = with_gradients(lambda x: one_by_one(x, *halves()), exact)
    modules = halves(dtype=torch.float32)

    def error(compute):
        with torch.autocast("cpu", torch.bfloat16):
            actual = with_gradients(
                lambda x: compute(x, *modules), exact.detach().bfloat16().requires_grad_()
            )
        assert {tensor.dtype for tensor in actual} == {torch.bfloat16}
        return [(a - e).norm() / e.norm() for a, e in zip(actual, expected, strict=True)]

    for ours, plain in zip(error(kernels.mlp), error(one_by_one), strict=True):
        assert ours < max(1.5 * plain, 0.01)


@pytest.mark.parametrize("frozen", [0, 1], ids=["expand", "contract"])
def test_frozen_weights_of_an_mlp_get_no_gradient(frozen):
    modules = halves()
    modules[frozen].requires_grad_(False)
    kernels.mlp(random(2, 3, 4, dtype=torch.float64), *modules).sum().backward()
    for i, module in enumerate(modules):
        assert all((weight.grad is None) == (i == frozen) for weight in module.parameters())


@pytest.mark.parametrize(
    "change",
    [
        lambda expand, contract: expand.register_forward_hook(lambda *args: 2 * args[-1]),
        lambda expand, contract: expand.dense.register_forward_hook(lambda *args: 2 * args[-1]),
        lambda expand, contract: expand.activation.register_forward_hook(lambda *a: 2 * a[-1]),
        lambda expand, contract: contract.register_forward_pre_hook(lambda _, args: 2 * args[0]),
        lambda expand, contract: contract.dense.register_forward_hook(lambda *args: 2 * args[-1]),
        lambda expand, contract: contract.dropout.register_forward_hook(lambda *a: 2 * a[-1]),
        lambda expand, contract: setattr(expand, "activation", nn.SiLU()),
        lambda expand, contract: setattr(expand, "activation", nn.GELU(approximate="tanh")),
        lambda expand, contract: setattr(contract, "activation", nn.SiLU()),
        lambda expand, contract: setattr(contract.dense, "forward", torch.tanh),
        lambda expand, contract: setattr(expand.dense, "bias", None),
        lambda expand, contract: setattr(contract.dense, "bias", None),
        lambda expand, contract: nn.utils.parametrizations.weight_norm(contract.dense),
        lambda expand, contract: setattr(expand, "dense", nn.Sequential(expand.dense, nn.Tanh())),
    ],
)
def test_what_hangs_on_an_mlp_or_took_a_place_in_it_is_heeded(change):
    expand, contract = halves()
    x = random(2, 3, 4, dtype=torch.float64)
    change(expand, contract)
    expected = one_by_one(x, expand, contract)
    torch.testing.assert_close(kernels.mlp(x, expand, contract), expected)


def test_an_mlp_drops_what_its_modules_drop():
    expand, contract = halves(dropout=0.5)
    x = random(2, 3, 4, dtype=torch.float64)
    for _ in range(2):
        for module in (expand, contract):
            module.train(not module.training)
        found = []
        for compute in (kernels.mlp, one_by_one):
            torch.manual_seed(1)
            found.append(compute(x, expand, contract))
        torch.testing.assert_close(*found)


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
