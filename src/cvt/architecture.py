"""The architecture of a CvT: its fields, their validation and the paper's variants.

Field names and defaults are those of `CvtConfig` in transformers: config.json files pass both ways.
Nothing here needs transformers or PyTorch, so that exported models run without them.
"""

import math
import os
import reprlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .files import named_in_errors, read_json
from .problem_type import PROBLEMS

MODEL_TYPE = "cvt"  # in config.json
LIBRARY = "cvt-vision"  # the `library_name` in a config.json that this package wrote
ACTIVATIONS = ("gelu", "quick_gelu")
PROJECTION_METHODS = ("dw_bn", "avg", "linear")
POSITION_EMBEDDINGS = ("none", "learned")
INITIALISATIONS = ("trunc_norm", "xavier")
DTYPES = ("float32", "bfloat16", "float16", "float64")

# Far above what anyone trains: a file that asks for more is damaged, or meant to harm.
MAX_BLOCKS = 1000  # in all stages together
MAX_CLASSES = 1_000_000
MAX_KERNEL = 1000  # of kernels, strides and paddings, in pixels
MAX_WIDTH = 1_000_000
MAX_SIDE = 65_536  # of an image, in pixels

# What differs from the defaults of `CvtConfig`: table 2 of the paper and the authors' yaml files;
# `cvt-7` and `cvt-digits` are ours, of 2.3 M and 1.0 M parameters: for pictures of 64 x 64 pixels,
# and for the 16 x 16 of `cvt demo`.
VARIANTS: dict[str, dict[str, Any]] = {
    "cvt-13": {"depth": (1, 2, 10)},
    "cvt-21": {"depth": (1, 4, 16)},
    "cvt-w24": {
        "depth": (2, 2, 20),
        "embed_dim": (192, 768, 1024),
        "num_heads": (3, 12, 16),
        "drop_path_rate": (0.0, 0.0, 0.3),
    },
    "cvt-7": {
        "depth": (1, 2, 4),
        "embed_dim": (48, 96, 192),
        "num_heads": (1, 2, 4),
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


def _is_image_size(value: Any) -> bool:
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    return value is None or all(map(_integer(1, MAX_SIDE).accepts, sides))


_IMAGE_SIZE = _Kind(
    f"None, an integer from 1 to {MAX_SIDE}, or two: height and width",
    _is_image_size,
    lambda value: (
        list(map(int, value)) if isinstance(value, list | tuple) else value and int(value)
    ),
)
_FLAG = _Kind("True or False", lambda value: value in (0, 1), bool)
_RATIO = _Kind("a number above 0", lambda v: isinstance(v, Real) and 0 < float(v) < math.inf, float)
_SHARE = _Kind("from 0 to 1", lambda v: isinstance(v, Real) and 0 <= float(v) <= 1, float)
_RATE = _Kind("at least 0 and below 1", lambda v: isinstance(v, Real) and 0 <= float(v) < 1, float)

PER_STAGE = {
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
    "position_embedding": _one_of(POSITION_EMBEDDINGS),
    "qkv_projection_method": _one_of(PROJECTION_METHODS),
    "kernel_qkv": _integer(1, MAX_KERNEL),
    "padding_kv": _integer(0, MAX_KERNEL),
    "stride_kv": _integer(1, MAX_KERNEL),
    "padding_q": _integer(0, MAX_KERNEL),
    "stride_q": _integer(1, MAX_KERNEL),
}
WHOLE = {
    "num_channels": _integer(1, MAX_WIDTH),
    "image_size": _IMAGE_SIZE,
    "hidden_act": _one_of(ACTIVATIONS),
    "init": _one_of(INITIALISATIONS),
    "initializer_range": _RATIO,
    "layer_norm_eps": _RATIO,
}


FIELDS = (*PER_STAGE, *WHOLE)


@dataclass(frozen=True)
class StageConfig:
    """The settings of one stage, under the names they have in `CvtConfig`.

    Attributes:
        in_channels: of its input.
        in_size: height and width of its input, in pixels, for images of the configuration's
            `image_size`; None without one.
    """

    in_channels: int
    in_size: tuple[int, int] | None
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
    position_embedding: str
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

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of its tokens, for an input of so many pixels."""
        margin = 2 * self.patch_padding - self.patch_sizes
        rows, columns = ((size + margin) // self.patch_stride + 1 for size in (height, width))
        return rows, columns

    @property
    def position_grid(self) -> tuple[int, int] | None:
        """Rows and columns of its position embedding; None where it has none."""
        if self.position_embedding == "none" or self.in_size is None:
            return None
        return self.grid(*self.in_size)

    @property
    def parameters(self) -> int:
        """Trainable numbers in the token and position embedding, class token and blocks."""
        width, hidden = self.embed_dim, int(self.embed_dim * self.mlp_ratio)
        embedding = width * self.in_channels * self.patch_sizes**2 + 3 * width
        convolved = sum(method == "dw_bn" for method in self.projection_methods.values())
        projections = convolved * (width * self.kernel_qkv**2 + 2 * width)
        attention = 4 * width**2 + width + 3 * width * self.qkv_bias
        mlp = 2 * width * hidden + hidden + width
        block = projections + attention + mlp + 4 * width
        positions = math.prod(self.position_grid or (0,))
        return embedding + width * (self.cls_token + positions) + self.depth * block

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


def _is_none_everywhere(values: Any) -> bool:
    """Whether `position_embedding` lists `none` alone."""
    is_list = isinstance(values, list | tuple) and len(values) > 0
    return is_list and all(value == "none" for value in values)


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


@dataclass(kw_only=True, eq=False, repr=False)
class Architecture:
    """The fields of a CvT, which `cvt.CvtConfig` documents, and what follows from them.

    What inherits from it has the labels, as configurations of transformers do.
    """

    if TYPE_CHECKING:
        id2label: Any = field(init=False)
        label2id: Any = field(init=False)
        problem_type: Any = field(init=False)

    num_channels: int = 3
    image_size: int | list[int] | tuple[int, ...] | None = None
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
    position_embedding: list[str] | tuple[str, ...] = ("none", "none", "none")
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
    thresholds: list[float] | None = None

    def validate(self) -> None:
        """Check every field and bring it to its own type; models call it again.

        Raises:
            ValueError: names the field, its stage and the value.
        """
        for name, kind in WHOLE.items():
            setattr(self, name, kind.check(name, getattr(self, name)))
        if _is_none_everywhere(self.position_embedding) and isinstance(self.depth, list | tuple):
            # Files and calls that do not know the field may have any number of stages.
            self.position_embedding = ["none"] * len(self.depth)
        check_lengths({name: getattr(self, name) for name in PER_STAGE})
        for name, kind in PER_STAGE.items():
            values = enumerate(getattr(self, name))
            checked = [kind.check(f"stage {i + 1}: {name}[{i}]", value) for i, value in values]
            setattr(self, name, checked)
        if (blocks := sum(self.depth)) > MAX_BLOCKS:
            raise ValueError(
                f"depth gives {blocks} blocks in {len(self.depth)} stages: there may be at most "
                f"{MAX_BLOCKS} in all"
            )
        if self.problem_type is not None:
            _one_of(PROBLEMS).check("problem_type", self.problem_type)
        if list(self.id2label or {}) != list(range(self.num_labels or 0)):
            raise ValueError(
                f"id2label = {reprlib.repr(self.id2label)}: its keys must count from 0"
            )
        if self.thresholds is not None:
            if not isinstance(self.thresholds, list) or len(self.thresholds) != self.num_labels:
                raise ValueError(
                    f"thresholds = {reprlib.repr(self.thresholds)}: must be a list of "
                    f"{self.num_labels} numbers, one for each class"
                )
            self.thresholds = [_SHARE.check("thresholds", value) for value in self.thresholds]
        for i, stage in enumerate(self.stages):
            check_stage(stage, i)
        self._check_positions()

    def _check_positions(self) -> None:
        """Raise a ValueError where the grid of a position embedding is not known, or empty."""
        if _is_none_everywhere(self.position_embedding):
            return
        if self.image_size is None:
            i = self.position_embedding.index("learned")
            raise ValueError(
                f"stage {i + 1}: position_embedding[{i}] = 'learned': needs image_size, the height "
                "and width of the images that its grid is for, in pixels"
            )
        if min(self.image_sides or ()) < (least := self.minimum_image_size):
            raise ValueError(
                f"image_size = {self.image_size}: this model needs at least {least} x {least} "
                "pixels"
            )

    @property
    def num_labels(self) -> Any:
        """The number of classes; None where they are not set yet."""
        return None if self.id2label is None else len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        if count != self.num_labels:
            self.class_names = [f"LABEL_{i}" for i in range(count)]

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
    def image_sides(self) -> tuple[int, int] | None:
        """`image_size` as height and width."""
        if self.image_size is None:
            return None
        sides = self.image_size if isinstance(self.image_size, list | tuple) else [self.image_size]
        return sides[0], sides[-1]

    @property
    def stages(self) -> list[StageConfig]:
        """The settings, stage by stage."""
        widths, size = [self.num_channels, *self.embed_dim], self.image_sides
        found = []
        values = zip(*(getattr(self, name) for name in PER_STAGE), strict=True)
        for width, of_stage in zip(widths, values, strict=False):
            stage = StageConfig(width, size, **dict(zip(PER_STAGE, of_stage, strict=True)))
            found.append(stage)
            size = stage.grid(*size) if size else None
        return found

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
        if self.id2label is not None and len(self.id2label) != len(names):
            self.thresholds = None  # they are of other classes
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


@dataclass(kw_only=True, eq=False, repr=False)
class ClassifierConfig(Architecture):
    """The configuration of a classifier that runs without transformers, as an export does.

    It has the fields, labels and properties of the `cvt.CvtConfig` of the same config.json.
    """

    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None

    def __post_init__(self) -> None:
        if self.id2label is None:  # transformers does not write the labels of two classes
            self.num_labels = 2
        elif self.label2id is None:
            self.label2id = {name: i for i, name in self.id2label.items()}
        self.validate()

    @classmethod
    def from_file(cls, path: Path, hidden_act: str | None = None) -> "ClassifierConfig":
        """Read a config.json.

        Args:
            path: the file.
            hidden_act: the activation, where it is known or does not matter.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not the configuration of a CvT; names the file.
        """
        with named_in_errors(path):
            saved = plain_fields(read_json(path))
            refuse_code(saved)
            names = {each.name for each in fields(cls)}
            saved = with_activation(saved, hidden_act)
            return cls(**{n: value for n, value in saved.items() if n in names})


def plain_fields(saved: Any) -> dict[str, Any]:
    """The fields in the config.json of a CvT; those of lucid-dl in our names.

    lucid-dl computes GELU; what it ported from microsoft/cvt-* was trained with QuickGELU.

    Sources: github.com/ChanLumerico/lucid, lucid/models/vision/cvt/_config.py and _model.py,
    tools/convert_weights/_templates.py.

    Raises:
        ValueError: the file holds no object, or is of another model.
    """
    if not isinstance(saved, dict):
        raise ValueError("must be an object")
    if saved.get("model_type", MODEL_TYPE) != MODEL_TYPE:
        raise ValueError(f"is of a model of type {saved['model_type']}, not {MODEL_TYPE}")
    if saved.get("library_name") == "lucid" and isinstance(saved.get("config"), dict):
        theirs = saved["config"]
    else:
        theirs = saved
    if not theirs.keys() >= {"dims", "depths", "embed_strides"}:
        return saved
    depth, strides = theirs["depths"], theirs["embed_strides"]
    check_lengths({"depth": depth, "embed_strides": strides})

    def every(value: Any) -> list:
        return [value] * len(depth)

    weights = saved.get("weights")
    source = str(weights.get("source")) if isinstance(weights, dict) else ""
    classes = _integer(0, MAX_CLASSES).check("num_classes", theirs.get("num_classes", 2))
    names = saved.get("id2label")
    if not isinstance(names, dict):
        names = {i: f"LABEL_{i}" for i in range(classes)}
    fixed = ("qkv_bias", "qkv_projection_method", "kernel_qkv", "padding_kv", "stride_kv",
             "padding_q", "stride_q")  # fmt: skip
    return {
        "model_type": saved.get("model_type", MODEL_TYPE),
        "num_channels": theirs.get("in_channels", 3),
        "patch_sizes": [7 if stride == 4 else 3 for stride in strides],
        "patch_stride": strides,
        "patch_padding": [2 if stride == 4 else 1 for stride in strides],
        "embed_dim": theirs["dims"],
        "num_heads": theirs.get("num_heads"),
        "depth": depth,
        "mlp_ratio": every(theirs.get("mlp_ratio", 4.0)),
        "attention_drop_rate": every(theirs.get("dropout", 0.0)),
        "drop_rate": every(theirs.get("dropout", 0.0)),
        "drop_path_rate": every(theirs.get("drop_path_rate", 0.0)),
        "cls_token": theirs.get("cls_token"),
        "position_embedding": every("none"),
        **{name: every(getattr(Architecture, name)[0]) for name in fixed},
        "hidden_act": "quick_gelu" if source.startswith("transformers/microsoft/cvt-") else "gelu",
        "id2label": names,
        "label2id": {str(name): i for i, name in names.items()},
    }


def with_activation(
    saved: dict[str, Any], hidden_act: str | None = None, is_file: bool = True
) -> dict[str, Any]:
    """The fields of a config.json, with the activation and the epsilon of its weights.

    This package writes both. Without `hidden_act` the file is of transformers' own CvtConfig, whose
    model computes GELU, and with 1e-5, whatever the file has.

    Args:
        saved: the fields in the file.
        hidden_act: the activation, if it is known from elsewhere.
        is_file: whether they are of a file; in memory, the activation may be left to its default.

    Raises:
        ValueError: the activation does not follow from the fields.
    """
    recorded, version = saved.get("hidden_act"), saved.get("transformers_version")
    doubt = ""
    if recorded is None:
        if is_file and not version:
            doubt = "neither hidden_act nor transformers_version is in the configuration"
        elif is_imagenet(saved):
            doubt = (
                "its classes are ImageNet's, as those of the published checkpoints, which need "
                "quick_gelu; where transformers trained the weights, it is gelu"
            )
        saved = {**saved, "hidden_act": hidden_act or "gelu", "layer_norm_eps": 1e-5}
    elif recorded != "gelu" and version and saved.get("library_name") == LIBRARY:
        doubt = (
            f"transformers' own CvT, which is of gelu, has saved a model of {recorded}; where it "
            "trained the weights, it is gelu"
        )
        if hidden_act == "gelu":  # it trained them, with the one epsilon that it has
            saved = {**saved, "layer_norm_eps": 1e-5}
    if doubt and hidden_act is None:
        raise ValueError(
            f"hidden_act is unknown: {doubt}. `cvt convert FOLDER NEW --hidden-act gelu`, or "
            "quick_gelu, records it; from_pretrained takes hidden_act"
        )
    return saved


def is_imagenet(saved: Mapping[str, Any]) -> bool:
    """Whether the classes in a config.json are those of ImageNet-1k, by their number and first."""
    names = saved.get("id2label")
    if not isinstance(names, Mapping) or len(names) != 1000:
        return False
    return "tench" in str(names.get("0", names.get(0)))


def check_memory(config: Architecture) -> None:
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
    config: Architecture, size: int, source: str | os.PathLike, new_head: bool = False
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
