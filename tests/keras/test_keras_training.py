"""`compile`, `fit` and their like, on the backend that KERAS_BACKEND names."""

import csv
import re

import numpy as np
import pytest
from helpers.small_models import tiny

from cvt import TFCvtForImageClassification, TFCvtModel
from cvt.keras.losses import ClassificationLoss

import keras  # isort: skip  # behind cvt, which keeps Triton apart from TensorFlow
from keras import losses, ops  # isort: skip

BACKEND = keras.config.backend()
IMAGES, CLASSES, SIZE = 12, 3, 8
EAGERLY = {"run_eagerly": True}  # compiling takes longer than what is tested


def config(**fields):
    """One block, so that compiling is quick; nothing random in training."""
    shape = {
        "embed_dim": [8],
        "num_heads": [2],
        "depth": [1],
        "mlp_ratio": [2],
        "cls_token": [True],
        "drop_path_rate": [0],
        "qkv_projection_method": ["dw_bn"],
        "num_labels": CLASSES,
    }
    rows = ["patch_sizes", "patch_stride", "patch_padding", "drop_rate", "attention_drop_rate"]
    rows += ["kernel_qkv", "stride_q", "stride_kv", "padding_q", "padding_kv", "qkv_bias"]
    whole = tiny()
    return tiny(**{row: getattr(whole, row)[1:2] for row in rows} | shape | fields)


def make(fields=None, data_format="channels_first", cls=TFCvtForImageClassification, **kwargs):
    keras.utils.set_random_seed(0)
    return cls(config(**fields or {}), data_format, **kwargs)


def data(data_format="channels_first"):
    """Images whose colour tells their class."""
    generator = np.random.default_rng(0)
    labels = np.arange(IMAGES) % CLASSES
    images = generator.normal(0, 0.3, (IMAGES, SIZE, SIZE, 3)).astype("float32")
    images += np.eye(3, dtype="float32")[labels][:, None, None]
    return images if data_format == "channels_last" else images.transpose(0, 3, 1, 2), labels


def adam():
    return keras.optimizers.Adam(0.01)


def sgd():
    """A few operations a weight, a small share of Adam's: faster to run eagerly and to compile."""
    return keras.optimizers.SGD(0.1)


def numbers(variables):
    return [np.array(ops.convert_to_numpy(variable)) for variable in variables]


def same(ours, theirs, tolerance=1e-6):
    for value, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("data_format", "dtype", "how"),
    [
        ("channels_first", "float32", {"jit_compile": BACKEND != "torch"}),
        ("channels_last", "mixed_bfloat16", {"jit_compile": BACKEND == "jax"}),
    ],
)
def test_fit_lowers_the_loss(data_format, dtype, how):
    model = make(data_format=data_format, dtype=dtype)
    model.compile(sgd(), **how)
    history = model.fit(*data(data_format), epochs=3, shuffle=False, verbose=0)
    assert history.history["loss"] == sorted(history.history["loss"], reverse=True)
    assert {keras.backend.standardize_dtype(v.dtype) for v in model.weights} == {"float32"}
    assert model.predict(data(data_format)[0], verbose=0).shape == (IMAGES, CLASSES)


def test_a_step_changes_every_trainable_weight():
    model = make({"depth": [2]})
    before = numbers(model.trainable_variables)
    model.compile(adam(), **EAGERLY)  # Adam's step is large however small the gradient is
    model.train_on_batch(*data())
    after = numbers(model.trainable_variables)
    unchanged = [
        variable.path
        for variable, old, new in zip(model.trainable_variables, before, after, strict=True)
        if (old == new).all()
    ]
    # Only the class token is classified, and as the last block's query it is not projected; the
    # bias of the keys adds the same to the scores of all keys.
    no_gradient = r"layers-1.*/convolution_projection_query/|projection_key/bias$"
    assert [path for path in unchanged if not re.search(no_gradient, path)] == []
    assert len(unchanged) >= 3


def test_evaluate_and_predict_see_the_logits_and_a_call_the_whole_output():
    model = make()
    images, labels = data()
    model.compile(sgd(), metrics=["accuracy"], **EAGERLY)
    trained = model.train_on_batch(images, labels, return_dict=True)
    assert trained.keys() == {"loss", "accuracy"}
    logits = model.predict(images, verbose=0)
    same([model.predict({"pixel_values": images}, verbose=0)], [logits])
    output = model({"pixel_values": images}, labels)
    assert logits.dtype == "float32"
    same([logits, model.predict_on_batch(images)], [numbers([output.logits])[0]] * 2)
    right = (logits.argmax(1) == labels).mean()
    expected = [float(output.loss), right]
    model.reset_metrics()  # as Keras 3.13 does not on JAX
    same([model.test_on_batch(images, labels)], [expected])
    same([model.evaluate(images, labels, verbose=0)], [expected])
    assert len(model(images, return_dict=False)) == 1


def independent(labels):
    return np.random.default_rng(0).integers(0, 2, (IMAGES, CLASSES)).astype("float32")


@pytest.mark.parametrize(
    ("num_labels", "problem", "labels_of", "loss"),
    [
        (3, None, lambda y: y, losses.SparseCategoricalCrossentropy(from_logits=True)),
        (
            3,
            "single_label_classification",
            lambda y: np.eye(CLASSES, dtype="float32")[y],
            losses.CategoricalCrossentropy(from_logits=True),
        ),
        (3, None, independent, losses.BinaryCrossentropy(from_logits=True)),
        (
            3,
            "multi_label_classification",
            independent,
            losses.BinaryCrossentropy(from_logits=True),
        ),
        (1, None, lambda y: y[:, None].astype("float32"), losses.MeanSquaredError()),
        (3, "regression", independent, losses.MeanSquaredError()),
    ],
    ids=["indices", "one-hot", "multi-label", "multi-label named", "one number", "regression"],
)
def test_the_loss_of_a_config_is_that_of_keras(num_labels, problem, labels_of, loss):
    images, labels = data()
    labels, weights = labels_of(labels), np.linspace(0, 2, IMAGES)
    results = []
    for given in (None, loss):
        model = make({"num_labels": num_labels, "problem_type": problem})
        model.compile(keras.optimizers.SGD(0.1), given, **EAGERLY)
        called = model(images, labels).loss
        assert float(model.test_on_batch(images, labels)) == pytest.approx(float(called), abs=1e-5)
        value = float(model.train_on_batch(images, labels, sample_weight=weights))
        results.append([value, *numbers(model.variables)])
    same(*results, 1e-5)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", None])
def test_a_saved_loss_is_that_of_its_problem(problem):
    loss = ClassificationLoss(problem, CLASSES)
    again = losses.deserialize(losses.serialize(loss))
    labels, logits = independent(None), np.linspace(-2, 2, IMAGES * CLASSES, dtype="float32")
    values = [float(each(labels, logits.reshape(labels.shape))) for each in (loss, again)]
    assert values[0] == values[1]
    assert (again.problem_type, again.num_labels) == (problem, CLASSES)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_of_no_class_is_named_and_in_a_graph_gives_a_nan_loss(label):
    model = make()
    images, labels = data()
    labels[0] = label
    with pytest.raises(ValueError, match=f"labels hold {label}: the indices of {CLASSES} classes"):
        model(images, labels)
    model.compile(**EAGERLY)
    assert np.isnan(model.evaluate(images, labels, verbose=0))


def test_a_name_is_no_config():
    with pytest.raises(TypeError, match=r"config = 'cvt-13': .* from_pretrained takes names"):
        TFCvtForImageClassification("cvt-13")


def test_images_of_weight_0_teach_nothing():
    images, labels = data()
    weights = np.arange(IMAGES) % 2
    results = []
    for wrong in (1, 2):
        model = make()
        model.compile(sgd(), **EAGERLY)
        wronged = np.where(weights, labels, (labels + wrong) % CLASSES)
        model.fit(images, wronged, sample_weight=weights, epochs=2, verbose=0, shuffle=False)
        results.append(numbers(model.variables))
    same(*results, 0)


def test_callbacks_and_validation_data_work(tmp_path):
    model = make()
    model.compile(sgd(), metrics=["accuracy"], **EAGERLY)
    rates = []
    history = model.fit(
        *data(),
        validation_data=data(),
        epochs=5,
        verbose=0,
        callbacks=[
            keras.callbacks.EarlyStopping("val_loss", min_delta=1e9, patience=1),
            keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            keras.callbacks.LambdaCallback(
                on_epoch_end=lambda epoch, logs: rates.append(float(model.optimizer.learning_rate))
            ),
        ],
    )
    assert rates == pytest.approx([0.05, 0.025])
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert float(rows[1]["val_accuracy"]) == pytest.approx(history.history["val_accuracy"][1])
    saved = keras.models.load_model(tmp_path / "2.keras")
    same([saved.predict(data()[0], verbose=0)], [model.predict(data()[0], verbose=0)])


def test_a_saved_model_goes_on_as_if_it_had_not_been_saved(tmp_path):
    model = make()
    model.compile(adam(), **EAGERLY)
    model.fit(*data(), epochs=2, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    model.reset_metrics()  # as Keras 3.13 does not on JAX
    loaded = keras.models.load_model(tmp_path / "model.keras")
    results = [
        [trained.train_on_batch(*data()), *numbers(trained.variables)]
        for trained in (model, loaded)
    ]
    same(*results)
    assert int(loaded.optimizer.iterations) == 3


def test_one_model_takes_labels_of_every_form():
    images, labels = data()
    model = make({"problem_type": "single_label_classification"})
    model.compile(sgd(), metrics=["accuracy"])
    forms = (labels, labels[:, None], np.eye(CLASSES, dtype="int64")[labels])
    results = [model.evaluate(images, form, verbose=0) for form in forms]
    right = model.predict(images, verbose=0).argmax(axis=1) == labels
    assert results[0][1] == pytest.approx(right.mean())
    for result in results[1:]:
        assert result == pytest.approx(results[0])


def test_labels_may_be_among_the_inputs():
    images, labels = data()
    together = {"pixel_values": images, "labels": labels}
    apart, joined = make(), make()
    for model in (apart, joined):
        model.compile(sgd(), metrics=["accuracy"], **EAGERLY)
    same(joined.train_on_batch(together), apart.train_on_batch(images, labels))
    same(joined.test_on_batch(together), apart.test_on_batch(images, labels))
    same([joined.predict_on_batch(together)], [apart.predict_on_batch(images)])


def test_a_frozen_backbone_keeps_its_weights_and_statistics():
    model = make()
    model.cvt.trainable = False
    before, head = numbers(model.cvt.variables), numbers(model.classifier.variables)
    model.compile(sgd(), **EAGERLY)
    model.fit(*data(), epochs=2, verbose=0)
    same(numbers(model.cvt.variables), before, 0)
    assert len(model.trainable_variables) == 4
    for old, new in zip(head, numbers(model.classifier.variables), strict=True):
        assert (old != new).any()


def test_norms_biases_and_class_tokens_can_be_excluded_from_weight_decay():
    model = make()
    optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias", "cls_token"])
    model.compile(optimizer, **EAGERLY)
    before = numbers(model.trainable_variables)
    images, labels = data()
    model.train_on_batch(images, labels, sample_weight=np.zeros(IMAGES))  # so there is no gradient
    kept = [1 - 0.1 * 0.5 if v.name == "kernel" else 1 for v in model.trainable_variables]
    assert len(set(kept)) == 2
    expected = [share * value for share, value in zip(kept, before, strict=True)]
    same(numbers(model.trainable_variables), expected)


def test_a_subclass_trains_on_its_own_logits():
    class Sharper(TFCvtForImageClassification):
        def call(self, pixel_values, training=False):
            return 2 * super().call(pixel_values, training=training).logits

    class Doubled(TFCvtForImageClassification):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    images, labels = data()
    plain = make()
    logits = numbers([plain(images).logits])[0]
    model = make(cls=Sharper)
    model.compile(sgd(), **EAGERLY)
    same([model.predict(images, verbose=0), numbers([model(images)])[0]], [2 * logits] * 2)
    first = model.train_on_batch(images, labels)
    assert model.train_on_batch(images, labels) < first
    model = make(cls=Doubled)
    model.compile(sgd(), **EAGERLY)
    plain.compile(sgd(), **EAGERLY)
    assert model.train_on_batch(images, labels) == pytest.approx(
        2 * plain.train_on_batch(images, labels)
    )


def functional(images):
    features = make(cls=TFCvtModel)
    inputs = keras.Input(images.shape[1:])
    image, _ = features(inputs, return_dict=False)
    pooled = keras.layers.GlobalAveragePooling2D("channels_first")(image)
    return keras.Model(inputs, keras.layers.Dense(CLASSES)(pooled))


def of_logits(images):
    inputs = keras.Input(images.shape[1:])
    return keras.Model(inputs, make()(inputs, return_dict=False)[0])


def by_name(images):
    channels_last = images.transpose(0, 2, 3, 1)
    model = make(data_format="channels_last")
    inputs = keras.Input(images.shape[1:])
    logits = model(keras.layers.Permute((2, 3, 1))(inputs)).logits
    assert model(channels_last).loss is None
    return keras.Model(inputs, logits)


def subclassed(images):
    class Classifier(keras.Model):
        def __init__(self):
            super().__init__()
            self.features = make(cls=TFCvtModel)
            self.head = keras.layers.Dense(CLASSES)

        def call(self, images, training=False):
            return self.head(self.features(images, training=training).cls_token_value[:, 0])

    return Classifier()


@pytest.mark.parametrize("build", [functional, of_logits, by_name, subclassed])
def test_a_model_is_a_layer_of_a_larger_one(build):
    images, labels = data()
    model = build(images)
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(sgd(), loss, **EAGERLY)
    values = model.fit(images, labels, epochs=3, verbose=0, shuffle=False).history["loss"]
    assert values == sorted(values, reverse=True)
    statistics = [v for v in model.non_trainable_variables if v.name == "moving_mean"]
    assert all((value != 0).any() for value in numbers(statistics))
    assert len(statistics) == 3
