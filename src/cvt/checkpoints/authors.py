"""Models from files of weights, of any dialect: their configuration, and what does not fit."""

import copy
import logging
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cvt.architecture import VARIANTS, check_file_size, plain_fields, with_activation
from cvt.checkpoints.errors import CheckpointError
from cvt.checkpoints.names import DIALECTS, POSITIONS, Dialect, dialect_of
from cvt.checkpoints.reading import read_weights
from cvt.configuration import CvtConfig
from cvt.data.class_names import imagenet_classes
from cvt.files import named_in_errors, read_json
from cvt.modeling import CvtForImageClassification
from cvt.strict_loading import CLASSIFIER, COUNTER, HEAD, list_faults

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFile:
    """What a file of weights holds.

    Attributes:
        config: of a classifier; without one in the file, and no config for it, of 0 classes.
        weights: of a CvT, under the names of `CvtForImageClassification`.
        unexpected: names in the file that no CvT has.
        dialect: of the file.
    """

    config: CvtConfig
    weights: dict[str, Tensor]
    unexpected: list[str]
    dialect: Dialect

    def names(self, weights: Iterable[str]) -> list[str]:
        """The names of weights as the file has them."""
        return [self.dialect.their_name(name) or name for name in weights]

    @property
    def is_headless(self) -> bool:
        """Whether they are of a model without a classifier."""
        return not self.weights.keys() & CLASSIFIER


def read_file(
    path: str | Path,
    *,
    config: CvtConfig | str | Path | None = None,
    hidden_act: str | None = None,
    key: str | None = None,
) -> ModelFile:
    """Read a file of weights of any dialect, which is logged.

    Args:
        path: the file; see `read_weights`.
        config: what does not follow from the tensors, or the config.json or folder that has it; by
            default that of the published variant they fit.
        hidden_act: the activation, if not the config's. Without one there it is that of the
            dialect, QuickGELU of the authors; under the names of transformers and lucid-dl weights
            may be of either.
        key: as in `read_weights`.

    Raises:
        CheckpointError: the file cannot be read, is no published variant and comes without config,
            or does not record its activation.
        ValueError: the config.json is not that of a CvT; names it.
    """
    found = read_weights(path, key)
    dialect = dialect_of(found) or DIALECTS["authors"]
    weights, unexpected = dialect.read(found)
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    announce(dialect, path)
    if isinstance(config, str | Path):
        path_of_config = Path(config, "config.json") if Path(config).is_dir() else Path(config)
        with named_in_errors(path_of_config):
            fields = plain_fields(read_json(path_of_config))
            if "hidden_act" not in fields:
                hidden_act = hidden_act or dialect.hidden_act
            given = {"hidden_act": hidden_act} if hidden_act else {}
            config = CvtConfig.from_dict(with_activation(fields, hidden_act), **given)
    elif config is not None:
        config = copy.deepcopy(config)
    elif not (dialect.hidden_act or hidden_act):
        raise CheckpointError(
            f"{path} has the names of {dialect.title} and does not record its activation: name the "
            f"folder with its config.json instead, or run `cvt convert {path} FOLDER --hidden-act "
            "gelu`, if it was trained in transformers or lucid-dl, which always compute GELU, else "
            "with quick_gelu, and use FOLDER"
        )
    else:
        try:
            config = recognise(weights)
        except ValueError as error:
            unknown = f"; unexpected {', '.join(unexpected)}" if unexpected else ""
            raise CheckpointError(
                f"{path}: {error}{unknown}; if you have its config.json, run `cvt convert {path} "
                "FOLDER --config config.json`, and use FOLDER"
            ) from error
        config.hidden_act = dialect.hidden_act or config.hidden_act
    refuse_positions(config, dialect, path)
    config.hidden_act = hidden_act or config.hidden_act
    name_imagenet(config)
    return ModelFile(config, weights, unexpected, dialect)


def name_imagenet(config: CvtConfig) -> None:
    """Give 1000 classes without names the names of ImageNet's."""
    imagenet = list(imagenet_classes().values())
    if len(config.class_names) == len(imagenet) and config.class_names[0] == "LABEL_0":
        config.class_names = imagenet


def announce(dialect: Dialect, path: str | Path) -> None:
    """Log which dialect a file has: as a warning where it is of other software."""
    level = logging.INFO if dialect.name in ("authors", "transformers") else logging.WARNING
    note = f"; {dialect.note}" if dialect.note else ""
    logger.log(level, f"{path} has the names of {dialect.title}{note}")


def load_authors(
    path: str | Path,
    *,
    config: CvtConfig | str | Path | None = None,
    num_labels: int | None = None,
    hidden_act: str | None = None,
    key: str | None = None,
    allow_nonfinite: bool = False,
) -> CvtForImageClassification:
    """A classifier from a file of weights; 1000 classes get the names of ImageNet's.

    Args:
        path: an authors' .pth file, or one of another dialect; see `read_weights`.
        config: as in `read_file`.
        num_labels: create a new, random classifier for so many classes if the file's has others, or
            if it has none.
        hidden_act: as in `read_file`.
        key: as in `read_weights`.
        allow_nonfinite: accept NaN and infinite weights.

    Raises:
        CheckpointError: the file cannot be read or does not fit; lists every fault.

    Example:
        >>> import cvt, torch
        >>> from cvt.checkpoints import load_authors, transformers_to_authors
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> weights = cvt.CvtForImageClassification(config).state_dict()
        >>> torch.save(transformers_to_authors(weights), "digits.pth")
        >>> load_authors("digits.pth", config=config).config.num_labels
        10
    """
    file = read_file(path, config=config, hidden_act=hidden_act, key=key)
    if file.is_headless and num_labels is None and (config is None or file.config.num_labels):
        raise headless(path)
    config, weights = file.config, dict(file.weights)
    head = weights.get("classifier.weight")
    new_head: Set[str] = set()
    if num_labels is not None and (head is None or len(head) != num_labels):
        # What a model without a head was saved as has no LayerNorm for it, either.
        new_head = CLASSIFIER if weights.keys() & CLASSIFIER else HEAD - weights.keys()
        config.num_labels = num_labels
    check_file_size(config, sum(w.nbytes for w in weights.values()), path, bool(new_head))
    model = CvtForImageClassification(config)
    expected = model.state_dict()
    counters = {name for name in expected if name.endswith(COUNTER)} - weights.keys()
    weights |= {name: expected[name] for name in (*new_head, *counters)}
    _check(file, path, weights, expected, allow_nonfinite)
    if new_head:
        logger.warning(
            f"New classifier of {num_labels} classes: {path} has "
            f"{'none' if head is None else len(head)}. It is random until trained."
        )
    model.load_state_dict(weights)
    return model


def _check(
    file: ModelFile,
    path: str | Path,
    weights: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    allow_nonfinite: bool,
) -> None:
    """Raise a CheckpointError that lists every weight of a file that is not as expected."""
    shapes = {
        name: (weights[name].shape, tensor.shape)
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    }
    faults = list_faults(
        missing=file.names(name for name in expected if name not in weights),
        unexpected=[*file.unexpected, *file.names(n for n in weights if n not in expected)],
        mismatched=dict(zip(file.names(shapes), shapes.values(), strict=True)),
    )
    if not allow_nonfinite:
        names = file.names(nonfinite(file.weights))
        faults += "".join(f"\n  {name} has NaN or infinity" for name in names)
    if faults:
        raise CheckpointError(f"the weights in {path} do not fit:{faults}")


def refuse_positions(config: CvtConfig, dialect: Dialect, path: str | Path) -> None:
    """Raise a CheckpointError where a dialect has no place for what a config describes."""
    stages = [i + 1 for i, kind in enumerate(config.position_embedding) if kind != "none"]
    if stages and POSITIONS not in dialect.modules:
        raise CheckpointError(
            f"{path}: a file of {dialect.title} has no place for the position embedding that the "
            f"configuration describes in stage {', '.join(map(str, stages))}"
        )


def headless(path: str | Path) -> CheckpointError:
    """The error for a file without a classifier, where one is needed."""
    return CheckpointError(
        f"{path} holds a model without a classifier: give num_labels for a new one, random until "
        f"it is trained (`cvt convert {path} FOLDER --num-labels N`; `cvt train` does so)"
    )


def nonfinite(weights: Mapping[str, Tensor]) -> list[str]:
    """The names of the weights that hold NaN or infinity."""
    return [name for name, weight in weights.items() if not weight.isfinite().all()]


def recognise(weights: Mapping[str, Tensor]) -> CvtConfig:
    """The configuration of weights under transformers' names, as far as tensors define it.

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
        raise ValueError(f"depth {depth} with widths {embed_dim} is none of {', '.join(VARIANTS)}")

    def has(s: int, name: str) -> bool:
        return any(key.startswith(f"{stages}.{s}.") and key.endswith(name) for key in weights)

    if any(name.endswith(".position_embedding") for name in weights):
        raise ValueError("the grid of its position embedding does not follow from the weights")
    everywhere = range(len(depth))
    convolved = [has(s, "convolution_projection.convolution.weight") for s in everywhere]
    if not all(convolved):
        raise ValueError(
            "the projections of a stage leave no weights: its qkv_projection_method may be avg or "
            "linear"
        )
    head = weights.get("classifier.weight", weights.get("classifier.bias"))
    first = weights.get(f"{stages}.0.embedding.convolution_embeddings.projection.weight")
    return CvtConfig.from_variant(
        name,
        num_channels=3 if first is None else first.shape[1],
        cls_token=[has(s, "cls_token") for s in everywhere],
        qkv_bias=[has(s, "projection_query.bias") for s in everywhere],
        num_labels=0 if head is None else len(head),
    )
