"""ONNX Runtime as a runtime, on a CPU or a CUDA device."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cvt.architecture import Architecture
from cvt.libraries import require
from cvt.runtime.base import Runtime
from cvt.runtime.features import FeatureSettings, output_names

if TYPE_CHECKING:
    from cvt.modeling import CvtForImageClassification

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntime(Runtime):
    """A graph in ONNX Runtime.

    Args:
        graph: an .onnx file, or what would be in one; takes `pixel_values`, gives `logits`.
        config: the classifier's.
        precision: the graph's.
        device: `cpu`, or a CUDA device.
        threads: that compute; as many as the processor has cores by default.
        image_size: as in `Runtime`.
        single: as in `Runtime`.
        features: that it gives as `features`, beside the logits or in their place.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: it cannot use the device, cannot run the graph, or that takes other pixels than
            is said of it.
    """

    name = "onnxruntime"

    def __init__(
        self,
        graph: Path | bytes,
        config: Architecture,
        precision: str = "fp32",
        device: str = "cpu",
        threads: int | None = None,
        image_size: tuple[int, int] | None = None,
        single: bool = False,
        features: FeatureSettings | None = None,
    ) -> None:
        super().__init__(config, precision, device, threads, image_size, single, features)
        provider = _provider(device)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0  # 0: its own choice
        options.log_severity_level = 3  # errors
        source = graph if isinstance(graph, bytes) else str(graph)
        try:
            self.session = onnxruntime.InferenceSession(source, options, providers=[provider])
        except Exception as error:  # it has exceptions of its own, of no common kind
            where = "the graph" if isinstance(graph, bytes) else graph
            raise ValueError(f"onnxruntime cannot run {where} on {device}: {error}") from error
        if self.session.get_providers()[0] != provider[0]:
            raise ValueError(f"device = {device}: onnxruntime could not start on it")
        if not isinstance(graph, bytes):
            (pixels,) = self.session.get_inputs()
            shape = [size if isinstance(size, int) else None for size in pixels.shape]
            self.check_graph(graph, shape)

    @classmethod
    def from_model(
        cls,
        model: "CvtForImageClassification",
        precision: str = "fp32",
        device: str = "cpu",
        threads: int | None = None,
        features: FeatureSettings | None = None,
    ) -> "OnnxRuntime":
        """Convert a classifier, in memory.

        Raises:
            ImportError: onnxruntime, or onnxscript for the conversion, is not installed.
            ValueError: ONNX Runtime does not compute in the precision, or cannot use the device.
        """
        require("the runtime onnxruntime", "onnxruntime", "onnxscript")
        if precision not in ("fp32", "fp16"):
            raise ValueError(f"precision = {precision}: ONNX Runtime has fp32 and fp16")
        _provider(device)
        from cvt.runtime.capture import onnx_graph, torch_graph
        from cvt.runtime.fused import fuse
        from cvt.runtime.torch_runtime import DTYPES

        fused = fuse(model, DTYPES[precision]).cpu()
        program = torch_graph(fused, (224, 224), features=features)
        names = output_names(model.config, features)
        graph = onnx_graph(program, names).SerializeToString()
        return cls(graph, model.config, precision, device, threads, features=features)

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(self.session.run(list(self.outputs), {"pixel_values": pixels}))


def _provider(device: str) -> tuple[str, dict[str, str]]:
    """What computes on a device in ONNX Runtime, and its settings.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: it has nothing for the device.
    """
    require("the runtime onnxruntime", "onnxruntime")
    import onnxruntime

    kind, _, index = device.partition(":")
    provider = PROVIDERS.get(kind, "")
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(f"device = {device}: the onnxruntime installed here cannot use it")
    return provider, {"device_id": index} if index else {}
