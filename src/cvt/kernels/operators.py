"""Operators that train faster than PyTorch's own and compute the same.

What is said of speed was measured with torch 2.15; `benchmarks/training.py` measures the whole.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

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


def is_autograd_alone() -> bool:
    """Whether nothing looks on that knows PyTorch's own operators only.

    Such are a tracer, whose compiler chooses itself what to keep, torch.func, and forward mode.
    """
    return not (is_captured() or is_transformed() or forward_ad._current_level >= 0)


def is_captured() -> bool:
    """Whether what is computed now becomes a graph, of torch.compile, torch.export or a trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_transformed() -> bool:
    """Whether torch.func, such as its vmap or grad, changes what is computed now."""
    return not torch.compiler.is_compiling() and bool(torch._C._functorch.peek_interpreter_stack())


def channels_last(image: Tensor, dtype: torch.dtype) -> Tensor:
    """The image, (B, C, H, W), in a type and in channels-last memory.

    Under torch.func it stays in the memory that it has: vmap hides a dimension of it.
    """
    if is_transformed():
        return image.to(dtype)
    return image.to(dtype, memory_format=torch.channels_last)


def silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of silu(x) = x · sigmoid(x)."""
    if torch.is_grad_enabled():  # PyTorch's operator has no gradient of its own
        gate = torch.sigmoid(x)
        return gradient * gate * (1 + x * (1 - gate))
    return torch.ops.aten.silu_backward(gradient, x)


def activated(source: Tensor, quick: bool) -> Tensor:
    """QuickGELU of what is 1.702 times its argument, or GELU of its argument."""
    return F.silu(source).div_(QUICK) if quick else F.gelu(source)


def activate(
    x: Tensor,
    plain: Callable[[Tensor], Tensor],
    with_source: Callable[[Tensor], tuple[Tensor, Tensor]],
    quick: bool,
) -> Tensor:
    """An activation of `x`, of any shape, that a backward pass need not keep but can make again.

    Args:
        x: any shape.
        plain: the activation in PyTorch's own operators.
        with_source: the activation, and of what `activated` makes it for `linear`.
        quick: for `activated`.
    """
    in_training = torch.is_grad_enabled() and x.requires_grad
    if in_training and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return checkpoint(plain, x, use_reentrant=False)  # the compiler heeds it
    if not (in_training and is_autograd_alone()):
        return plain(x)
    made, source = with_source(x)
    made.made_of = source, quick, made._version  # type: ignore[attr-defined]
    return made


class _QuickGELU(torch.autograd.Function):
    """x · sigmoid(1.702 x) as silu(1.702 x) / 1.702; and 1.702 x, which alone is kept."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        scaled = QUICK * x
        return activated(scaled, True), scaled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], outputs: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(outputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, of_scaled: Tensor | None) -> Tensor | None:
        of_x = None if gradient is None else silu_backward(gradient, *ctx.saved_tensors)
        if of_scaled is None:  # in a first derivative
            return of_x
        return QUICK * of_scaled if of_x is None else of_x + QUICK * of_scaled


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU, with which the released models were trained."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return activate(x, lambda x: x * torch.sigmoid(QUICK * x), _QuickGELU.apply, True)


class GELU(nn.GELU):
    """GELU, exact."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return activate(x, F.gelu, lambda x: (F.gelu(x), x), False)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), for whose backward pass `x` is made again, if it can be, and not kept.

    What `activate` gave can, unless it was changed since. It is left to others that look after what
    is kept, such as gradient checkpointing.

    Args:
        module: a Linear, or what took its place.
        x: (..., C).
    """
    others = torch._C._autograd._top_saved_tensors_default_hooks
    if torch.compiler.is_compiling() or not hasattr(x, "made_of") or others(True):
        return module(x)
    source, quick, version = x.made_of
    if version != x._version:
        return module(x)
    storage, size = x.untyped_storage()._cdata, x.numel()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        is_x = kept.untyped_storage()._cdata == storage and kept.numel() == size
        return kept.shape if is_x and kept.is_contiguous() else kept

    @torch.no_grad()
    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else activated(source, quick).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return module(x)


def with_dense_gradient(image: Tensor) -> Tensor:
    """The image, (B, C, H, W), whose gradient will have no gaps and be channels-last.

    Tokens behind a class token have a gradient with gaps, of which a CPU's BatchNorm is slow.
    """
    if image.requires_grad and not (torch.compiler.is_compiling() or is_transformed()):
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
