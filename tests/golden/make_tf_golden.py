"""Write `tf_classifier/` and `tf_model/`: folders of transformers 4 in TensorFlow, and outputs.

    python tests/golden/make_tf_golden.py

It was run on an x86-64 CPU with Python 3.11, transformers 4.57.6, tensorflow-cpu 2.21.0, tf-keras
2.21.0, numpy 2.3.5 and h5py 3.14.0: transformers 5 has no TensorFlow, and 4 needs the Keras of its
time, tf-keras.

`tf_classifier/` is a TFCvtForImageClassification of the usual three stages. `tf_model/` is a
TFCvtModel, whose file calls the weights otherwise; it has one stage, and no class token, which
transformers names after the third. Every weight and every statistic of BatchNorm is drawn anew.
Each folder holds what `save_pretrained` writes, and in `outputs.npz` the hidden states and the
logits of the images that `cases.image` draws for the folder's name and `TF_IMAGES`.
"""

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # before transformers is imported

import cases
import numpy as np
from transformers import CvtConfig, TFCvtForImageClassification, TFCvtModel

# Without an image size they cannot be built.
CLASSIFIER = CvtConfig(
    embed_dim=[8, 16, 24],
    num_heads=[1, 2, 3],
    depth=[1, 2, 3],
    mlp_ratio=[2.0, 2.0, 2.0],
    num_labels=5,
    image_size=32,
)
ONE_STAGE = {
    name: [values[0]]
    for name, values in CLASSIFIER.to_dict().items()
    if isinstance(values, list | tuple) and len(values) == 3
}
MODEL = CvtConfig(**ONE_STAGE, image_size=32)


def draw(name: str, shape: tuple[int, ...], random: np.random.RandomState) -> np.ndarray:
    """A value for a weight, at a scale that keeps activations near 1."""
    if "moving_variance" in name:
        return random.uniform(0.5, 2.0, shape)
    normal = random.standard_normal(shape)
    if "kernel" in name:
        return normal / np.prod(shape[:-1]) ** 0.5
    return normal if "cls_token" in name else 0.2 * normal + ("gamma" in name)


def write(cls: type, config: CvtConfig) -> None:
    """The folder of a model, and its outputs."""
    folder = cases.TF_CLASSIFIER if cls is TFCvtForImageClassification else cases.TF_MODEL
    model = cls(config)
    images = cases.image(folder.name, cases.TF_IMAGES)
    model(images)  # creates the weights
    random = np.random.RandomState(0)
    for variable in model.variables:
        variable.assign(draw(variable.name, tuple(variable.shape), random))
    model.save_pretrained(folder, safe_serialization=False)
    outputs = model(images, output_hidden_states=True)
    found = {f"stage{i}": state.numpy() for i, state in enumerate(outputs.hidden_states)}
    if "logits" in outputs:
        found["logits"] = outputs.logits.numpy()
    np.savez_compressed(folder / "outputs.npz", **found)
    print(folder, {name: value.shape for name, value in found.items()})


if __name__ == "__main__":
    write(TFCvtForImageClassification, CLASSIFIER)
    write(TFCvtModel, MODEL)
