"""The inference form of a CvT, `cvt.fuse(model)`: the same outputs from less work.

BatchNorm is folded into the depthwise convolutions, the scale of the attention into the query's
Linear, the constants of QuickGELU into the Linears around it. On a CPU, weights are packed for
oneDNN when they are first used, and batches are cut so that a block's work stays in the cache.
Where the logits alone are wanted, the last block computes nothing but its class token.

Shapes are as in `modeling.py`: B batch, C channels, H W grid, N tokens, h heads, d head width.
"""

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput

from cvt.backbone import CvtBackbone
from cvt.configuration import check_queries, checked_pixels
from cvt.modeling import (
    Block,
    CvtForImageClassification,
    CvtModel,
    CvtModelOutput,
    Projection,
    QuickGELU,
    Stage,
    channels_last,
    split_tokens,
    to_heads,
    to_image,
    to_tokens,
)

# Numbers in the hidden layer of an MLP that still pass through a processor's caches.
CACHED = 2**22

# ------------------------------------------------------------------------------ operators


def is_captured() -> bool:
    """Whether the operators become a graph, of torch.compile, torch.export or a trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def silu_is_separate() -> bool:
    """Whether silu takes longer within oneDNN's products than after them, as with AVX2."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def expect_plain(module: Any, kind: type[nn.Module]) -> Any:
    """`module`, which is what the model was built of, not an adapter around it or another head.

    Raises:
        TypeError: it is no `kind`, or computes something else than that.
    """
    computed_by = type(module).forward.__module__
    as_built = computed_by.startswith(("torch.nn.", "cvt.")) and "forward" not in vars(module)
    if not isinstance(module, kind) or not as_built:
        raise TypeError(
            f"the model has a {type(module).__module__}.{type(module).__qualname__} where fuse "
            f"knows a plain {kind.__name__} only; merge adapters into the model before fusing it"
        )
    return module


class Operator(nn.Module):
    """A weight and a bias, which no state dict holds, and the weight packed for oneDNN."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        for name, tensor in (("weight", weight), ("bias", bias)):
            kept = None if tensor is None else tensor.detach().to(dtype, copy=True)
            self.register_buffer(name, kept, persistent=False)
        self.packed: Tensor | None = None

    def packs(self) -> bool:
        """Whether the packed weight is to be used: not while PyTorch traces what is computed."""
        return (
            self.weight.device.type == "cpu"
            and not is_captured()
            and not torch.is_autocast_enabled("cpu")  # which knows PyTorch's own operators only
            and torch.backends.mkldnn.is_available()
            and (self.weight.dtype is torch.float32 or self.is_native_bfloat16())
        )

    def is_native_bfloat16(self) -> bool:
        """Whether the weight is in bfloat16 and this processor computes with it."""
        return self.weight.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"packed": None}  # it can be neither copied nor pickled

    def _apply(self, fn: Any, recurse: bool = True) -> "Operator":
        self.packed = None
        return super()._apply(fn, recurse)


class Linear(Operator):
    """Linear and its activation: none, gelu or silu."""

    ONEDNN = {"": ("none", ""), "gelu": ("gelu", "none"), "silu": ("swish", "")}

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str = ""
    ) -> None:
        super().__init__(weight, bias, dtype)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.packs():
            operators = torch.ops.mkldnn
            if self.packed is None:
                rows = x[..., 0].numel()
                self.packed = operators._reorder_linear_weight(self.weight, rows)
            separate = self.activation == "silu" and silu_is_separate()
            name, algorithm = self.ONEDNN["" if separate else self.activation]
            y = operators._linear_pointwise(x, self.packed, self.bias, name, [], algorithm)
            return F.silu(y, inplace=True) if separate else y
        y = F.linear(x, self.weight, self.bias)
        return getattr(F, self.activation)(y) if self.activation else y


class Conv(Operator):
    """Convolution of (B, C, H, W), channels-last."""

    def __init__(
        self, convolution: nn.Conv2d, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(weight, bias, dtype)
        geometry = (convolution.padding, convolution.stride, convolution.dilation)
        self.geometry: list[Any] = [*map(list, geometry), convolution.groups]

    def grid(self, size: Iterable[int]) -> list[int]:
        """Rows and columns of what comes out of an image of `size`, (H, W)."""
        padding, stride, _, _ = self.geometry
        numbers = zip(size, self.weight.shape[2:], padding, stride, strict=True)
        return [(n + 2 * pad - kernel) // step + 1 for n, kernel, pad, step in numbers]

    def forward(self, image: Tensor) -> Tensor:
        padding, stride, dilation, groups = self.geometry
        if self.packs():
            operators = torch.ops.mkldnn
            if self.packed is None:
                self.packed = operators._reorder_convolution_weight(
                    self.weight, *self.geometry, list(image.shape)
                )
            return operators._convolution_pointwise(
                image, self.packed, self.bias, *self.geometry, "none", [], ""
            )
        return F.conv2d(image, self.weight, self.bias, stride, padding, dilation, groups)


class LayerNorm(Operator):
    """LayerNorm over channels."""

    def __init__(self, norm: nn.LayerNorm, dtype: torch.dtype) -> None:
        super().__init__(expect_plain(norm, nn.LayerNorm).weight, norm.bias, dtype)
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def pooling(pool: nn.AvgPool2d) -> nn.Module:
    """The same averages, padded before: OpenVINO divides those of `ceil_mode` by other numbers."""
    kernel, stride, pad = cast(list[int], [pool.kernel_size, pool.stride, pool.padding])
    if stride + pad > kernel:  # PyTorch leaves out windows that lie in the padding alone
        return nn.AvgPool2d(kernel, stride, pad, pool.ceil_mode)
    averages = nn.AvgPool2d(kernel, stride, 0, pool.ceil_mode, count_include_pad=False)
    return nn.Sequential(nn.ZeroPad2d(pad), averages)


def folded(projection: Projection, dtype: torch.dtype) -> nn.Module:
    """The convolution of a projection with its BatchNorm in it; pooling or nothing as it is."""
    module: Any = projection.convolution_projection
    if isinstance(module, nn.Identity):
        return nn.Identity()
    if isinstance(module, nn.AvgPool2d):
        return pooling(module)
    convolution, norm = expect_plain(module[0], nn.Conv2d), expect_plain(module[1], _BatchNorm)
    return Conv(convolution, *fold(convolution, norm), dtype)


def fold(convolution: nn.Conv2d, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias, in double precision, of a convolution with its BatchNorm in it."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    bias = norm.bias.double() - norm.running_mean.double() * gain
    return convolution.weight.double() * gain[:, None, None, None], bias


def scaled(linear: nn.Linear, dtype: torch.dtype, by: float = 1.0, activation: str = "") -> Linear:
    """A Linear whose output is `by` times as large, in front of an activation."""
    bias = expect_plain(linear, nn.Linear).bias
    scaled_bias = None if bias is None else bias.double() * by
    return Linear(linear.weight.double() * by, scaled_bias, dtype, activation)


# ------------------------------------------------------------------------------ the network


class FusedBlock(nn.Module):
    """A `Block`, or, of the last one, only what the class token needs."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        super().__init__()
        attention = block.attention.attention
        self.heads = attention.num_heads
        self.norm1 = LayerNorm(block.layernorm_before, dtype)
        self.convolve_query = folded(attention.convolution_projection_query, dtype)
        self.convolve_key = folded(attention.convolution_projection_key, dtype)
        self.convolve_value = folded(attention.convolution_projection_value, dtype)
        self.query = scaled(attention.projection_query, dtype, by=attention.scale)
        self.key = scaled(attention.projection_key, dtype)
        self.value = scaled(attention.projection_value, dtype)
        self.out = scaled(block.attention.output.dense, dtype)
        self.norm2 = LayerNorm(block.layernorm_after, dtype)
        fc1, fc2 = block.intermediate.dense, block.output.dense
        if isinstance(block.intermediate.activation, QuickGELU):  # silu(1.702 x) / 1.702
            self.fc1 = scaled(fc1, dtype, 1.702, "silu")
            self.fc2 = Linear(expect_plain(fc2, nn.Linear).weight.double() / 1.702, fc2.bias, dtype)
        else:
            expect_plain(block.intermediate.activation, nn.GELU)
            self.fc1, self.fc2 = scaled(fc1, dtype, activation="gelu"), scaled(fc2, dtype)

    def forward(
        self, x: Tensor, grid: tuple[int, int], attentions: bool, class_token_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        N, (H, W) = x.shape[1], grid
        convolution = self.convolve_query
        queries = math.prod(convolution.grid(grid) if isinstance(convolution, Conv) else grid)
        check_queries(queries + N - H * W, N, grid)
        normed = self.norm1(x)
        class_token, tokens = split_tokens(normed, grid)  # (B, 1, C) or None, (B, H·W, C)
        image = to_image(tokens, grid)  # (B, C, H, W)

        def convolved(convolve: nn.Module) -> Tensor:
            projected = to_tokens(convolve(image))  # (B, H'·W', C)
            if class_token is not None:
                projected = torch.cat((class_token, projected), dim=1)
            return projected

        if class_token_only:
            x, query_input = x[:, :1], normed[:, :1]
            key_input, value_input = convolved(self.convolve_key), convolved(self.convolve_value)
        else:
            query_input = convolved(self.convolve_query)
            key_input, value_input = convolved(self.convolve_key), convolved(self.convolve_value)
        query, key, value = (
            to_heads(projected, self.heads)  # (B, h, N, d)
            for projected in (self.query(query_input), self.key(key_input), self.value(value_input))
        )
        weights = None
        if attentions:
            weights = (query @ key.transpose(2, 3)).softmax(dim=-1)  # (B, h, N, N')
            context = weights @ value
        else:
            context = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        x = x + self.out(context.transpose(1, 2).flatten(2))
        return x + self.fc2(self.fc1(self.norm2(x))), weights


class FusedStage(nn.Module):
    """A `Stage`, from an image to its tokens, class token included."""

    cls_token: Tensor | None

    def __init__(self, stage: Stage, dtype: torch.dtype) -> None:
        super().__init__()
        embedding: Any = stage.embedding.convolution_embeddings
        convolution = expect_plain(embedding.projection, nn.Conv2d)
        self.embed = Conv(convolution, convolution.weight, convolution.bias, dtype)
        self.norm = LayerNorm(embedding.normalization, dtype)
        token = None if stage.cls_token is None else stage.cls_token.detach().to(dtype, copy=True)
        self.register_buffer("cls_token", token, persistent=False)
        blocks = [FusedBlock(cast(Block, block), dtype) for block in stage.layers]
        self.hidden = blocks[0].fc1.weight.shape[0]
        self.blocks = nn.ModuleList(blocks)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of the tokens of `image`, (B, C', H', W')."""
        H, W = self.embed.grid(image.shape[2:])
        return H, W

    def forward(
        self, image: Tensor, attentions: bool, class_token_only: bool
    ) -> tuple[Tensor, ...]:
        """Tokens (B, N, C) or the class token (B, 1, C), then the attentions of every block."""
        grid = self.grid(image)
        x = self.norm(to_tokens(self.embed(image)))  # (B, H·W, C)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        weights = []
        for block in cast(Iterable[FusedBlock], self.blocks):
            last = block is self.blocks[-1]
            x, block_weights = block(x, grid, attentions, class_token_only and last)
            weights.append(block_weights)
        return (x, *weights) if attentions else (x,)

    def in_parts(self, image: Tensor, *options: bool) -> tuple[Tensor, ...]:
        """The same, on a CPU on as many images at once as its caches hold."""
        H, W = self.grid(image)
        images = max(1, CACHED // (H * W * self.hidden))
        if is_captured() or image.device.type != "cpu" or len(image) <= images:
            return self(image, *options)
        parts = [self(part, *options) for part in image.split(images)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class FusedCvt(nn.Module):
    """What `fuse` returns: called like the original model, but without labels.

    It stays in eval mode, gives no gradients, and no state dict holds its weights: save the model
    that it was computed from. `.to(device)` moves it.
    """

    def __init__(
        self, model: CvtModel | CvtForImageClassification | CvtBackbone, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config = model.config
        self.minimum_image_size = model.config.minimum_image_size
        self.is_classifier = isinstance(model, CvtForImageClassification)
        self.feature_maps: list[int] | None = None  # of a backbone: the stages that it returns
        if isinstance(model, CvtBackbone):
            self.feature_maps = [model.stage_names.index(name) for name in model.out_features]
        encoder = (
            model.cvt.encoder if isinstance(model, CvtForImageClassification) else model.encoder
        )
        stages = [FusedStage(cast(Stage, stage), dtype) for stage in encoder.stages]
        self.stages = nn.ModuleList(stages)
        if isinstance(model, CvtForImageClassification):
            self.layernorm = LayerNorm(model.layernorm, dtype)
            head = model.classifier
            is_none = isinstance(head, nn.Identity)
            self.classifier = nn.Identity() if is_none else scaled(cast(nn.Linear, head), dtype)
        super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return cast(FusedStage, self.stages[0]).embed.weight.dtype

    def train(self, mode: bool = True) -> "FusedCvt":
        """Refuses to leave eval mode.

        Raises:
            ValueError: `mode` is true.
        """
        if mode:
            raise ValueError("a fused model cannot be trained; train the model it was built from")
        return self

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ImageClassifierOutput | CvtModelOutput | BackboneOutput | tuple:
        """Arguments, by name, outputs and errors of the model's own forward."""
        config = self.config
        image = checked_pixels(pixel_values, config.num_channels, self.minimum_image_size)
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        logits_only = self.is_classifier and not output_hidden_states and not output_attentions
        image = channels_last(image.to(self.dtype))
        hidden_states: tuple[Tensor, ...] = ()
        attentions: tuple[Tensor, ...] = ()
        for stage in cast(Iterable[FusedStage], self.stages):
            last = stage is self.stages[-1]
            class_token_only = logits_only and last and stage.cls_token is not None
            grid = stage.grid(image)
            x, *weights = stage.in_parts(image, bool(output_attentions), class_token_only)
            attentions += tuple(weights)
            if class_token_only:
                break
            class_token, tokens = split_tokens(x, grid)
            image = to_image(tokens, grid)  # (B, C, H, W)
            hidden_states += (image,)

        output: ImageClassifierOutput | CvtModelOutput | BackboneOutput
        kept: dict[str, Any] = {
            "hidden_states": hidden_states if output_hidden_states else None,
            "attentions": attentions if output_attentions else None,
        }
        if self.is_classifier:
            pooled = x[:, :1] if stage.cls_token is not None else x
            logits = self.classifier(self.layernorm(pooled).mean(dim=1))  # (B, classes)
            output = ImageClassifierOutput(logits=logits, **kept)
        elif self.feature_maps is not None:
            maps: Any = tuple(hidden_states[i] for i in self.feature_maps)
            output = BackboneOutput(feature_maps=maps, **kept)
        else:
            output = CvtModelOutput(last_hidden_state=image, cls_token_value=class_token, **kept)
        return_dict = config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


def refuse_offloaded(model: nn.Module) -> None:
    """Make sure that the weights of a model are in memory.

    Raises:
        ValueError: some are on the meta device, as those that a `device_map` offloads.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if absent := [name for name, tensor in tensors if tensor.device.type == "meta"]:
        raise ValueError(
            f"{len(absent)} of the model's {len(tensors)} weights are offloaded (on the meta "
            f"device), as {absent[0]}: load the model without device_map, or with the whole of it "
            'on one device, as device_map="cpu"'
        )


def fuse(
    model: CvtModel | CvtForImageClassification | CvtBackbone, dtype: torch.dtype | None = None
) -> FusedCvt:
    """The inference form of a model, on its device; the model itself is left as it is.

    Outputs are those of the model within 1e-5 in float32. On a CPU the fused weights come to lie
    there twice, as they were and packed for oneDNN. `torch.compile` and `torch.export` take it.
    Hooks of the model stay behind.

    Args:
        model: in eval mode.
        dtype: to compute in; the model's own by default. Weights are folded in double precision and
            rounded once.

    Raises:
        TypeError: not a CvT of this package, or parts of it were replaced.
        ValueError: the model is in training mode, weights of it are offloaded, or `dtype` is no
            floating point type.

    Example:
        >>> import cvt, torch
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> model = cvt.CvtForImageClassification(config).eval()
        >>> fast = cvt.fuse(model)
        >>> pixels = torch.rand(2, 3, 16, 16)
        >>> with torch.no_grad():
        ...     torch.allclose(fast(pixels).logits, model(pixels).logits, atol=1e-5)
        True
    """
    if not isinstance(model, CvtModel | CvtForImageClassification | CvtBackbone):
        raise TypeError(
            "fuse takes a CvtModel, CvtForImageClassification or CvtBackbone of this package, "
            f"not {type(model).__module__}.{type(model).__qualname__}"
        )
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call model.eval() before fusing it")
    is_offloaded = hasattr(model, "hf_device_map")  # else a model on meta was built to be counted
    if is_offloaded or not all(parameter.is_meta for parameter in model.parameters()):
        refuse_offloaded(model)
    dtype = dtype or model.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype}: must be a floating point type")
    return FusedCvt(model, dtype)
