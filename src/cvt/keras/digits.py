"""Train a small CvT on scikit-learn's handwritten digits with Keras' `fit`, without a network.

    python -m cvt.keras.digits --epochs 30

KERAS_BACKEND selects the backend: tensorflow (the default), jax or torch.
"""

import argparse
import time

from cvt import CvtConfig, TFCvtForImageClassification, image_processor

import keras  # isort: skip  # after cvt, which keeps PyTorch's Triton apart from TensorFlow

from cvt.data import LabelledImages, open_training
from cvt.keras.data import image_dataset


def main() -> None:
    """Train the model and print its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    keras.utils.set_random_seed(arguments.seed)

    config = CvtConfig.from_variant("cvt-digits", num_labels=10)
    processor = image_processor(config, image_size=16, crop_pct=1.0)
    train, validation, _ = open_training("digits")
    assert isinstance(train, LabelledImages)  # not a stream
    assert isinstance(validation, LabelledImages)
    views = image_dataset(
        train, processor, 64, training=True, crop_scale=0.6, flip=0, seed=arguments.seed
    )
    held_out = image_dataset(validation, processor, 64)

    model = TFCvtForImageClassification(config)
    steps = arguments.epochs * len(views)
    rate = keras.optimizers.schedules.CosineDecay(
        3e-5, int(0.9 * steps), warmup_target=3e-3, warmup_steps=steps - int(0.9 * steps)
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.1, global_clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias", "cls_token"])
    model.compile(optimizer, metrics=["accuracy"])
    history = model.fit(views, validation_data=held_out, epochs=arguments.epochs, verbose=2)

    accuracy = 100 * history.history["val_accuracy"][-1]
    seconds = time.perf_counter() - start
    images = len(validation)
    print(f"{accuracy:.2f} % of the {images} held-out images are right, after {seconds:.0f} s.")


if __name__ == "__main__":
    main()
