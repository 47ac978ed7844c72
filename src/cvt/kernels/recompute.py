"""Training in less memory: the MLP's activation is recomputed in the backward pass."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cvt.modeling import Block


def recompute_activations(model: nn.Module) -> None:
    """Keep of every MLP only the hidden layer in front of its activation, for the backward pass.

    No matrix product is computed twice, and gradients stay as they are, bit for bit.

    Args:
        model: any of `cvt.modeling`; changed in place.

    Example:
        >>> import cvt, torch
        >>> from cvt.kernels import recompute_activations
        >>> model = cvt.CvtForImageClassification(cvt.CvtConfig.from_variant("cvt-digits"))
        >>> recompute_activations(model)
        >>> model(torch.rand(2, 3, 16, 16), labels=torch.tensor([3, 1])).loss.backward()
    """
    for module in model.modules():
        if isinstance(module, Block):
            module.__class__ = RecomputingBlock


class RecomputingBlock(Block):
    """A `Block` that keeps no activation."""

    def mlp(self, x: Tensor) -> Tensor:
        """(B, N, C) to the same, through the hidden layer."""
        if not (self.training and torch.is_grad_enabled()):
            return super().mlp(x)
        hidden = self.intermediate.dense(x)  # (B, N, mlp_ratio · C)
        has_dropout = self.intermediate.dropout.p > 0 or self.output.dropout.p > 0
        return checkpoint(
            self.activate_and_project, hidden, use_reentrant=False, preserve_rng_state=has_dropout
        )

    def activate_and_project(self, hidden: Tensor) -> Tensor:
        """(B, N, mlp_ratio · C) to (B, N, C)."""
        return self.output(self.intermediate.dropout(self.intermediate.activation(hidden)))
