"""The inference form of a CvT, `cvt.fuse(model)`: the same outputs from less work.

BatchNorm is folded into the depthwise convolutions, the scale of the attention into the query's
Linear, the constants of QuickGELU into the Linears around it. On a CPU, weights are packed for
oneDNN when they are first used, and batches are cut so that a block's work stays in the cache.
Where the logits alone are wanted, the last block computes nothing but its class token.

Shapes are as in `modeling.py`: B batch, C channels, H W grid, N tokens, h heads, d head width.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import _disable_current_modes

from cvt.architecture import Architecture, StageConfig, check_queries, checked_pixels
from cvt.runtime.features import LOGITS, FeatureSettings, output_names, pooled
from cvt.views import channels_last, resize_tokens, split_tokens, to_heads, to_image, to_tokens

if TYPE_CHECKING:
    from cvt.backbone import CvtBackbone
    from cvt.modeling import CvtForImageClassification, CvtModel

# Numbers in the hidden layer of an MLP that still pass through a processor's caches.
CACHED = 2**22
BATCH_NORM_EPS = 1e-5  # of PyTorch's BatchNorm

# ------------------------------------------------------------------------------ operators


def is_captured() -> bool:
    """Whether the operators become a graph, of torch.compile, torch.export or a trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def silu_is_separate() -> bool:
    """Whether silu takes longer within oneDNN's products than after them, as with AVX2."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


class Weights:
    """The weights of a part of a model, on the CPU, by transformers' names of them in it.

    They are folded in float64, which the GPUs of Apple do not have.
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[self.prefix + name].detach()
        return tensor if tensor.is_meta else tensor.cpu()

    def get(self, name: str) -> Tensor | None:
        """A weight, or None if the part has none of that name."""
        return self[name] if self.prefix + name in self.tensors else None

    def part(self, name: str) -> "Weights":
        """Those of a part of this part."""
        return Weights(self.tensors, f"{self.prefix}{name}.")


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
                # For a fixed number of rows: no answer may depend on the batch that came first.
                self.packed = operators._reorder_linear_weight(self.weight, 256)
            separate = self.activation == "silu" and silu_is_separate()
            name, algorithm = self.ONEDNN["" if separate else self.activation]
            y = operators._linear_pointwise(x, self.packed, self.bias, name, [], algorithm)
            return F.silu(y, inplace=True) if separate else y
        y = F.linear(x, self.weight, self.bias)
        return getattr(F, self.activation)(y) if self.activation else y


class Conv(Operator):
    """Convolution of (B, C, H, W), channels-last."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        stride: int,
        padding: int,
        groups: int = 1,
    ) -> None:
        super().__init__(weight, bias, dtype)
        self.geometry: list[Any] = [[padding] * 2, [stride] * 2, [1, 1], groups]

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

    def __init__(self, weights: Weights, dtype: torch.dtype, eps: float) -> None:
        super().__init__(weights["weight"], weights["bias"], dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def pooling(kernel: int, stride: int, pad: int) -> nn.Module:
    """The model's averages, padded before: OpenVINO divides those of `ceil_mode` by others."""
    if stride + pad > kernel:  # PyTorch leaves out windows that lie in the padding alone
        return nn.AvgPool2d(kernel, stride, pad, ceil_mode=True)
    averages = nn.AvgPool2d(kernel, stride, 0, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(nn.ZeroPad2d(pad), averages)


def folded(weights: Weights, stage: StageConfig, part: str, dtype: torch.dtype) -> nn.Module:
    """The projection of `query`, `key` or `value`: its convolution with its BatchNorm in it."""
    method, is_query = stage.projection_methods[part], part == "query"
    stride = stage.stride_q if is_query else stage.stride_kv
    padding = stage.padding_q if is_query else stage.padding_kv
    if method == "linear":
        return nn.Identity()
    if method == "avg":
        return pooling(stage.kernel_qkv, stride, padding)
    projection = weights.part(f"convolution_projection_{part}.convolution_projection")
    return Conv(*fold(projection), dtype, stride, padding, groups=stage.embed_dim)


def fold(weights: Weights) -> tuple[Tensor, Tensor]:
    """Weight and bias, in double precision, of a convolution with its BatchNorm in it."""
    norm = weights.part("normalization")
    gain = norm["weight"].double() * (norm["running_var"].double() + BATCH_NORM_EPS).rsqrt()
    bias = norm["bias"].double() - norm["running_mean"].double() * gain
    return weights["convolution.weight"].double() * gain[:, None, None, None], bias


def scaled(weights: Weights, dtype: torch.dtype, by: float = 1.0, activation: str = "") -> Linear:
    """A Linear whose output is `by` times as large, in front of an activation."""
    bias = weights.get("bias")
    scaled_bias = None if bias is None else bias.double() * by
    return Linear(weights["weight"].double() * by, scaled_bias, dtype, activation)


# ------------------------------------------------------------------------------ the network


class FusedBlock(nn.Module):
    """A `Block`, or, of the last one, only what the class token needs."""

    def __init__(
        self, weights: Weights, stage: StageConfig, config: Architecture, dtype: torch.dtype
    ) -> None:
        super().__init__()
        attention, eps = weights.part("attention.attention"), config.layer_norm_eps
        self.heads = stage.num_heads
        self.norm1 = LayerNorm(weights.part("layernorm_before"), dtype, eps)
        self.convolve_query = folded(attention, stage, "query", dtype)
        self.convolve_key = folded(attention, stage, "key", dtype)
        self.convolve_value = folded(attention, stage, "value", dtype)
        # The whole width, not the head's, as in `cvt.modeling`.
        self.query = scaled(attention.part("projection_query"), dtype, stage.embed_dim**-0.5)
        self.key = scaled(attention.part("projection_key"), dtype)
        self.value = scaled(attention.part("projection_value"), dtype)
        self.out = scaled(weights.part("attention.output.dense"), dtype)
        self.norm2 = LayerNorm(weights.part("layernorm_after"), dtype, eps)
        fc1, fc2 = weights.part("intermediate.dense"), weights.part("output.dense")
        if config.hidden_act == "quick_gelu":  # silu(1.702 x) / 1.702
            self.fc1 = scaled(fc1, dtype, 1.702, "silu")
            self.fc2 = Linear(fc2["weight"].double() / 1.702, fc2["bias"], dtype)
        else:
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
    position_embedding: Tensor | None

    def __init__(
        self, weights: Weights, stage: StageConfig, config: Architecture, dtype: torch.dtype
    ) -> None:
        super().__init__()
        embedding = weights.part("embedding.convolution_embeddings")
        projection = embedding.part("projection")
        stride, padding = stage.patch_stride, stage.patch_padding
        self.embed = Conv(projection["weight"], projection["bias"], dtype, stride, padding)
        self.norm = LayerNorm(embedding.part("normalization"), dtype, config.layer_norm_eps)
        token = weights["cls_token"].to(dtype, copy=True) if stage.cls_token else None
        self.register_buffer("cls_token", token, persistent=False)
        self.position_grid = stage.position_grid or (0, 0)
        positions = weights.get("position_embedding")
        positions = None if positions is None else positions.to(dtype, copy=True)
        self.register_buffer("position_embedding", positions, persistent=False)
        parts = (weights.part(f"layers.{i}") for i in range(stage.depth))
        blocks = [FusedBlock(part, stage, config, dtype) for part in parts]
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
        if self.position_embedding is not None:
            x = x + resize_tokens(self.position_embedding, self.position_grid, grid)
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
    that it was computed from. It is built on the CPU; `.to(device)` moves it.
    """

    def __init__(
        self,
        config: Architecture,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        feature_maps: list[int] | None = None,
        output: Callable | None = None,
    ) -> None:
        super().__init__()
        self.config: Any = config
        self.minimum_image_size = config.minimum_image_size
        self.is_classifier = "layernorm.weight" in weights
        self.feature_maps = feature_maps  # of a backbone: the stages that it returns
        self.output = output  # what the model returns; None where tuples are asked for
        own = Weights(weights)
        stages = (own.part("cvt") if self.is_classifier else own).part("encoder.stages")
        self.stages = nn.ModuleList(
            FusedStage(stages.part(str(i)), stage, config, dtype)
            for i, stage in enumerate(config.stages)
        )
        if self.is_classifier:
            self.layernorm = LayerNorm(own.part("layernorm"), dtype, config.layer_norm_eps)
            head, has_head = own.part("classifier"), "classifier.weight" in weights
            self.classifier = scaled(head, dtype) if has_head else nn.Identity()
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
    def features(self, pixel_values: Tensor, stages: int | None = None) -> Tensor:
        """The output of the first stages, all by default.

        Args:
            pixel_values: normalised images, (B, C, H, W).
            stages: how many.

        Returns:
            The image that the next stage takes, (B, C', H', W'). Of all stages, the tokens that the
            final norm takes: the class token, (B, 1, C'), or without one all tokens, (B, N, C').

        Raises:
            ValueError: as in the model's own forward.
        """
        image = checked_pixels(pixel_values, self.config.num_channels, self.minimum_image_size)
        image = channels_last(image.to(self.dtype))
        for stage in cast(Iterable[FusedStage], self.stages[:stages]):
            is_last, grid = stage is self.stages[-1], stage.grid(image)
            (x,) = stage.in_parts(image, False, is_last and stage.cls_token is not None)
            if is_last:
                return x
            image = to_image(split_tokens(x, grid)[1], grid)
        return image

    @torch.no_grad()
    def outputs(self, pixel_values: Tensor, settings: FeatureSettings) -> tuple[Tensor, ...]:
        """Logits and features of a classifier in one pass, see `cvt.runtime.features.pooled`.

        Args:
            pixel_values: normalised images, (B, C, H, W).
            settings: of this model, see `FeatureSettings.of`.
        """
        image = checked_pixels(pixel_values, self.config.num_channels, self.minimum_image_size)
        image = channels_last(image.to(self.dtype))
        for number, stage in enumerate(cast(Iterable[FusedStage], self.stages), start=1):
            grid, by_token = stage.grid(image), settings.pool == "cls"
            if number == settings.stage:
                break
            (x,) = stage.in_parts(image, False, False)
            image = to_image(split_tokens(x, grid)[1], grid)
        (x,) = stage.in_parts(image, False, by_token)
        class_token, tokens = (x, x) if by_token else split_tokens(x, grid)
        norm = self.layernorm if stage is self.stages[-1] else nn.Identity()
        has_logits = LOGITS in output_names(self.config, settings)
        classifier = self.classifier if has_logits else None
        return pooled(settings, class_token, tokens, norm, classifier)

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Any:
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

        if self.is_classifier:
            pooled = x[:, :1] if stage.cls_token is not None else x
            logits = self.classifier(self.layernorm(pooled).mean(dim=1))  # (B, classes)
            values: dict[str, Any] = {"logits": logits}
        elif self.feature_maps is not None:
            values = {"feature_maps": tuple(hidden_states[i] for i in self.feature_maps)}
        else:
            values = {"last_hidden_state": image, "cls_token_value": class_token}
        values["hidden_states"] = hidden_states if output_hidden_states else None
        values["attentions"] = attentions if output_attentions else None
        return_dict = config.return_dict if return_dict is None else return_dict
        if return_dict and self.output is not None:
            return self.output(**values)
        return tuple(value for value in values.values() if value is not None)


class Outputs(nn.Module):
    """Pixels in, logits and features out, in float32.

    Args:
        model: a fused classifier.
        settings: of the features, see `FeatureSettings.of`.
    """

    def __init__(self, model: FusedCvt, settings: FeatureSettings) -> None:
        super().__init__()
        self.model = model
        self.settings = settings

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) to (B, K) and (B, C')."""
        return tuple(each.float() for each in self.model.outputs(pixel_values, self.settings))


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


def check_plain(model: nn.Module, expected: nn.Module) -> None:
    """Make sure that a model is built of what its configuration describes.

    Args:
        model: to be fused.
        expected: another of its class and configuration.

    Raises:
        TypeError: there is an adapter in it, another head, or a layer with other settings.
    """
    found = dict(model.named_modules())
    for name, own in expected.named_modules():
        if any(own.children()) or type(own).__name__ in ("Dropout", "DropPath"):
            continue  # what is in it is checked; no rate matters
        kind = _BatchNorm if isinstance(own, _BatchNorm) else type(own)  # one of several processes
        module = found.pop(name, None)
        computed_by = type(module).forward.__module__ if module is not None else ""
        as_built = computed_by.startswith(("torch.nn.", "cvt.")) and "forward" not in vars(module)
        is_none = name == "classifier" and isinstance(module, nn.Identity)
        if not is_none and not (
            isinstance(module, kind) and as_built and module.extra_repr() == own.extra_repr()
        ):
            raise TypeError(
                f"the model has a {type(module).__module__}.{type(module).__qualname__} as {name} "
                f"where fuse knows a plain {type(own).__name__}({own.extra_repr()}) only; merge "
                "adapters into the model before fusing it"
            )


def fuse(
    model: "CvtModel | CvtForImageClassification | CvtBackbone", dtype: torch.dtype | None = None
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
    from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput

    from cvt.backbone import CvtBackbone
    from cvt.modeling import CvtForImageClassification, CvtModel, CvtModelOutput

    outputs = {
        CvtForImageClassification: ImageClassifierOutput,
        CvtBackbone: BackboneOutput,
        CvtModel: CvtModelOutput,
    }
    kind = next((each for each in outputs if isinstance(model, each)), None)
    if kind is None:
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
    config = model.config
    # A model may be fused on fake tensors, whose mode takes no part in building another on meta.
    with _disable_current_modes(), torch.device("meta"):
        check_plain(model, kind(config))
    feature_maps = None
    if isinstance(model, CvtBackbone):
        feature_maps = [model.stage_names.index(name) for name in model.out_features]
    fused = FusedCvt(config, model.state_dict(), dtype, feature_maps, outputs[kind])
    return fused.to(model.device)
