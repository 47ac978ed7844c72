"""The scale of the values that a regression learns: it trains on standardised values.

The classifier is trained to give values of mean 0 and standard deviation 1. In eval mode, and as it
is written, it gives them in their own units: the written weights contain mean and deviation, so
that whatever loads them needs no more than the weights.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cvt.data import Images, LabelledImages
from cvt.problem_type import REGRESSION

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class TargetScale:
    """Mean and standard deviation of every value over the training images, (K,) each."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, images: Images) -> "TargetScale | None":
        """That of images to train on; None of classes.

        Raises:
            ValueError: a value is the same in all images; names it.
        """
        if images.task.problem_type != REGRESSION:
            return None
        assert isinstance(images, LabelledImages)
        values = torch.from_numpy(images.targets).double()
        deviation, mean = torch.std_mean(values, dim=0, correction=0)
        for name, low, high in zip(images.classes, values.amin(0), values.amax(0), strict=True):
            if low == high:
                raise ValueError(f"{name} is {low:g} in all training images: nothing to learn")
        return cls(mean.float(), deviation.float())

    def put_on(self, model: Any, are_in_units: bool = False) -> None:
        """Let the classifier of a model train on standardised values.

        Args:
            model: a classifier, without adapters.
            are_in_units: whether its weights are those of a trained model, as it was written.
        """
        head = model.classifier
        if are_in_units:
            with torch.no_grad():
                head.weight.div_(self.deviation[:, None])
                head.bias.sub_(self.mean).div_(self.deviation)
        head.__class__ = StandardisedLinear
        head.register_buffer("mean", self.mean.to(head.weight.device), persistent=False)
        head.register_buffer("deviation", self.deviation.to(head.weight.device), persistent=False)

    def standardised(self, targets: Tensor) -> Tensor:
        """Values, (B, K), as the classifier is trained to give them."""
        return (targets - self.mean.to(targets.device)) / self.deviation.to(targets.device)


class StandardisedLinear(nn.Linear):
    """A linear layer that trains on standardised values, and gives them in units in eval mode."""

    mean: Tensor
    deviation: Tensor

    def forward(self, features: Tensor) -> Tensor:
        """Values, (B, K), of features, (B, C)."""
        values = super().forward(features)
        return values if self.training else values.float() * self.deviation + self.mean


@torch.no_grad()
def in_units(model: Module) -> Module:
    """The model itself, with the scale of its values in new weights of its classifier."""
    for module in [each for each in model.modules() if isinstance(each, StandardisedLinear)]:
        module.weight = nn.Parameter(module.weight * module.deviation[:, None])
        module.bias = nn.Parameter(module.bias * module.deviation + module.mean)
        del module.mean, module.deviation
        module.__class__ = nn.Linear  # type: ignore[assignment]
    return model
