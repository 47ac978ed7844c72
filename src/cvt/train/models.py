"""The classifier that a training run starts from."""

from pathlib import Path
from typing import Any

from cvt import hub
from cvt.checkpoints.loading import unknown_model
from cvt.configuration import VARIANTS, CvtConfig
from cvt.modeling import CvtForImageClassification


def classifier_for(
    name: str | Path, classes: list[str], from_scratch: bool = False
) -> CvtForImageClassification:
    """A classifier of these classes: trained weights where `name` has some, else random ones.

    Args:
        name: a published checkpoint, a variant, or a folder with a config.json.
        classes: their names, in the order of the classifier.
        from_scratch: random weights in any case.

    Raises:
        FileNotFoundError: the name means none of these.
    """
    labels: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {label: i for i, label in enumerate(classes)},
    }
    folder = Path(name).is_dir()
    if not folder and name in VARIANTS and (from_scratch or not hub.published(name)):
        return CvtForImageClassification(CvtConfig.from_variant(str(name), **labels))
    if not folder and not hub.published(name):
        raise unknown_model(name)
    has_weights = hub.published(name) or any(
        path.suffix in (".safetensors", ".bin") for path in Path(name).iterdir()
    )
    if has_weights and not from_scratch:
        return CvtForImageClassification.from_pretrained(name, **labels)
    return CvtForImageClassification(CvtConfig.from_pretrained(name, **labels))
