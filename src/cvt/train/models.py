"""The classifier that a training run starts from."""

from pathlib import Path

from cvt import hub
from cvt.checkpoints import load_classifier, load_config
from cvt.modeling import CvtForImageClassification

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def classifier_for(
    name: str | Path, classes: list[str], from_scratch: bool = False
) -> CvtForImageClassification:
    """A classifier of these classes: trained weights where `name` has some, else random ones.

    Args:
        name: a published checkpoint, an authors' file, a variant, or a folder with a config.json.
        classes: their names, in the order of the classifier.
        from_scratch: random weights in any case.

    Raises:
        FileNotFoundError: the name means none of these.
    """
    has_weights = (
        hub.published(name) is not None
        or Path(name).is_file()
        or any(file for pattern in WEIGHT_FILES for file in Path(name).glob(pattern))
    )
    if has_weights and not from_scratch:
        model = load_classifier(name, num_labels=len(classes))
        model.config.class_names = classes
        return model
    config = load_config(name)
    config.class_names = classes
    return CvtForImageClassification(config)
