import openvino
import pytest
import torch
from openvino import opset14

from cvt.runtime import openvino_graph
from cvt.runtime.openvino_runtime import core

AVX2, AVX512, VNNI = {"avx2"}, {"avx2", "avx512f"}, {"avx2", "avx512f", "avx512_vnni"}


@pytest.fixture(params=["swish", "gelu"])
def graph(request):
    """An MLP."""
    x = opset14.parameter([-1, 7, 3], openvino.Type.f32)
    hidden = opset14.matmul(x, opset14.constant(torch.randn(5, 3).numpy()), False, True)
    activation = {"swish": opset14.swish, "gelu": lambda y: opset14.gelu(y, "erf")}[request.param]
    output = activation(hidden)
    output.set_friendly_name("activation")
    return openvino.Model(
        [opset14.matmul(output, opset14.constant(torch.randn(5, 3).numpy()), False, False)], [x]
    )


def kinds(graph):
    return [node.get_type_name() for node in graph.get_ordered_ops()]


def results(graph, pixels):
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    return torch.from_numpy(core().compile_model(graph, "CPU", hint)(pixels.numpy())[0])


@pytest.fixture
def processor(monkeypatch):
    def has(flags):
        monkeypatch.setattr(openvino_graph, "instructions", lambda: frozenset(flags))

    return has


def test_activations_are_kept_from_products_with_avx2_and_the_results_stay(graph, processor):
    before = kinds(graph)
    processor(AVX2)
    adapted = openvino_graph.adapted(graph, "fp32", "f32")
    assert kinds(graph) == before  # the caller's stays as it is
    assert sorted(kinds(adapted)) == sorted([*before, "Negative", "Add"])
    (total,) = (n for n in adapted.get_ops() if n.get_friendly_name() == "activation")
    assert total.get_type_name() == "Add"
    tokens = 4 * torch.randn(2, 7, 3)
    torch.testing.assert_close(
        results(adapted, tokens), results(graph, tokens), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("flags", "precision", "computes_in"),
    [(AVX512, "fp32", "f32"), (set(), "fp32", "f32"), (AVX2, "bf16", "bf16")],
)
def test_other_processors_and_precisions_keep_the_graph(
    graph, processor, flags, precision, computes_in
):
    processor(flags)
    assert kinds(openvino_graph.adapted(graph, precision, computes_in)) == kinds(graph)


def quantized():
    """A product with 3 x 3 weights in 8 bits, as nncf writes them, of an activation in 8 bits."""
    x = opset14.parameter([1, 3], openvino.Type.f32)
    limits = [opset14.constant(limit, openvino.Type.f32) for limit in (-1.0, 1.0)] * 2
    weights = opset14.constant([[1, 2, 3], [4, 5, 6], [7, 8, 127]], openvino.Type.i8)
    scaled = opset14.multiply(
        opset14.convert(weights, "f32"), opset14.constant(0.5, openvino.Type.f32)
    )
    product = opset14.matmul(opset14.fake_quantize(x, *limits, 256), scaled, False, True)
    return openvino.Model([product], [x])


@pytest.mark.parametrize(("flags", "stays"), [(AVX2, False), (AVX512, False), (VNNI, True)])
def test_a_quantized_graph_is_computed_in_floats_where_8_bits_are_slower(processor, flags, stays):
    processor(flags)
    adapted = openvino_graph.adapted(quantized(), "int8", "f32")
    assert kinds(adapted).count("FakeQuantize") == stays
    assert kinds(adapted).count("Convert") == stays
    answer = results(adapted, torch.tensor([[0.1, 0.2, 0.30001]]))
    torch.testing.assert_close(answer[0], torch.tensor([0.7, 1.6, 20.2]), atol=0.5, rtol=0)
    if not stays:
        torch.testing.assert_close(answer[0, :2], torch.tensor([0.7, 1.6]), atol=1e-4, rtol=0)


def test_instructions_are_those_of_this_processor():
    assert openvino_graph.lacks() == bool(openvino_graph.instructions())
    for name in openvino_graph.instructions():
        assert not openvino_graph.lacks(name, "none such")
