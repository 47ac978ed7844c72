"""Tokens and images, which are views of each other, and a grid of tokens at another size.

B batch, C channels, H W grid, N tokens (H·W, one more with a class token), h heads, d head width.
"""

import torch
from torch import Tensor


# Both are views of channels-last memory, also to PyTorch's eyes: after a flatten and a transpose, a
# CPU's BatchNorm takes the gradient of a single image for one in another order (torch 2.15). Not by
# `unflatten`: behind it, `torch.onnx.export(dynamo=False)` writes the traced batch's size as fixed.
def to_tokens(image: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H·W, C)."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H·W, C) to (B, C, H, W)."""
    B, _, C = tokens.shape
    return tokens.view(B, *grid, C).permute(0, 3, 1, 2)


def channels_last(image: Tensor) -> Tensor:
    """(B, C, H, W) in channels-last memory; vmap has no memory format."""
    return image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def to_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) to (B, h, N, d)."""
    B, N, C = x.shape
    return x.view(B, N, heads, C // heads).transpose(1, 2)


def split_tokens(x: Tensor, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
    """The class token (B, 1, C), None where there is none, and the tokens (B, H·W, C) of `x`."""
    H, W = grid
    return (None, x) if x.shape[1] == H * W else x.split((1, H * W), dim=1)


def interpolation(size: int, new_size: int, like: Tensor) -> Tensor:
    """Weights, (new_size, size), that interpolate linearly along an axis.

    They are those of `F.interpolate`, which OpenVINO computes otherwise for a single row.
    """
    ones = like.new_ones(new_size)  # their sum is new_size, also where that is a symbol of a graph
    centres = (ones.cumsum(0) - 0.5) * (size / ones.sum()) - 0.5
    places = like.new_ones(size).cumsum(0) - 1
    return (1 - (centres.clamp(0, size - 1)[:, None] - places).abs()).clamp(min=0)


def resize_tokens(tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Tokens of a grid, (1, H·W, C), interpolated linearly to another size, (1, H'·W', C)."""
    if all(isinstance(side, int) for side in size) and size == grid:  # not symbols of a graph
        return tokens
    (H, W), (rows, columns), C = grid, size, tokens.shape[2]
    image = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).view(H, W * C)
    # Both in float32: autocast gives the first product in 16 bits, which count to 256 only.
    down, across = interpolation(H, rows, image), interpolation(W, columns, image)
    image = across @ (down @ image).view(rows, W, C)  # (H', W', C)
    return image.view(1, rows * columns, C).to(tokens.dtype)
