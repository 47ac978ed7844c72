"""How the torch model behaves, beyond being the authors' function of pixels."""

import copy
import inspect
import pickle
import re
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers.small_models import CLASSES, METHODS, PLACES, images, make, mixed, onnx_of_trace, tiny
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.cvt import modeling_cvt as port

from cvt import CvtBackbone, CvtForImageClassification, CvtModel

every_kind = pytest.mark.parametrize(("method", "places"), list(product(METHODS, PLACES)))


def targets(batch=4):
    return torch.arange(batch) % CLASSES


def close(actual, expected, atol=2e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def first_stage(model):
    return model.cvt.encoder.stages[0]


# ------------------------------------------------------------------------------ attention


@every_kind
def test_sdpa_and_eager_give_the_same_logits_and_gradients(method, places):
    sdpa = make(tiny(method, places))
    eager = copy.deepcopy(sdpa)
    eager.set_attn_implementation("eager")
    assert (sdpa.config._attn_implementation, eager.config._attn_implementation) == (
        "sdpa",
        "eager",
    )
    outputs = [model(images(), labels=targets()) for model in (sdpa, eager)]
    close(outputs[1].logits, outputs[0].logits)
    for output in outputs:
        output.loss.backward()
    for name, gradient in gradients(sdpa).items():
        close(gradients(eager)[name], gradient)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_scores_are_scaled_by_the_whole_width(method, implementation):
    model = make(tiny(method))
    model.set_attn_implementation(implementation)
    layer = model.cvt.encoder.stages[2].layers[0].attention  # 24 wide, 3 heads
    seen = {}
    for name in ("query", "key", "value"):
        linear = getattr(layer.attention, f"projection_{name}")
        linear.register_forward_hook(lambda *args, name=name: seen.update({name: args[2]}))
    layer.output.register_forward_pre_hook(lambda _, args: seen.update(context=args[0]))
    model(images())
    q, k, v = (
        seen[name].unflatten(2, (3, 8)).transpose(1, 2) for name in ("query", "key", "value")
    )
    context = (q @ k.transpose(2, 3) * 24**-0.5).softmax(dim=-1) @ v
    close(seen["context"], context.transpose(1, 2).flatten(2))


@every_kind
def test_attentions_are_one_tensor_per_block_whose_rows_sum_to_one(method, places):
    model = make(tiny(method, places))
    plain = model(images())
    output = model(images(), output_attentions=True)
    assert model.config._attn_implementation == "sdpa"
    assert plain.attentions is None
    close(output.logits, plain.logits)
    stride = 1 if method == "linear" else 2
    expected = []
    for (height, width), heads, depth, token in zip(
        [(10, 6), (5, 3), (3, 2)], [1, 2, 3], [1, 2, 3], places, strict=True
    ):
        keys = -(-height // stride) * -(-width // stride)
        if method == "avg":  # rounds up, with a padding of one
            keys = (height // 2 + 1) * (width // 2 + 1)
        expected += [(4, heads, height * width + token, keys + token)] * depth
    assert [tuple(weights.shape) for weights in output.attentions] == expected
    for weights in output.attentions:
        assert weights.min() >= 0
        close(weights.sum(dim=-1), torch.ones(weights.shape[:3]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attentions_can_be_asked_for_in_every_way(tmp_path, implementation):
    plain = make(tiny())
    logits = plain(images()).logits
    plain.save_pretrained(tmp_path)
    options = {"attn_implementation": implementation}
    before = CvtForImageClassification._from_config(tiny(output_attentions=True), **options)
    before.load_state_dict(plain.state_dict())
    after = CvtForImageClassification.from_pretrained(tmp_path, **options)
    after.config.output_attentions = True
    loaded = CvtForImageClassification.from_pretrained(tmp_path, output_attentions=True, **options)
    for model in (before, after, loaded):
        model.eval()
        assert model.config._attn_implementation == implementation
        output = model(images())
        assert len(output.attentions) == 6
        close(output.logits, logits)
        assert model(images(), output_attentions=False).attentions is None


def test_eager_attention_survives_from_pretrained_and_can_be_set_later(tmp_path):
    model = make(tiny())
    model.save_pretrained(tmp_path)
    loaded = CvtForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    model.set_attn_implementation("eager")
    assert torch.equal(loaded(images()).logits, model(images()).logits)


# ------------------------------------------------------------------------------ inputs


@every_kind
def test_a_batch_of_one_equals_a_row_of_a_batch(method, places):
    model = make(tiny(method, places))
    logits = model(images()).logits
    assert logits.std() > 0.1  # or the comparison proves nothing
    for row in range(4):
        close(model(images()[row : row + 1]).logits, logits[row : row + 1])


@pytest.mark.parametrize("method", METHODS)
def test_memory_layout_does_not_matter(method):
    model = make(tiny(method))
    x = images()
    expected = model(x).logits
    strided = torch.empty(4, 3, 40, 48)[..., ::2].copy_(x)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    assert not transposed.is_contiguous()
    for other in (x.to(memory_format=torch.channels_last), strided, transposed):
        close(model(other).logits, expected)
    close(model.to(memory_format=torch.channels_last)(x).logits, expected)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (None, "pixel_values is missing"),
        (torch.zeros(1, 3, 40, 40, dtype=torch.uint8), r"torch\.uint8; expected floats"),
        (torch.zeros(3, 40, 40), r"\(3, 40, 40\); expected \(batch, 3, height, width\)"),
        (torch.zeros(2, 1, 40, 40), r"\(2, 1, 40, 40\); expected \(batch, 3, height, width\)"),
        (torch.zeros(2, 3, 40, 2), "40 x 2 pixels; this model needs at least 3 x 3"),
        (torch.zeros(2, 3, 0, 40), "0 x 40 pixels; this model needs at least 3 x 3"),
        (torch.zeros(0, 3, 40, 40), r"\(0, 3, 40, 40\); expected"),
    ],
    ids=["none", "uint8", "3-d", "channels", "narrow", "no height", "no image"],
)
@pytest.mark.parametrize("cls", [CvtModel, CvtForImageClassification, CvtBackbone])
def test_bad_pixels_are_refused_with_what_was_expected(cls, pixel_values, message):
    with pytest.raises(ValueError, match=message):
        make(tiny(), cls)(pixel_values)


@every_kind
def test_the_smallest_image_runs(method, places):
    config = tiny(method, places)
    size = config.minimum_image_size
    assert make(config)(images(2, size, size)).logits.isfinite().all()


# ------------------------------------------------------------------------------ number formats


@every_kind
@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_stays_near_single_precision(method, places, dtype, atol):
    model = make(tiny(method, places))
    expected = model(images()).logits
    logits = model.to(dtype)(images()).logits
    assert logits.dtype == dtype
    close(logits.float(), expected, atol=atol)


@every_kind
def test_autocast_stays_near_single_precision_and_trains(method, places):
    model = make(tiny(method, places))
    expected = model(images()).logits
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images(), labels=targets())
    assert output.logits.dtype == torch.bfloat16
    close(output.logits.float(), expected, atol=0.1)
    output.loss.backward()
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model).values())


def test_pixels_are_brought_to_the_type_of_the_weights():
    model = make(tiny())
    logits = model(images().double()).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, model(images()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_layer_norm_is_accurate_far_from_zero(dtype, autocast):
    norm = make(tiny()).layernorm
    if not autocast:
        norm = norm.to(dtype)
    x = (1000 + 30 * torch.randn(64, 24, generator=torch.Generator().manual_seed(0))).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = norm(x)
    assert y.dtype == dtype
    reference = F.layer_norm(x.double(), (24,), norm.weight.double(), norm.bias.double(), norm.eps)
    ulp = max(torch.finfo(dtype).eps, 1e-4)  # float32 itself loses three digits to the mean
    torch.testing.assert_close(y.double(), reference, atol=ulp, rtol=ulp)


# ------------------------------------------------------------------------------ training


@every_kind
def test_every_parameter_gets_a_gradient(method, places):
    model = make(tiny(method, places)).train()
    model(images(), labels=targets()).loss.backward()
    # A constant added to every key changes no softmax, and the head reads nothing that the last
    # block's patch queries make where there is a class token: these gradients are zero.
    no_effect = ["_key.+bias$"]
    if places[-1]:
        no_effect.append(r"stages\.2\.layers\.2\..+convolution_projection_query")
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        if not re.search("|".join(no_effect), name):
            assert gradient.abs().max() > 0, name


def state_after_steps(model, checkpointing, steps=2):
    """Losses, gradients and buffers after training steps with dropout and drop path."""
    model = copy.deepcopy(model).train()
    if checkpointing is not None:
        model.activation_checkpointing_enable(**checkpointing)
        assert model.is_activation_checkpointing
    torch.manual_seed(3)
    losses = []
    for _ in range(steps):
        output = model(images(), labels=targets())
        output.loss.backward()
        losses.append(output.loss.detach())
    return losses, gradients(model), dict(model.named_buffers())


@pytest.mark.gpu
def test_a_gpu_computes_the_same_logits_and_gradients():
    model = make(mixed()).double().train()
    found = []
    for device in ("cpu", "cuda"):
        on_device = copy.deepcopy(model).to(device)
        logits = on_device(images().double().to(device)).logits
        logits.logsumexp(dim=1).mean().backward()
        gradients = [parameter.grad.cpu() for parameter in on_device.parameters()]
        found.append([logits.cpu(), *gradients])
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, atol=1e-10, rtol=1e-8)


@every_kind
@pytest.mark.parametrize(
    "arguments",
    [{}, *({"activation_checkpointing_kwargs": {"use_reentrant": flag}} for flag in (False, True))],
    ids=["default", "non-reentrant", "reentrant"],
)
def test_gradient_checkpointing_changes_nothing_but_memory(method, places, arguments):
    rates = {"drop_rate": [0.1] * 3, "attention_drop_rate": [0.1] * 3, "drop_path_rate": [0.3] * 3}
    model = make(tiny(method, places, **rates))
    losses, grads, buffers = state_after_steps(model, None)
    assert all(b == 2 for name, b in buffers.items() if name.endswith("num_batches_tracked"))
    checkpointed = state_after_steps(model, arguments)
    close(checkpointed[0], losses)
    close(checkpointed[1], grads)
    assert checkpointed[2].keys() == buffers.keys()
    for name, buffer in buffers.items():
        assert torch.equal(checkpointed[2][name], buffer), name


def test_gradient_checkpointing_can_be_switched_on_by_its_older_name_and_off():
    model = make(tiny()).train()
    with pytest.warns(FutureWarning, match="activation_checkpointing_enable"):
        model.gradient_checkpointing_enable()
    blocks = [block for stage in model.cvt.encoder.stages for block in stage.layers]
    assert all(block.gradient_checkpointing for block in blocks)
    model(images(), labels=targets()).loss.backward()
    assert all(gradient is not None for gradient in gradients(model).values())
    model.activation_checkpointing_disable()
    assert not any(block.gradient_checkpointing for block in blocks)


def test_gradient_checkpointing_returns_attentions_too():
    model = make(tiny()).train()
    model.activation_checkpointing_enable()
    output = model(images(), labels=targets(), output_attentions=True)
    assert len(output.attentions) == 6
    output.loss.backward()


# ------------------------------------------------------------------------------ regularisation


def test_drop_path_rates_rise_linearly_within_each_stage():
    rates = [
        [block.drop_path.rate for block in stage.layers]
        for stage in make(tiny(depth=[1, 2, 5], drop_path_rate=[0.3, 0.2, 0.4])).cvt.encoder.stages
    ]
    assert [pytest.approx(r) for r in ([0.0], [0.0, 0.2], [0.0, 0.1, 0.2, 0.3, 0.4])] == rates


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    model = make(tiny(depth=[1, 2, 2], drop_path_rate=[0, 0.9, 0.5]), CvtModel).train()
    torch.manual_seed(0)
    for stage, rate in ((1, 0.9), (2, 0.5)):
        drop_path = model.encoder.stages[stage].layers[1].drop_path
        dropped = drop_path(torch.ones(20_000, 3, 2))
        assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
        values = dropped[:, 0, 0]
        close(values.unique(), torch.tensor([0, 1 / (1 - rate)]))
        assert (values == 0).float().mean() == pytest.approx(rate, abs=0.01)
        assert values.mean() == pytest.approx(1, abs=0.1)


def test_drop_path_never_erases_the_skip_path():
    config = tiny("linear", depth=[1, 1, 2], drop_path_rate=[0, 0, 0.9])
    block = make(config, CvtModel).encoder.stages[2].layers[1].train()
    x, grid = torch.randn(400, 7, 24, generator=torch.Generator().manual_seed(0)), (3, 2)
    torch.manual_seed(0)
    y, _ = block(x, grid, False)
    counts = dict.fromkeys(product((0, 10), repeat=2), 0)  # the branches: dropped or ten times
    with torch.no_grad():
        attended = block.attention(block.layernorm_before(x), grid, False)[0]
        for attention, mlp in counts:
            middle = x + attention * attended
            expected = middle + mlp * block.output(
                block.intermediate(block.layernorm_after(middle))
            )
            matches = torch.isclose(y, expected, atol=1e-4, rtol=1e-4).all(dim=(1, 2))
            counts[attention, mlp] = int(matches.sum())
    assert sum(counts.values()) == 400  # every sample is one of the four
    assert counts[0, 0] == pytest.approx(400 * 0.81, abs=30)
    assert counts[0, 10] > 10  # the branches are drawn apart
    assert counts[10, 0] > 10
    untouched = (y == x).all(dim=(1, 2)).sum()
    assert untouched == counts[0, 0]


def test_nothing_is_dropped_in_eval_mode():
    rates = {name: [0.9] * 3 for name in ("drop_rate", "attention_drop_rate", "drop_path_rate")}
    plain, model = make(tiny()), make(tiny(**rates))
    assert torch.equal(model(images()).logits, plain(images()).logits)
    assert not torch.equal(model.train()(images()).logits, plain.train()(images()).logits)


def test_dropout_stands_in_four_places_per_stage():
    model = make(tiny(drop_rate=[0.1, 0.2, 0.3]))
    found = [
        [module.p for module in stage.modules() if isinstance(module, nn.Dropout)]
        for stage in model.cvt.encoder.stages
    ]
    # at the stage's head; then in each block after the attention, the activation, the second linear
    assert found == [[0.1] * 4, [0.2] * 7, [0.3] * 10]


def assert_halved(actual, complete):
    """Each element is gone or doubled, about half of them each."""
    gone = actual == 0
    close(actual, torch.where(gone, 0, 2 * complete))
    assert 0.4 < gone.float().mean() < 0.6


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_dropout_follows_the_activation_the_second_linear_and_the_attention(activation):
    model = make(tiny("linear", drop_rate=[0.5] * 3, hidden_act=activation)).train()
    block = first_stage(model).layers[0]
    torch.manual_seed(0)
    x = torch.randn(8, 60, 8)
    hidden = block.intermediate.dense(x)
    activated = F.gelu(hidden) if activation == "gelu" else hidden * torch.sigmoid(1.702 * hidden)
    assert_halved(block.intermediate(x), activated)
    assert_halved(block.output(activated), block.output.dense(activated))
    context, _ = block.attention.attention(x, (10, 6), False)
    assert_halved(block.attention(x, (10, 6), False)[0], block.attention.output.dense(context))


def test_dropout_at_the_head_of_a_stage_takes_the_class_token_too():
    model = make(tiny(places=(1, 0, 0), drop_rate=[0.5, 0, 0]))
    seen = []
    first_stage(model).layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(images(64))
    torch.manual_seed(0)
    model.train()(images(64))
    complete, dropped = seen
    assert complete.shape == (64, 61, 8)
    close(complete[:, :1], first_stage(model).cls_token.expand(64, -1, -1))
    assert_halved(dropped[:, :1], complete[:, :1])
    assert_halved(dropped[:, 1:], complete[:, 1:])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_dropout_is_on_the_weights(implementation):
    model = make(tiny("linear", (0, 0, 0), attention_drop_rate=[0.9, 0, 0]))
    model.set_attn_implementation(implementation)
    attention = first_stage(model).layers[0].attention.attention
    with torch.no_grad():  # values of one: what comes out is the sum of a row of weights
        attention.projection_value.weight.zero_()
        attention.projection_value.bias.fill_(1)
    torch.manual_seed(0)
    x = torch.randn(64, 60, 8)
    close(attention(x, (10, 6), False)[0], torch.ones(64, 60, 8))
    attention.train()
    context, _ = attention(x, (10, 6), False)
    close(context, context[..., :1].expand_as(context))  # the channels share the mask
    assert (context - 1).abs().mean() > 0.1
    assert context.mean().item() == pytest.approx(1, abs=0.1)


# ------------------------------------------------------------------------------ labels


def soft_labels():
    return torch.rand(4, CLASSES, generator=torch.Generator().manual_seed(0)).softmax(dim=1)


def values(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("fields", "labels", "loss"),
    [
        ({"num_labels": 1}, values(4), lambda z, y: F.mse_loss(z, y[:, None])),
        ({"num_labels": 1}, values(4, 1), F.mse_loss),
        ({"num_labels": 1}, targets(), lambda z, y: F.mse_loss(z, y[:, None].float())),
        ({"problem_type": "regression"}, values(4, CLASSES), F.mse_loss),
        ({}, targets(), F.cross_entropy),
        ({}, targets().int(), lambda z, y: F.cross_entropy(z, y.long())),
        ({}, targets()[:, None], lambda z, y: F.cross_entropy(z, y[:, 0])),
        ({}, torch.tensor([0, 1, -100, 2]), F.cross_entropy),
        ({"problem_type": "single_label_classification"}, targets(), F.cross_entropy),
        ({"problem_type": "single_label_classification"}, soft_labels(), F.cross_entropy),
        ({}, (soft_labels() > 0.2).float(), F.binary_cross_entropy_with_logits),
        (
            {"problem_type": "multi_label_classification"},
            (soft_labels() > 0.2).long(),
            lambda z, y: F.binary_cross_entropy_with_logits(z, y.float()),
        ),
    ],
)
def test_losses_are_those_of_torch(fields, labels, loss):
    model = make(tiny(**fields))
    output = model(images(), labels=labels)
    close(output.loss, loss(output.logits, labels))
    assert output.loss > 0
    assert model.config.problem_type == fields.get("problem_type")
    assert torch.equal(model(images()).logits, output.logits)
    assert model(images()).loss is None


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({}, targets(3)),
        ({}, torch.zeros(2, 2, dtype=torch.long)),
        ({}, torch.rand(4, CLASSES + 1)),
        ({}, torch.rand(CLASSES, 4)),
        ({"problem_type": "single_label_classification"}, torch.rand(CLASSES, 4)),
        ({"problem_type": "multi_label_classification"}, targets()),
        ({"num_labels": 1}, torch.rand(3)),
        ({"num_labels": 1}, torch.rand(2, 2)),
        ({"problem_type": "regression"}, torch.rand(4)),
    ],
)
def test_labels_of_the_wrong_shape_are_refused_with_both_shapes(fields, labels):
    model = make(tiny(**fields))
    with pytest.raises(ValueError, match="labels have shape") as error:
        model(images(), labels=labels)
    assert str(tuple(labels.shape)) in str(error.value)
    assert str((4, model.config.num_labels)) in str(error.value)


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([0, CLASSES, 1, 9], f"labels hold {CLASSES}, 9: "),
        ([0, -1, 1, -100], "labels hold -1: "),
        ([[0], [1], [2], [CLASSES]], f"labels hold {CLASSES}: "),
    ],
)
def test_labels_of_no_class_are_refused_by_number(labels, named):
    model = make(tiny())
    with pytest.raises(ValueError, match=f"{named}the indices of {CLASSES} classes are 0 to 4"):
        model(images(), labels=torch.tensor(labels))


def test_an_unknown_problem_type_is_refused():
    model = make(tiny())
    model.config.problem_type = "clustering"
    with pytest.raises(ValueError, match=r"problem_type.*clustering"):
        model(images(), labels=torch.rand(4, CLASSES))


# ------------------------------------------------------------------------------ outputs


def test_positional_arguments_are_in_the_order_of_transformers():
    theirs = {
        cls: [*inspect.signature(getattr(port, cls.__name__).forward).parameters][:-1]
        for cls in (CvtModel, CvtForImageClassification)
    }
    assert theirs[CvtModel] == ["self", "pixel_values", "output_hidden_states", "return_dict"]
    for cls, expected in theirs.items():
        ours = [*inspect.signature(cls.forward).parameters]
        assert ours == [*expected, "output_attentions"]
    _, hidden_states = make(tiny(places=(0, 0, 0)), CvtModel)(images(), True, False)
    assert [state.shape[1] for state in hidden_states] == [8, 16, 24]
    loss, logits, hidden_states = make(tiny())(images(), targets(), True, False)
    assert (loss.ndim, logits.shape, len(hidden_states)) == (0, (4, CLASSES), 3)
    # Those of transformers' backbones have another order.
    maps, hidden_states = make(tiny(), CvtBackbone)(images(), True, False, False)
    assert (len(maps), len(hidden_states)) == (1, 3)


@pytest.mark.parametrize("places", PLACES)
def test_outputs_have_their_fields_and_shapes(places):
    model = make(tiny(places=places), CvtModel)
    output = model(images(), output_hidden_states=True)
    assert output.last_hidden_state.shape == (4, 24, 3, 2)
    if places[-1]:
        assert output.cls_token_value.shape == (4, 1, 24)
    else:
        assert output.cls_token_value is None
    shapes = [tuple(state.shape) for state in output.hidden_states]
    assert shapes == [(4, 8, 10, 6), (4, 16, 5, 3), (4, 24, 3, 2)]
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert model(images()).hidden_states is None


@pytest.mark.parametrize("cls", [CvtModel, CvtForImageClassification, CvtBackbone])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("through_config", [False, True])
def test_tuples_hold_what_the_output_holds(cls, places, through_config):
    model = make(tiny(places=places), cls)
    ask = {"output_hidden_states": True, "output_attentions": True}
    expected = model(images(), **ask).to_tuple()
    if through_config:
        for name, value in {**ask, "return_dict": False}.items():
            setattr(model.config, name, value)
        found = model(images())
    else:
        found = model(images(), **ask, return_dict=False)
    assert type(found) is tuple
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_logits_come_from_the_normed_class_token_or_the_mean_of_the_normed_tokens():
    for places in PLACES:
        model = make(tiny(places=places))
        features = model.cvt(images())
        tokens = features.cls_token_value
        if tokens is None:
            tokens = features.last_hidden_state.flatten(2).transpose(1, 2)
        close(model(images()).logits, model.classifier(model.layernorm(tokens).mean(dim=1)))


# ------------------------------------------------------------------------------ backbone


@pytest.mark.parametrize(
    ("choice", "stages"),
    [
        ({}, [2]),
        ({"out_features": ["stage1", "stage3"]}, [0, 2]),
        ({"out_indices": [0, 1, 2]}, [0, 1, 2]),
        ({"out_indices": [1]}, [1]),
    ],
)
@pytest.mark.parametrize("places", PLACES)
def test_backbone_returns_the_chosen_stages(choice, stages, places):
    fields = {"patch_stride": [4, 2, 3], "patch_sizes": [7, 3, 5], "patch_padding": [2, 1, 2]}
    backbone = make(tiny(places=places, **fields, **choice), CvtBackbone)
    model = CvtModel(backbone.config).eval()
    model.load_state_dict(backbone.state_dict())
    hidden_states = model(images(), output_hidden_states=True).hidden_states
    output = backbone(images())
    assert len(output.feature_maps) == len(stages)
    for feature_map, stage in zip(output.feature_maps, stages, strict=True):
        assert torch.equal(feature_map, hidden_states[stage])
    assert backbone.channels == [[8, 16, 24][stage] for stage in stages]
    assert backbone.strides == [[4, 8, 24][stage] for stage in stages]
    assert backbone.out_features == [f"stage{stage + 1}" for stage in stages]
    assert [m.shape[1] for m in output.feature_maps] == backbone.channels
    assert output.hidden_states is None
    assert len(backbone(images(), output_hidden_states=True).hidden_states) == 3


def test_backbone_loads_from_a_classifiers_folder(tmp_path):
    classifier = make(tiny())
    classifier.save_pretrained(tmp_path)
    backbone = CvtBackbone.from_pretrained(tmp_path, out_features=["stage2", "stage3"])
    expected = classifier(images(), output_hidden_states=True).hidden_states[1:]
    torch.testing.assert_close(backbone(images()).feature_maps, expected, atol=0, rtol=0)
    backbone.save_pretrained(tmp_path / "backbone")
    again = CvtBackbone.from_pretrained(tmp_path / "backbone")
    assert again.out_features == ["stage2", "stage3"]
    torch.testing.assert_close(again(images()).feature_maps, expected, atol=0, rtol=0)


# ------------------------------------------------------------------------------ compilers


@pytest.mark.usefixtures("no_recompilation")
def test_eval_compiles_into_one_graph():
    model = make(mixed())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = images() + seed
        close(compiled(x).logits, model(x).logits)


@pytest.mark.usefixtures("no_recompilation")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_compiles_into_one_graph(checkpointing):
    model = make(mixed()).train()
    reference = copy.deepcopy(model)
    if checkpointing:
        model.activation_checkpointing_enable()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(3):
        for each in (compiled, reference):
            each.zero_grad()
            each(images() + step, labels=targets()).loss.backward()
        close(gradients(model), gradients(reference))
    close(dict(model.named_buffers()), dict(reference.named_buffers()))


@pytest.mark.usefixtures("no_recompilation")
def test_drop_path_and_dropout_compile_and_draw_anew_each_step():
    rates = {"drop_rate": [0.1] * 3, "attention_drop_rate": [0.1] * 3, "drop_path_rate": [0.5] * 3}
    model = make(mixed(depth=[1, 1, 2], **rates)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = {compiled(images(), labels=targets()).loss.item() for _ in range(3)}
    assert len(losses) == 3


def test_training_and_evaluation_take_turns_on_one_graph_each():
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    model = make(mixed(problem_type="single_label_classification"))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            compiled.train()(images(), labels=soft_labels()).loss.backward()
            with torch.no_grad():
                compiled.eval()(images())
    assert backend.frame_count == 2


@pytest.mark.slow  # needs a C++ compiler and Python's headers
@pytest.mark.usefixtures("no_recompilation")
def test_inductor_computes_the_same():
    model = make(mixed())
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            close(compiled(images()).logits, model(images()).logits)


def test_export_with_a_dynamic_batch():
    model = make(mixed())
    shapes = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(model, (images(),), dynamic_shapes=shapes).module()
    for batch in (1, 2, 3, 7):
        close(exported(images(batch)).logits, model(images(batch)).logits)


def test_export_with_dynamic_height_and_width():
    model = make(mixed())
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {"pixel_values": {0: dynamic, 2: dynamic, 3: dynamic}}
    # The example has more than one key a side everywhere: torch takes a size of one as constant.
    exported = torch.export.export(model, (images(2, 64, 48),), dynamic_shapes=shapes).module()
    for size in ((1, 64, 48), (2, 64, 48), (3, 47, 93), (1, 96, 64)):
        close(exported(images(*size)).logits, model(images(*size)).logits)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trace_takes_other_batches():
    model = make(mixed(return_dict=False))
    traced = torch.jit.trace(model, images())
    for batch in (1, 4, 6):
        close(traced(images(batch))[0], model(images(batch))[0])


# ------------------------------------------------------------------------------ life of an object


@pytest.mark.parametrize(
    ("method", "places", "batch"),
    [("dw_bn", (0, 0, 1), 2), ("avg", (1, 1, 1), 2), ("linear", (0, 0, 0), 1)],
)
def test_onnx_of_a_trace_takes_other_batches_and_sizes(method, places, batch):
    model = make(tiny(method, places, depth=[1, 1, 1]))
    run = onnx_of_trace(model, images(batch))
    with torch.no_grad():
        for pixels in (images(1), images(5), images(3, 48, 40)):
            close(run(pixels), model(pixels).logits)


def test_gradients_of_single_images_by_torch_func():
    model = make(mixed())
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights, image, label):
        arguments = {"labels": label[None]}
        return torch.func.functional_call(model, weights, image[None], arguments).loss

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    found = together(weights, images(3), targets(3))
    for i, (image, label) in enumerate(zip(images(3), targets(3), strict=True)):
        model.zero_grad()
        model(image[None], labels=label[None]).loss.backward()
        for name, gradient in gradients(model).items():
            close(found[name][i], gradient)


@pytest.mark.parametrize("method", METHODS)
def test_copies_and_pickles_compute_the_same_and_are_independent(method):
    model = make(tiny(method))
    expected = model(images()).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images()).logits, expected)
        twin.set_attn_implementation("eager")
        assert twin(images(), output_attentions=False).attentions is None
        with torch.no_grad():
            twin.classifier.bias.add_(1)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(images()).logits, expected)


def test_state_dict_goes_to_another_model():
    model, other = make(tiny()), CvtForImageClassification(tiny()).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(images()).logits, model(images()).logits)


def test_meta_models_allocate_nothing_and_take_weights():
    model = make(tiny())
    with torch.device("meta"):
        empty = CvtForImageClassification(tiny()).eval()
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    assert empty(images().to("meta")).logits.shape == (4, CLASSES)
    empty.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert torch.equal(empty(images()).logits, model(images()).logits)


def test_forward_leaves_the_config_alone():
    model = make(tiny())
    before = copy.deepcopy(model.config.to_dict())
    model.train()(images(), labels=targets(), output_attentions=True, output_hidden_states=True)
    assert model.config.to_dict() == before
