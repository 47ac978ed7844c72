"""A fused classifier as a graph that other software runs: torch.export, ONNX, OpenVINO.

The graph takes `pixel_values`, (B, C, H, W), and gives `logits`, (B, K), and `features`, (B, C'),
where they are asked for, all in float32.
"""

from collections.abc import Collection, Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from cvt.libraries import quiet
from cvt.runtime.features import LOGITS, FeatureSettings
from cvt.runtime.fused import FusedCvt, Outputs

if TYPE_CHECKING:
    import onnx
    import openvino


class Logits(nn.Module):
    """Pixels in, logits out."""

    def __init__(self, model: FusedCvt) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) to (B, K)."""
        (logits,) = self.model(
            pixel_values, output_hidden_states=False, return_dict=False, output_attentions=False
        )
        return logits.float()


@torch.no_grad()
def torch_graph(
    model: FusedCvt,
    image_size: tuple[int, int],
    dynamic: Collection[str] = ("batch", "size"),
    features: FeatureSettings | None = None,
) -> ExportedProgram:
    """The classifier captured by torch.export.

    Args:
        model: a fused classifier, on a CPU.
        image_size: height and width of the images that the graph takes, in pixels, unless
            that is dynamic.
        dynamic: what may differ from image to image: `batch`, `size`, both or neither. Without
            `batch`, the graph takes one image.
        features: which features it gives beside the logits, or in their place.
    """
    captured = Outputs(model, features.of(model.config)) if features else Logits(model)
    # torch.export takes a one for a constant, be it a batch or the side of a grid of keys.
    config, batch = model.config, 2 if "batch" in dynamic else 1
    if "size" in dynamic:
        coarsest = prod(config.patch_stride) * max(config.stride_kv)
        image_size = (max(config.minimum_image_size, 4 * coarsest),) * 2
    example = torch.zeros(batch, config.num_channels, *image_size)
    batch_dims = {0: Dim.DYNAMIC} if "batch" in dynamic else {}
    size_dims = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if "size" in dynamic else {}
    shapes = {"pixel_values": batch_dims | size_dims}
    with quiet():
        program = torch.export.export(captured.eval(), (example,), dynamic_shapes=shapes)
    least = config.minimum_image_size
    without_guards(program, (1, config.num_channels, least, least))
    return program


def without_guards(program: ExportedProgram, smallest: Sequence[int]) -> None:
    """Let a program take every size from the smallest on.

    Where PyTorch cannot prove that a size takes the same path through its operators as that of the
    example, it adds a guard. The graph is right without them, which a comparison with the model
    must show, and `program.module()` refuses sizes by them. Nothing public takes them off.

    Args:
        program: of one input.
        smallest: the size of each of its dimensions, at least.
    """
    program._guards_code = []
    for size, least in zip(_pixels(program).shape, smallest, strict=True):
        if isinstance(size, torch.SymInt):
            program.range_constraints[size.node.expr] = ValueRanges(least, int_oo)


def onnx_graph(program: ExportedProgram, outputs: Sequence[str] = (LOGITS,)) -> "onnx.ModelProto":
    """The same in ONNX; what may differ is named `batch`, `height` and `width` in it.

    Args:
        program: what `torch_graph` returned.
        outputs: the names of what it gives.

    Raises:
        ImportError: onnxscript is not installed.
    """
    names = zip(("batch", "channels", "height", "width"), pixel_shape(program), strict=True)
    dynamic = {axis: name for axis, (name, size) in enumerate(names) if size is None}
    with quiet("torch.onnx"):
        converted = torch.onnx.export(
            program,
            input_names=["pixel_values"],
            output_names=list(outputs),
            dynamic_shapes={"pixel_values": dynamic},
            verbose=False,
        )
    assert converted is not None
    graph = converted.model_proto
    for node in graph.graph.node:  # a stack trace each, with paths of this machine
        del node.metadata_props[:]
    return graph


def openvino_graph(
    program: ExportedProgram, outputs: Sequence[str] = (LOGITS,)
) -> "openvino.Model":
    """The same in OpenVINO; arguments as in `onnx_graph`.

    Raises:
        ImportError: openvino is not installed.
    """
    import openvino

    shape = [-1 if size is None else size for size in pixel_shape(program)]
    with quiet():
        graph = openvino.convert_model(program, input=[shape])
    graph.inputs[0].set_names({"pixel_values"})
    for output, name in zip(graph.outputs, outputs, strict=True):
        output.set_names({name})
    return graph


def pixel_shape(program: ExportedProgram) -> list[int | None]:
    """The shape of the pixels that a program takes; None where it may differ."""
    return [size if isinstance(size, int) else None for size in _pixels(program).shape]


def _pixels(program: ExportedProgram) -> Tensor:
    """What stands for the pixels in a program."""
    (node,) = (node for node in program.graph.nodes if node.target == "pixel_values")
    return node.meta["val"]
