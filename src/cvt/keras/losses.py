"""The losses and the accuracy of an image classifier; `cvt.losses` is the PyTorch version."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from cvt.configuration import CvtConfig
from cvt.keras.layers import register
from cvt.problem_type import problem_of, unknown_classes


def losses_per_image(logits: Any, labels: Any, problem: str) -> Any:
    """Compute the loss of every image, (B,)."""
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
    """Call `compute(labels, logits)` with labels of a static rank.

    A TensorFlow graph that accepts (B,), (B, 1) and (B, K) has labels of unknown rank; it computes
    with (B, 1) or (B, K), whichever fits their size.
    """
    if getattr(labels.shape, "rank", 0) is not None:
        return compute(labels, logits)
    shape = ops.shape(logits)
    return ops.cond(
        ops.size(labels) == shape[0],
        lambda: compute(ops.reshape(labels, (-1, 1)), logits),
        lambda: compute(ops.reshape(labels, shape), logits),
    )


def concrete_values(tensor: Any) -> np.ndarray | None:
    """Return the values of a tensor, or None while it is traced."""
    try:
        return np.asarray(ops.convert_to_numpy(tensor))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None


def classification_loss(logits: Any, labels: Any, config: CvtConfig) -> Any:
    """Compute the mean loss of `config.problem_type`, or of the problem inferred from the labels.

    Args:
        logits: (B, K).
        labels: as in `cvt.losses.classification_loss`.
        config: provides `problem_type` and `num_labels`.

    Raises:
        ValueError: the shape of the labels does not fit, or an index is out of range. A compiled
            graph cannot raise; there an index out of range gives a loss of NaN.
    """
    labels = ops.convert_to_tensor(labels)
    integers = "int" in keras.backend.standardize_dtype(labels.dtype)
    problem, indices = problem_of(
        *(config.problem_type, config.num_labels, integers),
        *(tuple(labels.shape), tuple(logits.shape)),
    )
    known = concrete_values(labels) if indices else None
    if known is not None and not ((known >= 0) & (known < logits.shape[1])).all():
        raise unknown_classes(known.ravel().tolist(), logits.shape[1])
    return ops.mean(losses_per_image(logits, labels, problem))


def accuracy(labels: Any, logits: Any) -> Any:
    """Return which images are classified correctly, (B,).

    Args:
        labels: class indices, (B,) or (B, 1), or one-hot labels, (B, K).
        logits: (B, K).
    """
    return with_known_rank(_accuracy, labels, logits)


def _accuracy(labels: Any, logits: Any) -> Any:
    if len(labels.shape) < 2 or labels.shape[1] == 1:
        return keras.metrics.sparse_categorical_accuracy(ops.reshape(labels, (-1,)), logits)
    return keras.metrics.categorical_accuracy(labels, logits)


@register
class Accuracy(keras.metrics.MeanMetricWrapper):
    """The fraction of correctly classified images, for class indices and one-hot labels.

    The form of the labels may change between batches; the metric "accuracy" of Keras keeps the form
    of the first batch.

    Example:
        >>> import numpy
        >>> from cvt.keras import Accuracy
        >>> accuracy = Accuracy()
        >>> logits = numpy.array([[0.1, 0.9], [0.2, 0.8]])
        >>> _ = accuracy.update_state(numpy.array([1, 0]), logits)
        >>> float(accuracy.result())
        0.5
    """

    def __init__(self, name: str = "accuracy", dtype: Any = None) -> None:
        super().__init__(accuracy, name=name, dtype=dtype)

    def get_config(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype}


@register
class ClassificationLoss(keras.losses.Loss):
    """`classification_loss` as a loss for `compile`; Keras converts all labels to floats for it.

    Args:
        problem_type: that of the config. None selects regression if there is one class,
            cross-entropy for class indices (B,) or (B, 1), and binary cross-entropy for (B, K).
        num_labels: K.
        kwargs: arguments of `keras.losses.Loss`.

    Example:
        >>> import numpy
        >>> from cvt.keras import ClassificationLoss
        >>> loss = ClassificationLoss("single_label_classification", num_labels=2)
        >>> float(loss(numpy.array([0, 1]), numpy.zeros((2, 2), "float32")))  # log 2
        0.693147...
    """

    def __init__(self, problem_type: str | None, num_labels: int | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.problem_type, self.num_labels = problem_type, num_labels

    def call(self, labels: Any, logits: Any) -> Any:
        """Compute the loss of every image, (B,), from labels and logits, (B, K)."""
        return with_known_rank(self._losses, labels, logits)

    def _losses(self, labels: Any, logits: Any) -> Any:
        indices = len(labels.shape) < 2 or labels.shape[1] == 1
        problem, _ = problem_of(
            *(self.problem_type, self.num_labels, indices),
            *(tuple(labels.shape), tuple(logits.shape)),
        )
        return losses_per_image(logits, labels, problem)

    def get_config(self) -> dict[str, Any]:
        own = {"problem_type": self.problem_type, "num_labels": self.num_labels}
        return super().get_config() | own
