"""One table of dialects: how other software names the weights of a CvT, and lays them out.

It needs neither PyTorch nor NumPy. docs/en/howto_convert.md has the source of each name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

Weight = TypeVar("Weight")
Rows = list[tuple[re.Pattern[str], str, Mapping[str, str]]]  # names to names, and their tensors

# transformers' and our names to the authors', by the module that holds the tensors (the class token
# holds itself). {s} is the stage, {b} the block.
_IN_BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
for _ours, _authors in {"query": "q", "key": "k", "value": "v"}.items():
    _projection = f"attention.attention.convolution_projection_{_ours}.convolution_projection"
    _IN_BLOCK |= {
        f"{_projection}.convolution": f"attn.conv_proj_{_authors}.conv",
        f"{_projection}.normalization": f"attn.conv_proj_{_authors}.bn",
        f"attention.attention.projection_{_ours}": f"attn.proj_{_authors}",
    }
_EMBEDDING = "cvt.encoder.stages.{s}.embedding.convolution_embeddings"
_AUTHORS = {
    "cvt.encoder.stages.{s}.cls_token": "stage{s}.cls_token",
    f"{_EMBEDDING}.projection": "stage{s}.patch_embed.proj",
    f"{_EMBEDDING}.normalization": "stage{s}.patch_embed.norm",
    **{
        f"cvt.encoder.stages.{{s}}.layers.{{b}}.{ours}": f"stage{{s}}.blocks.{{b}}.{authors}"
        for ours, authors in _IN_BLOCK.items()
    },
    "layernorm": "norm",
    "classifier": "head",
}
POSITIONS = "cvt.encoder.stages.{s}.position_embedding"
_OURS = {name: name for name in (*_AUTHORS, POSITIONS)}  # the authors' models have no positions
_PARAMETERS = ("cls_token", "position_embedding")  # the names that hold a tensor themselves
_FIRST = f"{_EMBEDDING}.projection.weight".format(s=0)  # the weight that every CvT has once

_NORM = re.compile(r"norm(alization|_before|_after)?$")
_LINEAR_TENSORS = {"weight": "weight", "bias": "bias"}  # of convolutions, too
_NORM_TENSORS = {
    name: name for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}
# The heads of wrappers, beside a model without a classifier: MMPretrain's, PASSL's, and by hand.
_HEADS_BESIDE = ("head.fc", "head.layers.head", "head.fc_cls", "head", "classifier", "fc")
# What PyTorch puts into the names of modules that it compiles, shards or recomputes.
_PYTORCH = re.compile(r"(?:(?<=\.)|^)_(?:orig_mod|(?:fsdp|checkpoint)_wrapped_module)\.")
# Weights of other networks that are called CvT.
_OTHER_NETWORKS = {
    "layers.0.2.layers.0.0.to_kv.net.0.weight": "it is vit-pytorch's CvT, another network: key and "
    "value share a convolution, the attention is scaled by the width of a head, and there is "
    "neither a class token nor a LayerNorm before the classifier",
}


@dataclass(frozen=True, eq=False)
class Dialect:
    """How a software names the weights of a CvT, and lays them out.

    Attributes:
        name: as `cvt convert --to` takes it.
        title: how messages call it.
        modules: our names of the modules to its names; {s} is the stage, {b} the block.
        linear: PyTorch's names of the tensors of convolutions and Linears to its names.
        norm: likewise of LayerNorm and BatchNorm.
        axes: the order of its axes from which `permute` gives PyTorch's, by their number.
        root: for names that are paths in Keras, which may begin with anything: how those within a
            stage begin.
        holder: what stands in front of all names but the classifier's, where it writes them.
        hidden_act: the activation of its weights; None if they may be of either.
        suffixes: of the files that are written for it; none if it is only read.
        note: what one has to know of its weights; empty if nothing.
    """

    name: str
    title: str
    modules: Mapping[str, str]
    linear: Mapping[str, str] = field(default_factory=lambda: _LINEAR_TENSORS)
    norm: Mapping[str, str] = field(default_factory=lambda: _NORM_TENSORS)
    axes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    root: str = ""
    holder: str = ""
    hidden_act: str | None = None
    suffixes: tuple[str, ...] = ()
    note: str = ""

    @cached_property
    def _reading(self) -> Rows:
        rows: Rows = []
        for ours, theirs in self.modules.items():
            tensors = {value: key for key, value in self._tensors(ours).items()}
            pattern = _optional_prefix(_pattern(theirs, tensors))
            rows.append((re.compile(pattern), ours, tensors))
        return rows

    @cached_property
    def _writing(self) -> Rows:
        return [
            (re.compile(_pattern(ours, self._tensors(ours))), theirs, self._tensors(ours))
            for ours, theirs in self.modules.items()
        ]

    def _tensors(self, ours: str) -> Mapping[str, str]:
        """The tensors of one of our modules, by PyTorch's names of them; none of a parameter."""
        if ours.endswith(_PARAMETERS):
            return {}
        return self.norm if _NORM.search(ours) else self.linear

    @cached_property
    def first(self) -> str:
        """Its name of the weight that every CvT has once."""
        first = self.their_name(_FIRST)
        assert first
        return first

    def is_first(self, name: str) -> bool:
        """Whether this is its name of that weight."""
        return self._plain(name).removeprefix("cvt.") == self.first.removeprefix("cvt.")

    def our_name(self, name: str) -> str | None:
        """The name in `CvtForImageClassification` of one of its weights; None if it has no such."""
        return _renamed(self._plain(name), self._reading)

    def their_name(self, name: str) -> str | None:
        """Its name of a weight of `CvtForImageClassification`; None if it has none."""
        return _renamed(name, self._writing)

    def written_name(self, name: str) -> str | None:
        """As `their_name`, with what stands around it in a file."""
        theirs = self.their_name(name)
        if theirs and self.root:
            path = theirs if name.endswith(_PARAMETERS) else re.sub(r"\.(?!\d)", "/", theirs)
            return f"{path}:0"
        held = theirs and not name.startswith("classifier.")
        return f"{self.holder}{theirs}" if held else theirs

    def read(self, state_dict: Mapping[str, Weight]) -> tuple[dict[str, Weight], list[str]]:
        """Its weights as `CvtForImageClassification` has them, and the names of all others."""
        read: dict[str, Weight] = {}
        unknown = []
        for name, weight in state_dict.items():
            ours = self.our_name(name)
            if ours is None or ours in read:
                unknown.append(name)
            else:
                read[ours] = _permuted(weight, self.axes)
        return read, unknown

    def written(self, state_dict: Mapping[str, Weight]) -> dict[str, Weight]:
        """The weights of a `CvtForImageClassification` as this software has them.

        BatchNorm's counters, which nothing reads, are left out where it has none.

        Raises:
            ValueError: it has no place for some; lists their names.
        """
        back = {n: tuple(axes.index(i) for i in range(n)) for n, axes in self.axes.items()}
        names = {name: self.written_name(name) for name in state_dict}
        absent = () if "num_batches_tracked" in self.norm else ("num_batches_tracked",)
        if unknown := [n for n, new in names.items() if not new and not n.endswith(absent)]:
            raise _no_weights(unknown)
        return {new: _permuted(state_dict[name], back) for name, new in names.items() if new}

    def _plain(self, name: str) -> str:
        """A path in Keras as the table has it; any other name as it is."""
        if not self.root:
            return name
        dotted = re.sub("[/-]", ".", name.removesuffix(":0"))
        dotted = re.sub(r"\.conv2d(?:_\d+)?(?=\.\w+$)", "", dotted)  # the layer in cvt-tensorflow's
        found = re.fullmatch(rf"(?:.*\.)?({self.root}\d+\..+)", dotted)
        return found[1] if found else ".".join(dotted.split(".")[-2:])


def _like_authors(*changes: tuple[str, str]) -> dict[str, str]:
    """The authors' table with other words in their names: patterns and what replaces them."""
    changed = dict(_AUTHORS)
    for pattern, new in changes:
        changed = {ours: re.sub(pattern, new, theirs) for ours, theirs in changed.items()}
    return changed


_STAGES = (r"^stage\{s\}", "stages.{s}")
_SEQUENTIAL = ((r"(conv_proj_.)\.conv$", r"\1.0"), (r"(conv_proj_.)\.bn$", r"\1.1"))
_KERAS: dict[str, Any] = {
    "linear": {"weight": "kernel", "bias": "bias"},
    "norm": {
        "weight": "gamma",
        "bias": "beta",
        "running_mean": "moving_mean",
        "running_var": "moving_variance",
    },
    "axes": {2: (1, 0), 4: (3, 2, 0, 1)},
}
_PADDLE: dict[str, Any] = {
    "norm": {
        "weight": "weight",
        "bias": "bias",
        "running_mean": "_mean",
        "running_var": "_variance",
    },
    "axes": {2: (1, 0)},
    "hidden_act": "quick_gelu",
    "suffixes": (".pdparams",),
}
DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect("transformers", "transformers", _OURS),
        Dialect(
            "authors",
            "the authors",
            _AUTHORS,
            hidden_act="quick_gelu",
            suffixes=(".pth", ".pt", ".bin", ".safetensors"),
        ),
        Dialect(
            "transformers-tf",
            "transformers 4 in TensorFlow",
            _OURS,
            **_KERAS,
            root=r"encoder\.stages\.",
            suffixes=(".safetensors",),
        ),
        Dialect(
            "cvt-tensorflow",
            "cvt-tensorflow",
            _AUTHORS,
            **_KERAS,
            root="stage",
            hidden_act="quick_gelu",
        ),
        Dialect(
            "timm",
            "timm's pull request 2176",
            _like_authors(
                _STAGES,
                (r"patch_embed", "conv_embed"),
                (r"conv_embed\.proj$", "conv_embed.conv"),
                (r"attn\.conv_proj_", "conv_proj.conv_"),
            ),
            hidden_act="quick_gelu",
            suffixes=(".pth", ".safetensors"),
            note="its fused attention divides by the root of a head's width, the authors' by that "
            "of all: what was trained with it needs its query projections multiplied by the root "
            "of the number of heads",
        ),
        Dialect(
            "lucid",
            "lucid-dl",
            _like_authors(
                _STAGES,
                (r"patch_embed", "embed"),
                (r"attn\.proj$", "attn.out_proj"),
                (r"attn\.(proj_.)$", r"attn.\1.proj"),
                (r"attn\.conv_(proj_.)\.conv$", r"attn.\1.dw"),
                (r"attn\.conv_(proj_.)\.bn$", r"attn.\1.bn"),
                (r"^norm$", "head_norm"),
                (r"^head$", "classifier"),
            ),
            suffixes=(".safetensors",),
        ),
        Dialect(
            "vformer",
            "vformer",
            _like_authors(_STAGES, (r"mlp\.fc1$", "mlp.net.0"), (r"mlp\.fc2$", "mlp.net.3")),
            hidden_act="gelu",
            suffixes=(".pth",),
        ),
        Dialect("paddlevit", "PaddleViT", _like_authors(_STAGES, *_SEQUENTIAL), **_PADDLE),
        Dialect(
            "passl",
            "PASSL",
            _like_authors(*_SEQUENTIAL, (r"^head$", "head.fc_cls")),
            holder="backbone.",
            **_PADDLE,
        ),
    )
}


def dialect_of(names: Iterable[str]) -> Dialect | None:
    """The dialect of names without a prefix; None if they are of no CvT that is known."""
    names = list(names)
    likely = [d for d in DIALECTS.values() if any(map(d.is_first, names))]
    counts = {
        dialect: sum(dialect.our_name(name) is not None for name in names)
        for dialect in likely or DIALECTS.values()
    }
    best = max(counts, key=lambda dialect: counts[dialect])
    return best if counts[best] else None


def other_network(names: Iterable[str]) -> str:
    """Why weights are of no CvT of the paper, though they are called so; empty if unknown."""
    return next(
        (why for name in names for end, why in _OTHER_NETWORKS.items() if name.endswith(end)), ""
    )


def authors_to_transformers(state_dict: Mapping[str, Weight]) -> dict[str, Weight]:
    """Rename the weights of an authors' model to those of `CvtForImageClassification`.

    Raises:
        ValueError: names that no CvT of the authors has; lists all of them.

    Example:
        >>> from cvt.checkpoints import authors_to_transformers
        >>> list(authors_to_transformers({"stage2.blocks.9.norm1.weight": 1}))
        ['cvt.encoder.stages.2.layers.9.layernorm_before.weight']
    """
    read, unknown = DIALECTS["authors"].read(state_dict)
    if unknown:
        raise _no_weights(unknown)
    return read


def transformers_to_authors(state_dict: Mapping[str, Weight]) -> dict[str, Weight]:
    """Rename the weights of a `CvtForImageClassification` or `CvtModel` to the authors' names.

    Raises:
        ValueError: names that no CvT of transformers has, as position embeddings; lists all of
            them.

    Example:
        >>> from cvt.checkpoints import transformers_to_authors
        >>> transformers_to_authors({"classifier.bias": 1, "layernorm.bias": 2})
        {'head.bias': 1, 'norm.bias': 2}
    """
    read, unknown = DIALECTS["transformers"].read(state_dict)
    if unknown:
        raise _no_weights(unknown)
    return DIALECTS["authors"].written(read)


def keras_to_transformers(path: str) -> str | None:
    """Transformers' name, in `CvtForImageClassification`, of the weight at a path in Keras.

    Args:
        path: in a model of this package, or in a tf_model.h5 of transformers 4.

    Returns:
        None if it is no weight of a CvT.
    """
    return DIALECTS["transformers-tf"].our_name(path)


def without_wrappers(name: str) -> str:
    """The name of a weight without what torch.compile, FSDP and checkpointing add to it."""
    return _PYTORCH.sub("", name)


def prefixes(names: Iterable[str]) -> list[str]:
    """What stands in front of the names of each CvT in a state dict: `""`, `module.`, `model.`."""
    found = (_PREFIXED_FIRST.fullmatch(name) for name in names)
    return [match["prefix"] for match in found if match]


def classifier_beside(names: Iterable[str], prefix: str) -> str | None:
    """The module that is the classifier of a CvT without one, in what holds the CvT.

    Args:
        names: of all weights.
        prefix: what stands in front of those of the CvT, as `backbone.`.

    Returns:
        None if there is none, or more than one that could be.
    """
    names = set(names)
    outer = prefix[: prefix.rstrip(".").rfind(".") + 1]
    found = [
        f"{outer}{head}"
        for head in _HEADS_BESIDE
        if {f"{outer}{head}.weight", f"{outer}{head}.bias"} <= names
    ]
    return found[0] if len(found) == 1 else None


def _pattern(module: str, tensors: Mapping[str, str]) -> str:
    """A regular expression for the names of the tensors of a module."""
    escaped = re.escape(module).replace(r"\{s\}", r"(?P<s>\d+)").replace(r"\{b\}", r"(?P<b>\d+)")
    return escaped + (rf"\.(?P<tensor>{'|'.join(tensors)})" if tensors else "")


def _optional_prefix(pattern: str) -> str:
    """The pattern, with the prefix that a model without a head does not have."""
    return re.sub(r"^cvt\\\.", r"(?:cvt\\.)?", pattern)


def _renamed(name: str, rows: Rows) -> str | None:
    for pattern, new, tensors in rows:
        if match := pattern.fullmatch(name):
            found = match.groupdict()
            tensor = found.pop("tensor", None)
            return new.format(**found) + (f".{tensors[tensor]}" if tensor else "")
    return None


def _permuted(weight: Any, axes: Mapping[int, tuple[int, ...]]) -> Any:
    """A tensor or an array with its axes in another order; anything else as it is."""
    order = axes.get(getattr(weight, "ndim", 0))
    if order is None:
        return weight
    return weight.permute(order) if hasattr(weight, "permute") else weight.transpose(order)


def _no_weights(names: Iterable[str]) -> ValueError:
    return ValueError("these are not weights of a CvT: " + ", ".join(names))


_FIRSTS = [_optional_prefix(re.escape(d.first)) for d in DIALECTS.values() if not d.root]
_PREFIXED_FIRST = re.compile(rf"(?P<prefix>|.+?\.)(?:{'|'.join(_FIRSTS)})")
