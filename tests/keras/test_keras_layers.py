"""Every layer of the Keras models: by Keras' own checks, and beside PyTorch's."""

import keras
import numpy as np
import pytest
import torch
from helpers.small_models import tiny
from keras import ops
from keras.src.testing import TestCase

from cvt.keras import layers
from cvt.keras.modeling import Encoder

CONFIG = tiny(
    embed_dim=[8, 12],
    num_heads=[1, 2],
    depth=[1, 1],
    num_channels=2,
    **{name: [0.2, 0.2] for name in ("drop_rate", "attention_drop_rate", "drop_path_rate")},
    **{name: [2, 2] for name in ("mlp_ratio", "patch_stride", "stride_kv")},
    **{name: [3, 3] for name in ("patch_sizes", "kernel_qkv")},
    **{name: [1, 1] for name in ("patch_padding", "padding_kv", "padding_q", "stride_q")},
    qkv_bias=[True, False],
    cls_token=[False, True],
    qkv_projection_method=["avg", "dw_bn"],
)
STAGE = {"config": CONFIG, "stage": 1}
GRID = (3, 2)


# ------------------------------------------------------------------------------ Keras' own checks


def alone(layer, **arguments):
    """A layer of several inputs and outputs, with the first of each."""

    class First(layer):
        def call(self, x, training=False):
            return super().call(x, **arguments, training=training)[0]

    return First


IMAGE, TOKENS = (2, 3, 2, 12), (2, 7, 12)  # of the second stage: GRID, one class token
CHECKS = {
    "BatchNorm": (layers.BatchNorm, {}, IMAGE, IMAGE),
    "DropPath": (layers.DropPath, {"rate": 0.2}, TOKENS, TOKENS),
    "Dense": (
        layers.Dense,
        {"width": 5, "dropout": 0.2, "activation": "quick_gelu"},
        TOKENS,
        (2, 7, 5),
    ),
    "ConvEmbedding": (layers.ConvEmbedding, STAGE, (2, 5, 4, 8), IMAGE),
    "DepthwiseConv": (
        layers.DepthwiseConv,
        {"kernel": 3, "stride": 2, "padding": 1},
        IMAGE,
        (2, 2, 1, 12),
    ),
    "AveragePooling": (
        layers.AveragePooling,
        {"kernel": 3, "stride": 2, "padding": 1},
        IMAGE,
        (2, 2, 2, 12),
    ),
    "Projection": (layers.Projection, STAGE | {"part": "key"}, IMAGE, (2, 2, 12)),
    "SelfAttention": (alone(layers.SelfAttention, grid=GRID), STAGE, TOKENS, TOKENS),
    "Block": (alone(layers.Block, grid=GRID), STAGE | {"block": 0}, TOKENS, TOKENS),
    "Stage": (alone(layers.Stage), STAGE, (2, 5, 4, 8), IMAGE),
    "Encoder": (alone(Encoder), {"config": CONFIG}, (2, 10, 8, 2), (2, 1, 12)),
}


@pytest.mark.parametrize(("layer", "arguments", "inputs", "outputs"), CHECKS.values(), ids=CHECKS)
def test_keras_own_checks_of_a_layer(layer, arguments, inputs, outputs):
    case = TestCase()
    case.setUp()
    case.run_layer_test(
        layer,
        arguments,
        input_shape=inputs,
        expected_output_shape=outputs,
        custom_objects={layer.__name__: layer},
    )
    case.doCleanups()


# ------------------------------------------------------------------------------ beside PyTorch's


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(1, 2, shape).astype("float32")


def assert_close(found, expected):
    """An image of Keras, or else any array, and one of PyTorch."""
    found = ops.convert_to_numpy(found)
    expected = expected.detach().numpy()
    if found.ndim == 4:
        expected = expected.transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def to_torch(image):
    return torch.from_numpy(image).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("gelu", torch.nn.GELU()), ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x))],
)
def test_activations_are_pytorchs(name, theirs):
    x = np.linspace(-20, 20, 1001, dtype="float32")
    assert_close(layers.ACTIVATIONS[name](ops.convert_to_tensor(x)), theirs(torch.from_numpy(x)))


@pytest.mark.parametrize("shape", [(2, 1, 1, 3), (1, 2, 3, 3), (4, 5, 2, 3)])
def test_batch_norm_trains_and_infers_as_pytorchs(shape):
    ours, theirs = layers.BatchNorm(), torch.nn.BatchNorm2d(3)
    for step in range(3):
        image = random(*shape, seed=step)
        assert_close(ours(image, training=True), theirs(to_torch(image)))
        assert_close(ours.moving_mean, theirs.running_mean)
        assert_close(ours.moving_variance, theirs.running_var)
    assert_close(ours(image), theirs.eval()(to_torch(image)))


def test_a_frozen_batch_norm_infers_though_the_model_trains():
    ours, image = layers.BatchNorm(), random(4, 5, 2, 3)
    ours.trainable = False
    assert_close(ours(image, training=True), torch.nn.BatchNorm2d(3).eval()(to_torch(image)))
    assert_close(ours.moving_variance, torch.ones(3))


WINDOWS = [(1, 1, 0), (1, 2, 0), (2, 2, 0), (2, 2, 1), (3, 1, 1), (3, 2, 1), (3, 3, 0), (4, 3, 2)]


@pytest.mark.parametrize("window", [*WINDOWS, (5, 2, 2), (2, 3, 0), (3, 4, 1)])
@pytest.mark.parametrize("size", [(5, 5), (8, 7), (6, 9)])
def test_average_pooling_is_pytorchs_in_ceil_mode(window, size):
    image = random(2, *size, 3)
    expected = torch.nn.AvgPool2d(*window, ceil_mode=True)(to_torch(image))
    assert_close(layers.AveragePooling(*window)(image), expected)


@pytest.mark.parametrize("window", WINDOWS)
def test_average_pooling_does_not_need_to_know_the_size(window):
    layer = layers.AveragePooling(*window)
    assert layer(keras.KerasTensor((None, None, None, 3))).shape == (None, None, None, 3)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        graph = tf.function(layer, input_signature=[tf.TensorSpec((None, None, None, 3))])
        for size in [(5, 5), (8, 7), (6, 9)]:
            image = random(2, *size, 3)
            expected = torch.nn.AvgPool2d(*window, ceil_mode=True)(to_torch(image))
            assert_close(graph(image), expected)


@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_depthwise_convolution_is_pytorchs(kernel, stride, padding):
    image, weight = random(2, 5, 4, 3), random(kernel, kernel, 1, 3)
    ours = layers.DepthwiseConv(kernel, stride, padding)
    ours.build(image.shape)
    ours.kernel.assign(weight)
    expected = torch.nn.functional.conv2d(
        to_torch(image),
        torch.from_numpy(weight.transpose(3, 2, 0, 1)),
        stride=stride,
        padding=padding,
        groups=3,
    )
    assert_close(ours(image), expected)


# ------------------------------------------------------------------------------ chance


def test_drop_path_leaves_out_whole_samples_and_keeps_the_mean():
    ones = np.ones((4000, 2, 3), "float32")
    drop_path = layers.DropPath(0.25)
    dropped = ops.convert_to_numpy(drop_path(ones, training=True))
    of_samples = dropped[:, :1, :1]
    np.testing.assert_array_equal(dropped, np.broadcast_to(of_samples, ones.shape))
    assert set(np.unique(of_samples)) == {0, np.float32(1 / 0.75)}
    assert of_samples.mean() == pytest.approx(1, abs=0.05)
    assert (of_samples != ops.convert_to_numpy(drop_path(ones, training=True))[:, :1, :1]).any()
    np.testing.assert_array_equal(ops.convert_to_numpy(drop_path(ones)), ones)


def test_a_dense_layers_dropout_comes_last_and_keeps_the_mean():
    dense = layers.Dense(50, dropout=0.25, activation="gelu")
    x = random(20, 10, 4)
    whole = ops.convert_to_numpy(dense(x))
    dropped = ops.convert_to_numpy(dense(x, training=True))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], (whole / 0.75)[kept], rtol=1e-5)
    assert kept.mean() == pytest.approx(0.75, abs=0.03)
