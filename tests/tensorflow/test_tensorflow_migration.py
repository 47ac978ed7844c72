"""What the page says of transformers 4's TensorFlow classes: every "same" is tried, and the rest.

The left column was read in transformers 4.57.6.
"""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
from golden.cases import TF_CLASSIFIER, TF_IMAGES, image
from helpers.small_models import CLASSES, mixed

from cvt import TFCvtForImageClassification

DOCS = Path(__file__).parents[2] / "docs"
LABELS = np.array([1, 3, 0, 1])


def rows(language, heading):
    page = (DOCS / language / "coming_from.md").read_text("utf-8")
    section = page.partition(heading)[2].partition("\n## ")[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return table[2:]


def small(**fields):
    keras.utils.set_random_seed(0)
    return TFCvtForImageClassification(mixed(num_labels=CLASSES, **fields))


def pictures():
    return image("migration", (len(LABELS), 16, 20))


def loading_and_logits():
    model = TFCvtForImageClassification.from_pretrained(TF_CLASSIFIER)
    pixels = image(TF_CLASSIFIER.name, TF_IMAGES)
    assert pixels.shape[1] == 3
    expected = np.load(TF_CLASSIFIER / "outputs.npz")["logits"]  # of transformers 4.57.6
    np.testing.assert_allclose(model(pixels).logits, expected, atol=1e-4)


def positions():
    loss, logits, states = small()(pictures(), LABELS, True, False, False)
    assert (loss.shape, logits.shape, len(states)) == ((), (4, CLASSES), 3)


def reading():
    output = small()(pictures(), output_hidden_states=True)
    assert output["logits"] is output[0] is output.logits is output.to_tuple()[0]
    assert output["hidden_states"] is output[1] is output.hidden_states


def compiling_with_a_loss():
    model = small()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss)
    expected = float(loss(LABELS, model(pictures()).logits))
    assert model.evaluate(pictures(), LABELS, verbose=0) == pytest.approx(expected, rel=1e-5)


def losses_of_fit(*data):
    model = small()
    model.compile(keras.optimizers.SGD(0.01))
    return model.fit(*data, epochs=2, batch_size=4, shuffle=False, verbose=0).history["loss"]


def fitting():
    first, second = losses_of_fit(pictures(), LABELS)
    assert second < first


def fitting_a_dict():
    found = losses_of_fit({"pixel_values": pictures(), "labels": LABELS})
    assert found == pytest.approx(losses_of_fit(pictures(), LABELS), rel=1e-5)


SAME = {
    "`from_pretrained(FOLDER)` with `tf_model.h5`": loading_and_logits,
    "`model(pixels).logits`, pixels (B, 3, H, W)": loading_and_logits,
    "`model(pixels, labels, output_hidden_states, return_dict, training)`, by position": positions,
    '`output["logits"]`, `output[0]`, `output.to_tuple()`': reading,
    "`model.compile(optimizer, loss)`": compiling_with_a_loss,
    "`model.fit(images, labels)`": fitting,
    '`model.fit({"pixel_values": images, "labels": labels})`': fitting_a_dict,
}


def test_the_page_says_same_of_these_calls_and_no_other():
    english, chinese = rows("en", "## From TensorFlow"), rows("zh", "## 从 TensorFlow")
    assert {left for left, right in english if re.search(r"\bsame\b", right)} == SAME.keys()
    same = [["same" in right for _, right in english], ["相同" in right for _, right in chinese]]
    assert same[0] == same[1]


@pytest.mark.parametrize("call", dict.fromkeys(SAME.values()))
def test_what_the_page_calls_the_same_is(call):
    call()


def test_the_output_is_no_dict():
    output = small()(pictures())
    assert not hasattr(output, "keys")
    assert output._fields == ("logits",)
    assert output.loss is output.hidden_states is None


def test_the_loss_is_a_mean():
    model = small()
    output = model(pictures(), LABELS)
    each = keras.losses.sparse_categorical_crossentropy(LABELS, output.logits, from_logits=True)
    assert each.shape == (4,)  # what transformers 4 returned
    assert float(output.loss) == pytest.approx(float(np.mean(each)), rel=1e-5)


def test_an_ignored_label_is_none_there_nor_here():
    import tensorflow as tf

    logits, labels = np.zeros((2, CLASSES), "float32"), np.array([1, -100])
    theirs = tf.nn.sparse_softmax_cross_entropy_with_logits  # what its loss calls
    with pytest.raises(tf.errors.InvalidArgumentError, match="-100"):
        theirs(labels, logits)
    assert np.isnan(tf.function(theirs, jit_compile=True)(labels, logits)).tolist() == [False, True]
    model = small()
    with pytest.raises(ValueError, match="labels hold -100"):
        model(pictures()[:2], labels)
    traced = tf.function(lambda labels: model(pictures()[:2], labels).loss)
    assert np.isnan(traced(tf.constant(labels)))


def test_what_is_gone_is_an_error_and_not_ignored(tmp_path):
    model = small()
    for name in ("saved_model", "safe_serialization", "max_shard_size", "push_to_hub", "version"):
        with pytest.raises(TypeError, match=name):
            model.save_pretrained(tmp_path / "x", **{name: True})
    for name in ("prepare_tf_dataset", "push_to_hub", "serving"):
        assert not hasattr(model, name)
    with pytest.raises(ValueError, match=r"\.weights\.h5"):
        model.save_weights(tmp_path / "weights.h5")
    assert not [*tmp_path.iterdir()]


def test_predict_gives_the_array():
    model = small()
    logits = model.predict(pictures(), verbose=0)
    assert type(logits) is np.ndarray
    np.testing.assert_allclose(logits, model(pictures()).logits, atol=1e-5)


def test_what_is_served_has_the_name_that_the_page_has(tmp_path):
    import tensorflow as tf

    model = small()
    model.export(tmp_path, verbose=False)
    served = tf.saved_model.load(tmp_path).signatures["serving_default"]
    for pixels in (pictures(), image("larger", (1, 24, 32))):
        answer = served(tf.constant(pixels))
        assert [*answer] == ["logits"]
        np.testing.assert_allclose(answer["logits"], model(pixels).logits, atol=1e-5)
