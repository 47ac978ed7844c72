"""PyTorch as a runtime: a model as it is, its fused form, and that compiled."""

import copy
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from cvt.architecture import Architecture
from cvt.runtime.base import Runtime
from cvt.runtime.fused import FusedCvt, fuse, refuse_offloaded

if TYPE_CHECKING:
    from cvt.modeling import CvtForImageClassification

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


class TorchRuntime(Runtime):
    """A classifier as it is, or what wraps one; on its device, in its precision, in eval mode.

    Args:
        model: takes pixels and `return_dict=True`, gives `.logits`.
        config: the classifier's, where the model does not have it.
        threads: for all of PyTorch in this process.

    Raises:
        ValueError: weights are offloaded.
    """

    name = "torch"

    def __init__(
        self, model: nn.Module, config: Architecture | None = None, threads: int | None = None
    ) -> None:
        refuse_offloaded(model)
        weight = next(chain(model.parameters(), model.buffers()))
        self.model, self.dtype = model, weight.dtype
        names = {dtype: name for name, dtype in DTYPES.items()}
        if threads is not None:
            torch.set_num_threads(threads)
        config = config or cast(Architecture, model.config)
        super().__init__(config, names[self.dtype], str(weight.device), threads)

    @classmethod
    def from_model(
        cls,
        model: Any,
        precision: str = "fp32",
        device: str = "cpu",
        threads: int | None = None,
        copied: bool = True,
    ) -> "TorchRuntime":
        """The classifier itself, on a device and in a precision.

        Args:
            model: the classifier.
            precision: a key of `DTYPES`.
            device: its name in torch.
            threads: as in the class.
            copied: leave the classifier where it is, and move a copy.
        """
        dtype, weight = DTYPES[precision], next(model.parameters())
        if copied and weight.to(device, dtype) is not weight:
            model = copy.deepcopy(model)
        return cls(model.to(device, dtype), threads=threads)

    # In inference mode FSDP would gather weights that training cannot use after it.
    @torch.no_grad()
    def _run(self, pixels: np.ndarray) -> np.ndarray:
        self.model.eval()  # it may have been trained since
        tensor = torch.from_numpy(pixels).to(self.device, self.dtype)
        return self.model(tensor, return_dict=True).logits.float().cpu().numpy()


class FusedRuntime(TorchRuntime):
    """The fused form of a classifier, which is left as it is; or what is fused already."""

    name = "fused"

    def __init__(
        self,
        model: "CvtForImageClassification | FusedCvt",
        precision: str = "fp32",
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        fused = model if isinstance(model, FusedCvt) else fuse(model, DTYPES[precision])
        super().__init__(fused.to(device), threads=threads)

    @torch.no_grad()
    def _run(self, pixels: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(pixels).to(self.device, self.dtype)
        options = {"output_hidden_states": False, "output_attentions": False}
        (logits,) = self.model(tensor, return_dict=False, **options)
        return logits.float().cpu().numpy()


class CompiledRuntime(FusedRuntime):
    """The fused form of a classifier, compiled by `torch.compile` for each shape that it meets.

    That takes up to a minute. On a CPU, where a batch is no faster than its parts, it runs in
    pieces of four, and what is left one by one: two shapes for each size of image. On a GPU shapes
    share what is compiled from the second on; that was never run on a GPU.
    """

    name = "compiled"

    def __init__(
        self,
        model: "CvtForImageClassification",
        precision: str = "fp32",
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        super().__init__(model, precision, device, threads)
        self.lock = Lock()  # each shape is compiled once
        if device == "cpu":
            self.model.compile(dynamic=False, options={"freezing": True})
        else:
            self.model.compile()

    def images_at_once(self, pixels: np.ndarray) -> int:
        """Four on a CPU, else all."""
        return 4 if self.device == "cpu" else len(pixels)

    def _run(self, pixels: np.ndarray) -> np.ndarray:
        with self.lock:
            return super()._run(pixels)
