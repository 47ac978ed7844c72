"""CvT in PyTorch, in the order of the paper (arXiv 2103.15808).

B batch, C channels, H W grid, N tokens (H·W, one more with a class token), h heads, d head width.
Primes mark the sizes of a stage's input, C' H' W', and of strided keys and values, H'·W' and N'.
Tokens are (B, N, C) everywhere; an image (B, C, H, W) is a channels-last view of them.
Parameter names are those of `transformers.models.cvt`, so that weights pass both ways.
"Authors" means `lib/models/cls_cvt.py` of github.com/microsoft/CvT.
"""

import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutput, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .architecture import StageConfig, check_memory, check_queries, checked_pixels
from .configuration import CvtConfig
from .losses import classification_loss
from .model_code import code_carried
from .strict_loading import COUNTER, load_pretrained, save_readable
from .views import channels_last, resize_tokens, split_tokens, to_heads, to_image, to_tokens


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 and given back in the input's type, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class DropPath(nn.Module):
    """Stochastic depth: leaves a residual branch out, sample by sample."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand((x.shape[0], 1, 1), device=x.device) >= self.rate
        return x / (1 - self.rate) * kept

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4f}"


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), with which the released models were trained, by the fused silu."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


class Dense(nn.Module):
    """Linear, activation, dropout."""

    def __init__(self, width_in: int, width_out: int, dropout: float, activation: str = "") -> None:
        super().__init__()
        activations = {"": nn.Identity, "gelu": nn.GELU, "quick_gelu": QuickGELU}
        self.dense = nn.Linear(width_in, width_out)
        self.activation = activations[activation]()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.activation(self.dense(x)))


@contextmanager
def batch_statistics_kept(module: nn.Module) -> Iterator[None]:
    """BatchNorm updates copies of its running statistics, which are dropped afterwards."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers()]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)


# -------------------------------------------- convolutional token embedding, section 3.1


class ConvEmbedding(nn.Module):
    """Image (B, C', H', W') to tokens (B, H·W, C): an overlapping convolution and a LayerNorm."""

    def __init__(self, stage: StageConfig, eps: float) -> None:
        super().__init__()
        geometry = stage.patch_sizes, stage.patch_stride, stage.patch_padding
        self.projection = nn.Conv2d(stage.in_channels, stage.embed_dim, *geometry)
        self.normalization = LayerNorm(stage.embed_dim, eps=eps)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        image = self.projection(image)  # (B, C, H, W)
        H, W = image.shape[2:]
        return self.normalization(to_tokens(image)), (H, W)


# -------------------------------------------- convolutional projection for attention, section 3.2


class Projection(nn.Module):
    """Image (B, C, H, W) to the tokens (B, H'·W', C) that a query, key or value Linear reads."""

    def __init__(self, method: str, width: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.convolution_projection: nn.Module = nn.Identity()  # of the method "linear"
        if method == "dw_bn":
            convolution = nn.Conv2d(width, width, kernel, stride, padding, groups=width, bias=False)
            self.convolution_projection = nn.Sequential(
                OrderedDict(convolution=convolution, normalization=nn.BatchNorm2d(width))
            )
        elif method == "avg":
            self.convolution_projection = nn.AvgPool2d(kernel, stride, padding, ceil_mode=True)

    def forward(self, image: Tensor) -> Tensor:
        return to_tokens(self.convolution_projection(image))


def eager_attention(
    module: nn.Module,
    query: Tensor,  # (B, h, N, d)
    key: Tensor,  # (B, h, N', d)
    value: Tensor,  # (B, h, N', d)
    attention_mask: None,
    scaling: float,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: context (B, N, h, d) and weights (B, h, N, N')."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1)
    kept = F.dropout(weights, dropout) if dropout else weights
    return (kept @ value).transpose(1, 2), weights


class SelfAttention(nn.Module):
    """Multi-head attention on projected tokens; the class token skips the projection."""

    is_causal = False  # read by transformers' attention functions

    def __init__(self, config: CvtConfig, stage: StageConfig) -> None:
        super().__init__()
        self.config = config
        width = stage.embed_dim
        method = stage.projection_methods  # "avg" leaves the query alone: its own is "linear"
        q = (width, stage.kernel_qkv, stage.stride_q, stage.padding_q)
        kv = (width, stage.kernel_qkv, stage.stride_kv, stage.padding_kv)
        self.convolution_projection_query = Projection(method["query"], *q)
        self.convolution_projection_key = Projection(method["key"], *kv)
        self.convolution_projection_value = Projection(method["value"], *kv)
        # The pointwise convolutions that follow depthwise convolution and BatchNorm, section 3.2.1.
        self.projection_query = nn.Linear(width, width, bias=stage.qkv_bias)
        self.projection_key = nn.Linear(width, width, bias=stage.qkv_bias)
        self.projection_value = nn.Linear(width, width, bias=stage.qkv_bias)
        self.num_heads = stage.num_heads
        self.dropout = stage.attention_drop_rate
        # The whole width, not the head's (authors: `Attention.__init__`); the weights expect it.
        self.scale = width**-0.5

    def forward(
        self, x: Tensor, grid: tuple[int, int], output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        B, N, C = x.shape
        query, key, value = (
            to_heads(tokens, self.num_heads)  # (B, h, N, d), N' for keys and values
            for tokens in self.project(x, grid)
        )
        check_queries(query.shape[2], N, grid)
        implementation = "eager" if output_attentions else self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        rate = self.dropout if self.training else 0.0  # no attention function looks at the mode
        context, weights = attend(self, query, key, value, None, scaling=self.scale, dropout=rate)
        return context.reshape(B, -1, C), weights  # from (B, N, h, d)

    def project(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, C), keys and values (B, N', C)."""
        class_token, tokens = split_tokens(x, grid)  # (B, 1, C) or None, (B, H·W, C)
        image = to_image(tokens, grid)  # (B, C, H, W)

        def convolve(projection: nn.Module) -> Tensor:
            projected = projection(image)  # (B, H'·W', C)
            if class_token is not None:
                projected = torch.cat((class_token, projected), dim=1)
            return projected

        query = self.projection_query(convolve(self.convolution_projection_query))
        key = self.projection_key(convolve(self.convolution_projection_key))
        value = self.projection_value(convolve(self.convolution_projection_value))
        return query, key, value


class Attention(nn.Module):
    """Self-attention and its output Linear."""

    def __init__(self, config: CvtConfig, stage: StageConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config, stage)
        self.output = Dense(stage.embed_dim, stage.embed_dim, stage.drop_rate)

    def forward(
        self, x: Tensor, grid: tuple[int, int], output_attentions: bool
    ) -> tuple[Tensor, Tensor | None]:
        context, weights = self.attention(x, grid, output_attentions)
        return self.output(context), weights


# ------------------------------------------------------------------------------ the network


class Block(GradientCheckpointingLayer):
    """Convolutional Transformer block: attention and MLP, each normed before and residual."""

    def __init__(self, config: CvtConfig, stage: StageConfig, drop_path_rate: float) -> None:
        super().__init__()
        width, hidden = stage.embed_dim, int(stage.embed_dim * stage.mlp_ratio)
        self.attention = Attention(config, stage)
        self.intermediate = Dense(width, hidden, stage.drop_rate, config.hidden_act)
        self.output = Dense(hidden, width, stage.drop_rate)
        self.drop_path = DropPath(drop_path_rate)
        self.layernorm_before = LayerNorm(width, eps=config.layer_norm_eps)
        self.layernorm_after = LayerNorm(width, eps=config.layer_norm_eps)

    def forward(
        self, x: Tensor, grid: tuple[int, int], output_attentions: bool, passes: list | None = None
    ) -> tuple[Tensor, Tensor | None]:
        # In the second pass of gradient checkpointing, BatchNorm does not count the batch again.
        with batch_statistics_kept(self) if passes else nullcontext():
            attended, weights = self.attention(self.layernorm_before(x), grid, output_attentions)
        if passes is not None:
            passes.append(None)
        x = x + self.drop_path(attended)
        x = x + self.drop_path(self.mlp(self.layernorm_after(x)))
        return x, weights

    def mlp(self, x: Tensor) -> Tensor:
        """(B, N, C) to the same, through the hidden layer."""
        hidden = self.intermediate(x)  # (B, N, mlp_ratio · C)
        return self.output(hidden)


class Stage(nn.Module):
    """Token embedding, class token and position embedding where the stage has one, blocks."""

    def __init__(self, config: CvtConfig, stage: StageConfig) -> None:
        super().__init__()
        self.cls_token = (
            nn.Parameter(torch.zeros(1, 1, stage.embed_dim)) if stage.cls_token else None
        )
        # None in the paper's own models; its ablations have one in some stages.
        self.position_grid = H, W = stage.position_grid or (0, 0)
        self.position_embedding = (
            nn.Parameter(torch.zeros(1, H * W, stage.embed_dim)) if stage.position_grid else None
        )
        embedding = ConvEmbedding(stage, config.layer_norm_eps)
        # Of one module, for the names of its weights in transformers.
        self.embedding = nn.Sequential(OrderedDict(convolution_embeddings=embedding))
        self.dropout = nn.Dropout(stage.drop_rate)
        self.layers = nn.ModuleList(Block(config, stage, rate) for rate in stage.drop_path_rates)

    def forward(
        self, image: Tensor, output_attentions: bool
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        x, (H, W) = self.embedding(image)  # (B, H·W, C)
        if self.position_embedding is not None:
            x = x + resize_tokens(self.position_embedding, self.position_grid, (H, W)).to(x.dtype)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x), dim=1)
        x = self.dropout(x)
        attentions: tuple[Tensor, ...] = ()
        for block in self.layers:
            # Gradient checkpointing repeats this call with the same list; compiled, it does not.
            passes: list | None = None if torch.compiler.is_compiling() else []
            x, weights = block(x, (H, W), output_attentions, passes)
            if output_attentions:
                attentions += (weights,)
        class_token, tokens = split_tokens(x, (H, W))
        return to_image(tokens, (H, W)), class_token, attentions


@dataclass
class CvtModelOutput(ModelOutput):
    """What `CvtModel` returns.

    Attributes:
        last_hidden_state: output of the last stage, (B, C, H, W).
        cls_token_value: its class token, (B, 1, C); None where the last stage has none.
        hidden_states: the output of every stage, (B, C, H, W) each.
        attentions: the attention weights of every block, (B, heads, queries, keys) each.

    Example:
        >>> import torch
        >>> from cvt import CvtConfig, CvtModel
        >>> model = CvtModel(CvtConfig.from_variant("cvt-digits")).eval()
        >>> output = model(torch.zeros(1, 3, 16, 16), output_attentions=True)
        >>> len(output.attentions), output.attentions[-1].shape  # 7 blocks; 4 heads, 5 tokens
        (7, torch.Size([1, 4, 5, 2]))
    """

    last_hidden_state: Tensor | None = None
    cls_token_value: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Encoder(nn.Module):
    """The stages, one after the other."""

    def __init__(self, config: CvtConfig) -> None:
        super().__init__()
        self.config = config
        self.stages = nn.ModuleList(Stage(config, stage) for stage in config.stages)
        self.minimum_image_size = config.minimum_image_size

    def forward(
        self,
        pixel_values: Tensor | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
    ) -> CvtModelOutput:
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        image = checked_pixels(pixel_values, self.config.num_channels, self.minimum_image_size)
        image = channels_last(image.to(next(self.parameters()).dtype))
        class_token, hidden_states, attentions = None, [], []
        for stage in self.stages:
            image, class_token, weights = stage(image, bool(output_attentions))
            hidden_states.append(image)
            attentions.extend(weights)
        return CvtModelOutput(
            last_hidden_state=image,
            cls_token_value=class_token,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


# ------------------------------------------------------------------------------ public classes


class CvtPreTrainedModel(PreTrainedModel):
    """What the CvT models share: initialisation, loading and transformers' switches."""

    config: CvtConfig
    config_class = CvtConfig
    base_model_prefix = "cvt"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keys_to_ignore_on_load_missing = [rf"\.{COUNTER}$"]  # they start at 0

    def __init__(self, config: CvtConfig) -> None:
        config.validate()
        check_memory(config)
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The authors' initialisation (`_init_weights_*`); convolutions keep PyTorch's own."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            is_head = module is getattr(self, "classifier", None)
            if self.config.init == "xavier" and not is_head:
                init.xavier_uniform_(module.weight)
            else:
                init.trunc_normal_(module.weight, std=std)
            if module.bias is not None and is_head:  # the authors keep PyTorch's own
                init.uniform_(module.bias, -(module.in_features**-0.5), module.in_features**-0.5)
            elif module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, Stage):
            for tokens in (module.cls_token, module.position_embedding):
                if tokens is not None:
                    init.trunc_normal_(tokens, std=std)
        elif isinstance(module, LayerNorm | nn.BatchNorm2d):
            super()._init_weights(module)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> "Self":
        """As in transformers, published names too, and strict: see `cvt.strict_loading`."""
        load = super().from_pretrained
        return load_pretrained(load, pretrained_model_name_or_path, *args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        *args: Any,
        with_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers; whoever may read the config may read the weights.

        Args:
            save_directory: the folder.
            is_main_process: as in transformers.
            args: as in transformers.
            with_code: write this package's code into it, for `trust_remote_code=True` in
                transformers without this package.
            kwargs: as in transformers.

        Raises:
            FileExistsError: `with_code` would overwrite a file that is not this package's.
            ValueError: `with_code` is asked for and `push_to_hub`, which would leave it out.
        """
        if with_code and kwargs.get("push_to_hub"):
            raise ValueError("with_code: push_to_hub leaves it out; `cvt push --with-code` uploads")
        folder = save_directory if is_main_process else None
        with code_carried(self.config, folder) if with_code else nullcontext():
            save_readable(super().save_pretrained, save_directory, is_main_process, *args, **kwargs)


class CvtModel(CvtPreTrainedModel):
    """CvT without a head.

    Example:
        >>> import torch
        >>> from cvt import CvtConfig, CvtModel
        >>> model = CvtModel(CvtConfig.from_variant("cvt-digits")).eval()
        >>> output = model(torch.zeros(2, 3, 32, 32), output_hidden_states=True)
        >>> [tuple(state.shape) for state in output.hidden_states]
        [(2, 32, 16, 16), (2, 64, 8, 8), (2, 128, 4, 4)]
        >>> output.cls_token_value.shape
        torch.Size([2, 1, 128])
    """

    _keys_to_ignore_on_load_unexpected = [r"^layernorm\.", r"^classifier\."]

    def __init__(self, config: CvtConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> CvtModelOutput | tuple:
        """Features of a batch of images.

        Args:
            pixel_values: normalised images, (B, C, H, W).
            output_hidden_states: return the output of every stage.
            return_dict: return a `CvtModelOutput` rather than a tuple.
            output_attentions: return the attention weights of every block, from the eager softmax.

        Raises:
            ValueError: wrong type or number of channels, or too small an image.
        """
        output = self.encoder(pixel_values, output_hidden_states, output_attentions)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


class CvtForImageClassification(CvtPreTrainedModel):
    """CvT with a linear classifier on the class token, or on the mean token where there is none.

    Example:
        >>> import torch
        >>> from cvt import CvtConfig, CvtForImageClassification
        >>> config = CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> model = CvtForImageClassification(config)
        >>> images, labels = torch.zeros(4, 3, 16, 16), torch.tensor([3, 1, 4, 1])
        >>> output = model(images, labels=labels)
        >>> output.logits.shape
        torch.Size([4, 10])
        >>> output.loss.backward()
    """

    def __init__(self, config: CvtConfig) -> None:
        super().__init__(config)
        width, classes = config.embed_dim[-1], config.num_labels
        self.num_labels = classes
        self.cvt = CvtModel(config)
        self.layernorm = LayerNorm(width, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(width, classes) if classes else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
    ) -> ImageClassifierOutput | tuple:
        """Logits of a batch of images, and the loss where labels are given.

        Args:
            pixel_values: normalised images, (B, C, H, W).
            labels: see `cvt.losses.classification_loss`.
            output_hidden_states: as in `CvtModel`.
            return_dict: return an `ImageClassifierOutput` rather than a tuple.
            output_attentions: as in `CvtModel`.

        Raises:
            ValueError: as in `CvtModel`, or labels that do not fit.
        """
        output = self.cvt(pixel_values, output_hidden_states, True, output_attentions)
        tokens = output.cls_token_value  # (B, 1, C)
        if tokens is None:
            tokens = to_tokens(output.last_hidden_state)  # (B, N, C)
        # The mean over one token is the class token itself.
        logits = self.classifier(self.layernorm(tokens).mean(dim=1))  # (B, classes)
        output = ImageClassifierOutput(
            loss=None if labels is None else classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()
