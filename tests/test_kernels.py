"""The fast operators compute what PyTorch's own do."""

import io

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad

from cvt import kernels
from cvt.modeling import Dense, eager_attention
from cvt.profile import LiveMemory


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


def mlp(activation="quick_gelu", dropout=0.0, dtype=torch.float64):
    """An MLP from 4 channels to 4."""
    torch.manual_seed(0)
    halves = Dense(4, 8, dropout, activation), Dense(8, 4, dropout)
    return nn.Sequential(*halves).to(dtype)


def plain(modules):
    """The same function of the same weights, by PyTorch's own operators."""
    expand, contract = modules
    quick = isinstance(expand.activation, kernels.QuickGELU)
    activation = (lambda x: x * torch.sigmoid(1.702 * x)) if quick else F.gelu
    return lambda x: contract.dense(activation(expand.dense(x)))


def kept(compute, x, weights):
    """Numbers that live on behind what is computed."""
    with LiveMemory([x, *weights]) as memory:
        before = memory.live
        made = compute(x)
    return (memory.live - before) // x.element_size() - made.numel()


ACTIVATIONS = pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])


@ACTIVATIONS
def test_an_mlp_keeps_no_activation_and_computes_the_same(activation):
    modules, x = mlp(activation), random(2, 3, 4, dtype=torch.float64)
    weights = list(modules.parameters())

    def results(compute):
        return with_gradients(lambda x, *_: compute(x), x, *weights)

    torch.testing.assert_close(results(modules), results(plain(modules)), rtol=1e-12, atol=1e-14)
    assert kept(modules, x, weights) == 2 * 3 * 8
    assert kept(plain(modules), x, weights) >= 2 * 3 * (8 + 8)


@ACTIVATIONS
def test_a_compiled_mlp_keeps_no_activation_and_computes_the_same(activation):
    modules, x, shapes = mlp(activation), random(2, 3, 4, dtype=torch.float64), []

    def note(graph, inputs):
        shapes.extend(node.meta["val"].shape for node in graph.graph.output_node().args[0])
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=note,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
    )
    weights = list(modules.parameters())
    results = [
        with_gradients(lambda x, *_, compute=compute: compute(x), x, *weights)
        for compute in (torch.compile(modules, backend=backend, fullgraph=True), plain(modules))
    ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    assert shapes.count(torch.Size([6, 8])) + shapes.count(torch.Size([2, 3, 8])) == 1


@ACTIVATIONS
def test_an_mlp_has_second_gradients_and_batched_ones(activation):
    x, modules = random(3, 4, dtype=torch.float64), mlp(activation)
    assert torch.autograd.gradcheck(modules, x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(modules, x)
    weight = modules[1].dense.weight
    norms = [
        torch.autograd.grad(compute(x).square().sum(), x, create_graph=True)[0].square().sum()
        for compute in (modules, plain(modules))
    ]
    torch.testing.assert_close(*(torch.autograd.grad(norm, (x, weight)) for norm in norms))


def test_an_mlp_has_gradients_by_sample():
    modules, x = mlp(), random(3, 2, 4, dtype=torch.float64)
    gradient = torch.func.grad(lambda image: modules(image).square().sum())
    images = torch.stack([gradient(image) for image in x])
    torch.testing.assert_close(torch.func.vmap(gradient)(x), images)


@ACTIVATIONS
def test_an_mlp_has_tangents(activation):
    modules, x = mlp(activation), random(3, 4, dtype=torch.float64)
    with forward_ad.dual_level():
        made = modules(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(made).tangent
    jacobian = torch.autograd.functional.jacobian(plain(modules), x)
    torch.testing.assert_close(tangent, jacobian.sum((2, 3)))


def test_an_mlp_under_autocast_is_as_exact_as_pytorchs():
    exact, modules = random(2, 3, 4, dtype=torch.float64), mlp()
    expected = with_gradients(plain(modules), exact)
    modules.float()

    def errors(compute):
        with torch.autocast("cpu", torch.bfloat16):
            actual = with_gradients(compute, exact.detach().bfloat16().requires_grad_())
        assert {tensor.dtype for tensor in actual} == {torch.bfloat16}
        return [(a - e).norm() / e.norm() for a, e in zip(actual, expected, strict=True)]

    for ours, theirs in zip(errors(modules), errors(plain(modules)), strict=True):
        assert ours < max(1.5 * theirs, 0.01)


def test_hooks_on_an_mlp_see_and_change_what_passes():
    modules, x, seen = mlp(), random(2, 3, 4, dtype=torch.float64), []
    expected = plain(modules)(x)
    for module in modules.modules():
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    torch.testing.assert_close(modules(x), expected)
    assert len(seen) == len(list(modules.modules()))

    modules[0].register_forward_hook(lambda module, args, output: 2 * output)
    expand, contract = modules
    hidden = expand.dense(x)
    changed = contract.dense(2 * hidden * torch.sigmoid(1.702 * hidden))
    upstream = torch.ones_like(changed)
    torch.testing.assert_close(
        torch.autograd.grad(modules(x), contract.dense.weight, upstream),
        torch.autograd.grad(changed, contract.dense.weight, upstream),
    )


@ACTIVATIONS
def test_an_activation_that_was_changed_in_place_is_kept(activation):
    modules, x = mlp(activation), random(2, 3, 4, dtype=torch.float64)
    modules[0].register_forward_hook(lambda module, args, output: output.mul_(2))
    modules(x).sum().backward()
    activated = modules[0](x).detach()
    expected = activated.flatten(0, 1).sum(0).expand(4, 8)
    torch.testing.assert_close(modules[1].dense.weight.grad, expected)


def test_others_that_look_after_what_is_kept_see_it():
    modules, x, seen = mlp(), random(2, 3, 4, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x.shape) or x, lambda x: x):
        modules(x)
    assert torch.Size([6, 8]) in seen


def test_an_activation_that_a_hook_took_can_be_saved():
    modules, file, seen = mlp(), io.BytesIO(), []
    modules[0].register_forward_hook(lambda module, args, output: seen.append(output))
    modules(random(2, 3, 4, dtype=torch.float64))
    torch.save(seen[0], file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file), seen[0])


def test_dropout_in_an_mlp_drops():
    modules, x = mlp(dropout=0.5), random(64, 3, 4, dtype=torch.float64)
    expand, contract = modules
    torch.manual_seed(1)
    made = modules(x)
    torch.manual_seed(1)
    hidden = expand.dense(x)
    dropped = F.dropout(hidden * torch.sigmoid(1.702 * hidden), 0.5)
    expected = F.dropout(contract.dense(dropped), 0.5)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x) for y in (made, expected)))


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
