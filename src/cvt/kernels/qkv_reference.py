"""The convolutions of `qkv_projection.py` in PyTorch's own operators."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def keys_shape(tokens: Sequence[int], size: tuple[int, int], stride: int) -> tuple[int, int, int]:
    """The shape of k and v, (B, N', C), for that of the tokens, (B, N, C), on a grid of (H, W)."""
    B, N, C = tokens
    H, W = grids(size, stride)[1]
    return B, N - size[0] * size[1] + H * W, C


def grids(size: tuple[int, int], stride: int) -> list[tuple[int, int]]:
    """The grids (H, W) of q, k and v."""
    key_size = (-(-size[0] // stride), -(-size[1] // stride))
    return [size, key_size, key_size]


def to_image(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, C) to (B, C, H, W), without class tokens."""
    return tokens[:, tokens.shape[1] - size[0] * size[1] :].unflatten(1, size).permute(0, 3, 1, 2)


def taps_of(weights: Iterable[Tensor]) -> Tensor:
    """The weights (C, 1, K, K) of three depthwise convolutions as taps (3, K², C)."""
    return torch.stack([weight.flatten(1).t() for weight in weights])


def weights_of(taps: Tensor) -> list[Tensor]:
    """The opposite."""
    side = int(taps.shape[1] ** 0.5)
    return [of.t().unflatten(1, (1, side, side)) for of in taps]


def forward(
    tokens: Tensor,
    taps: Tensor,
    bias: Tensor,
    size: tuple[int, int],
    stride: int,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `qkv_projection.convolve` gives, but for class tokens."""
    image, weights = to_image(tokens, size).to(taps.dtype), weights_of(taps)
    keys = keys_shape(tokens.shape, size, stride)
    q, k, v = torch.empty_like(tokens), tokens.new_empty(keys), tokens.new_empty(keys)
    found = taps.new_empty(2 if moments else 0, 3, taps.shape[2])
    for i, (output, grid) in enumerate(zip((q, k, v), grids(size, stride), strict=True)):
        step, padding = stride if i else 1, weights[i].shape[-1] // 2
        with torch.autocast(tokens.device.type, enabled=False):
            convolved = F.conv2d(image, weights[i], bias[i], step, padding, groups=taps.shape[2])
        if moments:
            found[1, i], found[0, i] = torch.var_mean(convolved, (0, 2, 3), correction=0)
        to_image(output, grid).copy_(convolved)
    return q, k, v, found


def backward(
    upstream: Sequence[Tensor],
    outputs: Sequence[Tensor],
    lines: Tensor,
    tokens: Tensor,
    taps: Tensor,
    size: tuple[int, int],
    stride: int,
    moments: bool,
) -> tuple[Tensor, Tensor]:
    """What `qkv_projection.convolve_backward` gives, but for class tokens."""
    image, weights, C = to_image(tokens, size).to(taps.dtype), weights_of(taps), taps.shape[2]
    grad_image, grad_weights, grad_biases = torch.zeros_like(image), [], []
    for i, grid in enumerate(grids(size, stride)):
        gradient = to_image(upstream[i], grid).to(taps.dtype)
        if moments:
            offset, slope = lines[i][..., None, None]  # (C, 1, 1) each
            gradient = gradient + offset + slope * to_image(outputs[i], grid)
        step, padding = stride if i else 1, weights[i].shape[-1] // 2
        image_part, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            *(gradient, image, weights[i], [C], [step, step], [padding, padding], [1, 1]),
            *(False, [0, 0], C, [True, True, True]),
        )
        grad_image += image_part
        grad_weights.append(grad_weight)
        grad_biases.append(grad_bias[None])
    grad_tokens = torch.empty_like(tokens)
    to_image(grad_tokens, size).copy_(grad_image)
    return grad_tokens, torch.cat((taps_of(grad_weights).flatten(0, 1), *grad_biases))
