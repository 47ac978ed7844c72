import numpy as np
import pytest
from small_models import images, mixed, tiny

from cvt import TFCvtForImageClassification

MODELS = {"dw_bn": tiny(depth=[1, 1, 1]), "all methods": mixed()}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("size", [(40, 24), (None, None)], ids=["known size", "any size"])
def test_xla_computes_what_tensorflow_does(config, size):
    import tensorflow as tf

    model, pixels = TFCvtForImageClassification(config), images().numpy()
    taken = [tf.TensorSpec((None, 3, *size))]
    compiled = tf.function(model, taken, autograph=False, jit_compile=True)(pixels)
    graph = tf.function(model, taken, autograph=False)(pixels)
    expected = model(pixels).logits
    np.testing.assert_allclose(compiled.logits, expected, atol=1e-5)
    np.testing.assert_allclose(graph.logits, expected, atol=1e-5)


def test_models_are_compiled_by_xla_on_a_gpu_or_where_it_is_asked_for():
    import tensorflow as tf

    model = TFCvtForImageClassification(MODELS["dw_bn"])
    assert model.jit_compile == bool(tf.config.list_physical_devices("GPU"))
    model.compile(jit_compile=True)
    assert model.jit_compile
