"""Triton's kernels compute what float64 does, write all that they should, and nothing else.

On a GPU, or in Triton's interpreter, which rounds to bfloat16 towards zero.
"""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers.small_models import images, one_block

from cvt.kernels import apply_triton, qkv_projection, qkv_triton
from cvt.kernels.qkv_projection import convolve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative, of a loss after steps; the convolutions of a GPU add in an order that changes.
LOSS_TOLERANCE = 1e-3 if DEVICE == "cuda" else 1e-5
GUARD = 8192  # numbers before and after each tensor: more than an image has


@pytest.fixture(autouse=True)
def triton_only():
    """Every test runs the kernels."""
    assert qkv_projection.triton_kernels(torch.empty(1, device=DEVICE)) is qkv_triton


# ------------------------------------------------------------------------------ memory


def room(shape, dtype, before=GUARD):
    """A tensor of NaN, in the midst of more of it."""
    place = torch.full((before + shape.numel() + GUARD,), torch.nan, dtype=dtype, device=DEVICE)
    return place[before : before + shape.numel()].view(shape)


def guarded(tensor, before=GUARD):
    """A copy of a tensor: whoever reads beyond its ends finds NaN."""
    return room(tensor.shape, tensor.dtype, before).copy_(tensor.detach()).requires_grad_()


def is_intact(tensor):
    """Whether nothing was written before and after a tensor."""
    whole = torch.empty(0, dtype=tensor.dtype, device=DEVICE).set_(tensor.untyped_storage())
    start, length = tensor.storage_offset(), tensor.numel()
    return whole[:start].isnan().all() and whole[start + length :].isnan().all()


def poison(monkeypatch):
    """What is allocated from now on, each NaN in the midst of NaN."""
    found, new_empty = [], torch.Tensor.new_empty

    def allocate(tensor, *shape, **options):
        if options:  # Triton's interpreter is asking
            return new_empty(tensor, *shape, **options)
        shape = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
        found.append(room(shape, tensor.dtype))
        return found[-1]

    monkeypatch.setattr(torch, "empty_like", lambda tensor: allocate(tensor, *tensor.shape))
    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)
    return found


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


# ------------------------------------------------------------------------------ the reference


class Case(NamedTuple):
    """Geometry, type, and about how many programs share the work."""

    batch: int
    grid: tuple
    channels: int
    side: int = 3
    stride: int = 2
    class_token: bool = True
    dtype: torch.dtype = torch.float32
    programs: int = qkv_triton.PROGRAMS

    def arguments(self, seed):
        """Random tokens, taps and biases, then height, width and stride."""
        generator = torch.Generator().manual_seed(seed)
        tokens = self.batch, self.class_token + self.grid[0] * self.grid[1], self.channels
        shapes = tokens, (3, self.side**2, self.channels), (3, self.channels)
        types = self.dtype, torch.float32, torch.float32
        tensors = (
            torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()
            for shape, dtype in zip(shapes, types, strict=True)
        )
        return *tensors, *self.grid, self.stride


def expected(tokens, taps, bias, height, width, stride, moments):
    """What `convolve` is to give, by PyTorch's operators in the type of the tokens."""
    class_tokens = tokens.shape[1] - height * width
    image = tokens[:, class_tokens:].unflatten(1, (height, width)).permute(0, 3, 1, 2)
    side, channels = int(taps.shape[1] ** 0.5), taps.shape[2]
    class_token, outputs, means, variances = tokens[:, :class_tokens], [], [], []
    for i in range(3):
        weight = taps[i].t().reshape(channels, 1, side, side)
        convolved = F.conv2d(image, weight, bias[i], stride if i else 1, side // 2, groups=channels)
        means.append(convolved.mean((0, 2, 3)))
        variances.append((convolved - means[i][:, None, None]).square().mean((0, 2, 3)))
        first = torch.zeros_like(class_token) if moments else class_token
        outputs.append(torch.cat((first, convolved.flatten(2).transpose(1, 2)), dim=1))
    found = torch.stack((torch.stack(means), torch.stack(variances)))[: 2 * moments]
    return *outputs, class_token, found


def random_gradients(outputs, dtype, seed):
    """Of outputs in their order, of which the moments are in float32 always."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.randn(y.shape, generator=generator).to(DEVICE) for y in outputs)
    *others, moments = (gradient.to(dtype) for gradient in numbers)
    return *others, moments.float()


def with_gradients(compute, arguments, upstream):
    """By name, what is not empty of the outputs, and the gradients for those of the outputs."""
    names = ("q", "k", "v", "class token", "moments")
    outputs = dict(zip(names, compute(*arguments), strict=True))
    outputs = {name: output for name, output in outputs.items() if output.numel()}
    upstream = [gradient for gradient in upstream if gradient.numel()]
    gradients = torch.autograd.grad([*outputs.values()], arguments[:3], upstream)
    return outputs | dict(zip(("tokens", "taps", "bias"), gradients, strict=True))


def distance(found, expected):
    """Relative; infinite where anything is NaN."""
    distance = ((found.double() - expected).norm() / expected.norm()).item()
    return torch.inf if math.isnan(distance) else distance


# ------------------------------------------------------------------------------ numbers

HALF = {"dtype": torch.float16}
BRAIN = {"dtype": torch.bfloat16}
SMALL = Case(2, (4, 3), 64)
CASES = [
    Case(2, (7, 7), 64),
    Case(1, (4, 3), 192, **BRAIN),
    Case(1, (1, 5), 128, class_token=False, **HALF),
    Case(257, (1, 1), 4, programs=1),
    Case(257, (3, 2), 4, class_token=False, programs=2, **BRAIN),
    Case(1, (8, 6), 24, stride=1, class_token=False),
    Case(1, (5, 4), 64, stride=1, programs=1, **HALF),
    Case(2, (14, 13), 8, programs=1, **BRAIN),
    Case(2, (5, 4), 6, stride=3),
    Case(2, (3, 5), 3, side=1, class_token=False, **HALF),
    Case(3, (4, 3), 2, side=5),
    Case(2, (2, 7), 1, side=5, stride=3, class_token=False, **BRAIN),
]


def distances(case, moments, seed):
    """Of outputs and gradients of random inputs, in units of what rounding explains.

    Makes sure that nothing is written elsewhere, and everything where it should.
    """
    tokens, taps, bias, *options = (*case.arguments(seed), moments)
    inputs = [guarded(tensor) for tensor in (tokens, taps, bias)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    upstream = random_gradients(expected(*doubles, *options), case.dtype, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qkv_triton, "PROGRAMS", case.programs)
        allocated = poison(patch)
        found = with_gradients(convolve, (*inputs, *options), upstream)
    upstream = [gradient.double() for gradient in upstream]
    reference = with_gradients(expected, (*doubles, *options), upstream)

    assert storages(found[name] for name in ("q", "k", "v", "tokens")) <= storages(allocated)
    assert all(map(is_intact, (*inputs, *allocated)))
    assert found.keys() == reference.keys()
    exact, rounded = 1e-5, max(1e-5, torch.finfo(case.dtype).eps)
    allowed = {"moments": exact, "taps": exact, "bias": exact}
    if moments:  # through which gradients depend on outputs, and those on gradients, all rounded
        allowed |= {"taps": rounded, "bias": rounded, "tokens": 2 * rounded}
    return {
        name: distance(found[name], value) / allowed.get(name, rounded)
        for name, value in reference.items()
    }


@pytest.mark.parametrize(
    ("case", "moments"),
    [(case, True) for case in CASES[::3]]
    + [pytest.param(case, True, marks=pytest.mark.slow) for case in CASES if case not in CASES[::3]]
    + [(CASES[0], False)]
    + [pytest.param(case, False, marks=pytest.mark.slow) for case in CASES[3::3]],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_float64(case, moments):
    found = distances(case, moments, seed=CASES.index(case))
    assert max(found.values()) < 1, found


def test_some_cases_take_several_turns_and_do_not_fill_the_last(monkeypatch):
    turns_of, left_of = [], []
    for case in CASES:
        monkeypatch.setattr(qkv_triton, "PROGRAMS", case.programs)
        tokens, taps, _, *grid, stride = case.arguments(0)
        launch = qkv_triton.Launch(tokens, taps, grid, stride)
        turns, cells, *_ = launch.sizes
        turns_of.append(turns)
        left_of.append(launch.programs * turns * launch.options["CELLS"] - cells)
    assert max(turns_of) > 1
    assert max(left_of) > min(left_of) == 0


def test_memory_need_not_be_aligned():
    tokens, taps, bias, *options = (*SMALL.arguments(1), True)
    reference = convolve(tokens, taps, bias, *options)
    moved = convolve(guarded(tokens, before=1), guarded(taps, before=1), bias, *options)
    for found, expected in zip(moved, reference, strict=True):  # a GPU may add in another order
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_upstream_gradients_may_have_any_layout():
    tokens, taps, bias, *options = (*SMALL.arguments(1), False)
    q, k, v, *_ = convolve(tokens, taps, bias, *options)
    laid_out = [
        torch.ones((), device=DEVICE).expand_as(q),
        torch.randn(k.mT.shape, device=DEVICE).mT,
        torch.randn(*v.shape, 2, device=DEVICE)[..., 1],
    ]
    gradients = [
        torch.autograd.grad((q, k, v), (tokens, taps, bias), upstream, retain_graph=True)
        for upstream in (laid_out, [gradient.clone() for gradient in laid_out])
    ]
    assert all(map(torch.equal, *gradients))


def test_class_tokens_take_no_part_where_there_are_moments():
    tokens, taps, bias, *options = (*SMALL.arguments(1), True)
    unknown = tokens.detach().clone()
    unknown[:, 0] = torch.nan
    results = []
    for given in (tokens, unknown.requires_grad_()):
        q, k, v, _, moments = convolve(given, taps, bias, *options)
        upstream = [torch.ones_like(output) for output in (q, k, v, moments)]
        if given is unknown:
            for gradient in upstream[:3]:
                gradient[:, 0] = torch.nan
        gradients = torch.autograd.grad((q, k, v, moments), (given, taps, bias), upstream)
        assert not any(output[:, 0].any() for output in (q, k, v, gradients[0]))
        results.append((q, k, v, moments, *gradients))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(("mean", "allowed"), [(10, 1e-6), (1000, 1e-4)])
def test_moments_are_good_far_from_zero(mean, allowed, monkeypatch):
    """Tokens with a spread of 1 around `mean`, and, as in a batch of one colour, with none."""
    monkeypatch.setattr(qkv_triton, "PROGRAMS", 1)
    tokens = mean + torch.randn(9, 16, 64, generator=torch.Generator().manual_seed(mean)).to(DEVICE)
    taps, bias = torch.ones(3, 1, 64, device=DEVICE), torch.zeros(3, 64, device=DEVICE)
    *_, (_, variance) = convolve(tokens, taps, bias, 4, 4, 1, True)
    exact = tokens.double().var((0, 1), correction=0).expand_as(variance)
    assert distance(variance, exact) < allowed
    tokens = tokens[:1, :1].expand_as(tokens).contiguous()
    *_, (_, variance) = convolve(tokens, taps, bias, 4, 4, 1, True)
    assert (variance.abs() < 1e-12 * mean**2).all()


def test_what_is_not_finite_stays_where_it_is_read():
    tokens, taps, bias, *options = (*SMALL.arguments(1), False)
    *reference, _, _ = convolve(tokens, taps, bias, *options)
    tokens = tokens.detach().clone()
    tokens[1, 1, 3], tokens[1, 9, 5] = torch.nan, torch.inf
    *found, _, _ = convolve(tokens, taps, bias, *options)
    for output, expected in zip(found, reference, strict=True):
        assert not output[1, :, [3, 5]].isfinite().all()
        output[1, :, [3, 5]] = expected[1, :, [3, 5]]
        assert torch.equal(output, expected)


# ------------------------------------------------------------------------------ models


def test_the_operators_give_the_same_when_compiled():
    arguments = (*SMALL.arguments(1), True)
    checks = ("test_faketensor",)  # the others do not depend on what implements them
    torch.library.opcheck(convolve, arguments, test_utils=checks)
    *outputs, grad_class, _ = (y.detach() for y in convolve(*arguments))
    tokens, taps, _, *options = arguments
    lines = torch.ones(3, 2, taps.shape[2], device=DEVICE)
    arguments = outputs, grad_class, outputs, lines, tokens, taps, *options
    torch.library.opcheck(qkv_projection.convolve_backward, arguments, test_utils=checks)


def steps(apply, count, prepare=lambda model: model):
    """The losses of some steps of AdamW after a function changed the model."""
    model = one_block().to(DEVICE).train()
    apply(model)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    targets = torch.arange(4, device=DEVICE)
    torch.manual_seed(0)
    compute = prepare(model)
    for i in range(count):
        loss = compute(images().to(DEVICE) + 0.1 * (i % 3), labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def nothing(model):
    """Leaves the model as it is."""


def test_steps_follow_each_other_as_before():
    losses = steps(nothing, 20)
    assert losses[-1] < 0.6 * losses[0]
    assert steps(apply_triton, 20) == pytest.approx(losses, rel=LOSS_TOLERANCE)


@pytest.mark.usefixtures("no_recompilation")
def test_training_compiles_into_one_graph():
    def compiled(model):
        return torch.compile(model, fullgraph=True, backend="aot_eager")

    expected = pytest.approx(steps(nothing, 3), rel=LOSS_TOLERANCE)
    assert steps(apply_triton, 3, compiled) == expected


def test_models_compute_the_same_in_eval_mode():
    model, pixels = one_block().to(DEVICE), images().to(DEVICE)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(pixels.double()).logits
        apply_triton(model)
        assert distance(model(pixels).logits, expected) < 1e-5


# ------------------------------------------------------------------------------ compilation


def test_kernels_compile_for_gpus_that_are_not_there_and_spill_no_registers(tmp_path):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    found = [json.loads(line) for line in process.stdout.splitlines()]
    assert len(found) == 9
    assert {kernel["name"]: kernel["spilled"] for kernel in found if kernel["spilled"]} == {}
