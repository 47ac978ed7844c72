"""The losses of an image classifier, as `cvt.losses` has them for PyTorch."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from cvt.configuration import CvtConfig
from cvt.keras.layers import register
from cvt.problem_type import problem_of, unknown_classes


def losses_of(logits: Any, labels: Any, problem: str) -> Any:
    """The loss of every image, (B,)."""
    logits = ops.cast(logits, "float32")
    if problem == "single_label_classification":
        if len(labels.shape) < 2 or labels.shape[1] == 1 != logits.shape[1]:
            indices = ops.cast(ops.reshape(labels, (-1,)), "int32")
            known = ops.logical_and(indices >= 0, indices < logits.shape[1])
            labels = ops.one_hot(ops.where(known, indices, 0), logits.shape[1])
            labels = ops.where(known[:, None], labels, float("nan"))  # a graph cannot raise
        return -ops.sum(ops.cast(labels, "float32") * ops.log_softmax(logits), axis=1)
    labels = ops.cast(ops.reshape(labels, ops.shape(logits)), "float32")
    if problem == "regression":
        return ops.mean(ops.square(logits - labels), axis=1)
    return ops.mean(ops.binary_crossentropy(labels, logits, from_logits=True), axis=1)


def with_known_rank(compute: Callable[[Any, Any], Any], labels: Any, logits: Any) -> Any:
    """compute(labels, logits), also in a graph of TensorFlow that takes (B,), (B, 1) and (B, K)."""
    if getattr(labels.shape, "rank", 0) is not None:
        return compute(labels, logits)
    shape = ops.shape(logits)
    return ops.cond(
        ops.size(labels) == shape[0],
        lambda: compute(ops.reshape(labels, (-1, 1)), logits),
        lambda: compute(ops.reshape(labels, shape), logits),
    )


def values_of(tensor: Any) -> np.ndarray | None:
    """The numbers of a tensor; None where it is traced and has none yet."""
    try:
        return np.asarray(ops.convert_to_numpy(tensor))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None


def classification_loss(logits: Any, labels: Any, config: CvtConfig) -> Any:
    """The loss of `config.problem_type`, or of the problem that the labels make likely.

    Args:
        logits: (B, K).
        labels: as `cvt.losses.classification_loss` takes them.
        config: its `problem_type` and `num_labels` are read.

    Raises:
        ValueError: the labels' shape does not fit, or an index is that of no class; in a compiled
            graph, which cannot raise, that makes the loss NaN.
    """
    labels = ops.convert_to_tensor(labels)
    integers = "int" in keras.backend.standardize_dtype(labels.dtype)
    problem, indices = problem_of(
        *(config.problem_type, config.num_labels, integers),
        *(tuple(labels.shape), tuple(logits.shape)),
    )
    known = values_of(labels) if indices else None
    if known is not None and not ((known >= 0) & (known < logits.shape[1])).all():
        raise unknown_classes(known.ravel().tolist(), logits.shape[1])
    return ops.mean(losses_of(logits, labels, problem))


def accuracy(labels: Any, logits: Any) -> Any:
    """Which images, (B,), get their class, an index, (B,) or (B, 1), or the largest of (B, K)."""
    return with_known_rank(_accuracy, labels, logits)


def _accuracy(labels: Any, logits: Any) -> Any:
    if len(labels.shape) < 2 or labels.shape[1] == 1:
        return keras.metrics.sparse_categorical_accuracy(ops.reshape(labels, (-1,)), logits)
    return keras.metrics.categorical_accuracy(labels, logits)


@register
class Accuracy(keras.metrics.MeanMetricWrapper):
    """The share of the images that get their class; labels may change their form between batches.

    Keras' own "accuracy" is for the form of the first batch.
    """

    def __init__(self, name: str = "accuracy", dtype: Any = None) -> None:
        super().__init__(accuracy, name=name, dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype}


@register
class ClassificationLoss(keras.losses.Loss):
    """The same as a loss of Keras, which `compile` takes; Keras hands it all labels as floats.

    Args:
        problem_type: of the config. If None: regression where there is one class, cross-entropy for
            class indices (B,) or (B, 1), binary cross-entropy for (B, K).
        num_labels: K.
        kwargs: Keras' own.
    """

    def __init__(self, problem_type: str | None, num_labels: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.problem_type, self.num_labels = problem_type, num_labels

    def call(self, labels: Any, logits: Any) -> Any:
        """Labels and logits (B, K) to the loss of every image, (B,)."""
        return with_known_rank(self._losses, labels, logits)

    def _losses(self, labels: Any, logits: Any) -> Any:
        indices = len(labels.shape) < 2 or labels.shape[1] == 1
        problem, _ = problem_of(
            *(self.problem_type, self.num_labels, indices),
            *(tuple(labels.shape), tuple(logits.shape)),
        )
        return losses_of(logits, labels, problem)

    def get_config(self) -> dict[str, Any]:
        own = {"problem_type": self.problem_type, "num_labels": self.num_labels}
        return super().get_config() | own
