"""Operators that train faster than PyTorch's own and compute the same.

What is said of speed was measured with torch 2.15; `benchmarks/training.py` measures the whole.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

QUICK = 1.702  # QuickGELU is x · sigmoid(1.702 x)


def is_cpu_bfloat16(x: Tensor) -> bool:
    """Whether PyTorch goes back through attention and strided convolutions of `x` slowly."""
    return x.device.type == "cpu" and x.dtype is torch.bfloat16


def autocast(x: Tensor) -> Tensor:
    """`x` in the type that autocast, where it is on, would give every operator's copy of it."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device)) if x.dtype is torch.float32 else x


def is_bare(module: nn.Module) -> bool:
    """Whether to call a module is to call the forward of its class, and nothing else."""
    hooks = (
        *(module._forward_pre_hooks, module._forward_hooks),
        *(module._backward_pre_hooks, module._backward_hooks),
    )
    return not any(hooks) and "forward" not in vars(module)


def is_autograd_alone() -> bool:
    """Whether nothing looks on that knows PyTorch's own operators only.

    Such are a tracer, whose compiler chooses itself what to keep, torch.func, and forward mode.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack()
        or forward_ad._current_level >= 0
    )


def silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of silu(x) = x · sigmoid(x)."""
    if torch.is_grad_enabled():  # PyTorch's operator has no gradient of its own
        gate = torch.sigmoid(x)
        return gradient * gate * (1 + x * (1 - gate))
    return torch.ops.aten.silu_backward(gradient, x)


class _QuickGELU(torch.autograd.Function):
    """x · sigmoid(1.702 x) as silu(1.702 x) / 1.702.

    Keeps `x` alone for the backward pass, where autograd would keep the sigmoid too.
    """

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.silu(QUICK * x, inplace=True).div_(QUICK)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return silu_backward(gradient, QUICK * ctx.saved_tensors[0])  # the two constants cancel


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU, with which the released models were trained."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        if x.requires_grad and is_autograd_alone():
            return _QuickGELU.apply(x)
        return x * torch.sigmoid(QUICK * x)


class _ActivatedLinear(torch.autograd.Function):
    """Linear(silu(x)), or of GELU, that keeps `x` alone and activates it again on the way back."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
        return F.linear(F.silu(x) if silu else F.gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.silu = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        backward = silu_backward if ctx.silu else torch.ops.aten.gelu_backward
        of_x = backward(gradient @ weight, x)
        of_weight, gradient = None, gradient.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            activated = F.silu(x) if ctx.silu else F.gelu(x)
            of_weight = gradient.t() @ activated.flatten(0, -2)
        return of_x, of_weight, gradient.sum(0), None


def mlp(x: Tensor, expand: Any, contract: Any) -> Tensor:
    """contract(expand(x)): in training, with less to keep and to move.

    The activation is not kept for the backward pass but made again, and the constants of QuickGELU,
    silu(1.702 x) / 1.702, go into the weights around it. Not so where there is dropout in between,
    or something hangs on the modules or took their place; there they are called one by one.

    Args:
        x: (..., C).
        expand: Linear `dense`, `activation` and `dropout`, of `cvt.modeling.Dense`.
        contract: the same, without an activation.
    """
    inner, outer, quick = expand.dense, contract.dense, type(expand.activation) is QuickGELU
    parts = (inner, expand.activation, outer, contract.activation)
    kinds = [nn.Linear, QuickGELU if quick else nn.GELU, nn.Linear, nn.Identity]
    if (
        not (torch.is_grad_enabled() and is_autograd_alone())
        or [type(part) for part in parts] != kinds
        or not all(map(is_bare, (*parts, expand, expand.dropout, contract)))
        or not (quick or expand.activation.approximate == "none")
        or (expand.dropout.training and expand.dropout.p > 0)
        or inner.bias is None
        or outer.bias is None
    ):
        return contract(expand(x))
    scale = QUICK if quick else 1
    hidden = F.linear(x, scale * inner.weight, scale * inner.bias)
    weight, bias = autocast(outer.weight / scale), autocast(outer.bias)
    return contract.dropout(_ActivatedLinear.apply(hidden, weight, bias, quick))


def with_dense_gradient(image: Tensor) -> Tensor:
    """The image, (B, C, H, W), whose gradient will have no gaps and be channels-last.

    Tokens behind a class token have a gradient with gaps, of which a CPU's BatchNorm is slow.
    """
    if image.requires_grad and not torch.compiler.is_compiling():
        image.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
    return image


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that counts a batch once, though gradient checkpointing runs forward twice."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    @property
    def recomputing(self) -> bool:
        """Whether this is the second time that the batch is seen."""
        return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same, normalised."""
        if self.training and self.recomputing:
            statistics = self.running_mean.clone(), self.running_var.clone()  # to be thrown away
            return F.batch_norm(x, *statistics, self.weight, self.bias, training=True, eps=self.eps)
        y = super().forward(x)
        return with_dense_gradient(y) if self.training else y

    @torch.no_grad()
    def track(self, deviation: Tensor, variance: Tensor, count: int) -> None:
        """Count a batch of known moments in the running statistics.

        Args:
            deviation: of its mean from the running mean, (C,).
            variance: without Bessel's correction, (C,).
            count: of values in each channel.
        """
        if count == 1:
            raise ValueError("BatchNorm needs more than one value per channel in training")
        if not self.recomputing:
            self.num_batches_tracked.add_(1)
            self.running_mean.add_(deviation, alpha=self.momentum)
            self.running_var.mul_(1 - self.momentum)
            self.running_var.add_(variance, alpha=self.momentum * count / (count - 1))


class DepthwiseConv(nn.Conv2d):
    """Depthwise Conv2d without bias; in bfloat16 on a CPU, strides are taken after it in training.

    There the gradient of a strided one is some forty times slower than that of a dense one.
    """

    def __init__(self, width: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__(width, width, kernel, stride, padding, groups=width, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H', W')."""
        if not (self.training and is_cpu_bfloat16(image)):
            return super().forward(image)
        dense = F.conv2d(image, self.weight, padding=self.padding, groups=self.groups)
        return F.avg_pool2d(dense, 1, self.stride)


def chunks_pay(query: Tensor, key: Tensor) -> bool:
    """Whether `chunked_attention` trains faster than SDPA, and in memory that can be afforded."""
    compiling = torch.compiler.is_compiling()
    return is_cpu_bfloat16(query) and key.shape[2] <= 1024 and not compiling


def chunked_attention(
    module: nn.Module,
    query: Tensor,  # (B, h, N, d)
    key: Tensor,  # (B, h, N', d)
    value: Tensor,  # (B, h, N', d)
    attention_mask: None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, None]:
    """Attention written out, on as many images at once as a cache holds: (B, N, h, d), no weights.

    On a CPU and in bfloat16, 1.5 to 4 times the speed of SDPA when trained, for which it keeps
    the weights.
    """
    images = 2**22 // (query[0, ..., 0].numel() * key.shape[2]) or 1
    contexts = []
    with torch.autocast(query.device.type, enabled=False):
        for q, k, v in zip(*(x.split(images) for x in (query, key, value)), strict=True):
            weights = (q @ (k * scaling).transpose(2, 3)).softmax(dim=-1)  # (images, h, N, N')
            contexts.append((F.dropout(weights, dropout) @ v).transpose(1, 2))
    return torch.cat(contexts), None
