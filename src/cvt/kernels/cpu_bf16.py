"""Training on a CPU in bfloat16: the same outputs and gradients by faster operators.

Measured with torch 2.15; `benchmarks/training.py` measures the whole step.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cvt.modeling import Projection

CHUNK = 2**22  # attention weights of the images in a chunk, which a cache holds
MAX_KEYS = 1024  # beyond, SDPA, which keeps no attention weights, for the memory


def apply_cpu_bf16(model: PreTrainedModel) -> None:
    """Make a model train faster on a CPU in bfloat16; elsewhere it computes as before.

    Attention is computed in chunks, unless another than SDPA was chosen; strided depthwise
    convolutions as dense ones; and the gradient of BatchNorm from contiguous memory. State dicts
    and saved configs stay as they are.

    Args:
        model: any of `cvt.modeling`; changed in place.

    Example:
        >>> import cvt, torch
        >>> from cvt.kernels import apply_cpu_bf16
        >>> model = cvt.CvtForImageClassification(cvt.CvtConfig.from_variant("cvt-digits"))
        >>> apply_cpu_bf16(model)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     model(torch.rand(2, 3, 16, 16)).logits.dtype
        torch.bfloat16
    """
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("cpu_bf16")
    for module in model.modules():
        if isinstance(module, Projection) and isinstance(
            module.convolution_projection, nn.Sequential
        ):
            convolution, norm = module.convolution_projection
            convolution.__class__, norm.__class__ = DenseDepthwiseConv, DenseGradientBatchNorm


def computes_in_bf16(x: Tensor) -> bool:
    """Whether PyTorch computes with `x` in bfloat16 on a CPU."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    autocast = torch.is_autocast_enabled("cpu") and x.dtype is torch.float32
    return (torch.get_autocast_dtype("cpu") if autocast else x.dtype) is torch.bfloat16


class DenseDepthwiseConv(nn.Conv2d):
    """Depthwise Conv2d that takes strides afterwards.

    In bfloat16 on a CPU the gradient of a strided one is some forty times slower than that of a
    dense one.
    """

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H', W')."""
        if not (self.training and computes_in_bf16(image)):
            return super().forward(image)
        dense = F.conv2d(image, self.weight, padding=self.padding, groups=self.groups)
        return F.avg_pool2d(dense, 1, self.stride)


class DenseGradientBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose gradient is contiguous.

    Tokens behind a class token have a gradient with gaps, of which a CPU's BatchNorm is slow.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        y = super().forward(x)
        if y.requires_grad and computes_in_bf16(y):
            y.register_hook(lambda grad: grad.contiguous(memory_format=torch.channels_last))
        return y


def attention(
    module: nn.Module,
    query: Tensor,  # (B, h, N, d)
    key: Tensor,  # (B, h, N', d)
    value: Tensor,  # (B, h, N', d)
    attention_mask: None,
    scaling: float,
    dropout: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention, in chunks where that is faster: context (B, N, h, d), no weights."""
    in_chunks = module.training and computes_in_bf16(query) and key.shape[2] <= MAX_KEYS
    attend = chunked_attention if in_chunks else sdpa_attention_forward
    return attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout)


def chunked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, None]:
    """Attention written out, on as many images at once as a cache holds.

    On a CPU and in bfloat16, 1.5 to 4 times the speed of SDPA when trained, for which it keeps the
    weights.
    """
    images = CHUNK // (query[0, ..., 0].numel() * key.shape[2]) or 1
    contexts = []
    with torch.autocast(query.device.type, enabled=False):
        for q, k, v in zip(*(x.split(images) for x in (query, key, value)), strict=True):
            weights = (q @ (k * scaling).transpose(2, 3)).softmax(dim=-1)  # (images, h, N, N')
            contexts.append((F.dropout(weights, dropout) @ v).transpose(1, 2))
    return torch.cat(contexts), None


AttentionInterface.register("cpu_bf16", attention)
