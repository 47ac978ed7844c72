"""A fused classifier as a graph that other software runs: torch.export, ONNX, OpenVINO.

The graph takes `pixel_values`, (B, C, H, W), and gives `logits`, (B, K), both in float32.
"""

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cvt.fused import FusedCvt

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
        return self.model(pixel_values, False, False, return_dict=True).logits.float()


@torch.no_grad()
def torch_graph(
    model: FusedCvt, image_size: tuple[int, int], dynamic: Collection[str] = ("batch", "size")
) -> ExportedProgram:
    """The classifier captured by torch.export.

    Args:
        model: a fused classifier, on a CPU.
        image_size: height and width of the images that the graph takes, in pixels; with a dynamic
            size, of one example.
        dynamic: what may differ from image to image: `batch`, `size`, both or neither. Without
            `batch`, the graph takes one image.
    """
    batch = 2 if "batch" in dynamic else 1  # torch.export takes a one for a constant
    example = torch.zeros(batch, model.config.num_channels, *image_size)
    of_batch = {0: Dim.DYNAMIC} if "batch" in dynamic else {}
    of_size = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if "size" in dynamic else {}
    shapes = {"pixel_values": of_batch | of_size}
    with _quiet():
        return torch.export.export(Logits(model).eval(), (example,), dynamic_shapes=shapes)


def onnx_graph(program: ExportedProgram) -> "onnx.ModelProto":
    """The same in ONNX.

    Raises:
        ImportError: onnxscript is not installed.
    """
    with _quiet():
        converted = torch.onnx.export(
            program, input_names=["pixel_values"], output_names=["logits"], verbose=False
        )
    assert converted is not None
    return converted.model_proto


def openvino_graph(program: ExportedProgram) -> "openvino.Model":
    """The same in OpenVINO.

    Raises:
        ImportError: openvino is not installed.
    """
    import openvino

    (pixels,) = (n for n in program.graph.nodes if n.target == "pixel_values")
    shape = [size if isinstance(size, int) else -1 for size in pixels.meta["val"].shape]
    with _quiet():
        graph = openvino.convert_model(program, input=[shape])
    graph.inputs[0].set_names({"pixel_values"})
    graph.outputs[0].set_names({"logits"})
    return graph


@contextmanager
def _quiet() -> Iterator[None]:
    """Converters warn of what no user can change."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
