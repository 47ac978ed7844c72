"""The convolutional projections of attention, query, key and value, in one pass over the tokens.

In the paper's form each of the three is a depthwise convolution, BatchNorm and a Linear, and the
class token skips the first two. Done one after the other, they read the tokens three times and move
their results four times more. Here:

- `cvt::convolve` computes all three convolutions of the tokens at once, with them the mean and the
  variance of each channel, which a BatchNorm in training wants.
- A BatchNorm is a line, channel by channel, so it is folded into the Linear behind it, with the
  batch's own statistics too. Its backward pass needs no pass over the tokens either: autograd
  finds the gradients of mean and variance in that of the folded weight, and `cvt::convolve` adds
  a line in its outputs for them.
- `_LinearWithClassToken` gives the class token the weight that is not folded.

On a GPU `cvt::convolve` is Triton's kernels (`qkv_triton.py`), elsewhere PyTorch's own operators
(`qkv_reference.py`); to torch.compile, torch.export and autocast it is one operator.

The kernels were checked in Triton's interpreter and never run on a GPU, so nothing applies them
unless asked to.

B batch, C channels, N tokens with the class token, if there is one, in front; (H, W) their grid.
q, k and v stand for what is computed from the tokens for queries, keys and values.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvt.kernels import qkv_reference
from cvt.kernels.qkv_reference import keys_shape, taps_of
from cvt.modeling import SelfAttention


def apply_triton(model: nn.Module) -> None:
    """Make a model compute query, key and value in one pass over the tokens.

    By Triton's kernels on a GPU, by PyTorch's own operators elsewhere. An attention whose
    projections are not those of the paper, or were replaced, computes as before; so does a trace,
    and torch.func. State dicts stay as they are. A second derivative raises an error.

    Args:
        model: any of `cvt.modeling`; changed in place.

    Example:
        >>> import cvt, torch
        >>> from cvt.kernels import apply_triton
        >>> config = cvt.CvtConfig.from_variant("cvt-digits")
        >>> model = cvt.CvtForImageClassification(config).eval()
        >>> pixels = torch.rand(2, 3, 16, 16)
        >>> before = model(pixels).logits
        >>> apply_triton(model)
        >>> torch.allclose(model(pixels).logits, before, atol=1e-5)
        True
    """
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.__class__ = OnePassAttention


# ------------------------------------------------------------------------------ the operator


def triton_kernels(tokens: Tensor) -> Any:
    """Triton's implementation where it runs, on a GPU or in the interpreter; else None."""
    can = tokens.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    if not can or tokens.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    try:
        from cvt.kernels import qkv_triton
    except ImportError:  # Triton is not installed
        return None
    return qkv_triton


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
    kernels = triton_kernels(tokens) or qkv_reference
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
    grad_class: Tensor,
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
        grad_class: that of the copy of the class token.
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
    kernels = triton_kernels(tokens) or qkv_reference
    size, upstream = (height, width), [gradient.contiguous() for gradient in upstream]
    grad_tokens, grad_taps = kernels.backward(
        upstream, outputs, lines, tokens, taps, size, stride, moments
    )
    if tokens.shape[1] > height * width:
        rows = [] if moments else [gradient[:, :1] for gradient in upstream]
        grad_tokens[:, :1] = sum(rows, start=grad_class)
    return grad_tokens, grad_taps


@convolve_backward.register_fake
def _(upstream, grad_class, outputs, lines, tokens, taps, *geometry):  # type: ignore[no-untyped-def]
    return torch.empty_like(tokens), taps.new_empty(3 * taps.shape[1] + 3, taps.shape[2])


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    tokens, taps, _, *ctx.options = inputs
    q, k, v, _, found = output
    ctx.save_for_backward(tokens, taps, q, k, v, found)


def _backward(ctx: Any, *upstream: Tensor) -> tuple:
    tokens, taps, *outputs, found = ctx.saved_tensors
    *grad_outputs, grad_class, grad_moments = upstream
    height, width, _, moments = ctx.options
    lines = taps.new_zeros(3, 2, taps.shape[2])
    if moments:  # mean = Σ y / n and variance = Σ (y - mean)² / n
        class_tokens = tokens.shape[1] - height * width
        counts = [len(y) * (y.shape[1] - class_tokens) for y in outputs]
        grad_mean, grad_variance = grad_moments / counts[1]
        lines = torch.stack((grad_mean - 2 * grad_variance * found[0], 2 * grad_variance), dim=1)
        lines[0] *= counts[1] / counts[0]
    grad_tokens, both = convolve_backward(
        grad_outputs, grad_class, outputs, lines, tokens, taps, *ctx.options
    )
    grad_taps, grad_bias = both.split((len(both) - 3, 3))
    return grad_tokens, grad_taps.view_as(taps), grad_bias, None, None, None, None


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
        grad_class = gradient[:, 0]  # (B, C')
        return (
            gradient @ weight,
            (grad_class @ class_weight)[:, None],
            gradient.flatten(0, 1).t() @ tokens.flatten(0, 1),
            gradient[:, 1:].sum((0, 1)),
            grad_class.t() @ class_token[:, 0],
            grad_class.sum(0),
        )


class QKVParts(NamedTuple):
    """Of query, key or value: the convolution, its norm and the Linear."""

    convolution: nn.Conv2d
    norm: nn.BatchNorm2d
    linear: nn.Linear


def parts_of(attention: SelfAttention) -> list[QKVParts]:
    """The parts of query, key and value; none if `convolve` does not compute what they do."""
    parts = []
    for projection, linear in (
        (attention.convolution_projection_query, attention.projection_query),
        (attention.convolution_projection_key, attention.projection_key),
        (attention.convolution_projection_value, attention.projection_value),
    ):
        modules: list[Any] = [*projection.modules(), linear]
        kinds = [nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.Linear]
        if [type(module) for module in modules[1:]] != kinds or not all(map(is_bare, modules)):
            return []
        parts.append(QKVParts(*modules[2:]))
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
    """Whether `convolve` computes these three depthwise convolutions, of query, key and value."""
    q, k, v = convolutions
    side = q.kernel_size[0]
    return (
        side % 2 == 1
        and all((c.kernel_size, c.padding) == (2 * (side,), 2 * (side // 2,)) for c in (q, k, v))
        and q.stride == (1, 1)
        and k.stride == v.stride
    )


def is_transformed() -> bool:
    """Whether torch.func, such as its vmap or jvp, changes what is computed now.

    It would take the tangent of an operator for zero; PyTorch has no public way to ask.
    """
    return not torch.compiler.is_compiling() and bool(torch._C._functorch.peek_interpreter_stack())


class OnePassAttention(SelfAttention):
    """A `SelfAttention` that computes query, key and value in one pass over the tokens."""

    def project(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, C), keys and values (B, N', C)."""
        # Who runs a trace has PyTorch's own operators only.
        is_seen = torch.jit.is_tracing() or is_transformed()
        parts = [] if is_seen else parts_of(self)
        return project(x, grid, parts) if parts else super().project(x, grid)


@torch.no_grad()
def update_statistics(
    norm: nn.BatchNorm2d, deviation: Tensor, variance: Tensor, count: int
) -> None:
    """Count a batch of known moments in the running statistics of a norm.

    Args:
        norm: the norm.
        deviation: of the batch's mean from the running mean, (C,).
        variance: without Bessel's correction, (C,).
        count: of values in each channel.

    Raises:
        ValueError: there is one value only.
    """
    if count == 1:
        raise ValueError("BatchNorm needs more than one value per channel in training")
    momentum: Any = norm.momentum
    mean: Any = norm.running_mean
    running: Any = norm.running_var
    batches: Any = norm.num_batches_tracked
    batches.add_(1)
    mean.add_(deviation, alpha=momentum)
    running.mul_(1 - momentum)
    running.add_(variance, alpha=momentum * count / (count - 1))


def project(
    tokens: Tensor, grid: tuple[int, int], parts: Sequence[QKVParts]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, N, C), keys and values (B, N', C) of the tokens.

    Args:
        tokens: (B, N, C), N being that of the grid, or one more with a class token in front.
        grid: (H, W).
        parts: of query, key and value.
    """
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
        *convolved, _, _ = convolve(tokens, taps * gain[:, None], bias, *geometry, False)
        query, key, value = (linear(x) for linear, x in zip(linears, convolved, strict=True))
        return query, key, value
    # Centred on the running means, the outputs lose the least where they are rounded.
    *convolved, class_token, (mean, variance) = convolve(tokens, taps, -means, *geometry, True)
    for norm, x, deviation, spread in zip(norms, convolved, mean, variance, strict=True):
        count = len(x) * (x.shape[1] - class_token.shape[1])
        update_statistics(norm, deviation, spread, count)

    # Linear(norm(x)) is another Linear of x, with the moments of the batch in its weight.
    weight = torch.stack([linear.weight for linear in linears])  # (3, C', C)
    gain = scale * torch.rsqrt(variance + eps)
    folded = (weight * gain[:, None]).to(tokens.dtype)
    bias = (weight * shift[:, None] - folded * mean[:, None]).sum(2)  # (3, C')
    own = torch.zeros_like(bias)
    if linears[0].bias is not None:
        own = torch.stack([linear.bias for linear in linears])
    token_weights = (folded, (bias + own).to(tokens.dtype))
    if class_token.shape[1]:
        class_weights = (weight.to(tokens.dtype), own.to(tokens.dtype))
        query, key, value = (
            _LinearWithClassToken.apply(x, class_token, *weights)
            for x, *weights in zip(convolved, *token_weights, *class_weights, strict=True)
        )
    else:
        query, key, value = (
            F.linear(*arguments) for arguments in zip(convolved, *token_weights, strict=True)
        )
    return query, key, value
