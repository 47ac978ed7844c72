"""PyTorch as a runtime: a model as it is, its fused form, and that compiled."""

from itertools import chain
from threading import Lock
from typing import cast

import torch
from torch import Tensor, nn

from cvt.configuration import CvtConfig
from cvt.fused import fuse
from cvt.modeling import CvtForImageClassification
from cvt.runtime.base import Runtime

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class TorchRuntime(Runtime):
    """A classifier as it is, or what wraps one; on its device, in its precision, in eval mode.

    Args:
        model: gives `.logits`.
        config: the classifier's, where the model does not have it.
        threads: for all of PyTorch in this process.
    """

    name = "torch"

    def __init__(
        self, model: nn.Module, config: CvtConfig | None = None, threads: int | None = None
    ) -> None:
        weight = next(chain(model.parameters(), model.buffers()))
        self.model, self.dtype = model, weight.dtype
        names = {dtype: name for name, dtype in DTYPES.items()}
        if threads is not None:
            torch.set_num_threads(threads)
        config = config or cast(CvtConfig, model.config)
        super().__init__(config, names[self.dtype], str(weight.device), threads)

    # In inference mode FSDP would gather weights that training cannot use after it.
    @torch.no_grad()
    def _run(self, pixels: Tensor) -> Tensor:
        self.model.eval()  # it may have been trained since
        return self.model(pixels.to(self.device, self.dtype)).logits.float().cpu()


class FusedRuntime(TorchRuntime):
    """The fused form of a classifier; the classifier is left as it is."""

    name = "fused"

    def __init__(
        self,
        model: CvtForImageClassification,
        precision: str = "fp32",
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        super().__init__(fuse(model, DTYPES[precision]).to(device), threads=threads)


class CompiledRuntime(FusedRuntime):
    """The fused form of a classifier, compiled by `torch.compile` for each shape that it meets.

    That takes up to a minute. On a CPU, where a batch is no faster than its parts, it runs in
    pieces of four, and what is left one by one: two shapes for each size of image.
    """

    name = "compiled"

    def __init__(
        self,
        model: CvtForImageClassification,
        precision: str = "fp32",
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        super().__init__(model, precision, device, threads)
        self.lock = Lock()  # threads that meet a shape together would each compile it
        if device == "cpu":
            self.model.compile(dynamic=False, options={"freezing": True})
        else:
            self.model.compile()

    def images_at_once(self, pixels: Tensor) -> int:
        """Four on a CPU, else all."""
        return 4 if self.device == "cpu" else len(pixels)

    def _run(self, pixels: Tensor) -> Tensor:
        with self.lock:
            return super()._run(pixels)
