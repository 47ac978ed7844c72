"""The losses of an image classifier."""

import torch.nn.functional as F
from torch import Tensor

from .configuration import CvtConfig
from .problem_type import problem_of, unknown_classes


def classification_loss(logits: Tensor, labels: Tensor, config: CvtConfig) -> Tensor:
    """The loss of `config.problem_type`, or of the problem inferred from the labels.

    Args:
        logits: (B, K).
        labels: `regression` (assumed if K is 1): values, as many as logits, mean squared error;
            `single_label_classification` (assumed for integers): class indices (B,) or
            probabilities (B, K), cross-entropy; `multi_label_classification` (assumed for floats):
            0 to 1 each, (B, K), binary cross-entropy.
        config: its `problem_type` and `num_labels` are read.

    Raises:
        ValueError: the labels' shape does not fit, or an index is that of no class; of the latter
            a GPU has errors of its own, since a check would wait for it. PyTorch ignores -100.
    """
    problem, indices = problem_of(
        *(config.problem_type, config.num_labels, not labels.is_floating_point()),
        *(tuple(labels.shape), tuple(logits.shape)),
    )
    if indices:
        labels = labels.flatten().long()
        try:
            return F.cross_entropy(logits, labels)
        except IndexError as error:
            counted = labels[labels != -100].tolist()
            raise unknown_classes(counted, logits.shape[1]) from error
    targets = labels.reshape(logits.shape).to(logits.dtype)
    if problem == "regression":
        return F.mse_loss(logits, targets)
    if problem == "single_label_classification":
        return F.cross_entropy(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets)
