"""The convolutional projections of attention, query, key and value, in one pass over the tokens.

In the paper's form each of the three is a depthwise convolution, BatchNorm and a Linear, and the
class token skips the first two. Done one after the other, they read the tokens three times and move
what they make of them four times more. Here:

- `cvt::convolve` makes all three convolutions of the tokens at once, and with them the mean and the
  variance of each channel, which a BatchNorm in training wants.
- A BatchNorm is a line, channel by channel, so it is folded into the Linear behind it, with the
  batch's own statistics too. Its backward pass needs no pass over the tokens either: autograd
  finds the gradients of mean and variance in that of the folded weight, and `cvt::convolve` adds
  a line in its outputs for them.
- `_LinearWithClassToken` gives the class token the weight that is not folded.

On a GPU `cvt::convolve` is Triton's kernels (`triton_projection.py`), elsewhere PyTorch's own
operators (`torch_projection.py`); to torch.compile, torch.export and autocast it is one operator.

B batch, C channels, N tokens with the class token, if there is one, in front; (H, W) their grid.
q, k and v stand for what is made of the tokens for queries, keys and values.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvt.kernels import torch_projection
from cvt.kernels.operators import BatchNorm, DepthwiseConv, is_transformed
from cvt.kernels.torch_projection import keys_shape, taps_of

MODES = ("off", "auto", "torch")


def set_projections(mode: str) -> None:
    """Choose how models compute the projections of attention, from now on and in this process.

    Args:
        mode: `off`, the default: convolutions, BatchNorms and Linears one by one, as modules.
            `auto`: in one pass, by Triton's kernels on a GPU where there is Triton, and as `off`
            elsewhere. `torch`: in one pass, by PyTorch's own operators. The environment variable
            CVT_PROJECTIONS is what a process begins with.

    `auto` was checked in Triton's interpreter and never run on a GPU, so it is not the default.

    Raises:
        ValueError: there is no such mode.
    """
    global _mode
    _mode = checked(mode)


def checked(mode: str) -> str:
    """The mode, if there is such a one."""
    if mode not in MODES:
        raise ValueError(
            f"projections = {mode!r}, of set_projections or the environment variable "
            f"CVT_PROJECTIONS: must be one of {', '.join(MODES)}"
        )
    return mode


def projections() -> str:
    """What `set_projections` chose."""
    return _mode


_mode = checked(os.environ.get("CVT_PROJECTIONS") or "off")


@contextmanager
def projections_as(mode: str) -> Iterator[None]:
    """`set_projections` for a while."""
    before = projections()
    set_projections(mode)
    try:
        yield
    finally:
        set_projections(before)


# ------------------------------------------------------------------------------ the operator


def triton_kernels(tokens: Tensor) -> Any:
    """Triton's implementation where it is to run, on a GPU or in the interpreter; else None."""
    can = tokens.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    has_type = tokens.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if projections() != "auto" or not (can and has_type):
        return None
    try:
        from cvt.kernels import triton_projection
    except ImportError:  # Triton is not installed
        return None
    return triton_projection


@torch.library.custom_op("cvt::convolve", mutates_args=())
def convolve(
    tokens: Tensor,
    taps: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    stride: int,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Three depthwise convolutions of the tokens, padded by (K - 1) / 2.

    Computed and summed in the type of the taps, rounded to that of the tokens.

    Args:
        tokens: (B, N, C), contiguous; N is height · width, or one more with a class token.
        taps: weights (3, K², C), of q, k and v; K is odd.
        bias: (3, C), added to the outputs.
        height: H of the grid of tokens.
        width: W of it.
        stride: of the convolutions of k and v; q's is 1.
        moments: give mean and variance; the class token in front of q, k and v is then zero,
            and otherwise the one in front of `tokens`.

    Returns:
        q (B, N, C), k and v (B, N', C) each; a copy of the class token, (B, 1, C) or (B, 0, C), so
        that its gradient need not be as large as the tokens'; mean and variance (without Bessel's
        correction) of every channel over batch and grid, before rounding, (2, 3, C) or (0, 3, C).
    """
    kernels = triton_kernels(tokens) or torch_projection
    q, k, v, found = kernels.forward(tokens, taps, bias, (height, width), stride, moments)
    class_token = tokens[:, : tokens.shape[1] - height * width].clone()
    for output in (q, k, v):
        output[:, : class_token.shape[1]] = 0 if moments else class_token
    return q, k, v, class_token, found


@convolve.register_fake
def _(tokens, taps, bias, height, width, stride, moments):  # type: ignore[no-untyped-def]
    B, N, C = tokens.shape
    k, v = (tokens.new_empty(keys_shape(tokens.shape, (height, width), stride)) for _ in range(2))
    class_token = tokens.new_empty(B, N - height * width, C)
    return torch.empty_like(tokens), k, v, class_token, taps.new_empty(2 if moments else 0, 3, C)


@torch.library.custom_op("cvt::convolve_backward", mutates_args=())
def convolve_backward(
    upstream: Sequence[Tensor],
    of_class: Tensor,
    outputs: Sequence[Tensor],
    lines: Tensor,
    tokens: Tensor,
    taps: Tensor,
    height: int,
    width: int,
    stride: int,
    moments: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `convolve`.

    Args:
        upstream: those of q, k and v.
        of_class: that of the copy of the class token.
        outputs: q, k and v.
        lines: offset and slope (3, 2, C): with `moments`, offset + slope · q is added to the
            gradient of q, likewise for k and v.
        tokens: as in `convolve`, like all that follow.
        taps: (3, K², C).
        height: H.
        width: W.
        stride: of k and v.
        moments: whether there were any.

    Returns:
        Gradients of tokens (B, N, C), and of taps and then biases (3 K² + 3, C).
    """
    kernels = triton_kernels(tokens) or torch_projection
    size, upstream = (height, width), [gradient.contiguous() for gradient in upstream]
    dtokens, dtaps = kernels.backward(upstream, outputs, lines, tokens, taps, size, stride, moments)
    if tokens.shape[1] > height * width:
        rows = [] if moments else [gradient[:, :1] for gradient in upstream]
        dtokens[:, :1] = sum(rows, start=of_class)
    return dtokens, dtaps


@convolve_backward.register_fake
def _(upstream, of_class, outputs, lines, tokens, taps, *geometry):  # type: ignore[no-untyped-def]
    return torch.empty_like(tokens), taps.new_empty(3 * taps.shape[1] + 3, taps.shape[2])


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    tokens, taps, _, *ctx.options = inputs
    q, k, v, _, found = output
    ctx.save_for_backward(tokens, taps, q, k, v, found)


def _backward(ctx: Any, *upstream: Tensor) -> tuple:
    tokens, taps, *outputs, found = ctx.saved_tensors
    *of_outputs, of_class, dmoments = upstream
    height, width, _, moments = ctx.options
    lines = taps.new_zeros(3, 2, taps.shape[2])
    if moments:  # mean = Σ y / n and variance = Σ (y - mean)² / n
        class_tokens = tokens.shape[1] - height * width
        counts = [len(y) * (y.shape[1] - class_tokens) for y in outputs]
        of_mean, of_variance = dmoments / counts[1]
        lines = torch.stack((of_mean - 2 * of_variance * found[0], 2 * of_variance), dim=1)
        lines[0] *= counts[1] / counts[0]
    dtokens, both = convolve_backward(
        of_outputs, of_class, outputs, lines, tokens, taps, *ctx.options
    )
    dtaps, dbias = both.split((len(both) - 3, 3))
    return dtokens, dtaps.view_as(taps), dbias, None, None, None, None


convolve.register_autograd(_backward, setup_context=_setup_context)


# ------------------------------------------------------------------------------ the projections


class _LinearWithClassToken(torch.autograd.Function):
    """A Linear of tokens (B, N, C), the first of which is zero and becomes another one's output."""

    @staticmethod
    def forward(
        tokens: Tensor,
        class_token: Tensor,  # (B, 1, C)
        weight: Tensor,
        bias: Tensor,
        class_weight: Tensor,
        class_bias: Tensor,
    ) -> Tensor:
        output = F.linear(tokens, weight, bias)
        output[:, :1] = F.linear(class_token, class_weight, class_bias)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        tokens, class_token, weight, _, class_weight, _ = inputs
        ctx.save_for_backward(tokens, class_token, weight, class_weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        tokens, class_token, weight, class_weight = ctx.saved_tensors
        of_class = gradient[:, 0]  # (B, C')
        return (
            gradient @ weight,
            (of_class @ class_weight)[:, None],
            gradient.flatten(0, 1).t() @ tokens.flatten(0, 1),
            gradient[:, 1:].sum((0, 1)),
            of_class.t() @ class_token[:, 0],
            of_class.sum(0),
        )


class Part(NamedTuple):
    """What makes queries, keys or values of tokens: a convolution, its norm and a Linear."""

    convolution: nn.Conv2d
    norm: BatchNorm
    linear: nn.Linear


def parts_of(projections: Sequence[tuple[Any, nn.Module]]) -> list[Part]:
    """The parts of q, k and v; none if they are not the paper's, or something took their place.

    Args:
        projections: a `cvt.modeling.Projection` and the Linear behind it, each.
    """
    parts = []
    for projection, linear in projections:
        modules = [*projection.modules(), linear]
        kinds = [nn.Sequential, DepthwiseConv, BatchNorm, nn.Linear]
        if [type(module) for module in modules[1:]] != kinds or not all(map(is_bare, modules)):
            return []
        parts.append(Part(*modules[2:]))
    norms = [part.norm for part in parts]
    same = (
        len({(part.norm.training, part.norm.eps, part.linear.bias is None) for part in parts}) == 1
    )
    usual = all(norm.track_running_stats and norm.momentum is not None for norm in norms)
    return parts if same and usual and fits([part.convolution for part in parts]) else []


def is_bare(module: nn.Module) -> bool:
    """Whether to call a module is to call the forward of its class, and nothing else."""
    hooks = (
        *(module._forward_pre_hooks, module._forward_hooks),
        *(module._backward_pre_hooks, module._backward_hooks),
    )
    return not any(hooks) and "forward" not in vars(module)


def fits(convolutions: Sequence[nn.Conv2d]) -> bool:
    """Whether `convolve` makes what these three depthwise convolutions, of q, k and v, make."""
    q, k, v = convolutions
    side = q.kernel_size[0]
    return (
        side % 2 == 1
        and all((c.kernel_size, c.padding) == (2 * (side,), 2 * (side // 2,)) for c in (q, k, v))
        and q.stride == (1, 1)
        and k.stride == v.stride
    )


def runs_on(tokens: Tensor) -> bool:
    """Whether `set_projections` chose `convolve` for such tokens."""
    if torch.jit.is_tracing():
        return False  # who runs a trace has PyTorch's own operators only
    if is_transformed():
        return False  # torch.func would take the tangent of an operator for zero
    return projections() == "torch" or triton_kernels(tokens) is not None


def project(
    tokens: Tensor, grid: tuple[int, int], projections: Sequence[tuple[Any, nn.Module]]
) -> list[Tensor]:
    """Queries, keys and values of the tokens, (B, N, C) or (B, N', C) each, if chosen; else none.

    Args:
        tokens: (B, N, C), N being that of the grid, or one more with a class token in front.
        grid: (H, W).
        projections: of q, k and v, as in `parts_of`.
    """
    parts = parts_of(projections) if runs_on(tokens) else []
    if not parts:
        return []
    tokens = tokens.contiguous()
    convolutions, norms, linears = zip(*parts, strict=True)
    taps = taps_of(convolution.weight for convolution in convolutions)
    taps = taps.to(torch.promote_types(taps.dtype, torch.float32))
    scale, shift, means = (
        torch.stack([getattr(norm, name) for norm in norms]).to(taps.dtype)
        for name in ("weight", "bias", "running_mean")
    )  # (3, C) each
    eps, geometry = norms[0].eps, (*grid, convolutions[1].stride[0])
    if not norms[0].training:
        gain = scale * torch.rsqrt(torch.stack([norm.running_var for norm in norms]) + eps)
        bias = shift - means * gain
        *made, _, _ = convolve(tokens, taps * gain[:, None], bias, *geometry, False)
        return [linear(x) for linear, x in zip(linears, made, strict=True)]
    # Centred on the running means, the outputs lose the least where they are rounded.
    *made, class_token, (mean, variance) = convolve(tokens, taps, -means, *geometry, True)
    for norm, x, deviation, spread in zip(norms, made, mean, variance, strict=True):
        norm.track(deviation, spread, len(x) * (x.shape[1] - class_token.shape[1]))

    # Linear(norm(x)) is another Linear of x, with the moments of the batch in its weight.
    weight = torch.stack([linear.weight for linear in linears])  # (3, C', C)
    gain = scale * torch.rsqrt(variance + eps)
    folded = (weight * gain[:, None]).to(tokens.dtype)
    bias = (weight * shift[:, None] - folded * mean[:, None]).sum(2)  # (3, C')
    own = torch.zeros_like(bias)
    if linears[0].bias is not None:
        own = torch.stack([linear.bias for linear in linears])
    of_tokens = (folded, (bias + own).to(tokens.dtype))
    if not class_token.shape[1]:
        return [F.linear(*of_part) for of_part in zip(made, *of_tokens, strict=True)]
    of_class = (weight.to(tokens.dtype), own.to(tokens.dtype))
    return [
        _LinearWithClassToken.apply(x, class_token, *of_part)
        for x, *of_part in zip(made, *of_tokens, *of_class, strict=True)
    ]
