"""A model in TensorFlow that runs when it is told to: what `keras_speed.py` starts.

    python benchmarks/keras_worker.py cvt FOLDER THREADS
    path/to/python benchmarks/keras_worker.py transformers FOLDER THREADS

FOLDER has the config.json; the weights are random. It speaks in lines of JSON: first the versions
of its libraries, then `true` for every task that it has read and run, which is a dict of the
arguments of `inference` or `training`. What a task needs is made, and compiled, when it is first
told.
"""

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

SETTINGS = {"cvt": {"KERAS_BACKEND": "tensorflow"}, "transformers": {"TF_USE_LEGACY_KERAS": "1"}}


def build(name: str, folder: str) -> Any:
    """A classifier with random weights, for images (B, 3, H, W)."""
    if name == "cvt":
        from cvt import CvtConfig, TFCvtForImageClassification

        return TFCvtForImageClassification(CvtConfig.from_pretrained(folder))
    from transformers import CvtConfig, TFCvtForImageClassification

    config = CvtConfig.from_pretrained(folder)
    config.image_size = 64  # without one it cannot be built; it sees others as well
    model = TFCvtForImageClassification(config)
    model.build()
    return model


def inference(model: Any, jit: bool, batch_size: int, image_size: int) -> Callable[[], object]:
    """From pixels to logits, which are waited for."""
    import tensorflow as tf

    images = tf.random.normal((batch_size, 3, image_size, image_size))
    forward = tf.function(lambda images: model(images, training=False).logits, jit_compile=jit)
    return lambda: forward(images).numpy()


def training(model: Any, jit: bool, batch_size: int, image_size: int) -> Callable[[], object]:
    """Forward, cross-entropy, backward and AdamW; the loss is waited for."""
    import tensorflow as tf

    images = tf.random.normal((batch_size, 3, image_size, image_size))
    labels = tf.range(batch_size) % model.config.num_labels
    optimizer = tf.keras.optimizers.AdamW(learning_rate=1e-4, weight_decay=0.05)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=jit)
    def step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model(images, training=True).logits
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(losses)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return lambda: step(images, labels).numpy()


def main(name: str, folder: str, threads: str) -> None:
    """Do as told until there is nothing more."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print, too
    os.environ.update(SETTINGS[name] | {"TF_CPP_MIN_LOG_LEVEL": "3"})
    if name == "cvt":
        import cvt.keras  # noqa: F401  # before TensorFlow, for the sake of PyTorch
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(int(threads))

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    libraries = ("keras", "transformers") if name == "cvt" else ("tf-keras", "transformers")
    answer({"tensorflow": tf.__version__} | {library: version(library) for library in libraries})
    ready: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        if line not in ready:
            task = json.loads(line)
            prepare = {"inference": inference, "training": training}[task.pop("question")]
            ready[line] = prepare(build(name, folder), **task)
        ready[line]()
        answer(True)


if __name__ == "__main__":
    main(*sys.argv[1:])
