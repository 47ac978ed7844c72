import numpy as np
import pytest
from helpers.small_models import images, mixed, tiny

from cvt import CvtConfig, TFCvtForImageClassification
from cvt.keras.layers import DepthwiseConv

PER_STAGE = [n for n, v in tiny().to_dict().items() if isinstance(v, list) and len(v) == 3]
MODELS = {"dw_bn": tiny(depth=[1, 1, 1]), "all methods": mixed()}


@pytest.mark.parametrize(
    ("config", "size"),
    [(MODELS["dw_bn"], (40, 24)), (MODELS["all methods"], (None, None))],
    ids=["dw_bn, known size", "all methods, any size"],
)
def test_xla_computes_what_tensorflow_does(config, size):
    import tensorflow as tf

    model, pixels = TFCvtForImageClassification(config), images().numpy()
    taken = [tf.TensorSpec((None, 3, *size))]
    compiled = tf.function(model, taken, autograph=False, jit_compile=True)(pixels)
    graph = tf.function(model, taken, autograph=False)(pixels)
    expected = model(pixels).logits
    np.testing.assert_allclose(compiled.logits, expected, atol=1e-5)
    np.testing.assert_allclose(graph.logits, expected, atol=1e-5)


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("how", ["export", "saved_model"])
def test_keras_and_tensorflow_save_what_serves(data_format, how, tmp_path):
    import tensorflow as tf

    shape = {name: value[:1] for name, value in tiny().to_dict().items() if name in PER_STAGE}
    config = CvtConfig(**shape | {"cls_token": [True], "num_labels": 5})
    model = TFCvtForImageClassification(config, data_format)
    if how == "export":
        model.export(tmp_path, verbose=False)
    else:
        tf.saved_model.save(model, tmp_path)
    serve = tf.saved_model.load(tmp_path).signatures["serving_default"]
    for batch, height in ((1, 16), (3, 24)):
        pixels = images(batch, height, 20).numpy()
        if data_format == "channels_last":
            pixels = pixels.transpose(0, 2, 3, 1)
        served = serve(tf.constant(pixels))
        assert [*served] == ["logits"]
        np.testing.assert_allclose(served["logits"], model(pixels).logits, atol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
def test_only_a_graph_for_xla_replaces_the_depthwise_convolution(nested):
    """TensorFlow has no public function that distinguishes the two graphs while tracing."""
    import tensorflow as tf

    layer = DepthwiseConv(3, 1, 1)
    pixels = [tf.TensorSpec((1, 6, 5, 4))]
    inner = tf.function(layer, pixels) if nested else layer

    def operations(jit_compile):
        graph = tf.function(inner, pixels, jit_compile=jit_compile).get_concrete_function().graph
        functions = graph.as_graph_def().library.function
        nodes = [node.op for function in functions for node in function.node_def]
        return {*nodes, *(operation.type for operation in graph.get_operations())}

    assert "DepthwiseConv2dNative" in operations(jit_compile=False)
    inner = tf.function(layer, pixels) if nested else layer
    assert "DepthwiseConv2dNative" not in operations(jit_compile=True)


def test_models_are_compiled_by_xla_on_a_gpu_or_where_it_is_asked_for():
    import tensorflow as tf

    model = TFCvtForImageClassification(MODELS["dw_bn"])
    assert model.jit_compile == bool(tf.config.list_physical_devices("GPU"))
    model.compile(jit_compile=True)
    assert model.jit_compile
