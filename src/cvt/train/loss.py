"""The loss of a batch, by what the labels mean."""

import torch.nn.functional as F
from torch import Tensor

from cvt.problem_type import MULTI_LABEL
from cvt.train.balance import weighted_cross_entropy
from cvt.train.target_scale import TargetScale


def batch_loss(
    logits: Tensor,
    targets: Tensor,
    problem_type: str,
    smoothing: float,
    class_weights: Tensor | None = None,
    scale: TargetScale | None = None,
) -> Tensor:
    """The mean loss of a batch, ().

    Args:
        logits: (B, K).
        targets: classes (B,), mixed and smoothed ones (B, K), 0 or 1 for each class (B, K), or
            values (B, K).
        problem_type: of the recipe.
        smoothing: label smoothing of single classes.
        class_weights: of single classes, (K,).
        scale: of values, on which they are compared.
    """
    if scale:
        return F.mse_loss(logits, scale.standardised(targets))
    if problem_type == MULTI_LABEL:
        return F.binary_cross_entropy_with_logits(logits, targets)
    if class_weights is not None:
        return weighted_cross_entropy(logits, targets, class_weights, smoothing)
    smoothing = smoothing if targets.ndim == 1 else 0.0  # mixed targets have it
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)
