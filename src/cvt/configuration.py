"""The configuration of a CvT: its fields, their validation and the paper's variants.

Field names and defaults are those of `CvtConfig` in transformers: config.json files pass both ways.
"""

import logging
import math
import os
import reprlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from cvt import hub

logger = logging.getLogger(__name__)

ACTIVATIONS = ("gelu", "quick_gelu")
PROJECTION_METHODS = ("dw_bn", "avg", "linear")
INITIALISATIONS = ("trunc_norm", "xavier")
DTYPES = ("float32", "bfloat16", "float16", "float64")

# Far above what anyone trains: a file that asks for more is damaged, or meant to harm.
MAX_BLOCKS = 1000  # in all stages together
MAX_CLASSES = 1_000_000
MAX_KERNEL = 1000  # of kernels, strides and paddings, in pixels
MAX_WIDTH = 1_000_000

# What differs from the defaults of `CvtConfig`: table 1 of the paper and the authors' yaml files;
# `cvt-digits` is ours, of 1.0 M parameters, for the 16 x 16 pixels of `cvt demo`.
VARIANTS: dict[str, dict[str, Any]] = {
    "cvt-13": {"depth": (1, 2, 10)},
    "cvt-21": {"depth": (1, 4, 16)},
    "cvt-w24": {
        "depth": (2, 2, 20),
        "embed_dim": (192, 768, 1024),
        "num_heads": (3, 12, 16),
        "drop_path_rate": (0.0, 0.0, 0.3),
    },
    "cvt-digits": {
        "depth": (1, 2, 4),
        "embed_dim": (32, 64, 128),
        "num_heads": (1, 2, 4),
        "patch_sizes": (5, 3, 3),
        "patch_stride": (2, 2, 2),
    },
}


class _Kind(NamedTuple):
    """What a field takes: a description, a test, and the type that it is converted to."""

    wanted: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any]

    def check(self, name: str, value: Any) -> Any:
        if not self.accepts(value):
            raise ValueError(f"{name} = {value!r}: must be {self.wanted}")
        return self.convert(value)


def _integer(ge: int, le: int) -> _Kind:
    def accepts(value: Any) -> bool:
        return (
            isinstance(value, Integral) and not isinstance(value, bool) and ge <= int(value) <= le
        )

    return _Kind(f"an integer from {ge} to {le}", accepts, int)


def _one_of(choices: tuple[str, ...]) -> _Kind:
    return _Kind("one of " + ", ".join(choices), lambda value: value in choices, str)


_FLAG = _Kind("True or False", lambda value: value in (0, 1), bool)
_RATIO = _Kind("a number above 0", lambda v: isinstance(v, Real) and 0 < float(v) < math.inf, float)
_RATE = _Kind("at least 0 and below 1", lambda v: isinstance(v, Real) and 0 <= float(v) < 1, float)

_PER_STAGE = {
    "patch_sizes": _integer(1, MAX_KERNEL),
    "patch_stride": _integer(1, MAX_KERNEL),
    "patch_padding": _integer(0, MAX_KERNEL),
    "embed_dim": _integer(1, MAX_WIDTH),
    "num_heads": _integer(1, MAX_WIDTH),
    "depth": _integer(1, MAX_BLOCKS),
    "mlp_ratio": _RATIO,
    "attention_drop_rate": _RATE,
    "drop_rate": _RATE,
    "drop_path_rate": _RATE,
    "qkv_bias": _FLAG,
    "cls_token": _FLAG,
    "qkv_projection_method": _one_of(PROJECTION_METHODS),
    "kernel_qkv": _integer(1, MAX_KERNEL),
    "padding_kv": _integer(0, MAX_KERNEL),
    "stride_kv": _integer(1, MAX_KERNEL),
    "padding_q": _integer(0, MAX_KERNEL),
    "stride_q": _integer(1, MAX_KERNEL),
}
_WHOLE = {
    "num_channels": _integer(1, MAX_WIDTH),
    "hidden_act": _one_of(ACTIVATIONS),
    "init": _one_of(INITIALISATIONS),
    "initializer_range": _RATIO,
    "layer_norm_eps": _RATIO,
}


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
        """The methods of query, key and value; `avg` leaves the query alone, as by the authors."""
        method = self.qkv_projection_method
        return {"query": "linear" if method == "avg" else method, "key": method, "value": method}

    @property
    def parameters(self) -> int:
        """Trainable numbers in the token embedding, the class token and the blocks."""
        width, hidden = self.embed_dim, int(self.embed_dim * self.mlp_ratio)
        embedding = width * self.in_channels * self.patch_sizes**2 + 3 * width
        convolved = sum(method == "dw_bn" for method in self.projection_methods.values())
        projections = convolved * (width * self.kernel_qkv**2 + 2 * width)
        attention = 4 * width**2 + width + 3 * width * self.qkv_bias
        mlp = 2 * width * hidden + hidden + width
        block = projections + attention + mlp + 4 * width
        return embedding + width * self.cls_token + self.depth * block

    def minimum_size(self, grid: int = 1) -> int:
        """The smallest height and width of its input, in pixels, that leave a token everywhere.

        Args:
            grid: height and width, in tokens, that the next stage needs.
        """
        for part, method in self.projection_methods.items():
            query = part == "query"
            needed = self.kernel_qkv - 2 * (self.padding_q if query else self.padding_kv)
            if method == "avg":  # rounds its output size up
                needed -= (self.stride_q if query else self.stride_kv) - 1
            grid = grid if method == "linear" else max(grid, needed)
        return max(1, (grid - 1) * self.patch_stride + self.patch_sizes - 2 * self.patch_padding)


def check_lengths(lists: Mapping[str, Any]) -> None:
    """Raise a ValueError unless all these fields are lists of one value per stage."""
    for name, values in lists.items():
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"{name} = {values!r}: must be a list of one value per stage")
    stages = len(lists["depth"])
    if stages > MAX_BLOCKS:
        raise ValueError(
            f"depth lists {stages} stages: there may be at most {MAX_BLOCKS} blocks in all"
        )
    if wrong := [name for name, values in lists.items() if len(values) != stages]:
        raise ValueError(
            f"depth = {list(lists['depth'])!r} lists {stages} stages; of another length: "
            + ", ".join(f"{name} ({len(lists[name])})" for name in wrong)
        )


def check_stage(stage: StageConfig, i: int) -> None:
    """Raise a ValueError where settings of stage `i`, counted from 0, contradict each other."""
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


def memory_bytes() -> int | None:
    """The memory of this machine, or of the container that the process is in; None if unknown."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None
    with suppress(OSError, ValueError):  # "max" is no limit
        return min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def checked_pixels(pixel_values: Any, channels: int, least: int) -> Any:
    """`pixel_values`, or a ValueError that names what was expected.

    Args:
        pixel_values: a tensor of floats, (B, C, H, W).
        channels: C.
        least: pixels that height and width must have.
    """
    if pixel_values is None:
        raise ValueError("pixel_values is missing")
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values are {pixel_values.dtype}; expected floats, normalised as "
            "cvt.image_processor does"
        )
    if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or pixel_values.shape[0] == 0:
        raise ValueError(
            f"pixel_values have shape {tuple(pixel_values.shape)}; "
            f"expected (batch, {channels}, height, width)"
        )
    H, W = pixel_values.shape[2:]
    if least > H or least > W:
        raise ValueError(
            f"pixel_values are {H} x {W} pixels; this model needs at least {least} x {least}"
        )
    return pixel_values


def check_queries(queries: int, tokens: int, grid: tuple[int, int]) -> None:
    """Raises a ValueError where queries cannot be added to tokens; the authors broadcast one."""
    if queries not in (tokens, 1):
        raise ValueError(
            f"kernel_qkv, stride_q and padding_q give {queries} queries of {tokens} tokens "
            f"({grid[0]} x {grid[1]}); the residual connection needs as many queries as tokens"
        )


def _with_integer_indices(name: str, labels: Mapping[Any, Any]) -> dict[Any, Any]:
    """The map `name`, `id2label` or `label2id`, with integers as indices, sorted by them."""
    try:
        if name == "id2label":
            return dict(sorted((int(index), label) for index, label in labels.items()))
        pairs = [(label, int(index)) for label, index in labels.items()]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} = {reprlib.repr(dict(labels))}: its class indices must be integers"
        ) from error
    return dict(sorted(pairs, key=lambda pair: pair[1]))


def refuse_code(fields: Mapping[str, Any]) -> None:
    """Raise a ValueError for fields of a file that ask for quantisation or code from the hub."""
    if fields.get("quantization_config") is not None:
        raise ValueError(
            "quantization_config: quantised weights are not read; save the model in one of "
            + ", ".join(DTYPES)
        )
    for name in ("attn_implementation", "_attn_implementation"):
        value = fields.get(name)
        if value is not None and (not isinstance(value, str) or "/" in value):
            raise ValueError(
                f"{name} = {value!r}: a configuration names no kernel of the hub; must be the "
                "name of an attention function, as sdpa or eager"
            )


class CvtConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a CvT.

    Every list has one value per stage; the number of stages is the length of `depth`.

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
        drop_rate: dropout on the tokens at the head of a stage, after the attention, and twice in
            the MLP.
        drop_path_rate: stochastic depth of the stage's last block; it rises linearly from 0.
        qkv_bias: whether the query, key and value Linears have a bias.
        cls_token: whether the stage has a class token.
        qkv_projection_method: `dw_bn` (depthwise convolution and BatchNorm), `avg` (average pooling
            of key and value) or `linear` (none).
        kernel_qkv: kernel of the projection, for query, key and value.
        padding_kv: padding of the key and value projection.
        stride_kv: its stride.
        padding_q: padding of the query projection.
        stride_q: its stride.
        hidden_act: activation of the MLP: `gelu`, as transformers computes, or `quick_gelu`, as the
            authors do.
        init: initialisation of the Linears, `trunc_norm` or `xavier`.
        initializer_range: standard deviation of `trunc_norm`, class tokens and the classifier.
        layer_norm_eps: epsilon of every LayerNorm. A config.json without `hidden_act` was written
            by transformers, whose 1e-12 never took effect; it is read as 1e-5.
        kwargs: fields of transformers' `PreTrainedConfig`; `out_features`, `out_indices` of
            `CvtBackbone`.

    Raises:
        ValueError: a field is illegal; names the field, its stage and the value.

    Example:
        >>> from cvt import CvtConfig
        >>> config = CvtConfig.from_variant("cvt-13", num_labels=5)
        >>> config.embed_dim, config.depth, config.hidden_act
        ([64, 192, 384], [1, 2, 10], 'quick_gelu')
        >>> CvtConfig(embed_dim=[64, 192, 100])
        Traceback (most recent call last):
            ...
        ValueError: stage 3: embed_dim[2] = 100 is not divisible by num_heads[2] = 6
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
        for name, value in (("dtype", self.dtype), ("torch_dtype", kwargs.get("torch_dtype"))):
            if value is not None and str(value).removeprefix("torch.") not in DTYPES:
                raise ValueError(f"{name} = {value!r}: must be one of {', '.join(DTYPES)}")
        kwargs.pop("stage_names", None)  # derived, but other libraries write it
        maps = [kwargs.pop(name, None) for name in ("out_features", "out_indices")]
        super().__post_init__(**kwargs)
        self.validate()
        self.set_output_features_output_indices(*maps)

    def validate(self) -> None:
        """Check every field and bring it to its own type; models call it again.

        Raises:
            ValueError: names the field, its stage and the value.
        """
        for name, kind in _WHOLE.items():
            setattr(self, name, kind.check(name, getattr(self, name)))
        check_lengths({name: getattr(self, name) for name in _PER_STAGE})
        for name, kind in _PER_STAGE.items():
            values = enumerate(getattr(self, name))
            checked = [kind.check(f"stage {i + 1}: {name}[{i}]", value) for i, value in values]
            setattr(self, name, checked)
        if (blocks := sum(self.depth)) > MAX_BLOCKS:
            raise ValueError(
                f"depth gives {blocks} blocks in {len(self.depth)} stages: there may be at most "
                f"{MAX_BLOCKS} in all"
            )
        if list(self.id2label or {}) != list(range(self.num_labels or 0)):
            raise ValueError(
                f"id2label = {reprlib.repr(self.id2label)}: its keys must count from 0"
            )
        for i, stage in enumerate(self.stages):
            check_stage(stage, i)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep class indices as integers in their order: files have them as strings in any order.

        Raises:
            ValueError: an index is no integer, or there are more than `MAX_CLASSES`.
        """
        if name == "num_labels" and value is not None:
            value = _integer(0, MAX_CLASSES).check(name, value)
        if name in ("id2label", "label2id") and value is not None:
            if not isinstance(value, Mapping) or len(value) > MAX_CLASSES:
                raise ValueError(
                    f"{name} = {reprlib.repr(value)}: must be a map of at most {MAX_CLASSES} "
                    "classes"
                )
            value = _with_integer_indices(name, value)
        super().__setattr__(name, value)

    @property
    def stages(self) -> list[StageConfig]:
        """The settings, stage by stage."""
        widths = [self.num_channels, *self.embed_dim]
        stages = zip(*(getattr(self, name) for name in _PER_STAGE), strict=True)
        return [
            StageConfig(width, **dict(zip(_PER_STAGE, stage, strict=True)))
            for width, stage in zip(widths, stages, strict=False)
        ]

    @property
    def stage_names(self) -> list[str]:
        """The names by which `CvtBackbone` takes its stages."""
        return [f"stage{i + 1}" for i in range(len(self.depth))]

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in the order of the classifier."""
        names: dict[Any, str] = self.id2label or {}
        return [names[i] for i in range(len(names))]

    @class_names.setter
    def class_names(self, names: list[str]) -> None:
        self.id2label = dict(enumerate(names))
        self.label2id = {name: i for i, name in enumerate(names)}

    @property
    def parameters(self) -> int:
        """Trainable numbers in `CvtForImageClassification`, counted without building it."""
        width, classes = self.embed_dim[-1], self.num_labels or 0
        head = 2 * width + (width + 1) * classes
        return sum(stage.parameters for stage in self.stages) + head

    @property
    def size_in_words(self) -> str:
        """The number of parameters, and the fields that it follows from most."""
        names = ("num_channels", "embed_dim", "depth", "mlp_ratio", "num_labels")
        fields = ", ".join(f"{name} {reprlib.repr(getattr(self, name))}" for name in names)
        return f"the {self.parameters:,} parameters ({fields})"

    @property
    def minimum_image_size(self) -> int:
        """The smallest height and width of an image, in pixels, that leave a token per stage."""
        size = 1
        for stage in reversed(self.stages):
            size = stage.minimum_size(size)
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
        """The authors' `cvt-13`, `cvt-21` or `cvt-w24`, or our small `cvt-digits`.

        All have QuickGELU and 1000 classes.

        Args:
            name: a key of `VARIANTS`.
            overrides: fields to set otherwise.

        Raises:
            ValueError: there is no such variant, or a field is illegal.

        Example:
            >>> from cvt import CvtConfig
            >>> CvtConfig.from_variant("cvt-21").depth
            [1, 4, 16]
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
        with hub.resolved(pretrained_model_name_or_path, kwargs) as source:
            config_dict, kwargs = super().get_config_dict(source, **kwargs)
        if not config_dict:
            raise OSError(f"{pretrained_model_name_or_path} has no config.json")
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a model of type {config_dict['model_type']}, "
                "not cvt"
            )
        if "hidden_act" not in config_dict and hub.published(pretrained_model_name_or_path):
            config_dict["hidden_act"] = "quick_gelu"
            config_dict["layer_norm_eps"] = 1e-5
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "CvtConfig":
        """As in transformers; a `config_dict` without `hidden_act` comes from its own CvtConfig.

        Raises:
            ValueError: a field is illegal, or asks for quantisation or for code from the hub, which
                only an argument of `from_pretrained` may.
        """
        refuse_code(config_dict)
        if "hidden_act" not in config_dict:
            config_dict = {**config_dict, "layer_norm_eps": 1e-5}
            if hub.published(kwargs.get("name_or_path", "")):  # as AutoConfig passes it
                config_dict["hidden_act"] = "quick_gelu"
            else:
                logger.info(
                    "The configuration has no hidden_act: exact GELU, as transformers computes."
                )
        # Overrides go through the constructor, which checks them; transformers sets them after it.
        maps = ("out_features", "out_indices")
        given = {n: kwargs.pop(n) for n in (*_PER_STAGE, *_WHOLE, *maps) if n in kwargs}
        depth, saved = given.get("depth"), config_dict.get("depth", cls.depth)
        resized = isinstance(depth, list | tuple) and len(depth) != len(saved)
        if resized or given.keys() & set(maps):  # the saved choice of maps is of other stages
            config_dict = {n: value for n, value in config_dict.items() if n not in maps}
        return super().from_dict({**config_dict, **given}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "CvtConfig":
        """As in transformers."""
        return cls.from_dict(cls._dict_from_json_file(json_file))


def check_memory(config: CvtConfig) -> None:
    """Make sure that the weights fit into this machine's memory, in 16 bits.

    Raises:
        ValueError: they do not; names the fields that they follow from.
    """
    needed, memory = 2 * config.parameters, memory_bytes()
    if memory is not None and needed > memory:
        raise ValueError(
            f"{config.size_in_words} take at least {needed / 2**30:,.0f} GiB, and this machine "
            f"has {memory / 2**30:,.0f} GiB of memory"
        )


def check_file_size(
    config: CvtConfig, size: int, source: str | os.PathLike, new_head: bool = False
) -> None:
    """Make sure that files can hold as many weights as the configuration describes.

    Args:
        config: of the model.
        size: of the files, in bytes; a weight takes at least one.
        source: how the error calls them.
        new_head: whether the classifier is not in them.

    Raises:
        ValueError: they cannot; names the fields that the number of weights follows from.
    """
    head = (config.embed_dim[-1] + 1) * (config.num_labels or 0)
    if config.parameters - (head if new_head else 0) > size:
        raise ValueError(
            f"{config.size_in_words} of its config.json do not fit {source}, whose weights take "
            f"{size:,} bytes"
        )
