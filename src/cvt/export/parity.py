"""Whether an export computes what the torch model computes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cvt.inference.output_metrics import thresholds_of
from cvt.inference.predict import has_independent_scores
from cvt.modeling import CvtForImageClassification
from cvt.runtime.base import Runtime
from cvt.runtime.torch_runtime import TorchRuntime

BATCHES = (1, 2, 5)
# The largest difference of a logit that is accepted, and the same as a share of the largest logit;
# the larger of the two holds. Of cvt-13 with random weights they were 2e-6, 0.015 and 0.002.
TOLERANCES = {"fp32": (1e-4, 1e-5), "bf16": (0.0, 0.05), "fp16": (0.0, 0.01)}


@dataclass(frozen=True)
class Check:
    """A batch that an export and the torch model were both given.

    Attributes:
        images: in the batch.
        height: of the images, in pixels.
        width: likewise.
        same_class: images of which both name the same class; where the scores of classes are
            independent, the same set of classes that reach their thresholds. For fp32, bf16 and
            fp16 classes whose logits lie within `tolerance` of each other, or of the threshold,
            are the same.
        difference: the largest between their logits.
        tolerance: what is accepted of it; None in int8, where the classes count.
    """

    images: int
    height: int
    width: int
    same_class: int
    difference: float
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Whether the logits are close and the classes the same; in int8, whether it has logits."""
        if self.tolerance is None:
            return isfinite(self.difference)
        return self.difference <= self.tolerance and self.same_class == self.images

    def __str__(self) -> str:
        accepted = "" if self.tolerance is None else f", of which {self.tolerance:.3g} is accepted"
        return (
            f"for {self.images} images of {self.height} x {self.width} pixels its logits differ "
            f"from the torch model's by {self.difference:.3g}{accepted}, and {self.same_class} get "
            "the same class"
        )


@torch.no_grad()
def compare(model: CvtForImageClassification, runtime: Runtime, pixels: Tensor) -> Check:
    """Give the same pixels, (B, C, H, W), to both.

    Args:
        model: in eval mode, in float32, on a CPU.
        runtime: of its export.
        pixels: normalised.
    """
    expected = model(pixels, return_dict=True).logits  # (B, K)
    logits = runtime(pixels)
    tolerance = tolerance_of(runtime.precision, expected)
    if has_independent_scores(runtime.config):
        thresholds = torch.logit(torch.tensor(thresholds_of(runtime.config)))  # (K,)
        differ = (expected >= thresholds) != (logits >= thresholds)
        far = (expected - thresholds).abs() > (tolerance or 0.0)
        same_class = ~(differ & far).any(dim=1)
    else:
        named = expected.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)
        same_class = named >= expected.amax(dim=1) - (tolerance or 0.0)
    return Check(
        *(len(pixels), pixels.shape[2], pixels.shape[3]),
        same_class=int(same_class.sum()),
        difference=(expected - logits).abs().max().item(),
        tolerance=tolerance,
    )


def features_difference(
    model: CvtForImageClassification, runtime: Runtime, pixels: Tensor
) -> tuple[float, bool]:
    """The largest difference between the features of both, and whether it is accepted.

    It is as that of logits is, by the largest feature; in int8, where it is finite. Arguments as
    in `compare`.
    """
    expected = TorchRuntime(model, features=runtime.feature_settings).features(pixels)  # (B, C)
    difference = (expected - runtime.features(pixels)).abs().max().item()
    accepted = tolerance_of(runtime.precision, expected)
    return difference, isfinite(difference) and (accepted is None or difference <= accepted)


def tolerance_of(precision: str, expected: Tensor) -> float | None:
    """What is accepted of a difference from these numbers, see `TOLERANCES`; None in int8."""
    if precision not in TOLERANCES:
        return None
    absolute, relative = TOLERANCES[precision]
    return max(absolute, relative * expected.abs().max().item())


class LoadedProgram(Runtime):
    """A program of torch.export as the documentation loads it, with what it checks itself.

    Args:
        path: of a file that was written here: reading another may run code of its own.
        runtime: that reads the same file.
    """

    name = "torch"

    def __init__(self, path: Path, runtime: Runtime) -> None:
        features = runtime.feature_settings
        super().__init__(
            runtime.config, runtime.precision, single=runtime.single, features=features
        )
        self.file = path.name
        self.program = torch.export.load(path).module()

    def _run(self, pixels: np.ndarray) -> tuple[np.ndarray, ...]:
        try:
            found = self.program(torch.from_numpy(pixels))
        except (AssertionError, RuntimeError) as refusal:
            shape, reason = tuple(pixels.shape), str(refusal).strip().splitlines()[0]
            raise ValueError(
                f"{self.file} was not written: it does not take pixels of shape {shape}: {reason}"
            ) from refusal
        outputs = found if isinstance(found, tuple) else (found,)
        return tuple(each.detach().numpy() for each in outputs)


def shapes(image_size: tuple[int, int], least: int | None = None) -> list[tuple[int, int, int]]:
    """Number, height and width of the images in each batch to check an export with.

    Args:
        image_size: height and width, in pixels.
        least: height and width that the model needs at least, where the size may differ: then there
            are images of odd sides, such as are no squares, and the smallest, too.
    """
    H, W = image_size
    sizes = [image_size]
    if least is not None:
        sizes += [(H + 1 + H % 2, W + 1 + W % 2), (max(least, H // 2), W + W // 2), (least, least)]
    return [(batch, *size) for batch in BATCHES for size in sizes]


def random_batches(channels: int, shapes: Iterable[tuple[int, int, int]]) -> Iterator[Tensor]:
    """Pixels, (B, C, H, W), always the same ones."""
    generator = torch.Generator().manual_seed(0)
    for B, H, W in shapes:
        yield torch.randn(B, channels, H, W, generator=generator)
