"""Operators that train faster than PyTorch's own and compute the same.

What is said of speed was measured with torch 2.15; `benchmarks/training.py` measures the whole.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_cpu_bfloat16(x: Tensor) -> bool:
    """Whether PyTorch goes back through attention and strided convolutions of `x` slowly."""
    return x.device.type == "cpu" and x.dtype is torch.bfloat16


def autocast(x: Tensor) -> Tensor:
    """`x` in the type that autocast, where it is on, would give every operator's copy of it."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device)) if x.dtype is torch.float32 else x


class QuickGELU(torch.autograd.Function):
    """x · sigmoid(1.702 x) as silu(1.702 x) / 1.702: `QuickGELU.apply(x)`.

    Keeps `x` alone for the backward pass, where autograd would keep the sigmoid too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """The activation of `x`, of any shape."""
        return F.silu(1.702 * x, inplace=True).div_(1.702)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keeps `x`."""
        context.save_for_backward(*inputs)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        """The gradient of `x`; the two constants cancel."""
        x = 1.702 * context.saved_tensors[0]
        if torch.is_grad_enabled():  # PyTorch's operator has no gradient of its own
            gate = torch.sigmoid(x)
            return gradient * gate * (1 + x * (1 - gate))
        return torch.ops.aten.silu_backward(gradient, x)


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
