"""OpenVINO as a runtime, on a CPU.

It computes fastest when it knows every shape, when a piece of a batch keeps the work in the
processor's caches, and when no thread waits for another. So the graph is compiled for each shape of
a piece; a model is even captured for each size of image, since a graph for any size stays slower.
One image gets all threads; of a batch, each thread gets pieces of its own.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from cvt.architecture import Architecture
from cvt.libraries import require
from cvt.runtime.base import Runtime
from cvt.runtime.cache import GraphCache
from cvt.runtime.features import FeatureSettings, output_names
from cvt.runtime.openvino_graph import adapted

if TYPE_CHECKING:
    import openvino

    from cvt.modeling import CvtForImageClassification
    from cvt.runtime.fused import FusedCvt

PIXELS_PER_PIECE = 224 * 224  # of all its images together
IMAGES_PER_PIECE = 8
LARGE_PIXELS = 256 * 256  # of an image that runs alone above that, for the memory that it takes
KEPT_GRAPHS = 4  # graphs that stay compiled, each with a packed copy of the weights
HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "bf16"}


class OpenVinoRuntime(Runtime):
    """A graph in OpenVINO.

    Args:
        graph: for images of a height and width, takes `pixel_values` and gives `logits`, `features`
            or both.
        config: the classifier's.
        precision: the graph's; one in `int8` computes the rest in bfloat16, where the processor
            can.
        threads: that compute; the processor's cores by default.
        image_size: as in `Runtime`.
        single: as in `Runtime`.
        features: that the graph gives.
    """

    name = "openvino"

    def __init__(
        self,
        graph: "Callable[[int, int], openvino.Model]",
        config: Architecture,
        precision: str = "fp32",
        threads: int | None = None,
        image_size: tuple[int, int] | None = None,
        single: bool = False,
        features: FeatureSettings | None = None,
    ) -> None:
        super().__init__(config, precision, "cpu", threads, image_size, single, features)
        computes_in = HINTS[precision] if computes(precision) else "f32"
        self.streams = threads or core().get_property("CPU", "RANGE_FOR_STREAMS")[1]
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": computes_in,
            "ENABLE_CPU_PINNING": False,  # a pinned thread waits for whoever else is on its core
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads

        @lru_cache(KEPT_GRAPHS)
        def compiled(streams: int, *shape: int) -> "openvino.AsyncInferQueue":
            import openvino

            static = adapted(graph(*shape[2:]), precision, computes_in)
            static.reshape(list(shape))
            hint = "LATENCY" if streams == 1 else "THROUGHPUT"
            parallel = {"PERFORMANCE_HINT": hint, "NUM_STREAMS": streams}
            network = core().compile_model(static, "CPU", settings | parallel)
            return openvino.AsyncInferQueue(network, streams)

        self.compiled = compiled
        self.lock = Lock()  # each request uses all threads

    @classmethod
    def from_model(
        cls,
        model: "CvtForImageClassification",
        precision: str = "fp32",
        threads: int | None = None,
        features: FeatureSettings | None = None,
    ) -> "OpenVinoRuntime":
        """A classifier that is converted, in memory, for each size of image that it meets.

        Raises:
            ImportError: openvino is not installed.
            ValueError: this processor does not compute in that precision.
        """
        import torch

        from cvt.runtime.fused import fuse

        fused = fuse(model, torch.float32).cpu()
        return cls.from_source(model.config, lambda: fused, None, precision, threads, features)

    @classmethod
    def from_source(
        cls,
        config: Architecture,
        fused: "Callable[[], FusedCvt]",
        kept: GraphCache | None,
        precision: str = "fp32",
        threads: int | None = None,
        features: FeatureSettings | None = None,
    ) -> "OpenVinoRuntime":
        """A classifier whose graphs were converted earlier, or are converted when they are needed.

        Args:
            config: the classifier's.
            fused: returns its fused form in float32 on the CPU; called for sizes of images of which
                no graph is kept.
            kept: the graphs of earlier with the same features, and where new ones go.
            precision: as in `from_model`.
            threads: likewise.
            features: likewise.

        Raises:
            ImportError: openvino is not installed.
            ValueError: this processor does not compute in that precision.
        """
        require("the runtime openvino", "openvino")
        demand(precision)

        @lru_cache(KEPT_GRAPHS)
        def graph(height: int, width: int) -> "openvino.Model":
            if kept and (found := kept.find((height, width))):
                return core().read_model(found)
            from cvt.runtime.capture import openvino_graph, torch_graph

            program = torch_graph(fused(), (height, width), {"batch"}, features)
            converted = openvino_graph(program, output_names(config, features))
            if kept:
                kept.keep((height, width), converted)
            return converted

        return cls(graph, config, precision, threads, features=features)

    @classmethod
    def from_file(cls, path: Path, *args: Any, **kwargs: Any) -> "OpenVinoRuntime":
        """Read a graph, model.xml beside model.bin; the other arguments are the class's.

        Raises:
            ImportError: openvino is not installed.
            ValueError: the file is no complete graph, or takes other pixels than export.json lists.
        """
        require("the runtime openvino", "openvino")

        try:
            graph = core().read_model(path)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a complete OpenVINO graph: {error}") from error
        runtime = cls(lambda *_: graph, *args, **kwargs)
        shape = graph.inputs[0].partial_shape
        runtime.check_graph(path, [s.get_length() if s.is_static else None for s in shape])
        return runtime

    def images_at_once(self, pixels: np.ndarray) -> int:
        """All that fill pieces, where no thread is left without one; else a single image."""
        B, _, H, W = pixels.shape
        images = piece(H, W)
        idle_threads = images == 1 and self.streams > B
        return 1 if idle_threads or H * W > LARGE_PIXELS else B - B % images or 1

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        """The outputs of one image, or of pieces that have a thread each."""
        B, *shape = pixels.shape
        if B == 1:
            with self.lock:
                request = self.compiled(1, B, *shape)[0]
                request.infer([pixels], share_inputs=True)
                return self._of(request)

        found: dict[int, tuple[np.ndarray, ...]] = {}

        def keep(request: "openvino.InferRequest", start: int) -> None:
            found[start] = self._of(request)

        images = piece(*shape[1:])
        with self.lock:
            queue = self.compiled(self.streams, images, *shape)
            queue.set_callback(keep)
            for start in range(0, B, images):
                queue.start_async([pixels[start : start + images]], start, share_inputs=True)
            queue.wait_all()
        columns = zip(*(found[start] for start in sorted(found)), strict=True)
        return tuple(map(np.concatenate, columns))

    def _of(self, request: "openvino.InferRequest") -> tuple[np.ndarray, ...]:
        return tuple(request.get_tensor(name).data.copy() for name in self.outputs)


def piece(height: int, width: int) -> int:
    """How many images of a size, in pixels, a thread takes at a time."""
    return min(IMAGES_PER_PIECE, max(1, PIXELS_PER_PIECE // (height * width)))


def demand(precision: str) -> None:
    """Make sure that OpenVINO computes in a precision on this processor.

    Raises:
        ValueError: it does not.
    """
    if not computes(precision):
        raise ValueError(
            f"precision = {precision}: OpenVINO does not compute in it on this processor; in fp32 "
            "it does, and the runtime fused computes a model in it"
        )


@cache
def core() -> "openvino.Core":
    """OpenVINO itself, once: a second one that ends first leaves a signal stack that is gone."""
    import openvino

    return openvino.Core()


def computes(precision: str) -> bool:
    """Whether OpenVINO computes in a precision on this processor."""
    capabilities = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}[HINTS[precision]] in capabilities
