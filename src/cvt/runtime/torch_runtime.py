"""PyTorch as a runtime: a model as it is, its fused form, and that compiled."""

import copy
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from cvt.architecture import Architecture
from cvt.runtime.base import Runtime
from cvt.runtime.features import LOGITS, FeatureSettings, pooled
from cvt.runtime.fused import FusedCvt, Outputs, fuse, refuse_offloaded
from cvt.views import channels_last, to_tokens

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
        model: takes pixels and `return_dict=True`, gives `.logits`; has the classifier's `config`.
        threads: for all of PyTorch in this process.
        features: of the classifier itself, not of what wraps one.

    Raises:
        ValueError: weights are offloaded.
    """

    name = "torch"

    def __init__(
        self,
        model: nn.Module,
        threads: int | None = None,
        features: FeatureSettings | None = None,
    ) -> None:
        refuse_offloaded(model)
        weight = next(chain(model.parameters(), model.buffers()))
        self.model, self.dtype = model, weight.dtype
        names = {dtype: name for name, dtype in DTYPES.items()}
        if threads is not None:
            torch.set_num_threads(threads)
        how = (names[self.dtype], str(weight.device), threads)
        super().__init__(cast(Architecture, model.config), *how, features=features)

    @classmethod
    def from_model(
        cls,
        model: Any,
        precision: str = "fp32",
        device: str = "cpu",
        threads: int | None = None,
        copied: bool = True,
        features: FeatureSettings | None = None,
    ) -> "TorchRuntime":
        """The classifier itself, on a device and in a precision.

        Args:
            model: the classifier.
            precision: a key of `DTYPES`.
            device: its name in torch.
            threads: as in the class.
            copied: leave the classifier where it is, and move a copy.
            features: as in the class.
        """
        dtype, weight = DTYPES[precision], next(model.parameters())
        if copied and weight.to(device, dtype) is not weight:
            model = copy.deepcopy(model)
        return cls(model.to(device, dtype), threads=threads, features=features)

    # In inference mode FSDP would gather weights that training cannot use after it.
    @torch.no_grad()
    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        outputs = self._outputs(torch.from_numpy(pixels).to(self.device, self.dtype))
        return tuple(each.float().cpu().numpy() for each in outputs)

    def _outputs(self, pixels: Tensor) -> tuple[Tensor, ...]:
        self.model.eval()  # it may have been trained since
        settings, model = self.feature_settings, cast(Any, self.model)
        if settings is None:
            return (model(pixels, return_dict=True).logits,)
        image, stages = channels_last(pixels), model.cvt.encoder.stages
        for stage in stages[: settings.stage]:
            image, class_token, _ = stage(image, False)
        norm = model.layernorm if stage is stages[-1] else nn.Identity()
        classifier = model.classifier if LOGITS in self.outputs else None
        return pooled(settings, class_token, to_tokens(image), norm, classifier)


class FusedRuntime(TorchRuntime):
    """The fused form of a classifier, which is left as it is; or what is fused already."""

    name = "fused"

    def __init__(
        self,
        model: "CvtForImageClassification | FusedCvt",
        precision: str = "fp32",
        device: str = "cpu",
        threads: int | None = None,
        features: FeatureSettings | None = None,
    ) -> None:
        fused = model if isinstance(model, FusedCvt) else fuse(model, DTYPES[precision])
        super().__init__(fused.to(device), threads=threads, features=features)
        if self.feature_settings:
            self.model = Outputs(fused, self.feature_settings)

    def _outputs(self, pixels: Tensor) -> tuple[Tensor, ...]:
        if self.feature_settings:
            return self.model(pixels)
        options = {"output_hidden_states": False, "output_attentions": False}
        return self.model(pixels, return_dict=False, **options)


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
        features: FeatureSettings | None = None,
    ) -> None:
        super().__init__(model, precision, device, threads, features)
        self.lock = Lock()  # each shape is compiled once
        if device == "cpu":
            self.model.compile(dynamic=False, options={"freezing": True})
        else:
            self.model.compile()

    def images_at_once(self, pixels: np.ndarray) -> int:
        """Four on a CPU, else all."""
        return 4 if self.device == "cpu" else len(pixels)

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        with self.lock:
            return super()._run(pixels)
