"""LiteRT, once TensorFlow Lite, as a runtime, on a CPU."""

import os
from pathlib import Path
from threading import Lock

import numpy as np

from cvt.architecture import Architecture
from cvt.libraries import require, silence_stderr
from cvt.runtime.base import Runtime
from cvt.runtime.features import FeatureSettings


class LiteRtRuntime(Runtime):
    """A file of LiteRT.

    Args:
        path: the file; takes `pixel_values`, gives `logits`.
        config: the classifier's.
        precision: of its weights; it computes in fp32.
        threads: that compute; the processor's cores by default.
        image_size: as in `Runtime`.
        single: as in `Runtime`.
        features: as in `OnnxRuntime`.

    Raises:
        ImportError: ai-edge-litert is not installed.
        ValueError: the file is damaged, asks for more than LiteRT's own operators, or takes other
            pixels than its export.json lists.
    """

    name = "litert"

    def __init__(
        self,
        path: Path,
        config: Architecture,
        precision: str = "fp32",
        threads: int | None = None,
        image_size: tuple[int, int] | None = None,
        single: bool = False,
        features: FeatureSettings | None = None,
    ) -> None:
        super().__init__(config, precision, "cpu", threads, image_size, single, features)
        require("the runtime litert", "ai_edge_litert", extra="tensorflow")
        from ai_edge_litert.interpreter import Interpreter

        self.lock = Lock()  # an interpreter has one set of tensors
        least = image_size or (config.minimum_image_size,) * 2
        try:
            with silence_stderr():  # it names what computes
                # Given the path, and not what is in the file, it checks that the file is complete.
                interpreter = Interpreter(str(path), num_threads=threads or os.cpu_count())
                self.signature = interpreter.get_signature_runner("serving_default")
                takes = self.signature.get_input_details()["pixel_values"]["shape_signature"]
                self._run(np.zeros((1, config.num_channels, *least), np.float32))
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"{path} is not a complete LiteRT graph: {error}") from error
        self.check_graph(path, [None if size < 0 else int(size) for size in takes])

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        with self.lock:
            found = self.signature(pixel_values=pixels)
            return tuple(found[name] for name in self.outputs)
