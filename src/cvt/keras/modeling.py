"""CvT in Keras 3: the models that earlier versions of transformers had in TensorFlow.

The same code runs on TensorFlow, JAX and PyTorch, as `KERAS_BACKEND` or Keras' own settings say.
"""

import inspect
import os
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, cast

import keras
from keras import layers, ops

from cvt.configuration import CvtConfig, check_memory
from cvt.keras import weights
from cvt.keras.layers import Stage, as_config, normal, register, uniform
from cvt.keras.losses import Accuracy, ClassificationLoss, classification_loss

DATA_FORMATS = ("channels_first", "channels_last")


# ------------------------------------------------------------------------------ outputs


class Output(tuple):
    """A named tuple of those values that are not None; attributes of the others are None.

    None is what no functional model of Keras and no signature of a SavedModel can give.
    """

    def __new__(cls, **values: Any) -> Self:
        """Of a class with exactly these fields, as trees of Keras, TensorFlow and JAX need it."""
        present = {name: value for name, value in values.items() if value is not None}
        return _with_fields(cls, tuple(present))._make(present.values())

    def to_tuple(self) -> tuple:
        """The values that are not None."""
        return tuple(self)

    def __getitem__(self, key: Any) -> Any:
        """A value by its name, or by its place."""
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)

    def __reduce__(self) -> tuple:
        return _unpickled, (type(self).__bases__[1], cast(Any, self)._asdict())


@lru_cache
def _with_fields(kind: type[Output], names: tuple[str, ...]) -> Any:
    return type(kind.__name__, (namedtuple(kind.__name__, names), kind), {})


def _unpickled(kind: type[Output], values: dict[str, Any]) -> Output:
    return kind(**values)


class TFCvtModelOutput(Output):
    """What `TFCvtModel` returns.

    Attributes:
        last_hidden_state: output of the last stage, (B, C, H, W), or (B, H, W, C) as the model's
            `data_format` says.
        cls_token_value: its class token, (B, 1, C); None where the last stage has none.
        hidden_states: the output of every stage, shaped like the last.
        attentions: the attention weights of every block, (B, heads, queries, keys) each.
    """

    last_hidden_state: Any = None
    cls_token_value: Any = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


class TFImageClassifierOutput(Output):
    """What `TFCvtForImageClassification` returns.

    Attributes:
        loss: a scalar, where labels are given.
        logits: (B, K).
        hidden_states: as in `TFCvtModelOutput`.
        attentions: likewise.
    """

    loss: Any = None
    logits: Any = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


# ------------------------------------------------------------------------------ models


@register
class Encoder(layers.Layer):
    """The stages, one after the other."""

    def __init__(self, config: CvtConfig | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = as_config(config)
        self.stages = [
            Stage(self.config, i, name=f"stages-{i}", dtype=self.dtype_policy)
            for i in range(len(self.config.depth))
        ]

    def build(self, shape: tuple) -> None:
        """Make the weights, for images of the shape."""
        for stage in self.stages:
            stage.build(shape)
            shape = (None, None, None, stage.stage.embed_dim)

    def call(self, image: Any, training: bool = False) -> tuple[Any, tuple, tuple]:
        """(B, H, W, C) to class token (B, 0 or 1, C), every stage's image and block's weights."""
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
    """What the models share: weights are made at once, loaded strictly and saved for PyTorch too.

    Args:
        config: the model's, or its dict.
        data_format: of the images that it takes and the hidden states that it gives:
            `channels_first`, (B, C, H, W), or `channels_last`, (B, H, W, C).
        kwargs: Keras' own: `name`, and `dtype`, as `mixed_bfloat16`.

    Raises:
        TypeError: the config is something else.
        ValueError: the data format is none of these, or a field of the config is illegal.
    """

    def __init__(
        self,
        config: CvtConfig | dict[str, Any],
        data_format: str = "channels_first",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if data_format not in DATA_FORMATS:
            raise ValueError(
                f"data_format = {data_format!r}: must be one of {', '.join(DATA_FORMATS)}"
            )
        self.config = as_config(config)
        self.config.validate()
        check_memory(self.config)
        self.data_format = data_format

    @property
    def images_shape(self) -> tuple[int | None, ...]:
        """The shape of a batch of images of any size."""
        channels = self.config.num_channels
        first = self.data_format == "channels_first"
        return (None, channels, None, None) if first else (None, None, None, channels)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments of `call`, by position too: Keras itself takes none but tensors so."""
        pixels = args[0] if args else kwargs.get("pixel_values")
        checked_pixels(pixels, self.config, self.data_format)  # Keras would add lines to the error
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
        """A trained model; its weights must fit, all of them.

        Args:
            source: a model folder (ours, of transformers 5 or, with a tf_model.h5, of transformers
                4), an authors' .pth file, a published name or a hub id.
            data_format: as in the class.
            dtype: as in the class.
            kwargs: `config`, a CvtConfig or its dict, in the place of the source's; fields of the
                config to set otherwise, as `num_labels` for a new, random classifier of so many
                classes or `drop_path_rate`; for the hub `revision`, `token`,
                `cache_dir`, `local_files_only` and the like.

        Raises:
            TypeError: an argument is none of these; names it.
            ValueError: weights are missing, unexpected or of the wrong shape; lists all of them.
            OSError: there is no such model, or it cannot be reached.
        """
        return weights.load(
            source, lambda config: cls(config, data_format=data_format, dtype=dtype), **kwargs
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which the PyTorch classes open.

        Files of these names are replaced, others in the folder are left alone.
        """
        weights.save(self, folder)

    def export(
        self, filepath: str | Path, *args: Any, input_signature: Any = None, **kwargs: Any
    ) -> None:
        """As in Keras; for any number and size of images where no signature is given."""
        if input_signature is None:  # Keras would take that of the last call, and demand one
            input_signature = [keras.InputSpec(shape=self.images_shape, dtype="float32")]
        super().export(filepath, *args, input_signature=input_signature, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """What `from_config` makes it of again."""
        own = {"config": self.config.to_dict(), "data_format": self.data_format}
        return super().get_config() | own


@register
class TFCvtModel(TFCvtPreTrainedModel):
    """CvT without a head; arguments as in `TFCvtPreTrainedModel`."""

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
        """Make the weights; they are the same for all sizes of images."""
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
        """Features of a batch of images.

        Args:
            pixel_values: normalised images, (B, C, H, W), or (B, H, W, C) as `data_format` says; or
                a dict that has them under this name.
            output_hidden_states: return the output of every stage.
            return_dict: return a `TFCvtModelOutput` rather than a tuple.
            training: as in Keras.
            output_attentions: return the attention weights of every block. Last, since the classes
                of transformers 4 did not take it.

        Raises:
            ValueError: wrong type or number of channels, or too small an image.
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
    """CvT with a linear classifier on the class token, or on the mean token where there is none.

    `fit`, `evaluate` and `predict` see the logits alone, (B, K), so losses and metrics are Keras'
    own (`from_logits=True`). Compiled without a loss, it trains on that of `config.problem_type`.
    Arguments as in `TFCvtPreTrainedModel`.
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
        self.only_logits = False
        self.build(self.images_shape)

    def build(self, shape: tuple) -> None:
        """Make the weights; they are the same for all sizes of images."""
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
        """Logits of a batch of images, and the loss where labels are given.

        Args:
            pixel_values: as in `TFCvtModel`.
            labels: see `cvt.keras.losses.classification_loss`.
            output_hidden_states: as in `TFCvtModel`.
            return_dict: return a `TFImageClassifierOutput` rather than a tuple.
            training: as in Keras.
            output_attentions: as in `TFCvtModel`.

        Raises:
            ValueError: as in `TFCvtModel`, or labels that do not fit.
        """
        output = self.cvt(
            pixel_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            training=training,
        )
        tokens = output.cls_token_value  # (B, 1, C)
        if tokens is None:
            image = output.last_hidden_state
            tokens = image if self.data_format == "channels_last" else to_channels_last(image)
            _, H, W, C = ops.shape(tokens)
            tokens = ops.reshape(tokens, (-1, H * W, C))
        logits = ops.mean(self.layernorm(tokens), axis=1)
        if self.classifier is not None:
            logits = self.classifier(logits)  # (B, K)
        if self.only_logits:
            return logits
        output = TFImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def compile(
        self, optimizer: Any = "rmsprop", loss: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        """As in Keras; without a loss, `ClassificationLoss` of the config.

        The metric "accuracy" takes class indices, (B,) or (B, 1), and one-hot labels in turn.
        """
        if loss is None:
            loss = ClassificationLoss(self.config.problem_type, self.config.num_labels)
        if isinstance(metrics, list | tuple) and (self.config.num_labels or 0) > 1:
            by_name = [each in ("accuracy", "acc") for each in metrics]
            metrics = [
                Accuracy(name=each) if named else each
                for each, named in zip(metrics, by_name, strict=True)
            ]
        super().compile(optimizer=optimizer, loss=loss, metrics=metrics, **kwargs)

    def compute_loss(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; labels may be among the inputs, as data sets of transformers have them."""
        return super().compute_loss(x, labels_of(x, y), *args, **kwargs)

    def compute_metrics(self, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Keras; labels likewise."""
        return super().compute_metrics(x, labels_of(x, y), *args, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as a saved model was."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def _resolve_auto_jit_compile(self) -> bool:
        # On a CPU TensorFlow trains without XLA at nearly twice the speed, and starts at once.
        if keras.config.backend() == "tensorflow":
            import tensorflow as tf

            return bool(tf.config.list_physical_devices("GPU"))
        return super()._resolve_auto_jit_compile()

    def _symbolic_build(self, *args: Any, **kwargs: Any) -> Any:
        with self._logits():
            return super()._symbolic_build(*args, **kwargs)

    @contextmanager
    def _logits(self) -> Iterator[None]:
        self.only_logits = True
        try:
            yield
        finally:
            self.only_logits = False

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras, on the logits."""
        with self._logits():
            return super().train_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras, on the logits."""
        with self._logits():
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras: the logits."""
        with self._logits():
            return super().predict_step(*args, **kwargs)


# ------------------------------------------------------------------------------ pixels


def to_channels_last(image: Any) -> Any:
    """(B, C, H, W) to (B, H, W, C)."""
    return ops.transpose(image, (0, 2, 3, 1))


def labels_of(inputs: Any, labels: Any) -> Any:
    """The labels, which may be in a dict with the pixels."""
    return inputs.get("labels") if labels is None and isinstance(inputs, dict) else labels


def channels_last(pixel_values: Any, config: CvtConfig, data_format: str) -> Any:
    """The pixels as (B, H, W, C), or a ValueError that names what was expected."""
    pixel_values = checked_pixels(pixel_values, config, data_format)
    return to_channels_last(pixel_values) if data_format == "channels_first" else pixel_values


def checked_pixels(pixel_values: Any, config: CvtConfig, data_format: str) -> Any:
    """The pixels, or a ValueError that names what was expected."""
    if isinstance(pixel_values, dict):  # the name by which data sets of transformers have them
        pixel_values = pixel_values.get("pixel_values")
    if not hasattr(pixel_values, "shape") or not hasattr(pixel_values, "dtype"):
        raise ValueError(
            f"pixel_values are of type {type(pixel_values).__name__}; expected one array or tensor"
        )
    shape, first = tuple(pixel_values.shape), data_format == "channels_first"
    channels = config.num_channels
    wanted = (
        f"(batch, {channels}, height, width)" if first else f"(batch, height, width, {channels})"
    )
    dtype = keras.backend.standardize_dtype(pixel_values.dtype)
    if "float" not in dtype:
        raise ValueError(
            f"pixel_values are {dtype}; expected floats, normalised as cvt.image_processor does"
        )
    if len(shape) != 4 or shape[1 if first else 3] not in (channels, None) or shape[0] == 0:
        raise ValueError(
            f"pixel_values have shape {shape}; with data_format = {data_format} expected {wanted}"
        )
    least = config.minimum_image_size
    sides = shape[2:] if first else shape[1:3]
    if any(side is not None and side < least for side in sides):
        raise ValueError(
            f"pixel_values are {sides[0]} x {sides[1]} pixels; this model needs at least "
            f"{least} x {least}"
        )
    return pixel_values
