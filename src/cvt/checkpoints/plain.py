"""The weights of a model folder, without transformers, where nothing is unusual in it."""

from collections.abc import Iterable, Iterator
from math import prod

from torch import Tensor

from cvt.architecture import MODEL_TYPE, ClassifierConfig, StageConfig, check_memory
from cvt.checkpoints.source import ModelSource
from cvt.files import check_checksums, read_json, weight_files

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def read_plain(
    source: ModelSource, verify: bool = True
) -> tuple[ClassifierConfig, dict[str, Tensor]] | None:
    """The configuration and the weights of a classifier, by transformers' names.

    Args:
        source: of the model.
        verify: compare the folder with its `checksums.json`, where it has one.

    Returns:
        None where the folder is anything else than a CvT's config.json beside safetensors that fit
        it, in its type: `load_classifier` opens it, or lists what is wrong.

    Raises:
        ValueError: a file is damaged; names it.
    """
    files = weight_files(source.path) if source.kind == "folder" else []
    if not files or any(file.suffix == ".bin" for file in files):
        return None
    if verify:
        check_checksums(source.path)
    path = source.path / "config.json"
    try:
        fields = read_json(path)
        config = ClassifierConfig.from_file(path)
        check_memory(config)
        weights = dict(_tensors(file for file in files if file.suffix == ".safetensors"))
    except Exception:  # `load_classifier` raises it in words
        return None
    found = {name: tuple(w.shape) for name, w in weights.items() if w.is_floating_point()}
    dtypes = {str(weights[name].dtype).removeprefix("torch.") for name in found}
    dtypes |= {fields[key] for key in ("dtype", "torch_dtype") if fields.get(key)}
    fits = fields.get("model_type") == MODEL_TYPE and found == dict(shapes(config))
    return (config, weights) if fits and len(dtypes) == 1 else None


def _tensors(files: Iterable) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    for file in files:
        yield from load_file(file).items()


def shapes(config: ClassifierConfig) -> Shapes:
    """The name and the shape of every weight of a classifier, as transformers saves it."""
    for i, stage in enumerate(config.stages):
        name, C, P = f"cvt.encoder.stages.{i}", stage.embed_dim, stage.patch_sizes
        if stage.cls_token:
            yield f"{name}.cls_token", (1, 1, C)
        if grid := stage.position_grid:
            yield f"{name}.position_embedding", (1, prod(grid), C)
        embedding = f"{name}.embedding.convolution_embeddings"
        yield from _pair(f"{embedding}.projection", C, stage.in_channels, P, P)
        yield from _pair(f"{embedding}.normalization", C)
        for j in range(stage.depth):
            yield from _block(f"{name}.layers.{j}", stage)
    yield from _pair("layernorm", config.embed_dim[-1])
    if config.num_labels:
        yield from _pair("classifier", config.num_labels, config.embed_dim[-1])


def _pair(name: str, *shape: int) -> Shapes:
    """A weight and its bias."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _block(name: str, stage: StageConfig) -> Shapes:
    C, k, hidden = stage.embed_dim, stage.kernel_qkv, int(stage.embed_dim * stage.mlp_ratio)
    attention = f"{name}.attention.attention"
    for part, method in stage.projection_methods.items():
        if method == "dw_bn":
            convolution = f"{attention}.convolution_projection_{part}.convolution_projection"
            yield f"{convolution}.convolution.weight", (C, 1, k, k)
            yield from _pair(f"{convolution}.normalization", C)
            yield f"{convolution}.normalization.running_mean", (C,)
            yield f"{convolution}.normalization.running_var", (C,)
        pair = _pair(f"{attention}.projection_{part}", C, C)
        yield from pair if stage.qkv_bias else [next(pair)]
    yield from _pair(f"{name}.attention.output.dense", C, C)
    yield from _pair(f"{name}.intermediate.dense", hidden, C)
    yield from _pair(f"{name}.output.dense", C, hidden)
    yield from _pair(f"{name}.layernorm_before", C)
    yield from _pair(f"{name}.layernorm_after", C)
