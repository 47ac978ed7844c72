"""Recomputing activations changes nothing but memory."""

import copy
import pickle

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from helpers.small_models import images, make, tiny
from torch._dynamo.backends.common import aot_autograd

from cvt.kernels import recompute_activations
from cvt.macs import MacCounter
from cvt.modeling import QuickGELU
from cvt.profile import LiveMemory

ACTIVATIONS = pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])


def random(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def pair(activation="quick_gelu", **changes):
    """Two blocks of the same weights in training, the second of which recomputes."""
    model = make(tiny(hidden_act=activation, **changes)).double().train()
    other = copy.deepcopy(model)
    recompute_activations(other)
    return [each.cvt.encoder.stages[0].layers[0] for each in (model, other)]


def with_gradients(block, x, **options):
    """What an MLP computes, and the gradients of its input and weights."""
    weights = [*block.intermediate.parameters(), *block.output.parameters()]
    output = block.mlp(x)
    upstream = torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype)
    return output, *torch.autograd.grad(output, (x, *weights), upstream, **options)


def kept(block, x):
    """Numbers that live on behind what an MLP computes, for its backward pass."""
    with LiveMemory([x, *block.parameters()]) as memory:
        before = memory.live
        output = block.mlp(x)
    return (memory.live - before) // x.element_size() - output.numel()


@ACTIVATIONS
def test_only_the_hidden_layer_is_kept_and_gradients_are_equal_to_the_bit(activation):
    plain, recomputing = pair(activation)
    width = plain.layernorm_after.weight.numel()
    x = random(2, 3, width)
    for one, other in zip(with_gradients(plain, x), with_gradients(recomputing, x), strict=True):
        assert torch.equal(one, other)
    hidden = 2 * 3 * plain.intermediate.dense.out_features
    assert kept(recomputing, x) == hidden
    assert kept(plain, x) >= 2 * hidden


def test_no_matrix_product_is_computed_twice():
    x = random(2, 3, pair()[0].layernorm_after.weight.numel())
    counts = []
    for block in pair():
        with MacCounter() as counter:
            block.mlp(x).square().sum().backward()
        counts.append(counter.macs)
    assert counts[0] == counts[1] > 0


@ACTIVATIONS
def test_second_gradients_are_those_of_the_plain_model(activation):
    norms = []
    for block in pair(activation):
        x = random(3, 2, block.layernorm_after.weight.numel())
        (gradient,) = torch.autograd.grad(block.mlp(x).square().sum(), x, create_graph=True)
        weight = block.output.dense.weight
        norms.append(torch.autograd.grad(gradient.square().sum(), (x, weight)))
    torch.testing.assert_close(*norms)


@ACTIVATIONS
def test_a_compiled_mlp_keeps_no_activation_and_computes_the_same(activation):
    plain, recomputing = pair(activation)
    x, shapes = random(2, 3, plain.layernorm_after.weight.numel()), []

    def note(graph, inputs):
        shapes.extend(node.meta["val"].shape for node in graph.graph.output_node().args[0])
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=note,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph),
        partition_fn=min_cut_rematerialization_partition,
    )
    expected = with_gradients(plain, x)
    recomputing.mlp = torch.compile(recomputing.mlp, backend=backend, fullgraph=True)
    found = with_gradients(recomputing, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    hidden = plain.intermediate.dense.out_features
    assert shapes.count(torch.Size([6, hidden])) + shapes.count(torch.Size([2, 3, hidden])) == 1


def test_a_model_trains_the_same_with_dropout_and_under_checkpointing():
    rates = {"drop_rate": [0.1] * 3, "attention_drop_rate": [0.1] * 3, "drop_path_rate": [0.3] * 3}
    model = make(tiny(hidden_act="quick_gelu", **rates)).train()
    found = []
    for prepare in (
        lambda model: None,
        recompute_activations,
        lambda model: (recompute_activations(model), model.activation_checkpointing_enable()),
    ):
        changed = copy.deepcopy(model)
        prepare(changed)
        torch.manual_seed(3)
        loss = changed(images(), labels=torch.arange(4) % 2).loss
        loss.backward()
        found.append([loss, *(p.grad for p in changed.parameters()), *changed.buffers()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_hooks_on_the_layers_see_and_change_what_passes():
    block = pair()[1]
    x = random(2, 3, block.layernorm_after.weight.numel())
    expand, output = block.intermediate, block.output
    assert isinstance(expand.activation, QuickGELU)
    expand.activation.register_forward_hook(lambda module, args, result: 2 * result)
    hidden = expand.dense(x)
    expected = output.dense(2 * hidden * torch.sigmoid(1.702 * hidden))
    upstream = torch.ones_like(expected)
    torch.testing.assert_close(
        *(
            torch.autograd.grad(y, (x, output.dense.weight), upstream)
            for y in (block.mlp(x), expected)
        )
    )


def test_it_leaves_no_trace_in_copies_and_state_dicts():
    model = make(tiny()).train()
    before = list(model.state_dict())
    recompute_activations(model)
    recompute_activations(model)
    assert list(model.state_dict()) == before
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(images()).logits, model.eval()(images()).logits)
