"""A classifier as a SavedModel of TensorFlow or a file of LiteRT, by way of its Keras model.

The graph takes `pixel_values`, (B, C, H, W), and gives `logits`, (B, K), and `features`, (B, C'),
where they are asked for, all in float32: these are the names in its signature `serving_default`.
"""

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cvt.libraries import import_tensorflow, quiet, silence_stderr
from cvt.modeling import CvtForImageClassification
from cvt.runtime.features import FEATURES, LOGITS


def demand_backend(to: str) -> None:
    """Make sure that Keras computes in TensorFlow.

    Raises:
        ImportError: Keras is too old, or what its backend needs is missing.
        ValueError: its backend is another one.
    """
    import_tensorflow()
    import cvt.keras  # noqa: F401
    import keras  # isort: skip  # after cvt.keras, whose error names what is wrong with it

    if keras.config.backend() != "tensorflow":
        raise ValueError(
            f"to = {to}: needs Keras on TensorFlow, and Keras is on {keras.config.backend()}; set "
            "KERAS_BACKEND=tensorflow before it is imported"
        )


def write_saved_model(
    model: CvtForImageClassification,
    folder: Path,
    size: tuple[int, int],
    dynamic: Collection[str],
    outputs: Collection[str] = (LOGITS,),
) -> None:
    """Write a SavedModel.

    It computes in float32. XLA is left to who serves it: on a CPU, cvt-13 gains nothing by it and
    is compiled for up to ten seconds for each new shape.

    Args:
        model: the classifier, on a CPU.
        folder: to write.
        size: height and width of the images that it takes, in pixels, unless that is dynamic.
        dynamic: what may differ from image to image: `batch`, `size`, both or neither. Without
            `batch`, it takes one image.
        outputs: what it gives.
    """
    tf = import_tensorflow()
    from cvt.keras import TFCvtForImageClassification
    from cvt.keras.weights import assign, named_variables

    config = model.config
    network: Any = TFCvtForImageClassification(config, dtype="float32")
    assign(
        network, {name: weight.numpy() for name, weight in model.state_dict().items()}, "the model"
    )
    batch = None if "batch" in dynamic else 1
    sides = (None, None) if "size" in dynamic else size
    pixels = tf.TensorSpec((batch, config.num_channels, *sides), tf.float32, "pixel_values")

    @tf.function(input_signature=[pixels], autograph=False)
    def serve(pixel_values: Any) -> dict[str, Any]:
        if FEATURES not in outputs:
            return {LOGITS: network(pixel_values, return_dict=True).logits}
        features = network.pooled(network.cvt(pixel_values, return_dict=True))
        return {LOGITS: network.classifier(features), FEATURES: features}

    served = tf.Module()
    served.serve = serve
    served.weights = [variable.value for variable in named_variables(network).values()]
    served.class_names = tf.Variable(config.class_names, trainable=False)
    with quiet("tensorflow", "absl"):
        tf.saved_model.save(served, str(folder), signatures=serve)


def write_litert(
    model: CvtForImageClassification,
    file: Path,
    precision: str,
    size: tuple[int, int],
    dynamic: Collection[str],
    outputs: Collection[str] = (LOGITS,),
) -> None:
    """Write a file of LiteRT; its weights are of 16 bits in fp16, and of 8 in int8.

    In int8 each product rounds its activations to 8 bits by their own range, so no images calibrate
    it. Ranges from calibration ("full integer") leave logits 20 times as far from the model's, and
    are not faster. It has operators of LiteRT itself alone, so every interpreter runs it. Other
    arguments as in `write_saved_model`.
    """
    tf = import_tensorflow()
    with TemporaryDirectory(dir=file.parent) as beside, quiet("tensorflow", "absl"):
        write_saved_model(model, Path(beside), size, dynamic, outputs)
        converter = tf.lite.TFLiteConverter.from_saved_model(beside)
        if precision != "fp32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if precision == "fp16":
            converter.target_spec.supported_types = [tf.float16]
        with silence_stderr():
            file.write_bytes(converter.convert())


def write_labels(names: Collection[str], file: Path) -> None:
    """Write a line for each class, in the order of the logits, as mobile applications read them."""
    lines = [" ".join(name.splitlines()) for name in names]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
