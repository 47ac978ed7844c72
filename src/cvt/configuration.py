"""The configuration of a CvT: its fields, their validation and the paper's variants.

Field names and defaults are those of `CvtConfig` in transformers, so that config.json files pass both ways.
"""

import math
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.utils import logging

from cvt import hub

logger = logging.get_logger(__name__)

ACTIVATIONS = ("gelu", "quick_gelu")
PROJECTION_METHODS = ("dw_bn", "avg", "linear")
INITIALISATIONS = ("trunc_norm", "xavier")

# Table 2 of the paper; what differs from the defaults of `CvtConfig`. The released weights were trained with QuickGELU.
VARIANTS: dict[str, dict[str, Any]] = {
    "cvt-13": {"depth": (1, 2, 10)},
    "cvt-21": {"depth": (1, 4, 16)},
    "cvt-w24": {
        "depth": (2, 2, 20),
        "embed_dim": (192, 768, 1024),
        "num_heads": (3, 12, 16),
        "drop_path_rate": (0.0, 0.0, 0.3),
    },
}


def _integer(at_least: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or (number := operator.index(value)) < at_least:
            raise ValueError
        return number

    convert.__doc__ = f"an integer of at least {at_least}"
    return convert


def _flag(value: Any) -> bool:
    """True or False"""
    if value not in (0, 1):
        raise ValueError
    return bool(value)


def _ratio(value: Any) -> float:
    """a number above 0"""
    if isinstance(value, str) or not 0 < float(value) < math.inf:
        raise ValueError
    return float(value)


def _probability(value: Any) -> float:
    """a probability, at least 0 and below 1"""
    if isinstance(value, str) or not 0 <= float(value) < 1:
        raise ValueError
    return float(value)


def _one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if value not in choices:
            raise ValueError
        return str(value)

    convert.__doc__ = "one of " + ", ".join(choices)
    return convert


# Each field's check; it converts the value or raises, and its docstring says what it takes.
_PER_STAGE: dict[str, Callable[[Any], Any]] = {
    "patch_sizes": _integer(1),
    "patch_stride": _integer(1),
    "patch_padding": _integer(0),
    "embed_dim": _integer(1),
    "num_heads": _integer(1),
    "depth": _integer(1),
    "mlp_ratio": _ratio,
    "attention_drop_rate": _probability,
    "drop_rate": _probability,
    "drop_path_rate": _probability,
    "qkv_bias": _flag,
    "cls_token": _flag,
    "qkv_projection_method": _one_of(PROJECTION_METHODS),
    "kernel_qkv": _integer(1),
    "padding_kv": _integer(0),
    "stride_kv": _integer(1),
    "padding_q": _integer(0),
    "stride_q": _integer(1),
}
_WHOLE: dict[str, Callable[[Any], Any]] = {
    "num_channels": _integer(1),
    "hidden_act": _one_of(ACTIVATIONS),
    "init": _one_of(INITIALISATIONS),
    "initializer_range": _ratio,
    "layer_norm_eps": _ratio,
}


def _checked(name: str, value: Any, convert: Callable[[Any], Any]) -> Any:
    try:
        return convert(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {value!r}: must be {convert.__doc__}") from None


@dataclass(frozen=True)
class StageConfig:
    """The settings of one stage, under the names they have in `CvtConfig`."""

    in_channels: int
    patch_sizes: int
    patch_stride: int
    patch_padding: int
    embed_dim: int
    num_heads: int
    depth: int
    mlp_ratio: float
    attention_drop_rate: float
    drop_rate: float
    drop_path_rate: float
    qkv_bias: bool
    cls_token: bool
    qkv_projection_method: str
    kernel_qkv: int
    padding_kv: int
    stride_kv: int
    padding_q: int
    stride_q: int

    @property
    def drop_path_rates(self) -> list[float]:
        """The rate of each block, rising linearly from 0 to `drop_path_rate`."""
        return [self.drop_path_rate * block / max(self.depth - 1, 1) for block in range(self.depth)]

    @property
    def projection_methods(self) -> dict[str, str]:
        """The method of query, key and value; `avg` leaves the query alone (authors: `Attention.__init__`)."""
        method = self.qkv_projection_method
        return {"query": "linear" if method == "avg" else method, "key": method, "value": method}

    @property
    def minimum_size(self) -> int:
        """The smallest height and width, in pixels of the stage's input, that leave a token everywhere."""
        grid = 1
        for part, method in self.projection_methods.items():
            padding, stride = (
                (self.padding_q, self.stride_q)
                if part == "query"
                else (self.padding_kv, self.stride_kv)
            )
            if method == "dw_bn":
                grid = max(grid, self.kernel_qkv - 2 * padding)
            elif method == "avg":  # rounds its output size up
                grid = max(grid, self.kernel_qkv - 2 * padding - stride + 1)
        return max(1, (grid - 1) * self.patch_stride + self.patch_sizes - 2 * self.patch_padding)


class CvtConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a CvT. Every list has one value per stage; the number of stages is the length of `depth`.

    Args:
        num_channels: channels of the image.
        patch_sizes: kernel of the convolutional token embedding, in pixels of the stage's input.
        patch_stride: its stride.
        patch_padding: its padding.
        embed_dim: width of the tokens; a multiple of `num_heads`.
        num_heads: attention heads.
        depth: number of blocks.
        mlp_ratio: hidden width of the MLP as a multiple of `embed_dim`.
        attention_drop_rate: dropout on the attention weights.
        drop_rate: dropout on the tokens at the head of a stage, after the attention and inside the MLP.
        drop_path_rate: stochastic depth of the stage's last block; block j of n has `j / (n - 1)` of it.
        qkv_bias: whether the query, key and value Linears have a bias.
        cls_token: whether the stage has a class token.
        qkv_projection_method: `dw_bn` (depthwise convolution and BatchNorm), `avg` (average pooling of key and
            value) or `linear` (none).
        kernel_qkv: kernel of the projection, for query, key and value.
        padding_kv: padding of the key and value projection.
        stride_kv: its stride.
        padding_q: padding of the query projection.
        stride_q: its stride.
        hidden_act: activation of the MLP: `gelu`, as transformers computes, or `quick_gelu`, as the authors do.
        init: initialisation of the Linears: `trunc_norm` or `xavier`.
        initializer_range: standard deviation of `trunc_norm`, of the class tokens and of the classifier.
        layer_norm_eps: epsilon of every LayerNorm. A config.json without `hidden_act` was written by transformers,
            whose 1e-12 never took effect; it is read as 1e-5.
        kwargs: fields of transformers' `PreTrainedConfig`, `out_features` and `out_indices` (of `stage1`, ...).

    Raises:
        ValueError: a field is illegal; names the field, its stage and the value.
    """

    model_type = "cvt"

    num_channels: int = 3
    patch_sizes: list[int] | tuple[int, ...] = (7, 3, 3)
    patch_stride: list[int] | tuple[int, ...] = (4, 2, 2)
    patch_padding: list[int] | tuple[int, ...] = (2, 1, 1)
    embed_dim: list[int] | tuple[int, ...] = (64, 192, 384)
    num_heads: list[int] | tuple[int, ...] = (1, 3, 6)
    depth: list[int] | tuple[int, ...] = (1, 2, 10)
    mlp_ratio: list[float] | tuple[float, ...] = (4.0, 4.0, 4.0)
    attention_drop_rate: list[float] | tuple[float, ...] = (0.0, 0.0, 0.0)
    drop_rate: list[float] | tuple[float, ...] = (0.0, 0.0, 0.0)
    drop_path_rate: list[float] | tuple[float, ...] = (0.0, 0.0, 0.1)
    qkv_bias: list[bool] | tuple[bool, ...] = (True, True, True)
    cls_token: list[bool] | tuple[bool, ...] = (False, False, True)
    qkv_projection_method: list[str] | tuple[str, ...] = ("dw_bn", "dw_bn", "dw_bn")
    kernel_qkv: list[int] | tuple[int, ...] = (3, 3, 3)
    padding_kv: list[int] | tuple[int, ...] = (1, 1, 1)
    stride_kv: list[int] | tuple[int, ...] = (2, 2, 2)
    padding_q: list[int] | tuple[int, ...] = (1, 1, 1)
    stride_q: list[int] | tuple[int, ...] = (1, 1, 1)
    hidden_act: str = "gelu"
    init: str = "trunc_norm"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("stage_names", None)  # derived, but other libraries write it
        out_features, out_indices = (
            kwargs.pop("out_features", None),
            kwargs.pop("out_indices", None),
        )
        super().__post_init__(**kwargs)
        self.validate()
        self.set_output_features_output_indices(out_features, out_indices)

    def validate(self) -> None:
        """Check every field and bring it to its own type. Models call it again, since fields can be set.

        Raises:
            ValueError: names the field, its stage and the value.
        """
        for name, convert in _WHOLE.items():
            setattr(self, name, _checked(name, getattr(self, name), convert))
        for name in ("depth", *_PER_STAGE):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not values:
                raise ValueError(f"{name} = {values!r}: must be a list of one value per stage")
            if len(values) != len(self.depth):
                raise ValueError(
                    f"{name} = {values!r}: {len(values)} values, but depth = {list(self.depth)!r} makes "
                    f"{len(self.depth)} stages"
                )
        for name, convert in _PER_STAGE.items():
            values = getattr(self, name)
            setattr(
                self,
                name,
                [_checked(f"stage {i + 1}: {name}[{i}]", v, convert) for i, v in enumerate(values)],
            )
        for i, stage in enumerate(self.stages):
            if stage.embed_dim % stage.num_heads:
                raise ValueError(
                    f"stage {i + 1}: embed_dim[{i}] = {stage.embed_dim} is not divisible by "
                    f"num_heads[{i}] = {stage.num_heads}"
                )
            if int(stage.embed_dim * stage.mlp_ratio) < 1:
                raise ValueError(
                    f"stage {i + 1}: mlp_ratio[{i}] = {stage.mlp_ratio} leaves the MLP no width"
                )
            if stage.qkv_projection_method == "avg" and 2 * stage.padding_kv > stage.kernel_qkv:
                raise ValueError(
                    f"stage {i + 1}: padding_kv[{i}] = {stage.padding_kv} is more than half of "
                    f"kernel_qkv[{i}] = {stage.kernel_qkv}, which average pooling does not allow"
                )

    @property
    def stages(self) -> list[StageConfig]:
        """The settings, stage by stage."""
        widths = [self.num_channels, *self.embed_dim]
        return [
            StageConfig(
                in_channels=widths[i], **{name: getattr(self, name)[i] for name in _PER_STAGE}
            )
            for i in range(len(self.depth))
        ]

    @property
    def stage_names(self) -> list[str]:
        """The names by which `CvtBackbone` takes its stages."""
        return [f"stage{i + 1}" for i in range(len(self.depth))]

    @property
    def minimum_image_size(self) -> int:
        """The smallest height and width, in pixels, of an image that leaves at least one token per stage."""
        size = 1
        for stage in reversed(self.stages):
            before = (size - 1) * stage.patch_stride + stage.patch_sizes - 2 * stage.patch_padding
            size = max(stage.minimum_size, before)
        return size

    @property
    def output_attentions(self) -> bool:
        """Whether models return attentions by default. Works with every `attn_implementation`."""
        return bool(self._output_attentions)

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        self._output_attentions = value

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> "CvtConfig":
        """The authors' model of that name: `cvt-13`, `cvt-21` or `cvt-w24`, with QuickGELU and 1000 classes.

        Args:
            name: a key of `VARIANTS`.
            overrides: fields to set otherwise.

        Raises:
            ValueError: there is no such variant, or a field is illegal.
        """
        if name not in VARIANTS:
            raise ValueError(f"no CvT variant is called {name!r}; there are {', '.join(VARIANTS)}")
        classes = {} if "id2label" in overrides else {"num_labels": 1000}
        return cls(**{"hidden_act": "quick_gelu", **classes, **VARIANTS[name], **overrides})

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; short names work too, and published checkpoints carry QuickGELU."""
        with hub.resolved(pretrained_model_name_or_path) as source:
            config_dict, kwargs = super().get_config_dict(source, **kwargs)
        if "hidden_act" not in config_dict and hub.published(pretrained_model_name_or_path):
            config_dict["hidden_act"] = "quick_gelu"
            config_dict["layer_norm_eps"] = 1e-5
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "CvtConfig":
        """As in transformers; without `hidden_act`, `config_dict` comes from transformers' own CvtConfig."""
        if "hidden_act" not in config_dict:
            logger.info(
                "The configuration has no hidden_act: exact GELU, as transformers computes."
            )
            config_dict = {**config_dict, "layer_norm_eps": 1e-5}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "CvtConfig":
        """As in transformers."""
        return cls.from_dict(cls._dict_from_json_file(json_file))
