"""One table of parameter names, read in every direction."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

Weight = TypeVar("Weight")

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
_TABLE = {
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
_POSITIONS = "cvt.encoder.stages.{s}.position_embedding"
_OURS = _TABLE | {_POSITIONS: _POSITIONS}  # the authors' models have none
_PARAMETERS = ("cls_token", "position_embedding")  # the names that hold a tensor themselves
# A weight of a Keras model: its path is our name with slashes and hyphens for dots.
_KERAS = re.compile(r"(encoder[/.]stages[-.]\d+[/.].+|(?:layernorm|classifier)/[^/]+)$")
_KERAS_TENSORS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
# What PyTorch puts into the names of modules that it compiles, shards or recomputes.
_PYTORCH = re.compile(r"(?:(?<=\.)|^)_(?:orig_mod|(?:fsdp|checkpoint)_wrapped_module)\.")
# The weight that every CvT has once, behind the names of the modules that hold the model.
_FIRST = re.compile(
    r"(?P<prefix>|.+?\.)(?:stage0\.patch_embed\.proj"
    r"|(?:cvt\.)?encoder\.stages\.0\.embedding\.convolution_embeddings\.projection)\.weight"
)
_TENSOR = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)"


def authors_to_transformers(state_dict: Mapping[str, Weight]) -> dict[str, Weight]:
    """Rename the weights of an authors' model to those of `CvtForImageClassification`.

    Raises:
        ValueError: names that no CvT of the authors has; lists all of them.

    Example:
        >>> from cvt.checkpoints import authors_to_transformers
        >>> list(authors_to_transformers({"stage2.blocks.9.norm1.weight": 1}))
        ['cvt.encoder.stages.2.layers.9.layernorm_before.weight']
    """
    return _refusing(*rename_known(state_dict))


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
    return _refusing(*_renamed(_prefixed(state_dict), _TABLE))


def keras_to_transformers(path: str) -> str | None:
    """Transformers' name, in `CvtForImageClassification`, of the weight at a path in Keras.

    Args:
        path: in a model of this package, or in a tf_model.h5 of transformers 4.

    Returns:
        None if it is no weight of a CvT.
    """
    found = _KERAS.search(path.removesuffix(":0"))
    if found is None:
        return None
    module, _, tensor = re.sub("[/-]", ".", found[1]).rpartition(".")
    name = f"{module}.{_KERAS_TENSORS.get(tensor, tensor)}"
    name = f"cvt.{name}" if name.startswith("encoder.") else name
    return name if not _renamed({name: None}, _OURS)[1] else None


def rename_known(state_dict: Mapping[str, Weight]) -> tuple[dict[str, Weight], list[str]]:
    """As `authors_to_transformers`, and the names that no CvT of the authors has."""
    return _renamed(state_dict, {authors: ours for ours, authors in _TABLE.items()})


def known_to_transformers(
    state_dict: Mapping[str, Weight],
) -> tuple[dict[str, Weight], list[str]]:
    """The weights as `CvtForImageClassification` names them, and the names that no CvT has.

    Args:
        state_dict: of a `CvtForImageClassification` or a `CvtModel`, ours or transformers'.
    """
    prefixed = _prefixed(state_dict)
    unknown = set(_renamed(prefixed, _OURS)[1])
    return {name: w for name, w in prefixed.items() if name not in unknown}, sorted(unknown)


def without_wrappers(name: str) -> str:
    """The name of a weight without what torch.compile, FSDP and checkpointing add to it."""
    return _PYTORCH.sub("", name)


def prefixes(names: Iterable[str]) -> list[str]:
    """What stands in front of the names of each CvT in a state dict: `""`, `module.`, `model.`."""
    found = (_FIRST.fullmatch(name) for name in names)
    return [match["prefix"] for match in found if match]


def _prefixed(state_dict: Mapping[str, Weight]) -> dict[str, Weight]:
    # A model without a head has its names without the prefix.
    return {f"cvt.{k}" if k.startswith("encoder.") else k: v for k, v in state_dict.items()}


def _refusing(renamed: dict[str, Weight], unknown: list[str]) -> dict[str, Weight]:
    if unknown:
        raise ValueError("these are not weights of a CvT: " + ", ".join(unknown))
    return renamed


def _renamed(
    state_dict: Mapping[str, Weight], table: Mapping[str, str]
) -> tuple[dict[str, Weight], list[str]]:
    patterns = {}
    for source, target in table.items():
        module = re.escape(source).replace(r"\{s\}", r"(?P<s>\d+)").replace(r"\{b\}", r"(?P<b>\d+)")
        tensor = "" if source.endswith(_PARAMETERS) else _TENSOR
        patterns[re.compile(f"{module}(?P<tensor>{tensor})")] = target + "{tensor}"
    renamed, unknown = {}, []
    for name, weight in state_dict.items():
        matches = ((pattern.fullmatch(name), target) for pattern, target in patterns.items())
        new = next((target.format(**match.groupdict()) for match, target in matches if match), None)
        if new is None:
            unknown.append(name)
        else:
            renamed[new] = weight
    return renamed, unknown
