"""The layers of CvT in Keras 3, in the order of the paper (arXiv 2103.15808).

B batch, C channels, H W grid, N tokens (H·W, one more with a class token), h heads, d head width.
Tokens are (B, N, C), an image is (B, H, W, C): the same memory.

Layers have the names of the modules in `cvt.modeling`, with a hyphen for a dot, so that the path of
a weight gives its name in a state dict (`cvt.checkpoints.names`).
"""

import math
from typing import Any

import keras
from keras import initializers, layers, ops

from cvt.architecture import check_queries
from cvt.configuration import CvtConfig

register = keras.saving.register_keras_serializable(package="cvt")


def as_config(config: CvtConfig | dict[str, Any]) -> CvtConfig:
    """Return the config, created from its dict if necessary.

    Raises:
        TypeError: the config is neither a CvtConfig nor a dict.
    """
    if not isinstance(config, CvtConfig | dict):
        raise TypeError(
            f"config = {config!r}: must be a CvtConfig or its dict; from_pretrained takes names"
        )
    return config if isinstance(config, CvtConfig) else CvtConfig.from_dict(config)


# ------------------------------------------------------------------------------ initialisation


def convolution_initializer() -> initializers.Initializer:
    """Return PyTorch's default initializer of a convolution's kernel."""
    return initializers.VarianceScaling(1 / 3, "fan_in", "uniform")


def normal(config: CvtConfig) -> initializers.Initializer:
    """Return the equivalent of PyTorch's `trunc_normal_`, which cuts only at 100 deviations."""
    return initializers.RandomNormal(stddev=config.initializer_range)


def linear_initializer(config: CvtConfig) -> initializers.Initializer:
    """Return the authors' initializer of a Linear."""
    return initializers.GlorotUniform() if config.init == "xavier" else normal(config)


def uniform(fan_in: int) -> initializers.Initializer:
    """Return PyTorch's default initializer of a bias in a layer with `fan_in` inputs."""
    return initializers.RandomUniform(-(fan_in**-0.5), fan_in**-0.5)


# ------------------------------------------------------------------------------ elementary layers


def pad(image: Any, padding: int, extra: int = 0, value: float = 0.0) -> Any:
    """Pad (B, H, W, C) by `padding` on each side, and by `extra` more at the bottom and right."""
    if padding == extra == 0:
        return image
    sides = (padding, padding + extra)
    return ops.pad(image, ((0, 0), sides, sides, (0, 0)), constant_values=value)


def compiled_by_xla() -> bool:
    """Return whether the current call is traced for XLA.

    TensorFlow has no public function for this, and `model.jit_compile` does not cover a caller's
    own `tf.function(model, jit_compile=True)`. No other private function of TensorFlow or Keras is
    used in `cvt.keras`.
    """
    if keras.config.backend() != "tensorflow":
        return keras.config.backend() == "jax"
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


@register
def quick_gelu(x: Any) -> Any:
    """Compute the sigmoid approximation of GELU; the released models were trained with it."""
    return x * ops.sigmoid(1.702 * x)


@register
def gelu(x: Any) -> Any:
    """Compute the exact GELU, as transformers does."""
    return ops.gelu(x, approximate=False)


ACTIVATIONS = {"": None, "gelu": gelu, "quick_gelu": quick_gelu}


@register
class BatchNorm(layers.BatchNormalization):
    """BatchNormalization with an unbiased running variance, as in PyTorch."""

    def __init__(self, momentum: float = 0.9, epsilon: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(momentum=momentum, epsilon=epsilon, **kwargs)

    def call(self, x: Any, training: bool = False) -> Any:
        """Normalise an image, (B, H, W, C)."""
        if not (training and self.trainable):
            return super().call(x, training=False)
        previous = ops.copy(self.moving_variance)  # on PyTorch the variable is changed in place
        y = super().call(x, training=True)
        B, H, W, _ = ops.shape(x)
        # The increment holds the biased variance of n values; n / (n - 1) = 1 + 1 / (n - 1) times
        # the biased variance is the unbiased one.
        degrees_of_freedom = ops.cast(ops.maximum(B * H * W - 1, 1), previous.dtype)
        increment = self.moving_variance - self.momentum * previous
        self.moving_variance.assign_add(increment / degrees_of_freedom)
        return y


@register
class DropPath(layers.Layer):
    """Stochastic depth: drops a residual branch, sample by sample."""

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator() if rate else None
        self.built = True

    def call(self, x: Any, training: bool = False) -> Any:
        """Drop samples of (B, N, C) in training and scale the others to keep the mean."""
        if not training or self.rate == 0:
            return x
        draw = keras.random.uniform((ops.shape(x)[0], 1, 1), seed=self.seed_generator)
        return x / (1 - self.rate) * ops.cast(draw >= self.rate, x.dtype)

    def compute_output_shape(self, shape: tuple) -> tuple:
        return shape

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"rate": self.rate}


@register
class Dense(layers.Layer):
    """Linear, activation, dropout."""

    def __init__(
        self,
        width: int,
        dropout: float,
        activation: str = "",
        initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.width, self.rate, self.activation = width, dropout, activation
        self.initializer = initializers.get(initializer)
        self.dense = layers.Dense(
            width,
            activation=ACTIVATIONS[activation],
            kernel_initializer=self.initializer,
            name="dense",
            dtype=self.dtype_policy,
        )
        self.dropout = layers.Dropout(dropout, name="dropout", dtype=self.dtype_policy)

    def build(self, shape: tuple) -> None:
        self.dense.build(shape)

    def call(self, x: Any, training: bool = False) -> Any:
        """Map (B, N, C) to (B, N, width)."""
        return self.dropout(self.dense(x), training=training)

    def compute_output_shape(self, shape: tuple) -> tuple:
        """Return the shape (B, N, width)."""
        return (*shape[:-1], self.width)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "width": self.width,
            "dropout": self.rate,
            "activation": self.activation,
            "initializer": initializers.serialize(self.initializer),
        }


class CvtLayer(layers.Layer):
    """Base class of the layers of one stage.

    Args:
        config: the configuration of the model, or its dict.
        stage: the index of the stage, from 0.
        kwargs: arguments of `keras.layers.Layer`.
    """

    def __init__(self, config: CvtConfig | dict[str, Any], stage: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = as_config(config)
        self.number = stage
        self.stage = self.config.stages[stage]

    def norm(self, name: str) -> layers.LayerNormalization:
        """Create a LayerNorm; it computes in float32."""
        epsilon = self.config.layer_norm_eps
        return layers.LayerNormalization(epsilon=epsilon, name=name, dtype=self.dtype_policy)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"config": self.config.to_dict(), "stage": self.number}


# -------------------------------------------- convolutional token embedding, section 3.1


@register
class ConvEmbedding(CvtLayer):
    """Overlapping convolution and LayerNorm: image (B, H', W', C') to image (B, H, W, C)."""

    def __init__(self, config: CvtConfig | dict[str, Any], stage: int, **kwargs: Any) -> None:
        super().__init__(config, stage, **kwargs)
        self.projection = layers.Conv2D(
            self.stage.embed_dim,
            self.stage.patch_sizes,
            self.stage.patch_stride,
            kernel_initializer=convolution_initializer(),
            bias_initializer=uniform(self.stage.in_channels * self.stage.patch_sizes**2),
            name="projection",
            dtype=self.dtype_policy,
        )
        self.normalization = self.norm("normalization")

    def build(self, shape: tuple) -> None:
        self.projection.build(shape)
        self.normalization.build((None, None, None, self.stage.embed_dim))

    def call(self, image: Any) -> Any:
        return self.normalization(self.projection(pad(image, self.stage.patch_padding)))


def interpolation(size: int, new_size: Any) -> Any:
    """Return the weights, (new_size, size), that interpolate linearly along an axis.

    They are those of PyTorch's `interpolate(mode="bilinear")` along it.
    """
    places = ops.arange(size, dtype="float32")
    scale = size / ops.cast(new_size, "float32")
    centers = (ops.arange(new_size, dtype="float32") + 0.5) * scale - 0.5
    centers = ops.clip(centers, 0, size - 1)
    return ops.maximum(1 - ops.abs(centers[:, None] - places), 0)


def resize_tokens(tokens: Any, grid: tuple[int, int], size: tuple) -> Any:
    """Interpolate the tokens of a grid, (1, H·W, C), to those of another size, (1, H'·W', C)."""
    if all(isinstance(side, int) for side in size) and size == grid:
        return tokens
    (H, W), (rows, columns), C = grid, size, tokens.shape[-1]
    image = ops.matmul(interpolation(H, rows), ops.reshape(tokens, (H, W * C)))  # (H', W·C)
    image = ops.matmul(interpolation(W, columns), ops.reshape(image, (rows, W, C)))  # (H', W', C)
    return ops.reshape(image, (1, rows * columns, C))


# -------------------------------------------- convolutional projection for attention, section 3.2


class Window(layers.Layer):
    """Base class of the layers that slide a window of `kernel` x `kernel` over an image."""

    def __init__(self, kernel: int, stride: int, padding: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size, self.stride, self.padding = kernel, stride, padding

    def get_config(self) -> dict[str, Any]:
        sizes = {"kernel": self.size, "stride": self.stride, "padding": self.padding}
        return super().get_config() | sizes


@register
class DepthwiseConv(Window):
    """Depthwise convolution without bias, (B, H, W, C) to (B, H', W', C).

    The kernel is stored as (k, k, 1, C), the layout of a grouped convolution, so that one rule
    transposes every kernel of the network for PyTorch.
    """

    def build(self, shape: tuple) -> None:
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.size, self.size, 1, shape[-1]),
            initializer=convolution_initializer(),
        )

    def call(self, image: Any) -> Any:
        image, kernel = pad(image, self.padding), ops.cast(self.kernel, image.dtype)
        _, H, W, _ = image.shape
        if not compiled_by_xla() or H is None or W is None:
            kernel = ops.transpose(kernel, (0, 1, 3, 2))
            return ops.depthwise_conv(image, kernel, self.stride, data_format="channels_last")
        # XLA's depthwise convolution is slow on a CPU; it fuses a sum of shifted, weighted images.
        rows, columns = (range(0, size - self.size + 1, self.stride)[-1] + 1 for size in (H, W))
        return sum(
            image[:, i : i + rows : self.stride, j : j + columns : self.stride] * kernel[i, j, 0]
            for i in range(self.size)
            for j in range(self.size)
        )


@register
class AveragePooling(Window):
    """PyTorch's AvgPool2d with `ceil_mode=True`: the last window may extend beyond the image.

    The mean includes the zeros of the padding, but nothing beyond the padding.
    """

    def call(self, image: Any) -> Any:
        """Pool (B, H, W, C) to (B, H', W', C)."""
        _, H, W, _ = ops.shape(image)

        def pooled(padded: Any) -> Any:
            padded = pad(padded, 0, extra=self.stride - 1)
            windows = ops.average_pool(
                padded, self.size, self.stride, "valid", data_format="channels_last"
            )
            rows, columns = (-(-(size + self.padding) // self.stride) for size in (H, W))
            return windows[:, :rows, :columns]

        ones = pad(ops.ones_like(image[:1, :, :, :1]), self.padding, value=1.0)
        return pooled(pad(image, self.padding)) / pooled(ones)


@register
class Projection(CvtLayer):
    """Projection of an image (B, H, W, C) to tokens (B, H'·W', C) for query, key or value."""

    def __init__(
        self, config: CvtConfig | dict[str, Any], stage: int, part: str, **kwargs: Any
    ) -> None:
        super().__init__(config, stage, **kwargs)
        self.part = part
        method, query = self.stage.projection_methods[part], part == "query"
        window = (
            self.stage.kernel_qkv,
            self.stage.stride_q if query else self.stage.stride_kv,
            self.stage.padding_q if query else self.stage.padding_kv,
        )
        self.steps: list[layers.Layer] = []
        if method == "dw_bn":
            self.steps = [
                DepthwiseConv(
                    *window, name="convolution_projection-convolution", dtype=self.dtype_policy
                ),
                BatchNorm(name="convolution_projection-normalization", dtype=self.dtype_policy),
            ]
        elif method == "avg":
            self.steps = [AveragePooling(*window, name="pooling", dtype=self.dtype_policy)]

    def build(self, shape: tuple) -> None:
        for step in self.steps:
            step.build(shape)

    def call(self, image: Any, training: bool = False) -> Any:
        for step in self.steps:
            image = step(image, **({"training": training} if isinstance(step, BatchNorm) else {}))
        _, H, W, C = ops.shape(image)
        return ops.reshape(image, (-1, H * W, C))

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"part": self.part}


@register
class SelfAttention(CvtLayer):
    """Multi-head attention on projected tokens; the class token is not projected."""

    def __init__(self, config: CvtConfig | dict[str, Any], stage: int, **kwargs: Any) -> None:
        super().__init__(config, stage, **kwargs)
        self.projections, self.linears = [], []
        for part in ("query", "key", "value"):
            name, policy = f"convolution_projection_{part}", self.dtype_policy
            self.projections.append(Projection(self.config, stage, part, name=name, dtype=policy))
            self.linears.append(
                layers.Dense(
                    self.stage.embed_dim,
                    use_bias=self.stage.qkv_bias,
                    kernel_initializer=linear_initializer(self.config),
                    name=f"projection_{part}",
                    dtype=policy,
                )
            )
        self.dropout = layers.Dropout(self.stage.attention_drop_rate, dtype=self.dtype_policy)
        # The scale uses the whole width, not that of a head (authors: `Attention.__init__`).
        self.scale = self.stage.embed_dim**-0.5

    def build(self, shape: tuple) -> None:
        for projection, linear in zip(self.projections, self.linears, strict=True):
            projection.build((None, None, None, shape[-1]))
            linear.build(shape)

    def call(self, x: Any, grid: tuple, training: bool = False) -> tuple[Any, Any]:
        """Compute the context, (B, N, C), and the attention weights, (B, h, N, N').

        Args:
            x: tokens, (B, N, C): the class tokens, then the H·W tokens of the image.
            grid: H and W.
            training: as in Keras.
        """
        _, N, C = ops.shape(x)
        H, W = grid
        class_token, tokens = x[:, : N - H * W], x[:, N - H * W :]
        image = ops.reshape(tokens, (-1, H, W, C))

        def project(projection: Projection, linear: layers.Dense) -> Any:
            projected = projection(image, training=training)  # (B, H'·W', C)
            if self.stage.cls_token:
                projected = ops.concatenate((class_token, projected), axis=1)
            heads = (ops.shape(projected)[1], self.stage.num_heads, C // self.stage.num_heads)
            projected = ops.reshape(linear(projected), (-1, *heads))
            return ops.transpose(projected, (0, 2, 1, 3))  # (B, h, N, d)

        query, key, value = map(project, self.projections, self.linears)
        queries = ops.shape(query)[2]
        if isinstance(queries, int) and isinstance(N, int):  # a graph may have unknown sizes
            check_queries(queries, N, grid)
        weights = ops.matmul(query * self.scale, ops.transpose(key, (0, 1, 3, 2)))
        # Keras warns about a softmax over a single key.
        weights = ops.ones_like(weights) if key.shape[2] == 1 else ops.softmax(weights)
        context = ops.matmul(self.dropout(weights, training=training), value)  # (B, h, N, d)
        return ops.reshape(ops.transpose(context, (0, 2, 1, 3)), (-1, queries, C)), weights


# ------------------------------------------------------------------------------ the network


@register
class Block(CvtLayer):
    """Convolutional Transformer block: pre-norm attention and MLP with residual connections."""

    def __init__(
        self, config: CvtConfig | dict[str, Any], stage: int, block: int, **kwargs: Any
    ) -> None:
        super().__init__(config, stage, **kwargs)
        self.block = block
        width, rate = self.stage.embed_dim, self.stage.drop_rate
        hidden, act = int(width * self.stage.mlp_ratio), self.config.hidden_act
        initializer, policy = linear_initializer(self.config), self.dtype_policy
        name = "attention-attention"
        self.attention = SelfAttention(self.config, stage, name=name, dtype=policy)
        self.merge = Dense(width, rate, "", initializer, name="attention-output", dtype=policy)
        self.expand = Dense(hidden, rate, act, initializer, name="intermediate", dtype=policy)
        self.reduce = Dense(width, rate, "", initializer, name="output", dtype=policy)
        self.drop_path = DropPath(self.stage.drop_path_rates[block], dtype=policy)
        self.norm1, self.norm2 = self.norm("layernorm_before"), self.norm("layernorm_after")

    def build(self, shape: tuple) -> None:
        for layer in (self.norm1, self.attention, self.merge, self.norm2, self.expand):
            layer.build(shape)
        self.reduce.build((*shape[:-1], self.expand.width))

    def call(self, x: Any, grid: tuple, training: bool = False) -> tuple[Any, Any]:
        """Compute tokens, (B, N, C), and attention weights, (B, h, N, N'), from (B, N, C)."""
        attended, weights = self.attention(self.norm1(x), grid=grid, training=training)
        attended = self.merge(attended, training=training)
        x = x + self.drop_path(attended, training=training)
        mlp = self.reduce(self.expand(self.norm2(x), training=training), training=training)
        return x + self.drop_path(mlp, training=training), weights

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"block": self.block}


@register
class Stage(CvtLayer):
    """Token embedding, an optional class token and position embedding, and blocks."""

    def __init__(self, config: CvtConfig | dict[str, Any], stage: int, **kwargs: Any) -> None:
        super().__init__(config, stage, **kwargs)
        policy = self.dtype_policy
        name = "embedding-convolution_embeddings"
        self.embedding = ConvEmbedding(self.config, stage, name=name, dtype=policy)
        self.dropout = layers.Dropout(self.stage.drop_rate, name="dropout", dtype=policy)
        self.blocks = [
            Block(self.config, stage, block, name=f"layers-{block}", dtype=policy)
            for block in range(self.stage.depth)
        ]

    def build(self, shape: tuple) -> None:
        width = self.stage.embed_dim
        if self.stage.cls_token:
            self.cls_token = self.add_weight(
                name="cls_token", shape=(1, 1, width), initializer=normal(self.config)
            )
        if grid := self.stage.position_grid:
            self.position_embedding = self.add_weight(
                name="position_embedding",
                shape=(1, math.prod(grid), width),
                initializer=normal(self.config),
            )
        self.embedding.build(shape)
        for block in self.blocks:
            block.build((None, None, width))

    def call(self, image: Any, training: bool = False) -> tuple[Any, Any, tuple]:
        """Compute the stage's output from an image, (B, H', W', C').

        Returns:
            The image, (B, H, W, C), the class token, (B, 0 or 1, C), and the attention weights of
            every block, (B, h, N, N') each.
        """
        image = self.embedding(image)
        B, H, W, C = ops.shape(image)
        x = ops.reshape(image, (-1, H * W, C))
        if grid := self.stage.position_grid:
            positions = ops.convert_to_tensor(self.position_embedding)
            x = x + ops.cast(resize_tokens(positions, grid, (H, W)), x.dtype)
        if self.stage.cls_token:
            class_token = ops.cast(ops.convert_to_tensor(self.cls_token), x.dtype)
            x = ops.concatenate((ops.broadcast_to(class_token, (B, 1, C)), x), axis=1)
        x = self.dropout(x, training=training)
        attentions: tuple = ()
        grid = (H, W)
        if isinstance(H, int) != isinstance(W, int):  # Keras requires one type within a tuple
            grid = tuple(map(ops.convert_to_tensor, grid))
        for block in self.blocks:
            x, weights = block(x, grid=grid, training=training)
            attentions += (weights,)
        first = int(self.stage.cls_token)  # index of the first image token
        return ops.reshape(x[:, first:], (-1, H, W, C)), x[:, :first], attentions
