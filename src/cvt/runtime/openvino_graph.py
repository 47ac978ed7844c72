"""A graph of OpenVINO in the form that this processor computes fastest, with the same results.

What is rewritten is the graph in memory: files of exports stay as they are, and run everywhere.
"""

import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino

INT8 = ("avx512_vnni", "avx_vnni", "amx_int8")  # any of them multiplies 8-bit numbers
ACTIVATIONS = ("Swish", "Gelu")


@cache
def instructions() -> frozenset[str]:
    """The instruction sets of an x86 processor under Linux; elsewhere empty, for unknown."""
    with suppress(OSError):
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^flags\s*:\s*(.+)", cpuinfo, re.MULTILINE):
            return frozenset(found[1].split())
    return frozenset()


def lacks(*names: str) -> bool:
    """Whether the processor is known to have none of these instruction sets."""
    return bool(instructions()) and instructions().isdisjoint(names)


def adapted(graph: "openvino.Model", precision: str, computes_in: str) -> "openvino.Model":
    """A copy of a graph, rewritten where that makes it faster on this processor.

    Args:
        graph: for any processor.
        precision: the graph's own, as `int8`.
        computes_in: OpenVINO's name of what it computes in where that is not int8, as `f32`.
    """
    graph = graph.clone()
    in_floats = precision == "int8" and lacks(*INT8)
    if in_floats:
        compute_in_floats(graph)
    if computes_in == "f32" and lacks("avx512f") and (in_floats or precision != "int8"):
        separate_activations(graph)
    return graph


def compute_in_floats(graph: "openvino.Model") -> None:
    """Compute a quantized graph in floats, with its weights of 8 bits.

    Without instructions for it, products in int8 are slower than in fp32 (0.81 times as fast for
    cvt-13 with AVX2), and sums of two products are cut at 16 bits.
    """
    from openvino.passes import ConstantFolding, Manager

    for node in graph.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize":
            node.output(0).replace(node.input_value(0))
    manager = Manager()
    manager.register_pass(ConstantFolding())  # else weights are converted in every call
    manager.run_passes(graph)
    graph.validate_nodes_and_infer_types()


def separate_activations(graph: "openvino.Model") -> None:
    """Keep OpenVINO from fusing activations into the products of matrices before them.

    With AVX2, its kernel for a product alone (MLAS) is 1.3 times as fast as the one that computes
    the activation too (oneDNN). A product whose result is read twice is not fused, so silu(x) is
    written as x + silu(-x), and gelu(x) likewise: both are equal, to within a rounding of x.
    """
    from openvino import opset14

    for node in graph.get_ordered_ops():
        if node.get_type_name() in ACTIVATIONS:
            x, *slope = node.input_values()
            mirrored = opset14.negative(x)
            if node.get_type_name() == "Swish":
                activated = opset14.swish(mirrored, *slope)
            else:
                form = node.get_attributes()["approximation_mode"].lower()
                activated = opset14.gelu(mirrored, form)
            total = opset14.add(x, activated)
            total.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(total.output(0))
    graph.validate_nodes_and_infer_types()
