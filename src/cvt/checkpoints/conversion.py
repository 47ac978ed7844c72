"""From a checkpoint of any dialect to a model folder and back."""

import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from cvt.checkpoints import pdparams
from cvt.checkpoints.authors import nonfinite, refuse_positions
from cvt.checkpoints.errors import CheckpointError
from cvt.checkpoints.loading import image_size_of, load_classifier, load_processor
from cvt.checkpoints.names import DIALECTS, Dialect, dialect_of
from cvt.checkpoints.reading import read_weights
from cvt.checkpoints.source import model_source
from cvt.data.class_names import read_labels
from cvt.files import check_folder_name, staged, write_checksums
from cvt.modeling import CvtForImageClassification
from cvt.strict_loading import COUNTER

logger = logging.getLogger(__name__)

TOLERANCE = 1e-6
WRITTEN = ("transformers", *(name for name, dialect in DIALECTS.items() if dialect.suffixes))


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote.

    Attributes:
        model: the converted model, in eval mode.
        image_size: height and width, in pixels, that its preprocessing is set for, if it has one.
        largest_difference: between its logits and those of the result read back from disk.

    Example:
        >>> import cvt
        >>> from cvt.checkpoints import convert
        >>> model = cvt.CvtForImageClassification(cvt.CvtConfig.from_variant("cvt-digits"))
        >>> model.save_pretrained("source")
        >>> convert("source", "converted", image_size=32).image_size
        32
    """

    model: CvtForImageClassification
    image_size: int | None
    largest_difference: float


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    to: str = "transformers",
    image_size: int | None = None,
    labels: str | Path | None = None,
    num_labels: int | None = None,
    config: str | Path | None = None,
    hidden_act: str | None = None,
    key: str | None = None,
    allow_nonfinite: bool = False,
    verify: bool = True,
    force: bool = False,
) -> Conversion:
    """Convert a checkpoint, and check the result by reading it back and comparing outputs.

    Args:
        source: a file of weights of any dialect, a model folder, or the name of a published
            checkpoint.
        dest: the model folder to write, or the file if `to` is not "transformers".
        to: "transformers" (a model folder, ours and transformers'), or the dialect of a file, one
            of `WRITTEN`.
        image_size: resolution of the folder's preprocessing in pixels; else the source's, else that
            of the published file of this name, else 224.
        labels: a file of the folder's class names, see `cvt.data.class_names.read_labels`; else the
            source's.
        num_labels: create a new, random classifier for so many classes if the source's has others.
        config: a config.json for weights of no published variant, or without `dw_bn` projections.
        hidden_act: the activation, where the source's own is wrong, as in a folder downloaded from
            the hub, which does not record its QuickGELU.
        key: the entry of a checkpoint, or the model in it; see `read_weights`.
        allow_nonfinite: accept NaN and infinite weights.
        verify: compare the source with its `checksums.json`, where it has one.
        force: overwrite files in `dest`.

    Raises:
        CheckpointError: the source cannot be used; lists every fault. Nothing is written.
        ValueError: an argument does not fit the checkpoint. Nothing is written.
        FileExistsError: `dest` exists and `force` is not given.

    Example:
        >>> import cvt
        >>> from cvt.checkpoints import convert
        >>> model = cvt.CvtForImageClassification(cvt.CvtConfig.from_variant("cvt-digits"))
        >>> model.save_pretrained("folder")
        >>> _ = cvt.image_processor(model.config, 16).save_pretrained("folder")
        >>> done = convert("folder", "authors.pth", to="authors")
        >>> done.largest_difference
        0.0
    """
    if to not in WRITTEN:
        raise ValueError(f"to = {to!r}: must be one of {', '.join(WRITTEN)}")
    dialect = DIALECTS[to]
    if to == "transformers":
        check_folder_name(dest)
    else:
        _check_file(dest, dialect, image_size=image_size, labels=labels)
    with staged(dest, overwrite=force) as written:  # refuses an existing `dest` before the work
        changes: dict[str, Any] = {"num_labels": num_labels, "hidden_act": hidden_act}
        named = model_source(source)
        model = load_classifier(
            named, config=config, key=key, allow_nonfinite=allow_nonfinite, verify=verify, **changes
        ).eval()
        if bad := [] if allow_nonfinite else nonfinite(model.state_dict()):
            raise CheckpointError(f"{source} has NaN or infinity in {', '.join(bad)}")
        if labels is not None:
            model.config.class_names = read_labels(labels, len(model.config.class_names))
        if to == "transformers":
            processor = load_processor(named, model.config, image_size)
            image_size = image_size_of(processor)
            again = _write_folder(model, processor, written)
        else:
            refuse_positions(model.config, dialect, dest)
            again = _write_file(model, dialect, written)
        difference = largest_difference(model, again)
        if not difference <= TOLERANCE and not allow_nonfinite:
            raise CheckpointError(
                f"{dest} was not written: read back, its logits differ by {difference:.3g}"
            )
    return Conversion(model=model, image_size=image_size, largest_difference=difference)


def _check_file(dest: str | Path, dialect: Dialect, **of_folders: Any) -> None:
    """Raise a ValueError for a file that is not of the dialect, and for settings of folders."""
    if not str(dest).endswith(dialect.suffixes):
        suffixes = " or ".join(dialect.suffixes)
        raise ValueError(f"{dest}: {dialect.name} is written to a file {suffixes}")
    for name, value in of_folders.items():
        if value is not None:
            raise ValueError(
                f"{name} = {value}: is for a folder; a file of {dialect.name} records none"
            )


def _write_folder(
    model: CvtForImageClassification, processor: Any, folder: Path
) -> CvtForImageClassification:
    """Write a model folder; returns the model that is read back."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_checksums(folder)
    return CvtForImageClassification.from_pretrained(folder).eval()


def _write_file(
    model: CvtForImageClassification, dialect: Dialect, path: Path
) -> CvtForImageClassification:
    """Write a file of a dialect; returns the model that is read back."""
    activation, epsilon = model.config.hidden_act, model.config.layer_norm_eps
    usual = dialect.hidden_act or "gelu"
    if (activation, epsilon) != (usual, 1e-5):
        logger.warning(
            f"a file of {dialect.title} does not record that this model has {activation} and an "
            f"epsilon of {epsilon}; their code computes {usual} and 1e-05"
        )
    weights = {n: w.contiguous() for n, w in dialect.written(model.state_dict()).items()}
    if path.suffix == ".safetensors":
        save_file(weights, path, metadata={"format": "tf" if dialect.root else "pt"})
    else:
        with open(path, "wb") as file:  # given a path on a full disk, PyTorch aborts
            if path.suffix == pdparams.SUFFIX:
                pickle.dump({n: _array(w) for n, w in weights.items()}, file, protocol=4)
            else:
                torch.save(weights, file)
    found = read_weights(path)
    assert dialect_of(found) is dialect
    counters = {n: w for n, w in model.state_dict().items() if n.endswith(COUNTER)}
    again: Any = CvtForImageClassification(model.config)
    again.to(model.dtype).eval()
    again.load_state_dict(counters | dialect.read(found)[0])
    return again


def _array(weight: torch.Tensor) -> np.ndarray:
    """A weight as PaddlePaddle keeps it: bfloat16 in integers of 16 bits."""
    if weight.dtype == torch.bfloat16:
        return weight.view(torch.int16).numpy().view(np.uint16)
    return weight.numpy()


@torch.no_grad()
def largest_difference(one: CvtForImageClassification, other: CvtForImageClassification) -> float:
    """Between the logits of two models for the same two random images."""
    size = max(64, one.config.minimum_image_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, one.config.num_channels, size, size, generator=generator)
    ours, theirs = (model(images, return_dict=True).logits for model in (one, other))
    return (ours - theirs).abs().max().item()
