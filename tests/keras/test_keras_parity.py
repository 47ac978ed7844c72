"""The Keras models beside the PyTorch ones, on the backend that KERAS_BACKEND names."""

import inspect
import math
import re

import keras
import numpy as np
import pytest
import torch
from helpers.keras_models import compiled, stateless
from helpers.small_models import assert_equal, images, mixed, random_case, randomise, seeds, tiny
from keras import initializers, ops
from scipy import stats

from cvt import CvtConfig, CvtForImageClassification, TFCvtForImageClassification, TFCvtModel
from cvt.architecture import VARIANTS
from cvt.checkpoints.names import keras_to_transformers
from cvt.keras import TFCvtModelOutput, TFImageClassifierOutput, losses, weights
from cvt.keras.modeling import DATA_FORMATS
from cvt.losses import classification_loss
from cvt.strict_loading import COUNTER

SEEDS, SEEDS_OF_TRAINING = range(50), range(12)
BACKEND = keras.config.backend()
ALL = {"output_hidden_states": True, "output_attentions": True}
POSITIONS = {"position_embedding": ["learned"] * 3, "image_size": [16, 24]}


# ------------------------------------------------------------------------------ models


def case(seed):
    """A random config without dropout, and images for it.

    Few blocks, as each takes a while to compile: two in an only stage, else one in each.
    """
    fields, shape = random_case(seed, portable=False)
    stages = len(fields["depth"])
    rates = dict.fromkeys(("drop_rate", "attention_drop_rate", "drop_path_rate"), [0.0] * stages)
    config = CvtConfig(**fields | rates | {"depth": [1] * stages if stages > 1 else [2]})
    return config, torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def zeros(initializer, shape, dtype=None):
    return np.zeros(shape, dtype)


def without_weights(config, **kwargs):
    """A Keras model, all zeros: JAX would compile the drawing of every shape."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RandomNormal", "RandomUniform", "VarianceScaling", "Zeros", "Ones"):
            patch.setattr(getattr(initializers, name), "__call__", zeros)
        return TFCvtForImageClassification(config, **kwargs)


def pair(config, seed=0, **kwargs):
    """The PyTorch model, random, and the Keras model of the same weights."""
    theirs = CvtForImageClassification(config).eval()
    randomise(theirs, seed)
    ours = without_weights(config, **kwargs)
    found = {name: weight.numpy() for name, weight in theirs.state_dict().items()}
    weights.assign(ours, found, "PyTorch")
    return theirs, ours


def by_name(output, data_format="channels_first"):
    """The tensors of an output by name, as PyTorch's, images with the channels first."""
    found = {}
    for name in ("logits", "last_hidden_state", "cls_token_value", "hidden_states", "attentions"):
        value = getattr(output, name, None)
        parts = enumerate(value) if isinstance(value, tuple) else [("", value)]
        for i, tensor in parts if value is not None else ():
            if not isinstance(tensor, torch.Tensor):
                tensor = torch.tensor(ops.convert_to_numpy(tensor).astype("float32"))
            if "hidden" in name and data_format == "channels_last":
                tensor = tensor.permute(0, 3, 1, 2)
            found[f"{name}{i}"] = tensor.detach().float()
    return found


# ------------------------------------------------------------------------------ backends


def gradients(model, loss):
    """A function of an array to the gradients of `loss(array)`: of the array, of the weights."""
    read = [variable.value for variable in model.trainable_variables]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def call(array):
            array = tf.constant(array)
            with tf.GradientTape() as tape:
                tape.watch(array)
                value = loss(array)
            return tape.gradient(value, [array, *read], unconnected_gradients="zero")

    elif BACKEND == "torch":

        def call(array):
            array = torch.tensor(array, requires_grad=True)
            return torch.autograd.grad(loss(array), [array, *read], materialize_grads=True)

    else:
        import jax

        step = jax.jit(jax.grad(stateless(model, loss), argnums=(0, 1), has_aux=True))

        def call(array):
            state = [variable.value for variable in model.variables]
            (of_state, of_array), state = step(state, array)
            for variable, value in zip(model.variables, state, strict=True):
                variable.assign(value)
            pairs = zip(model.variables, of_state, strict=True)
            return [of_array] + [gradient for variable, gradient in pairs if variable.trainable]

    return call


# ------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("seed", seeds(12 if BACKEND == "jax" else 20, len(SEEDS)))
def test_outputs_equal_pytorchs(seed):
    config, pixels = case(seed)
    data_format = DATA_FORMATS[seed % 2]
    theirs, ours = pair(config, seed, data_format=data_format)
    with torch.no_grad():
        expected = by_name(theirs(pixels, **ALL)) | by_name(theirs.cvt(pixels))
    call = compiled(ours, lambda pixels: (ours(pixels, **ALL), ours.cvt(pixels)))
    pixels = pixels.permute(0, 2, 3, 1) if data_format == "channels_last" else pixels
    output, features = call(pixels.numpy())
    found = by_name(output, data_format) | by_name(features, data_format)
    assert_equal(found, expected, tolerance=1e-4)


@pytest.mark.parametrize("seed", seeds(4 if BACKEND == "jax" else 6, len(SEEDS_OF_TRAINING)))
def test_gradients_and_batch_statistics_of_three_steps_equal_pytorchs(seed):
    config, pixels = case(seed)
    theirs, ours = pair(config, seed)
    theirs.double().train()
    pixels = torch.cat((pixels, pixels.square()))  # a batch of one has no variance
    labels = np.arange(len(pixels)) % config.num_labels

    def loss(pixels):
        output = ours(pixels, labels=labels, output_hidden_states=True, training=True)
        # With the hidden states no gradient is too small to be compared.
        return output.loss + sum(ops.mean(ops.square(state)) for state in output.hidden_states)

    call = gradients(ours, loss)
    names = [keras_to_transformers(variable.path) for variable in ours.trainable_variables]
    for step in range(1, 4):
        theirs.zero_grad()
        batch = (step * pixels).double().requires_grad_()
        output = theirs(batch, labels=torch.from_numpy(labels), output_hidden_states=True)
        (output.loss + sum(state.square().mean() for state in output.hidden_states)).backward()
        expected = {name: weight.grad for name, weight in theirs.named_parameters()}

        of_pixels, *of_weights = map(ops.convert_to_numpy, call((step * pixels).numpy()))
        found = dict(zip(names, map(weights.to_torch, of_weights), strict=True))
        found = {name: torch.tensor(gradient).double() for name, gradient in found.items()}
        of_pixels = torch.tensor(of_pixels).double()
        assert_equal(found | {"": of_pixels}, expected | {"": batch.grad}, tolerance=1e-3)

    expected = {name: value for name, value in theirs.named_buffers() if "running" in name}
    found = {
        name: torch.tensor(ops.convert_to_numpy(variable)).double()
        for name, variable in weights.named_variables(ours).items()
        if "running" in name
    }
    assert_equal(found, expected, tolerance=1e-4)


def test_the_random_configs_vary_in_all_that_matters():
    configs = [case(seed)[0] for seed in SEEDS]
    assert {len(config.depth) for config in configs} == {1, 2, 3, 4}
    names = ("qkv_projection_method", "cls_token", "position_embedding", "qkv_bias", "embed_dim")
    for name in (*names, "stride_q"):
        assert len({value for config in configs for value in getattr(config, name)}) > 1, name
    assert {config.hidden_act for config in configs} == {"gelu", "quick_gelu"}
    trained = [case(seed)[0] for seed in SEEDS_OF_TRAINING]
    assert {m for c in trained for m in c.qkv_projection_method} == {"dw_bn", "avg", "linear"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_variants_have_pytorchs_weights(variant):
    config = CvtConfig.from_variant(variant)
    with torch.device("meta"):
        theirs = CvtForImageClassification(config)
    with keras.StatelessScope(initialize_variables=False):  # shapes, and no memory
        ours = TFCvtForImageClassification(config)
        variables = weights.named_variables(ours)
    keras.utils.clear_session()  # which would initialise them later
    shapes = {
        name: weights.to_torch(np.empty(v.shape, "V0")).shape for name, v in variables.items()
    }
    expected = {name: tuple(weight.shape) for name, weight in theirs.state_dict().items()}
    assert shapes == {n: shape for n, shape in expected.items() if not n.endswith(COUNTER)}
    parameters = sum(math.prod(variable.shape) for variable in ours.trainable_variables)
    assert parameters == sum(weight.numel() for weight in theirs.parameters())


# ------------------------------------------------------------------------------ outputs


@pytest.fixture(scope="module")
def small():
    """A PyTorch and a Keras model of the same weights, and images for them."""
    return *pair(mixed(**POSITIONS)), images(batch=2, height=16, width=20)


def equal(found, expected):
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected.detach(), atol=1e-4)


def test_an_output_is_read_by_name_by_number_and_as_a_tuple(small):
    theirs, ours, pixels = small
    labels = np.array([1, 3])
    call = compiled(ours, lambda pixels: ours(pixels, labels=labels, output_hidden_states=True))
    output = call(pixels.numpy())
    expected = theirs(pixels, labels=torch.tensor(labels), output_hidden_states=True)
    assert isinstance(output, TFImageClassifierOutput)
    assert output.attentions is None
    assert len(output.to_tuple()) == len(expected.to_tuple()) == 3
    equal(output.loss, expected.loss)
    for i, name in enumerate(("loss", "logits", "hidden_states")):
        assert output[i] is output[name] is getattr(output, name) is output.to_tuple()[i]


def test_features_are_read_by_name_by_number_and_as_a_tuple():
    config = mixed(cls_token=(0, 0, 0))
    theirs, ours = pair(config)
    pixels = images(batch=2, height=16, width=20)
    output = compiled(ours, lambda pixels: ours.cvt(pixels, output_attentions=True))(pixels.numpy())
    expected = theirs.cvt(pixels, output_attentions=True)
    assert isinstance(output, TFCvtModelOutput)
    assert output.cls_token_value is output.hidden_states is None
    assert output[0] is output["last_hidden_state"] is output.last_hidden_state
    assert output[1] is output["attentions"]
    assert len(output.to_tuple()) == len(expected.to_tuple()) == 2
    equal(output[0], expected[0])


def test_the_config_decides_what_is_returned_unless_the_call_does():
    fields = {"output_hidden_states": True, "output_attentions": True, "return_dict": False}
    theirs, ours = pair(mixed(**fields))
    pixels = images(batch=2, height=16, width=20)

    less = {"output_hidden_states": False, "output_attentions": False}

    def by(*models):
        return lambda pixels: [
            (model(pixels), model(pixels, **less), model(pixels, return_dict=True))
            for model in models
        ]

    expected = by(theirs, theirs.cvt)(pixels)
    found = compiled(ours, by(ours, ours.cvt))(pixels.numpy())
    for mine, wanted in zip(found, expected, strict=True):
        assert [type(output) is tuple for output in mine] == [True, True, False]
        assert [len(output) for output in mine[:2]] == [len(output) for output in wanted[:2]]
        assert mine[2].to_tuple()[-1] is mine[2].attentions
        equal(mine[0][0], wanted[0][0])


# ------------------------------------------------------------------------------ losses

INDICES, COLUMN = [2, 0], [[2], [0]]
SHARES, MANY = [[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]], [[1.0, 0.0, 1.0], [0.0, 0.3, 0.0]]


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (1, None, [0.5, -1.0]),
        (1, None, [[0.5], [-1.0]]),
        (1, "regression", [1, 2]),
        (3, "regression", [[0.5, -1.0, 2.0], [0.0, 1.0, 3.0]]),
        (3, None, INDICES),
        (3, None, COLUMN),
        (3, "single_label_classification", INDICES),
        (3, "single_label_classification", COLUMN),
        (3, "single_label_classification", SHARES),
        (3, None, MANY),
        (3, "multi_label_classification", MANY),
        (3, "multi_label_classification", [[1, 0, 1], [0, 0, 0]]),
    ],
)
def test_the_loss_of_every_problem_is_pytorchs(num_labels, problem_type, labels):
    config = tiny(num_labels=num_labels, problem_type=problem_type)
    logits = torch.randn(2, num_labels, generator=torch.Generator().manual_seed(0))
    expected = classification_loss(logits, torch.tensor(labels), config)
    found = losses.classification_loss(ops.convert_to_tensor(logits.numpy()), labels, config)
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        (None, [0, 1, 2]),
        (None, [[0, 1]]),
        (None, 1),
        (None, [0.5, 1.0]),
        (None, [[0.5], [1.0]]),
        ("single_label_classification", [0.5, 1.0]),
        ("single_label_classification", [[0.5, 0.5], [0.0, 1.0]]),
        ("multi_label_classification", INDICES),
        ("regression", [0.5, 1.0]),
        ("ranking", INDICES),
    ],
)
def test_labels_that_do_not_fit_are_refused_as_by_pytorch(problem_type, labels):
    config = tiny(num_labels=3)
    config.__dict__["problem_type"] = problem_type  # transformers refuses an unknown one
    with pytest.raises(ValueError, match=r"labels have shape|problem_type = ") as theirs:
        classification_loss(torch.zeros(2, 3), torch.tensor(labels), config)
    with pytest.raises(ValueError, match=f"^{re.escape(str(theirs.value))}$"):
        losses.classification_loss(ops.zeros((2, 3)), np.array(labels), config)


@pytest.mark.parametrize("labels", [[0, 3], [[-1], [0]]])
def test_labels_of_no_class_are_refused_as_by_pytorch(labels):
    config = tiny(num_labels=3)
    with pytest.raises(ValueError, match=r"labels hold (3|-1): ") as theirs:
        classification_loss(torch.zeros(2, 3), torch.tensor(labels), config)
    with pytest.raises(ValueError, match=f"^{re.escape(str(theirs.value))}$"):
        losses.classification_loss(ops.zeros((2, 3)), np.array(labels), config)


def test_positional_arguments_are_in_the_order_of_transformers():
    """Those of its TFCvtModel and TFCvtForImageClassification, 4.57; ours has one more."""
    expected = ["output_hidden_states", "return_dict", "training", "output_attentions"]
    orders = [
        [*inspect.signature(cls.call).parameters]
        for cls in (TFCvtModel, TFCvtForImageClassification)
    ]
    assert orders == [
        ["self", "pixel_values", *expected],
        ["self", "pixel_values", "labels", *expected],
    ]
    _, ours = pair(mixed())
    pixels = images(batch=2, height=16, width=20)
    call = compiled(
        ours, lambda pixels: (ours.cvt(pixels, True, False), ours(pixels, None, True, False))
    )
    features, output = call(pixels.numpy())
    assert isinstance(features, tuple)
    assert [state.shape[1] for state in features[-1]] == [8, 16, 24]
    logits, hidden_states = output
    assert (tuple(logits.shape), len(hidden_states)) == ((2, 5), 3)


# ------------------------------------------------------------------------------ bad pixels


@pytest.mark.parametrize("data_format", DATA_FORMATS)
@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((2, 4, 16, 16), "float32", "expected (batch, {image})"),
        ((3, 16, 16), "float32", "expected (batch, {image})"),
        ((0, 3, 16, 16), "float32", "expected (batch, {image})"),
        ((2, 3, 16, 16), "uint8", "are uint8; expected floats"),
        ((2, 3, 16, 16), "int32", "are int32; expected floats"),
        ((2, 3, 2, 16), "float32", "are 2 x 16 pixels; this model needs at least 3 x 3"),
    ],
)
def test_pixels_that_do_not_fit_are_refused(small, monkeypatch, data_format, shape, dtype, words):
    _, ours, _ = small
    for model in (ours, ours.cvt):
        monkeypatch.setattr(model, "data_format", data_format)
    pixels, image = np.zeros(shape, dtype), "3, height, width"
    if data_format == "channels_last":
        pixels, image = np.moveaxis(pixels, -3, -1), "height, width, 3"
    for model in (ours, ours.cvt):
        with pytest.raises(ValueError, match=re.escape(words.format(image=image))) as refusal:
            model(pixels)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("pixels", [None, [[[[0.5]]]], [np.zeros((3, 8, 8), np.float32)]])
def test_pixels_that_are_no_array_are_refused_in_a_line(small, pixels):
    _, ours, _ = small
    with pytest.raises(ValueError, match=r"^pixel_values are of type \w+; expected one array or"):
        ours(pixels)


def test_an_unknown_data_format_is_refused():
    with pytest.raises(ValueError, match="data_format = 'NCHW': must be one of channels_first"):
        TFCvtModel(tiny(), data_format="NCHW")


# ------------------------------------------------------------------------------ initialisation


@pytest.mark.parametrize("init", ["trunc_norm", "xavier"])
def test_initial_weights_are_distributed_as_pytorchs(init):
    shape = {"embed_dim": [128] * 3, "num_heads": [1, 1, 1], "depth": [1, 1, 1]}
    config = tiny(places=(1, 1, 1), num_labels=256, init=init, **shape)
    torch.manual_seed(0)
    keras.utils.set_random_seed(0)
    theirs = CvtForImageClassification(config).state_dict()
    for name, variable in weights.named_variables(TFCvtForImageClassification(config)).items():
        found, expected = ops.convert_to_numpy(variable).ravel(), theirs[name].numpy().ravel()
        assert stats.ks_2samp(found, expected).pvalue > 1e-4, name
        if expected.std() > 0:
            assert found.std() == pytest.approx(expected.std(), rel=0.25), name


# ------------------------------------------------------------------------------ chance

RATES = ["drop_rate", "attention_drop_rate", "drop_path_rate"]


def test_every_rate_is_where_pytorch_has_it():
    config = tiny(**{name: [i / 10, i / 5, 0.5] for i, name in enumerate(RATES, 1)})
    theirs, ours = pair(config)
    stages = zip(theirs.cvt.encoder.stages, ours.cvt.encoder.stages, strict=True)
    for stage, (their, our) in enumerate(stages):
        assert our.dropout.rate == their.dropout.p == config.drop_rate[stage]
        linear = np.linspace(0, config.drop_path_rate[stage], config.depth[stage])
        np.testing.assert_allclose([block.drop_path.rate for block in our.blocks], linear)
        for theirs_of, ours_of in zip(their.layers, our.blocks, strict=True):
            assert ours_of.drop_path.rate == theirs_of.drop_path.rate
            assert ours_of.attention.dropout.rate == theirs_of.attention.attention.dropout
            assert ours_of.merge.dropout.rate == theirs_of.attention.output.dropout.p
            assert ours_of.expand.dropout.rate == theirs_of.intermediate.dropout.p
            assert ours_of.reduce.dropout.rate == theirs_of.output.dropout.p


@pytest.mark.parametrize("rate", RATES)
def test_training_draws_anew_and_inference_does_not_draw(rate):
    keras.utils.set_random_seed(0)  # else drop path may leave out the same branches twice
    theirs, ours = pair(mixed(depth=[1, 1, 2], **{rate: [0.0, 0.0, 0.5]}))
    pixels = images(batch=4, height=16, width=20)
    train = compiled(ours, lambda pixels: ours(pixels, training=True).logits)
    first, second = (np.array(ops.convert_to_numpy(train(pixels.numpy()))) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    _, ours = pair(ours.config)  # training has moved the statistics
    equal(compiled(ours, lambda pixels: ours(pixels).logits)(pixels.numpy()), theirs(pixels).logits)


def chances(model):
    """The layers of a model that draw in training."""
    for stage in model.cvt.encoder.stages:
        yield stage.dropout
        for block in stage.blocks:
            yield from (block.attention.dropout, block.drop_path)
            yield from (dense.dropout for dense in (block.merge, block.expand, block.reduce))


# Of a stage and a block of it: the layer that draws, and one whose weights are 0. Drop path is one
# layer in two branches: where the last Linear of a branch is 0, it acts in the other one alone.
SITES = {
    "none": lambda stage, block: (None, None),
    "embedding": lambda stage, block: (stage.dropout, None),
    "attention": lambda stage, block: (block.attention.dropout, None),
    "merge": lambda stage, block: (block.merge.dropout, None),
    "expand": lambda stage, block: (block.expand.dropout, None),
    "reduce": lambda stage, block: (block.reduce.dropout, None),
    "drop path of attention": lambda stage, block: (block.drop_path, block.reduce.dense),
    "drop path of the MLP": lambda stage, block: (block.drop_path, block.merge.dense),
}


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_every_layer_that_draws_acts_alone_too(site):
    keras.utils.set_random_seed(0)
    _, ours = pair(mixed(depth=[2, 1, 1], **{name: [0.5] * 3 for name in RATES}))
    stage = ours.cvt.encoder.stages[0]
    drawing, silent = site(stage, stage.blocks[1])
    for layer in chances(ours):
        layer.rate = layer.rate if layer is drawing else 0
    for variable in silent.variables if silent else ():
        variable.assign(np.zeros(variable.shape))
    pixels = images(batch=16, height=16, width=20)
    train = compiled(ours, lambda pixels: ours(pixels, training=True).logits)
    first, second = (np.array(ops.convert_to_numpy(train(pixels.numpy()))) for _ in range(2))
    assert (np.abs(first - second).max() > 1e-3) == (drawing is not None)


# ------------------------------------------------------------------------------ mixed precision


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.01), ("bfloat16", 0.1)])
def test_mixed_precision_is_close_to_single(small, dtype, tolerance):
    theirs, _, pixels = small
    _, ours = pair(mixed(**POSITIONS), dtype=f"mixed_{dtype}")
    output = compiled(ours, lambda pixels: ours(pixels, **ALL))(pixels.numpy())
    assert keras.backend.standardize_dtype(output.logits.dtype) == dtype
    assert {keras.backend.standardize_dtype(v.dtype) for v in ours.trainable_variables} == {
        "float32"
    }
    expected = by_name(theirs(pixels, **ALL))
    assert_equal(by_name(output), expected, tolerance)
