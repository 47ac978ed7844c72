"""From an authors' file to a model folder and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cvt.checkpoints.loading import load_classifier, load_processor
from cvt.checkpoints.names import authors_to_transformers, transformers_to_authors
from cvt.checkpoints.reading import CheckpointError, read_weights
from cvt.configuration import CvtConfig
from cvt.files import staged
from cvt.labels import imagenet_classes, read_labels
from cvt.modeling import CvtForImageClassification

TOLERANCE = 1e-6


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote.

    Attributes:
        model: the converted model, in eval mode.
        image_size: height and width, in pixels, that its preprocessing is set for.
        largest_difference: between its logits and those of the result read back from disk.
    """

    model: CvtForImageClassification
    image_size: int
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
    allow_nonfinite: bool = False,
    force: bool = False,
) -> Conversion:
    """Convert a checkpoint, and check the result by reading it back and comparing outputs.

    Args:
        source: an authors' .pth file, a model folder, or the name of a published checkpoint.
        dest: the model folder to write, or the .pth file if `to` is "authors".
        to: "transformers" (a model folder, ours and transformers') or "authors".
        image_size: resolution of the preprocessing in pixels; else the source's, else told by the
            name of a published file, else 224.
        labels: a file of class names, as `cvt.labels.read_labels` takes it; else the source's, or
            ImageNet's for 1000 classes.
        num_labels: make a new, random classifier for so many classes if the source's has others.
        config: a config.json for weights of no published variant, or without `dw_bn` projections.
        hidden_act: the activation, where the source's own is wrong: a folder downloaded from the
            authors' models on the hub says nothing of its QuickGELU.
        allow_nonfinite: accept NaN and infinite weights.
        force: overwrite files in `dest`.

    Raises:
        CheckpointError: the source cannot be used; lists every fault. Nothing is written.
        ValueError: an argument does not fit the checkpoint. Nothing is written.
        FileExistsError: `dest` exists and `force` is not given.
    """
    if to not in ("transformers", "authors"):
        raise ValueError(f"to = {to!r}: must be transformers or authors")
    with staged(dest, overwrite=force) as written:  # refuses an existing `dest` before the work
        model = load_classifier(
            source, config=config, num_labels=num_labels, hidden_act=hidden_act
        ).eval()
        refuse_nonfinite(source, model.state_dict(), allow_nonfinite)
        name_classes(model.config, labels)
        processor = load_processor(source, model.config, image_size)
        if to == "transformers":
            model.save_pretrained(written)
            processor.save_pretrained(written)
            again = CvtForImageClassification.from_pretrained(written).eval()
        else:
            torch.save(transformers_to_authors(model.state_dict()), written)
            again = CvtForImageClassification(model.config).eval()
            again.load_state_dict(authors_to_transformers(read_weights(written)))
        difference = largest_difference(model, again)
        if not difference <= TOLERANCE and not allow_nonfinite:
            raise CheckpointError(
                f"{dest} was not written: read back, its logits differ by {difference:.3g}"
            )
    size = processor.size["shortest_edge"]
    return Conversion(model=model, image_size=size, largest_difference=difference)


def refuse_nonfinite(source: str | Path, weights: Mapping[str, Tensor], allow: bool) -> None:
    """Raise a CheckpointError that lists the weights with NaN or infinity."""
    bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if bad and not allow:
        raise CheckpointError(f"{source} has NaN or infinite weights:\n  " + "\n  ".join(bad))


def name_classes(config: CvtConfig, labels: str | Path | None) -> None:
    """Set the labels: the file's, or ImageNet's where 1000 classes have no names yet."""
    if labels is not None:
        config.class_names = read_labels(labels, len(config.class_names))
    elif len(config.class_names) == 1000 and config.class_names[0] == "LABEL_0":
        config.class_names = list(imagenet_classes().values())


@torch.no_grad()
def largest_difference(one: CvtForImageClassification, other: CvtForImageClassification) -> float:
    """Between the logits of two models for the same two random images."""
    size = max(64, one.config.minimum_image_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, one.config.num_channels, size, size, generator=generator)
    return (one(images).logits - other(images).logits).abs().max().item()
