"""The layers of CvT in Keras 3, in the order of the paper (arXiv 2103.15808).

B batch, C channels, H W grid, N tokens (H·W, one more with a class token), h heads, d head width.
Tokens are (B, N, C), an image is (B, H, W, C): the same memory.

Layers are named as the modules of `cvt.modeling` are, with a hyphen for a dot, so that the path of
a weight tells its name in a state dict (`cvt.checkpoints.names`).
"""

from typing import Any

import keras
from keras import initializers, layers, ops

from cvt.configuration import CvtConfig, check_queries

register = keras.saving.register_keras_serializable(package="cvt")


def as_config(config: CvtConfig | dict[str, Any]) -> CvtConfig:
    """A config, or the one of a dict.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(config, CvtConfig | dict):
        raise TypeError(
            f"config = {config!r}: must be a CvtConfig or its dict; from_pretrained takes names"
        )
    return config if isinstance(config, CvtConfig) else CvtConfig.from_dict(config)


# ------------------------------------------------------------------------------ initialisation


def convolution_initializer() -> initializers.Initializer:
    """PyTorch's own for the kernel of a convolution."""
    return initializers.VarianceScaling(1 / 3, "fan_in", "uniform")


def normal(config: CvtConfig) -> initializers.Initializer:
    """PyTorch's truncated normal distribution: it is cut at 2, a hundred deviations away."""
    return initializers.RandomNormal(stddev=config.initializer_range)


def linear_initializer(config: CvtConfig) -> initializers.Initializer:
    """The authors' for Linears."""
    return initializers.GlorotUniform() if config.init == "xavier" else normal(config)


def uniform(inputs: int) -> initializers.Initializer:
    """PyTorch's own for the bias of what has so many inputs."""
    return initializers.RandomUniform(-(inputs**-0.5), inputs**-0.5)


# ------------------------------------------------------------------------------ elementary layers


def pad(image: Any, padding: int, behind: int = 0, value: float = 0.0) -> Any:
    """(B, H, W, C) with `padding` more rows and columns on each side, and `behind` after those."""
    if padding == behind == 0:
        return image
    sides = (padding, padding + behind)
    return ops.pad(image, ((0, 0), sides, sides, (0, 0)), constant_values=value)


def compiled_by_xla() -> bool:
    """Whether what is called now is traced for XLA."""
    if keras.config.backend() != "tensorflow":
        return keras.config.backend() == "jax"
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


@register
def quick_gelu(x: Any) -> Any:
    """The sigmoid approximation of GELU, with which the released models were trained."""
    return x * ops.sigmoid(1.702 * x)


@register
def gelu(x: Any) -> Any:
    """GELU itself, as transformers computes."""
    return ops.gelu(x, approximate=False)


ACTIVATIONS = {"": None, "gelu": gelu, "quick_gelu": quick_gelu}


@register
class BatchNorm(layers.BatchNormalization):
    """BatchNormalization that keeps the running variance without bias, as PyTorch does."""

    def __init__(self, momentum: float = 0.9, epsilon: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(momentum=momentum, epsilon=epsilon, **kwargs)

    def call(self, x: Any, training: bool = False) -> Any:
        """(B, H, W, C) to the same shape."""
        if not (training and self.trainable):
            return super().call(x, training=False)
        before = ops.copy(self.moving_variance)  # PyTorch changes it in place
        y = super().call(x, training=True)
        B, H, W, _ = ops.shape(x)
        others = ops.cast(ops.maximum(B * H * W - 1, 1), before.dtype)
        of_batch = self.moving_variance - self.momentum * before
        self.moving_variance.assign_add(of_batch / others)
        return y


@register
class DropPath(layers.Layer):
    """Stochastic depth: leaves a residual branch out, sample by sample."""

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator() if rate else None
        self.built = True

    def call(self, x: Any, training: bool = False) -> Any:
        """(B, N, C) to the same shape."""
        if not training or self.rate == 0:
            return x
        drawn = keras.random.uniform((ops.shape(x)[0], 1, 1), seed=self.seed_generator)
        return x / (1 - self.rate) * ops.cast(drawn >= self.rate, x.dtype)

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
        """(B, N, C) to (B, N, width)."""
        return self.dropout(self.dense(x), training=training)

    def compute_output_shape(self, shape: tuple) -> tuple:
        """(B, N, width)."""
        return (*shape[:-1], self.width)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "width": self.width,
            "dropout": self.rate,
            "activation": self.activation,
            "initializer": initializers.serialize(self.initializer),
        }


class CvtLayer(layers.Layer):
    """A layer of one stage.

    Args:
        config: the model's, or its dict.
        stage: which of its stages, from 0.
    """

    def __init__(self, config: CvtConfig | dict[str, Any], stage: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = as_config(config)
        self.number = stage
        self.stage = self.config.stages[stage]

    def norm(self, name: str) -> layers.LayerNormalization:
        """A LayerNorm of that name; it computes in float32."""
        epsilon = self.config.layer_norm_eps
        return layers.LayerNormalization(epsilon=epsilon, name=name, dtype=self.dtype_policy)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"config": self.config.to_dict(), "stage": self.number}


# -------------------------------------------- convolutional token embedding, section 3.1


@register
class ConvEmbedding(CvtLayer):
    """Image (B, H', W', C') to image (B, H, W, C): an overlapping convolution and a LayerNorm."""

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


# -------------------------------------------- convolutional projection for attention, section 3.2


class Window(layers.Layer):
    """What goes over an image in windows of `kernel` x `kernel`."""

    def __init__(self, kernel: int, stride: int, padding: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size, self.stride, self.padding = kernel, stride, padding

    def get_config(self) -> dict[str, Any]:
        sizes = {"kernel": self.size, "stride": self.stride, "padding": self.padding}
        return super().get_config() | sizes


@register
class DepthwiseConv(Window):
    """Depthwise convolution without bias, (B, H, W, C) to (B, H', W', C).

    Its kernel is (k, k, 1, C), a grouped convolution's, as every other of the network.
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
        # XLA's own is slow on a CPU; shifted images, weighed and summed, become a single loop.
        rows, columns = (range(0, size - self.size + 1, self.stride)[-1] + 1 for size in (H, W))
        return sum(
            image[:, i : i + rows : self.stride, j : j + columns : self.stride] * kernel[i, j, 0]
            for i in range(self.size)
            for j in range(self.size)
        )


@register
class AveragePooling(Window):
    """PyTorch's AvgPool2d with `ceil_mode`: a last window that begins inside is kept.

    Zeros of the padding count, what reaches beyond it does not.
    """

    def call(self, image: Any) -> Any:
        """(B, H, W, C) to (B, H', W', C)."""
        _, H, W, _ = ops.shape(image)

        def pooled(padded: Any) -> Any:
            padded = pad(padded, 0, behind=self.stride - 1)
            windows = ops.average_pool(
                padded, self.size, self.stride, "valid", data_format="channels_last"
            )
            inside = [-(-(size + self.padding) // self.stride) for size in (H, W)]
            return windows[:, : inside[0], : inside[1]]

        counted = pad(ops.ones_like(image[:1, :, :, :1]), self.padding, value=1.0)
        return pooled(pad(image, self.padding)) / pooled(counted)


@register
class Projection(CvtLayer):
    """Image (B, H, W, C) to the tokens (B, H'·W', C) that a query, key or value Linear reads."""

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
    """Multi-head attention on projected tokens; the class token skips the projection."""

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
        # The whole width, not the head's (authors: `Attention.__init__`); the weights expect it.
        self.scale = self.stage.embed_dim**-0.5

    def build(self, shape: tuple) -> None:
        for projection, linear in zip(self.projections, self.linears, strict=True):
            projection.build((None, None, None, shape[-1]))
            linear.build(shape)

    def call(self, x: Any, grid: tuple, training: bool = False) -> tuple[Any, Any]:
        """Tokens (B, N, C) to context (B, N, C) and weights (B, h, N, N').

        Args:
            x: the tokens, those before the last H·W of which are class tokens.
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
        if isinstance(queries, int) and isinstance(N, int):  # else they are not known yet
            check_queries(queries, N, grid)
        weights = ops.matmul(query * self.scale, ops.transpose(key, (0, 1, 3, 2)))
        # Of a single key Keras warns.
        weights = ops.ones_like(weights) if key.shape[2] == 1 else ops.softmax(weights)
        context = ops.matmul(self.dropout(weights, training=training), value)  # (B, h, N, d)
        return ops.reshape(ops.transpose(context, (0, 2, 1, 3)), (-1, queries, C)), weights


# ------------------------------------------------------------------------------ the network


@register
class Block(CvtLayer):
    """Convolutional Transformer block: attention and MLP, each normed before and residual."""

    def __init__(
        self, config: CvtConfig | dict[str, Any], stage: int, block: int, **kwargs: Any
    ) -> None:
        super().__init__(config, stage, **kwargs)
        self.block = block
        width, rate = self.stage.embed_dim, self.stage.drop_rate
        hidden, act = int(width * self.stage.mlp_ratio), self.config.hidden_act
        made, policy = linear_initializer(self.config), self.dtype_policy
        name = "attention-attention"
        self.attention = SelfAttention(self.config, stage, name=name, dtype=policy)
        self.merge = Dense(width, rate, "", made, name="attention-output", dtype=policy)
        self.expand = Dense(hidden, rate, act, made, name="intermediate", dtype=policy)
        self.reduce = Dense(width, rate, "", made, name="output", dtype=policy)
        self.drop_path = DropPath(self.stage.drop_path_rates[block], dtype=policy)
        self.norm1, self.norm2 = self.norm("layernorm_before"), self.norm("layernorm_after")

    def build(self, shape: tuple) -> None:
        for layer in (self.norm1, self.attention, self.merge, self.norm2, self.expand):
            layer.build(shape)
        self.reduce.build((*shape[:-1], self.expand.width))

    def call(self, x: Any, grid: tuple, training: bool = False) -> tuple[Any, Any]:
        """Tokens (B, N, C) to the same shape, and the attention weights (B, h, N, N')."""
        attended, weights = self.attention(self.norm1(x), grid=grid, training=training)
        attended = self.merge(attended, training=training)
        x = x + self.drop_path(attended, training=training)
        mlp = self.reduce(self.expand(self.norm2(x), training=training), training=training)
        return x + self.drop_path(mlp, training=training), weights

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"block": self.block}


@register
class Stage(CvtLayer):
    """Token embedding, class token where the stage has one, blocks."""

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
        self.embedding.build(shape)
        for block in self.blocks:
            block.build((None, None, width))

    def call(self, image: Any, training: bool = False) -> tuple[Any, Any, tuple]:
        """Image (B, H', W', C') to image (B, H, W, C), class token and the blocks' weights.

        The class token is (B, 0 or 1, C), the weights of attention are (B, h, N, N') each.
        """
        image = self.embedding(image)
        B, H, W, C = ops.shape(image)
        x = ops.reshape(image, (-1, H * W, C))
        if self.stage.cls_token:
            class_token = ops.cast(ops.convert_to_tensor(self.cls_token), x.dtype)
            x = ops.concatenate((ops.broadcast_to(class_token, (B, 1, C)), x), axis=1)
        x = self.dropout(x, training=training)
        attentions: tuple = ()
        grid = (H, W)
        if isinstance(H, int) != isinstance(W, int):  # Keras takes one kind alone in a tuple
            grid = tuple(map(ops.convert_to_tensor, grid))
        for block in self.blocks:
            x, weights = block(x, grid=grid, training=training)
            attentions += (weights,)
        ahead = int(self.stage.cls_token)
        return ops.reshape(x[:, ahead:], (-1, H, W, C)), x[:, :ahead], attentions
