"""Projections in one pass are those of the modules one by one, whatever is asked of a model."""

import copy
import random
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune
from helpers.small_models import (
    assert_equal,
    images,
    make,
    mixed,
    one_block,
    random_case,
    randomise,
    tiny,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from cvt import CvtConfig, CvtForImageClassification
from cvt.kernels import apply_triton, qkv_projection
from cvt.kernels.qkv_projection import convolve

BLOCKS = 6  # of a tiny model
CONVOLVE = "cvt.convolve.default"
SEEDS = range(8)


# ------------------------------------------------------------------------------ helpers


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function)] += 1
        return function(*args, **(kwargs or {}))


def convolutions(compute):
    """How many times `compute()` runs three convolutions at once."""
    with Operators() as operators:
        compute()
    return operators.calls[CONVOLVE]


def targets(batch):
    return torch.arange(batch) % 2


def applied(model):
    """A copy of the model in which query, key and value are computed in one pass."""
    model = copy.deepcopy(model)
    apply_triton(model)
    return model


def step(model, pixels, autocast=False):
    """Outputs, gradients and buffers of a copy of the model after a step that updates nothing."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(pixels, labels=targets(len(pixels)))
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits, "loss": output.loss}, gradients, dict(model.named_buffers())


def distances(found, expected):
    """Relative ones of outputs, gradients and buffers, as `step` gives them."""
    both = [
        [torch.cat([tensor.double().flatten() for tensor in kind.values()]) for kind in of_step]
        for of_step in (found, expected)
    ]
    return torch.stack([(a - b).norm() / b.norm() for a, b in zip(*both, strict=True)])


def assert_the_same(model, pixels):
    for found, expected in zip(step(applied(model), pixels), step(model, pixels), strict=True):
        assert_equal(found, expected, tolerance=1e-9)


def random_model(seed):
    """A random classifier, whose projections can all be computed in one pass, and its pixels."""
    rng = random.Random(seed)
    fields, (batch, *shape) = random_case(seed, portable=False)
    stages = range(len(fields["depth"]))
    fields["kernel_qkv"] = [rng.choice([1, 3, 3, 5]) for _ in stages]
    fields["padding_q"] = fields["padding_kv"] = [side // 2 for side in fields["kernel_qkv"]]
    fields["stride_q"] = [1 for _ in stages]
    fields["stride_kv"] = [rng.randint(1, 3) for _ in stages]
    fields["qkv_projection_method"] = ["dw_bn" for _ in stages]
    model = CvtForImageClassification(CvtConfig(**fields))
    randomise(model, seed)
    # One value per channel cannot be normed in training, so there is more than one image.
    pixels = torch.randn(batch + 1, *shape, generator=torch.Generator().manual_seed(seed))
    return model, pixels


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def attention(model):
    """That of the last block but one."""
    return model.cvt.encoder.stages[-1].layers[-2].attention.attention


# ------------------------------------------------------------------------------ the operators

CASES = [  # grid, class token, stride, side of the convolutions, moments
    ((3, 4), True, 2, 3, True),
    ((3, 4), False, 2, 3, False),
    ((1, 1), True, 2, 3, True),
    ((2, 3), True, 1, 5, False),
    ((4, 2), False, 3, 1, True),
]
every_case = pytest.mark.parametrize("case", CASES)


def arguments(case, dtype=torch.float64):
    """Arguments of `convolve`."""
    grid, class_token, stride, side, moments = case
    generator = torch.Generator().manual_seed(side)
    shapes = (2, class_token + grid[0] * grid[1], 2), (3, side**2, 2), (3, 2)
    types = dtype, torch.promote_types(dtype, torch.float32)
    tensors = [
        torch.randn(shape, generator=generator).to(types[i > 0]).requires_grad_()
        for i, shape in enumerate(shapes)
    ]
    return *tensors, *grid, stride, moments


@every_case
def test_the_operators_are_what_pytorch_asks_of_operators(case):
    tokens, taps, bias, *options = arguments(case, torch.bfloat16)
    torch.library.opcheck(convolve, (tokens, taps, bias, *options))
    with torch.no_grad():
        *outputs, class_token, _ = convolve(tokens, taps, bias, *options)
        upstream, lines = [torch.ones_like(y) for y in outputs], taps.new_ones(3, 2, taps.shape[2])
        backward = upstream, class_token, outputs, lines, tokens, taps, *options
        torch.library.opcheck(qkv_projection.convolve_backward, backward)


@every_case
def test_the_gradients_of_convolutions_and_moments_are_exact(case):
    *tensors, height, width, stride, moments = arguments(case)

    def compute(*tensors):
        return convolve(*tensors, height, width, stride, moments)[: 4 + moments]

    assert torch.autograd.gradcheck(compute, tensors)


def test_the_gradients_of_a_linear_with_a_class_token_are_exact():
    shapes = (2, 3, 4), (2, 1, 4), (5, 4), (5,), (5, 4), (5,)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def linear(tokens, *others):
        tokens = torch.cat((torch.zeros_like(tokens[:, :1]), tokens), dim=1)
        return qkv_projection._LinearWithClassToken.apply(tokens, *others)

    assert torch.autograd.gradcheck(linear, inputs)


def test_a_second_derivative_is_refused_rather_than_wrong():
    model = applied(make(tiny()))
    pixels = images().requires_grad_()
    (gradient,) = torch.autograd.grad(model(pixels).logits.sum(), pixels, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cvt\.convolve_backward.* no autograd formula"):
        gradient.sum().backward()


# ------------------------------------------------------------------------------ whole models


def as_built(model):
    return model.train()


def in_eval(model):
    return model.eval()


def with_frozen_norms(model):
    model.train()
    for norm in norms(model):
        norm.eval().requires_grad_(False)
    return model


def checkpointing(model):
    model.train().activation_checkpointing_enable()
    return model


@pytest.mark.parametrize("prepare", [as_built, in_eval, with_frozen_norms, checkpointing])
@pytest.mark.parametrize("seed", SEEDS)
def test_models_compute_and_train_the_same(prepare, seed):
    model, pixels = random_model(seed)
    model, pixels = prepare(model).double(), pixels.double()
    assert_the_same(model, pixels)
    assert convolutions(lambda: applied(model)(pixels)) == sum(model.config.depth)


def test_the_random_models_vary_in_all_that_matters():
    configs = [random_model(seed)[0].config for seed in SEEDS]
    assert {side for config in configs for side in config.kernel_qkv} == {1, 3, 5}
    assert {stride for config in configs for stride in config.stride_kv} == {1, 2, 3}
    assert {flag for config in configs for flag in config.cls_token} == {True, False}
    assert {flag for config in configs for flag in config.qkv_bias} == {True, False}


def test_steps_follow_each_other_as_before():
    """Twenty steps of AdamW, whose losses, each by each, stay within a hundred thousandth."""
    start, curves = make(tiny(drop_path_rate=[0.1] * 3, hidden_act="quick_gelu")).train(), []
    for model in (copy.deepcopy(start), applied(start)):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        torch.manual_seed(0)
        curves.append([])
        for i in range(20):
            loss = model(images() + 0.1 * (i % 3), labels=targets(4)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    assert curves[0][-1] < 0.5 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize("prepare", [as_built, in_eval])
@pytest.mark.parametrize("precision", ["autocast", torch.float32, torch.bfloat16, torch.float16])
def test_rounding_costs_no_more(prepare, precision):
    """Beside float64, of tokens whose mean is far from zero, as it is for the running means."""
    autocast = precision == "autocast"
    sums = [0, 0]
    for seed in range(4):
        model = CvtForImageClassification(tiny(depth=[1, 1, 2]))
        randomise(model, seed)
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm_before.bias"):
                parameter.data += 3 * torch.randn_like(parameter)
        model = prepare(model).to(torch.float32 if autocast else precision)
        exact = step(copy.deepcopy(model).double(), images(8, 48, 48).double())
        for i, each in enumerate((model, applied(model))):
            sums[i] += distances(step(each, images(8, 48, 48), autocast), exact)
    assert (sums[1] <= 1.5 * sums[0]).all(), sums


def test_inputs_that_are_not_finite_stay_in_their_image():
    model, pixels = applied(make(tiny())), images()
    pixels[1, 0, 20, 12] = torch.nan
    with torch.inference_mode():
        found = model(pixels).logits
        assert found.isnan().all(1).tolist() == [False, True, False, False]
        torch.testing.assert_close(found[2:], model(images()).logits[2:])


def test_a_gradient_that_overflows_skips_the_step():
    model = applied(make(tiny()).train())
    optimizer, scaler = torch.optim.SGD(model.parameters()), torch.amp.GradScaler("cpu", 2.0**127)
    before = [parameter.clone() for parameter in model.parameters()]
    scaler.scale(100 * model(images(), labels=targets(4)).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("prepare", [copy.deepcopy, applied])
def test_a_norm_of_one_value_is_refused_in_training(prepare):
    model = prepare(make(tiny()).train())
    with pytest.raises(ValueError, match=r"more than (1|one) value"):
        model(images(1, 16, 16))


# ------------------------------------------------------------------------------ compilers


@pytest.mark.usefixtures("no_recompilation")
@pytest.mark.parametrize("prepare", [as_built, in_eval, checkpointing])
def test_models_compile_into_one_graph(prepare):
    model = applied(prepare(one_block()))
    reference = copy.deepcopy(model)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for i in range(3):
        for each in (compiled, reference):
            each.zero_grad()
            each(images() + i, labels=targets(4)).loss.backward()
    assert "cvt.convolve" in backend.graphs[0].print_readable(print_output=False)
    for of in (nn.Module.named_parameters, nn.Module.named_buffers):
        for (name, found), (_, expected) in zip(of(model), of(reference), strict=True):
            pairs = (found, expected) if found.grad is None else (found.grad, expected.grad)
            torch.testing.assert_close(*pairs, msg=lambda text, name=name: f"{name}: {text}")


def test_fsdp_trains_the_same():
    model = make(tiny()).train()
    _, expected, _ = step(model, images())
    apply_triton(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for stage in model.cvt.encoder.stages:
            for block in stage.layers:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(images(), labels=targets(4)).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6
            )
    finally:
        dist.destroy_process_group()


def test_transforms_of_functions_see_what_they_differentiate():
    """PyTorch would take the tangent of an operator of ours for zero."""
    plain = make(tiny(hidden_act="quick_gelu"))
    plain.set_attn_implementation("eager")
    found = []
    for model in (plain, applied(plain)):
        logits = lambda x, model=model: model(x).logits  # noqa: E731
        _, tangent = torch.func.jvp(logits, (images(),), (images(),))
        gradient = torch.func.grad(lambda x, logits=logits: logits(x).sum())(images())
        found.append((tangent, gradient))
    assert found[0][0].norm() > 0
    torch.testing.assert_close(*found)


# ------------------------------------------------------------------------------ what is left alone


def norm_of(model):
    return attention(model).convolution_projection_key.convolution_projection.normalization


def with_adapter(model):
    from peft import LoraConfig, inject_adapter_in_model

    name = next(name for name, part in model.named_modules() if part is attention(model))
    config = LoraConfig(target_modules=f"{name}.projection_query", init_lora_weights=False)
    inject_adapter_in_model(config, model)


def with_forward_hook(model):
    attention(model).projection_value.register_forward_hook(lambda _, __, output: 2 * output)


def with_pruned_weights(model):
    torch.nn.utils.prune.random_unstructured(attention(model).projection_key, "weight", 0.5)


def with_backward_hook(model):
    def double(module, gradient, _):
        return tuple(2 * each for each in gradient)

    norm_of(model).register_full_backward_hook(double)


def with_hook_on_a_whole_projection(model):
    projection = attention(model).convolution_projection_query
    projection.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))


def with_forward_replaced(model):
    linear = attention(model).projection_query
    linear.forward = lambda x: 2 * nn.Linear.forward(linear, x)


def with_norms_of_both_modes(model):
    norm_of(model).eval()


def with_an_average_of_all_batches(model):
    norm_of(model).momentum = None


def with_batch_statistics_only(model):
    norm_of(model).track_running_stats = False


@pytest.mark.parametrize(
    "change",
    [
        with_adapter,
        with_forward_hook,
        with_pruned_weights,
        with_backward_hook,
        with_hook_on_a_whole_projection,
        with_forward_replaced,
        with_norms_of_both_modes,
        with_an_average_of_all_batches,
        with_batch_statistics_only,
    ],
)
def test_an_attention_that_was_changed_is_computed_by_its_modules(change):
    found = []
    for prepare in (lambda model: None, apply_triton):
        model = make(tiny()).train()
        change(model)
        prepare(model)
        with Operators() as operators:
            model(images(), labels=targets(4)).loss.backward()
        assert operators.calls[CONVOLVE] == (BLOCKS - 1) * (prepare is apply_triton)
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        found[-1] |= dict(model.named_buffers())
    assert_equal(*found, tolerance=1e-5)


def test_synchronised_norms_are_left_alone():
    model = applied(nn.SyncBatchNorm.convert_sync_batchnorm(make(tiny())))
    assert convolutions(lambda: model(images())) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_projections_of_other_shapes_are_left_alone(seed):
    """Averages, none, kernels of even size, and strides or paddings that move queries."""
    fields, shape = random_case(seed, portable=False)
    model = CvtForImageClassification(CvtConfig(**fields)).eval()
    randomise(model, seed)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    assert_the_same(model.double(), pixels.double())


def test_only_projections_that_fit_are_computed_at_once():
    model = applied(make(mixed()))  # convolutions in the first stage of three
    assert convolutions(lambda: model(images())) == 1


def test_it_leaves_no_trace_in_what_is_saved(tmp_path):
    model = make(tiny())
    names, config = list(model.state_dict()), model.config.to_json_string()
    other = applied(applied(model))
    assert (list(other.state_dict()), other.config.to_json_string()) == (names, config)
    assert convolutions(lambda: model(images())) == 0
    other.save_pretrained(tmp_path)
    loaded = CvtForImageClassification.from_pretrained(tmp_path).eval()
    assert convolutions(lambda: loaded(images())) == 0
