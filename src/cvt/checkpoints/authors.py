"""Models from the authors' files: what the tensors tell, and what does not fit."""

import copy
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from cvt.checkpoints.names import rename_known, transformers_to_authors
from cvt.checkpoints.reading import CheckpointError, read_weights
from cvt.configuration import VARIANTS, CvtConfig
from cvt.hub import list_faults
from cvt.labels import imagenet_classes
from cvt.modeling import CvtForImageClassification

logger = logging.getLogger(__name__)


def load_authors(
    path: str | Path,
    *,
    config: CvtConfig | None = None,
    num_labels: int | None = None,
    hidden_act: str | None = None,
    allow_nonfinite: bool = False,
) -> CvtForImageClassification:
    """A classifier from an authors' .pth file; 1000 classes get the names of ImageNet's.

    Args:
        path: the file.
        config: what the tensors do not tell; by default the published variant they fit, QuickGELU.
        num_labels: make a new, random classifier for so many classes if the file's has others.
        hidden_act: the activation, if not the config's.
        allow_nonfinite: accept NaN and infinite weights.

    Raises:
        CheckpointError: the file cannot be read or does not fit; lists every fault.
    """
    found = read_weights(path)
    if any(name.startswith(("cvt.", "encoder.")) for name in found):
        raise CheckpointError(
            f"{path} has transformers' names; name the folder with its config.json instead"
        )
    weights, unexpected = rename_known(found)
    try:
        config = recognise(weights) if config is None else copy.deepcopy(config)
    except ValueError as error:
        unknown = f"; unexpected {', '.join(unexpected)}" if unexpected else ""
        raise CheckpointError(f"{path}: {error}{unknown}") from error
    config.hidden_act = hidden_act or config.hidden_act
    head = weights.get("classifier.weight")
    new_head: tuple[str, ...] = ()
    if num_labels is not None and (head is None or len(head) != num_labels):
        new_head = ("classifier.weight", "classifier.bias")
        config.num_labels = num_labels
        logger.warning(
            f"New classifier of {num_labels} classes: {path} has "
            f"{'none' if head is None else len(head)}. It is random until trained."
        )
    model = CvtForImageClassification(config)
    expected = model.state_dict()
    weights |= {name: expected[name] for name in new_head}

    theirs = dict(zip(expected, transformers_to_authors(expected), strict=True))
    faults = list_faults(
        missing=[theirs[name] for name in expected if name not in weights],
        unexpected=[
            *unexpected,
            *transformers_to_authors(
                {name: weight for name, weight in weights.items() if name not in expected}
            ),
        ],
        mismatched={
            theirs[name]: (weights[name].shape, tensor.shape)
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        },
    )
    if not allow_nonfinite:
        faults += "".join(f"\n  {name} has NaN or infinity" for name in nonfinite(found))
    if faults:
        raise CheckpointError(f"the weights in {path} do not fit:{faults}")
    model.load_state_dict(weights)
    imagenet = list(imagenet_classes().values())
    if len(config.class_names) == len(imagenet) and config.class_names[0] == "LABEL_0":
        config.class_names = imagenet
    return model


def nonfinite(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of the weights that hold NaN or infinity."""
    return [name for name, weight in weights.items() if not weight.isfinite().all()]


def recognise(weights: Mapping[str, Tensor]) -> CvtConfig:
    """The configuration of weights under transformers' names, as far as tensors tell it.

    Raises:
        ValueError: they are no published variant, or their projections leave no trace in them.
    """
    stages = "cvt.encoder.stages"
    depth: list[int] = []
    embed_dim: list[int] = []
    while any(name.startswith(f"{stages}.{len(depth)}.") for name in weights):
        s = len(depth)
        blocks = re.compile(rf"{re.escape(stages)}\.{s}\.layers\.(\d+)\.")
        depth.append(len({match[1] for name in weights if (match := blocks.match(name))}))
        norm = weights.get(f"{stages}.{s}.embedding.convolution_embeddings.normalization.weight")
        embed_dim.append(0 if norm is None else len(norm))
    for name in VARIANTS:
        variant = CvtConfig.from_variant(name)
        if depth == variant.depth and embed_dim == variant.embed_dim:
            break
    else:
        raise ValueError(
            f"depth {depth} with widths {embed_dim} is none of {', '.join(VARIANTS)}; name its "
            "config.json with --config"
        )

    def has(s: int, name: str) -> bool:
        return any(key.startswith(f"{stages}.{s}.") and key.endswith(name) for key in weights)

    everywhere = range(len(depth))
    convolved = [has(s, "convolution_projection.convolution.weight") for s in everywhere]
    if not all(convolved):
        raise ValueError(
            "the projections of a stage leave no weights, so it is avg or linear; say which in a "
            "config.json and name it with --config"
        )
    head = weights.get("classifier.weight")
    first = weights.get(f"{stages}.0.embedding.convolution_embeddings.projection.weight")
    return CvtConfig.from_variant(
        name,
        num_channels=3 if first is None else first.shape[1],
        cls_token=[has(s, "cls_token") for s in everywhere],
        qkv_bias=[has(s, "projection_query.bias") for s in everywhere],
        num_labels=1000 if head is None else len(head),
    )
