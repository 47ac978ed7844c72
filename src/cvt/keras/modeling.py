"""CvT in Keras 3: the models that transformers 4 provided in TensorFlow.

The same code runs on TensorFlow, JAX and PyTorch. `KERAS_BACKEND` or the configuration file of
Keras selects the backend.
"""

import inspect
import os
from collections import namedtuple
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, cast

import keras
from keras import layers, ops

from cvt.architecture import check_memory
from cvt.configuration import CvtConfig
from cvt.keras import weights
from cvt.keras.layers import Stage, as_config, normal, register, uniform
from cvt.keras.losses import Accuracy, ClassificationLoss, classification_loss

DATA_FORMATS = ("channels_first", "channels_last")


def check_data_format(data_format: str) -> None:
    """Raise a ValueError unless `data_format` is one of `DATA_FORMATS`."""
    if data_format not in DATA_FORMATS:
        raise ValueError(f"data_format = {data_format!r}: must be one of {', '.join(DATA_FORMATS)}")


# ------------------------------------------------------------------------------ outputs


class Output(tuple):
    """A named tuple of the values that are not None; the other attributes are None.

    Neither a functional model of Keras nor a signature of a SavedModel can return None.
    """

    def __new__(cls, **values: Any) -> Self:
        """Create a tuple whose class has exactly these fields.

        The tree utilities of Keras, TensorFlow and JAX rebuild a named tuple from all its fields.
        """
        present = {name: value for name, value in values.items() if value is not None}
        return _with_fields(cls, tuple(present))._make(present.values())

    def to_tuple(self) -> tuple:
        """Return the values that are not None."""
        return tuple(self)

    def __getitem__(self, key: Any) -> Any:
        """Return a value by its name or by its index."""
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)

    def __reduce__(self) -> tuple:
        return _unpickled, (type(self).__bases__[1], cast(Any, self)._asdict())


@lru_cache
def _with_fields(kind: type[Output], names: tuple[str, ...]) -> Any:
    return type(kind.__name__, (namedtuple(kind.__name__, names), kind), {})


def _unpickled(kind: type[Output], values: dict[str, Any]) -> Output:
    return kind(**values)


class TFCvtModelOutput(Output):
    """The output of `TFCvtModel`.

    Attributes:
        last_hidden_state: the output of the last stage, (B, C, H, W), or (B, H, W, C) with
            `data_format="channels_last"`.
        cls_token_value: the class token, (B, 1, C); None if the last stage has none.
        hidden_states: the output of every stage, in the same format.
        attentions: the attention weights of every block, (B, heads, queries, keys) each.

    Example:
        >>> import numpy
        >>> from cvt import CvtConfig, TFCvtModel
        >>> model = TFCvtModel(CvtConfig.from_variant("cvt-digits"))
        >>> output = model(numpy.zeros((1, 3, 16, 16), "float32"), output_hidden_states=True)
        >>> len(output.hidden_states)
        3
    """

    last_hidden_state: Any = None
    cls_token_value: Any = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


class TFImageClassifierOutput(Output):
    """The output of `TFCvtForImageClassification`.

    Attributes:
        loss: a scalar; None without labels.
        logits: the logits, (B, K).
        hidden_states: as in `TFCvtModelOutput`.
        attentions: as in `TFCvtModelOutput`.

    Example:
        >>> import numpy
        >>> from cvt import CvtConfig, TFCvtForImageClassification
        >>> model = TFCvtForImageClassification(CvtConfig.from_variant("cvt-digits"))
        >>> output = model(numpy.zeros((1, 3, 16, 16), "float32"), labels=numpy.array([7]))
        >>> output.loss.shape, output.logits.shape
        (TensorShape([]), TensorShape([1, 1000]))
    """

    loss: Any = None
    logits: Any = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


# ------------------------------------------------------------------------------ models


@register
class Encoder(layers.Layer):
    """Applies the stages in sequence."""

    def __init__(self, config: CvtConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = as_config(config)
        self.stages = [
            Stage(self.config, i, name=f"stages-{i}", dtype=self.dtype_policy)
            for i in range(len(self.config.depth))
        ]

    def build(self, shape: tuple) -> None:
        """Create the weights for images of this shape."""
        for stage in self.stages:
            stage.build(shape)
            shape = (None, None, None, stage.stage.embed_dim)

    def call(self, image: Any, training: bool = False) -> tuple[Any, tuple, tuple]:
        """Compute the outputs of all stages from an image, (B, H, W, C).

        Returns:
            The class token, (B, 0 or 1, C), the image of every stage, (B, H', W', C') each, and the
            attention weights of every block, (B, h, N, N') each.
        """
        hidden_states: tuple = ()
        attentions: tuple = ()
        class_token = None
        for stage in self.stages:
            image, class_token, weights = stage(image, training=training)
            hidden_states += (image,)
            attentions += weights
        return class_token, hidden_states, attentions

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"config": self.config.to_dict()}


class TFCvtPreTrainedModel(keras.Model):
    """Base class: creates all weights at once, loads them strictly and saves them for PyTorch.

    Args:
        config: the configuration, or its dict.
        data_format: the format of input images and hidden states: `channels_first`, (B, C, H, W),
            or `channels_last`, (B, H, W, C).
        kwargs: arguments of `keras.Model`: `name`, and `dtype`, such as `mixed_bfloat16`.

    Raises:
        TypeError: the config is neither a CvtConfig nor a dict.
        ValueError: the data format is neither of the two, or a field of the config is illegal.
    """

    def __init__(
        self,
        config: CvtConfig | dict[str, Any],
        data_format: str = "channels_first",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_data_format(data_format)
        self.config = as_config(config)
        self.config.validate()
        check_memory(self.config)
        self.data_format = data_format

    @property
    def images_shape(self) -> tuple[int | None, ...]:
        """Return the shape of a batch of images of any size."""
        channels = self.config.num_channels
        first = self.data_format == "channels_first"
        return (None, channels, None, None) if first else (None, None, None, channels)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; every argument may be positional.

        `keras.layers.Layer` accepts only tensors as positional arguments, and appends lines to the
        errors that `call` raises, so pixels are checked before it.
        """
        pixels = args[0] if args else kwargs.get("pixel_values")
        checked_pixels(pixels, self.config, self.data_format)
        if len(args) > 1:
            names = [*inspect.signature(self.call).parameters][1 : len(args)]
            kwargs = dict(zip(names, args[1:], strict=True), **kwargs)
        return super().__call__(*args[:1], **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        data_format: str = "channels_first",
        dtype: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Load a trained model strictly: every weight must fit.

        Args:
            source: a model folder (of this package, of transformers 5, of transformers 4 in
                TensorFlow, of lucid-dl), a file of weights of any dialect, a published name or a
                hub id.
            data_format: as in the class.
            dtype: as in the class.
            kwargs: `config`, a CvtConfig or its dict that replaces the source's; fields of the
                config to override, such as `drop_path_rate`, or `num_labels`, which creates a new,
                random classifier of that many classes; options of the hub: `revision`, `token`,
                `cache_dir`, `local_files_only`, `force_download` and `subfolder`.

        Raises:
            TypeError: an argument is none of these; the message names it.
            ValueError: weights are missing, unexpected or of the wrong shape; the message lists
                all of them.
            OSError: the model does not exist or cannot be reached.
        """
        return weights.load(
            source, lambda config: cls(config, data_format=data_format, dtype=dtype), **kwargs
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which the PyTorch classes load.

        Existing files of these names are replaced; other files in the folder are kept.
        """
        weights.save(self, folder)

    def export(
        self, filepath: str | Path, *args: Any, input_signature: Any = None, **kwargs: Any
    ) -> None:
        """Export as in Keras; by default for any number and size of images."""
        if input_signature is None:  # Keras would take that of the last call, which must exist
            input_signature = [keras.InputSpec(shape=self.images_shape, dtype="float32")]
        super().export(filepath, *args, input_signature=input_signature, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments from which `from_config` recreates the model."""
        own = {"config": self.config.to_dict(), "data_format": self.data_format}
        return super().get_config() | own


@register
class TFCvtModel(TFCvtPreTrainedModel):
    """CvT without a classifier; its arguments are those of `TFCvtPreTrainedModel`.

    Example:
        >>> import numpy
        >>> from cvt import CvtConfig, TFCvtModel
        >>> model = TFCvtModel(CvtConfig.from_variant("cvt-digits"))
        >>> model(numpy.zeros((2, 3, 16, 16), "float32")).last_hidden_state.shape
        TensorShape([2, 128, 2, 2])
    """

    def __init__(
        self,
        config: CvtConfig | dict[str, Any],
        data_format: str = "channels_first",
        **kwargs: Any,
    ) -> None:
        super().__init__(config, data_format, **kwargs)
        self.encoder = Encoder(self.config, name="encoder", dtype=self.dtype_policy)
        self.build(self.images_shape)

    def build(self, shape: tuple) -> None:
        """Create the weights; their shapes do not depend on the image size."""
        if not self.encoder.built:
            self.encoder.build((None, None, None, self.config.num_channels))

    def call(
        self,
        pixel_values: Any,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
        output_attentions: bool | None = None,
    ) -> TFCvtModelOutput | tuple:
        """Compute the features of a batch of images.

        Args:
            pixel_values: normalised images, (B, C, H, W), or (B, H, W, C) with
                `data_format="channels_last"`; or a dict with the key `pixel_values`.
            output_hidden_states: return the output of every stage.
            return_dict: return a `TFCvtModelOutput` instead of a tuple.
            training: as in Keras.
            output_attentions: return the attention weights of every block. This argument is the
                last because the classes of transformers 4 do not have it.

        Raises:
            ValueError: the pixels have a wrong type, a wrong number of channels or too small a
                height or width.
        """
        config = self.config
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        image = channels_last(pixel_values, config, self.data_format)
        class_token, images, attentions = self.encoder(image, training=training)
        if self.data_format == "channels_first":
            images = tuple(ops.transpose(image, (0, 3, 1, 2)) for image in images)
        output = TFCvtModelOutput(
            last_hidden_state=images[-1],
            cls_token_value=class_token if config.cls_token[-1] else None,
            hidden_states=images if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )
        return_dict = config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


@register
class TFCvtForImageClassification(TFCvtPreTrainedModel):
    """CvT with a linear classifier on the class token, or on the mean token without one.

    Losses and metrics receive the logits, (B, K), so those of Keras work (`from_logits=True`), and
    `predict` returns the logits. Without a loss, `compile` selects that of `config.problem_type`.
    The arguments are those of `TFCvtPreTrainedModel`.

    Example:
        >>> import numpy
        >>> from cvt import CvtConfig, TFCvtForImageClassification
        >>> model = TFCvtForImageClassification(CvtConfig.from_variant("cvt-digits", num_labels=10))
        >>> model.compile(optimizer="adamw", metrics=["accuracy"])  # then model.fit(images, labels)
        >>> output = model(numpy.zeros((2, 3, 16, 16), "float32"), labels=numpy.array([3, 1]))
        >>> output.logits.shape
        TensorShape([2, 10])
    """

    def __init__(
        self,
        config: CvtConfig | dict[str, Any],
        data_format: str = "channels_first",
        **kwargs: Any,
    ) -> None:
        super().__init__(config, data_format, **kwargs)
        width, policy = self.config.embed_dim[-1], self.dtype_policy
        self.cvt = TFCvtModel(self.config, data_format, name="cvt", dtype=policy)
        self.layernorm = layers.LayerNormalization(
            epsilon=self.config.layer_norm_eps, name="layernorm", dtype=policy
        )
        self.classifier = None
        if self.config.num_labels:
            self.classifier = layers.Dense(
                self.config.num_labels,
                kernel_initializer=normal(self.config),
                bias_initializer=uniform(width),
                name="classifier",
                dtype=policy,
            )
        self.build(self.images_shape)

    def build(self, shape: tuple) -> None:
        """Create the weights; their shapes do not depend on the image size."""
        for layer in filter(None, (self.layernorm, self.classifier)):
            if not layer.built:
                layer.build((None, None, self.config.embed_dim[-1]))

    def call(
        self,
        pixel_values: Any,
        labels: Any = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
        output_attentions: bool | None = None,
    ) -> TFImageClassifierOutput | tuple:
        """Compute the logits of a batch of images, and the loss if labels are given.

        Args:
            pixel_values: as in `TFCvtModel`.
            labels: as in `cvt.keras.losses.classification_loss`.
            output_hidden_states: as in `TFCvtModel`.
            return_dict: return a `TFImageClassifierOutput` instead of a tuple.
            training: as in Keras.
            output_attentions: as in `TFCvtModel`.

        Raises:
            ValueError: the pixels or the labels do not fit.
        """
        output = self.cvt(
            pixel_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            training=training,
        )
        logits = self.pooled(output)
        if self.classifier is not None:
            logits = self.classifier(logits)  # (B, K)
        output = TFImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def pooled(self, output: TFCvtModelOutput) -> Any:
        """Return the features that the classifier receives, (B, C), of the output of `cvt`."""
        tokens = output.cls_token_value  # (B, 1, C)
        if tokens is None:
            image = output.last_hidden_state
            tokens = image if self.data_format == "channels_last" else to_channels_last(image)
            _, H, W, C = ops.shape(tokens)
            tokens = ops.reshape(tokens, (-1, H * W, C))
        return ops.mean(self.layernorm(tokens), axis=1)

    def compile(
        self, optimizer: Any = "rmsprop", loss: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Compile as in Keras; the default loss is `ClassificationLoss` of the config.

        The metric "accuracy" accepts class indices, (B,) or (B, 1), and one-hot labels, (B, K),
        also from one batch to the next.
        """
        if loss is None:
            loss = ClassificationLoss(self.config.problem_type, self.config.num_labels)
        if isinstance(metrics, list | tuple) and (self.config.num_labels or 0) > 1:
            is_accuracy = [metric in ("accuracy", "acc") for metric in metrics]
            metrics = [
                Accuracy(name=metric) if replaced else metric
                for metric, replaced in zip(metrics, is_accuracy, strict=True)
            ]
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile with the arguments of a saved model."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Compute the loss of the logits as in Keras; `x` may contain the labels."""
        labels, logits = select_labels(x, y), select_logits(y_pred)
        return super().compute_loss(x, labels, logits, sample_weight, training=training)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Compute the metrics of the logits as in Keras; `x` may contain the labels."""
        labels, logits = select_labels(x, y), select_logits(y_pred)
        return super().compute_metrics(x, labels, logits, sample_weight)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the logits of one batch."""
        output = super().predict_step(*args, **kwargs)
        if keras.config.backend() == "jax":  # its steps are stateless and return the state too
            output, state = output
            return select_logits(output), state
        return select_logits(output)


# ------------------------------------------------------------------------------ batches


def select_labels(inputs: Any, labels: Any) -> Any:
    """Return the labels, or those in a dict of inputs, as data sets of transformers have them."""
    return inputs.get("labels") if labels is None and isinstance(inputs, dict) else labels


def select_logits(output: Any) -> Any:
    """Return the logits of an output: an `Output`, a tuple whose first value they are, or logits.

    The steps of Keras call the model without labels, so that no loss precedes the logits.
    """
    if isinstance(output, TFImageClassifierOutput):
        return output.logits
    return output[0] if isinstance(output, tuple) else output


def to_channels_last(image: Any) -> Any:
    """Transpose (B, C, H, W) to (B, H, W, C)."""
    return ops.transpose(image, (0, 2, 3, 1))


def channels_last(pixel_values: Any, config: CvtConfig, data_format: str) -> Any:
    """Check the pixels and return them as (B, H, W, C)."""
    pixel_values = checked_pixels(pixel_values, config, data_format)
    return to_channels_last(pixel_values) if data_format == "channels_first" else pixel_values


def checked_pixels(pixel_values: Any, config: CvtConfig, data_format: str) -> Any:
    """Return the pixels, also from a dict with the key `pixel_values`.

    Raises:
        ValueError: the pixels have a wrong type or shape; the message states what was expected.
    """
    if isinstance(pixel_values, dict):
        pixel_values = pixel_values.get("pixel_values")
    if not hasattr(pixel_values, "shape") or not hasattr(pixel_values, "dtype"):
        raise ValueError(
            f"pixel_values are of type {type(pixel_values).__name__}; expected one array or tensor"
        )
    shape, first = tuple(pixel_values.shape), data_format == "channels_first"
    channels = config.num_channels
    expected = (
        f"(batch, {channels}, height, width)" if first else f"(batch, height, width, {channels})"
    )
    dtype = keras.backend.standardize_dtype(pixel_values.dtype)
    if "float" not in dtype:
        raise ValueError(
            f"pixel_values are {dtype}; expected floats, normalised as cvt.image_processor does"
        )
    if len(shape) != 4 or shape[1 if first else 3] not in (channels, None) or shape[0] == 0:
        raise ValueError(
            f"pixel_values have shape {shape}; with data_format = {data_format} expected {expected}"
        )
    minimum = config.minimum_image_size
    sides = shape[2:] if first else shape[1:3]
    if any(side is not None and side < minimum for side in sides):
        raise ValueError(
            f"pixel_values are {sides[0]} x {sides[1]} pixels; this model needs at least "
            f"{minimum} x {minimum}"
        )
    return pixel_values
