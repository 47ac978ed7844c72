"""Who takes part: models of one shape with random weights, and what runs them on a CPU."""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import transformers_cvt
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cvt import CvtConfig, CvtForImageClassification, fuse, image_processor
from cvt.export.quantization import preprocessed
from cvt.macs import MacCounter
from cvt.runtime import open_runtime
from cvt.runtime.capture import onnx_graph, openvino_graph
from cvt.runtime.openvino_runtime import demand

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Transformers' CvT cannot be less deep.
TINY = {"embed_dim": (8, 16, 32), "num_heads": (1, 2, 4), "depth": (1, 2, 3), "num_labels": 10}


class Peer(NamedTuple):
    """A model, what runs it, and in which precision."""

    model: str
    runtime: str
    precision: str


REFERENCE = Peer("transformers", "torch", "fp32")
OURS = Peer("cvt", "fused", "fp32")
CPU = (
    REFERENCE,
    Peer("transformers", "compiled", "fp32"),
    Peer("transformers", "onnxruntime", "fp32"),
    Peer("transformers", "openvino", "fp32"),
    Peer("transformers", "openvino of fixed shape", "fp32"),
    Peer("transformers", "openvino", "bf16"),
    Peer("transformers", "openvino of fixed shape", "bf16"),
    Peer("transformers", "openvino of fixed shape", "int8"),
    Peer("cvt", "torch", "fp32"),
    OURS,
    Peer("cvt", "compiled", "fp32"),
    Peer("cvt", "onnxruntime", "fp32"),
    Peer("cvt", "openvino", "fp32"),
    Peer("cvt", "fused", "bf16"),
    Peer("cvt", "openvino", "bf16"),
)
INT8 = Peer("cvt", "openvino", "int8")
BY_HAND = {  # what an expert builds of transformers' CvT, for one shape
    precision: Peer("transformers", "openvino of fixed shape", precision)
    for precision in ("fp32", "bf16", "int8")
}
OPENVINO = (
    REFERENCE,
    BY_HAND["fp32"],
    BY_HAND["int8"],
    OURS,
    Peer("cvt", "openvino", "fp32"),
)
YARDSTICKS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "pvt_v2_b2")  # timm's


def shape(variant: str) -> CvtConfig:
    """A variant, `tiny`, or the last block of that; drop path is zero, so that none skips work."""
    is_tiny = variant in ("tiny", "one-block")
    config = CvtConfig(**TINY) if is_tiny else CvtConfig.from_variant(variant)
    if variant == "one-block":
        lists = {name: value for name, value in config.to_dict().items() if isinstance(value, list)}
        last = {name: value[2:] for name, value in lists.items() if not name.startswith("out_")}
        config = CvtConfig(**last | {"depth": [1], "num_labels": config.num_labels})
    config.drop_path_rate = [0.0] * len(config.depth)
    return config


class Logits(nn.Module):
    """Pixels in, logits out, of a model that may answer with more."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, K)."""
        answer = self.model(pixel_values)
        return answer if isinstance(answer, Tensor) else answer.logits


def build(name: str, config: CvtConfig) -> nn.Module:
    """Our model or transformers', of one shape, or another one of timm's; in eval mode."""
    torch.manual_seed(0)
    if name == "cvt":
        return CvtForImageClassification(config).eval()
    if name == "transformers":
        return transformers_cvt(config).eval()
    import timm

    return timm.create_model(name, drop_path_rate=0.0).eval()


def training_step(
    model: nn.Module, forward: nn.Module, images: Tensor, dtype: torch.dtype
) -> Callable[[], None]:
    """A function that takes one step on images (B, 3, H, W); a GPU is not waited for.

    Args:
        model: is trained.
        forward: gives logits (B, K), by the model as it is or compiled.
        images: the batch of every step.
        dtype: of autocast, which is off for float32.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    labels = torch.arange(len(images), device=images.device) % 10

    def step() -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def opened(peer: Peer, options: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """What runs a model, from pixels (B, 3, H, W) to logits (B, K) on the CPU.

    Raises:
        ValueError: this processor does not compute in its precision.
    """
    torch.set_num_threads(options.threads)
    name, runtime, precision = peer
    if runtime.startswith("openvino"):  # which would compute in fp32 without a word
        demand(precision)
    model = build(name, shape(options.variant))
    if name == "cvt":
        return open_runtime(model, runtime, precision, "cpu", options.threads)
    model = Logits(model)
    if runtime == "onnxruntime":
        return in_onnxruntime(exported(model, options), options)
    if runtime.startswith("openvino"):
        fixed = runtime.endswith("fixed shape")
        graph = openvino_graph(exported(model, options))
        return in_openvino(graph, precision, fixed, options)
    return in_torch(model, precision, runtime == "compiled")


def in_torch(model: nn.Module, precision: str, compiled: bool) -> Callable[[Tensor], Tensor]:
    """A model in PyTorch, eager or compiled."""
    dtype = DTYPES[precision]
    model = model.to(dtype)
    forward = torch.compile(model) if compiled else model

    @torch.inference_mode()
    def run(pixels: Tensor) -> Tensor:
        return forward(pixels.to(dtype)).float()

    return run


def exported(model: nn.Module, options: argparse.Namespace) -> ExportedProgram:
    """The graph of a model, for batches of any size."""
    example = torch.zeros(2, 3, options.image_size, options.image_size)
    shapes = {"pixel_values": {0: Dim.DYNAMIC}}
    return torch.export.export(model, (example,), dynamic_shapes=shapes)


def in_onnxruntime(
    program: ExportedProgram, options: argparse.Namespace
) -> Callable[[Tensor], Tensor]:
    """A graph in ONNX Runtime."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    graph = onnx_graph(program).SerializeToString()
    session = onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> Tensor:
        (logits,) = session.run(None, {"pixel_values": pixels.numpy()})
        return torch.from_numpy(logits)

    return run


@functools.cache
def core() -> Any:
    """OpenVINO, which must never end: cores that do can leave threads no stack for signals."""
    import openvino

    return openvino.Core()


def by_hand_in_int8(
    pictures: Sequence[Path], options: argparse.Namespace
) -> Callable[[Tensor], Tensor]:
    """Transformers' CvT in OpenVINO for a fixed shape, as nncf quantizes a transformer.

    Args:
        pictures: to calibrate with.
        options: of the benchmark.
    """
    import nncf

    config = shape(options.variant)
    processor = image_processor(config, image_size=options.image_size)
    graph = openvino_graph(exported(Logits(build("transformers", config)), options))
    quantized = nncf.quantize(
        graph,
        nncf.Dataset(pictures, lambda path: {"pixel_values": preprocessed([path], processor)}),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(pictures),
    )
    return in_openvino(quantized, "int8", True, options)


def settings(precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Of OpenVINO; threads that stay on their core would wait there for other programs."""
    hints = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": hints[precision],
        "INFERENCE_NUM_THREADS": options.threads,
        "ENABLE_CPU_PINNING": False,
    }


def product(size: int, precision: str, options: argparse.Namespace) -> Callable[[], object]:
    """A function that multiplies square matrices of `size` in OpenVINO."""
    import openvino
    from openvino import opset14

    a, b = torch.randn(2, size, size).numpy()
    left = opset14.parameter([size, size], np.float32)
    right = opset14.constant(b)
    factors = [left, right]
    if precision == "int8":
        low, high = (opset14.constant(np.float32(limit)) for limit in (-4, 4))
        factors = [
            opset14.fake_quantize(factor, low, high, low, high, levels)
            for factor, levels in ((left, 256), (right, 255))
        ]
    graph = openvino.Model([opset14.matmul(*factors, False, False)], [left])
    compiled = core().compile_model(graph, "CPU", settings(precision, options))
    return functools.partial(compiled.create_infer_request().infer, [a])


def in_openvino(
    graph: Any, precision: str, fixed: bool, options: argparse.Namespace
) -> Callable[[Tensor], Tensor]:
    """A graph in OpenVINO, for any batch or compiled anew for the shape of each."""
    compiled = {}

    def run(pixels: Tensor) -> Tensor:
        key = tuple(pixels.shape) if fixed else None
        if key not in compiled:
            if fixed:
                graph.reshape(list(key))
            compiled[key] = core().compile_model(graph, "CPU", settings(precision, options))
        return torch.from_numpy(compiled[key](pixels.numpy())[0])

    return run


def forward_operations(name: str, variant: str, image_size: int, is_fused: bool) -> int:
    """Floating point operations of a model for an image: matrix products and convolutions.

    Our fused form skips what the last block does for nothing; nothing else skips any.
    """
    with torch.device("meta"), torch.no_grad():
        model = build(name, shape(variant))
        if is_fused:
            model = fuse(model)
        pixels = torch.empty(1, 3, image_size, image_size)
        with MacCounter() as counter:
            model(pixels)
    return 2 * counter.macs


def operations(peer: Peer, options: argparse.Namespace) -> int:
    """Floating point operations that a peer executes for an image."""
    is_fused = peer.model == "cvt" and peer.runtime != "torch"
    return forward_operations(peer.model, options.variant, options.image_size, is_fused)
