"""`cvt::convolve` in Triton: one pass over the tokens forward, two backward.

All three kernels go through cells: a key, its value and the S x S queries around them, where S is
the stride of keys and values. So a token is read (S - 1 + K)² / S² times and not K² times, 4 times
for the paper's S = 2 and K = 3, and mostly from a cache. A thread has four channels, whose weights
stay in its registers while its program takes turn after turn. Sums are in float32.

What they must move, in units of the tokens, at the paper's strides: forward 2.5 (read the tokens,
write q, k and v); backward 5.5 for the gradients of outputs and weights, then 2.5 for that of the
tokens, which wants the neighbours' of the former. A LayerNorm in front stays outside: torch.compile
does it and the sum before it in one pass.

In the kernels: B batch, C channels, H W grid of tokens and queries, h w of keys and values; K the
side of the convolutions, S their stride, which is 1 for queries. Tokens are (B, N, C) with CLASS
class tokens, none or one, in front.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc"

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cvt.kernels.qkv_reference import grids, keys_shape

SIZES = ["turns", "cells", "H", "W", "h", "w"]  # one kernel serves all of them
WARPS = 4
PROGRAMS = 1024  # about so many, some for each multiprocessor of a large GPU


@triton.jit
def cells_of(turn, turns, cells, h, w, CELLS: tl.constexpr):
    """The cells of this program's turn: image, row, column, and whether there are so many."""
    cell = (tl.program_id(0) * turns + turn) * CELLS + tl.arange(0, CELLS)
    line = cell // w
    image = line // h
    return image, line - image * h, cell - line * w, cell < cells


@triton.jit
def offsets(image, row, column, H, W, C: tl.constexpr, CLASS: tl.constexpr, CHANNELS: tl.constexpr):
    """Where the tokens at some places begin, (cells, CHANNELS), on the grid or beside it."""
    token = image.to(tl.int64) * (H * W + CLASS) + (CLASS + row * W + column)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return token[:, None] * C + c[None, :]


@triton.jit
def on_grid(row, column, real, H, W):
    """Which places, (cells,), are on the grid; as an unsigned number, -1 is a large one."""
    return real & (row.to(tl.uint32) < H) & (column.to(tl.uint32) < W)


@triton.jit
def read(pointers, inside):
    """Values in float32, zero where they are not inside."""
    return tl.load(pointers, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def write(pointers, inside, values):
    """The opposite of `read`."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside[:, None])


@triton.jit
def rows_of(table, ROWS: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's channels of a table (ROWS, C), as a tuple of rows (1, CHANNELS)."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    rows = ()
    for i in tl.static_range(ROWS):
        rows = rows + (tl.load(table + i * C + c)[None, :],)
    return rows


@triton.jit
def zeros(COUNT: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr):
    """A tuple of sums to compute."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.full([CELLS, CHANNELS], 0.0, tl.float32),)
    return sums


@triton.jit
def add_tap(
    total, x, weights, of: tl.constexpr, y_tap: tl.constexpr, x_tap: tl.constexpr, K: tl.constexpr
):
    """`total` and `x` times a weight, if there is such a tap; of the query 0, key 1 or value 2."""
    if y_tap >= 0 and y_tap < K and x_tap >= 0 and x_tap < K:
        total += x * weights[(of * K + y_tap) * K + x_tap]
    return total


@triton.jit
def note(sums, output, inside, is_first):
    """Sums, in each lane, of deviations from its first value and of their squares, with one more.

    Of the values themselves, the sums lose a variance that is small beside the squared mean.
    """
    first, total, squares = sums
    first = tl.where(is_first, output, first)
    deviation = tl.where(inside[:, None], output - first, 0.0)
    return first, total + deviation, squares + deviation * deviation


@triton.jit
def write_moments(table, of: tl.constexpr, n, sums, C: tl.constexpr, CHANNELS: tl.constexpr):
    """Number, mean and sum of squared deviations of all lanes, to the table (programs, 3, 3, C)."""
    first, total, squares = sums
    n = n[:, None]
    count = tl.sum(n, axis=0)
    deviation = total / tl.maximum(n, 1.0)  # of a lane's mean from its first value
    mean = first + deviation
    means = tl.sum(n * mean, axis=0) / tl.maximum(count, 1.0)
    between = mean - means[None, :]
    squares += n * between * between - total * deviation
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    row = table + (tl.program_id(0) * 3 + of) * 3 * C + c
    tl.store(row, tl.full([CHANNELS], 0.0, tl.float32) + count)
    tl.store(row + C, means)
    tl.store(row + 2 * C, tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    tokens, taps, bias, q, k, v, moments,
    turns, cells, H, W, h, w,
    C: tl.constexpr, CLASS: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """q, k and v, and of each program their moments."""
    PAD: tl.constexpr = K // 2
    PATCH: tl.constexpr = S - 1 + K
    weights = rows_of(taps, 3 * K * K, C, CHANNELS)
    biases = rows_of(bias, 3, C, CHANNELS)
    stats_q = zeros(3, CELLS, CHANNELS)
    stats_k = zeros(3, CELLS, CHANNELS)
    stats_v = zeros(3, CELLS, CHANNELS)
    n_q = tl.full([CELLS], 0.0, tl.float32)
    n_k = tl.full([CELLS], 0.0, tl.float32)

    for turn in range(turns):
        image, row, column, real = cells_of(turn, turns, cells, h, w, CELLS)
        sums = (tl.broadcast_to(biases[1], [CELLS, CHANNELS]),)
        sums = sums + (tl.broadcast_to(biases[2], [CELLS, CHANNELS]),)
        for _ in tl.static_range(S * S):
            sums = sums + (tl.broadcast_to(biases[0], [CELLS, CHANNELS]),)
        top, left = row * S - PAD, column * S - PAD
        corner = offsets(image, top, left, H, W, C, CLASS, CHANNELS)
        for y in tl.static_range(PATCH):
            in_row = tokens + (corner + y * W * C)
            for x in tl.static_range(PATCH):
                token = read(in_row + x * C, on_grid(top + y, left + x, real, H, W))
                grown = (add_tap(sums[0], token, weights, 1, y, x, K),)
                grown = grown + (add_tap(sums[1], token, weights, 2, y, x, K),)
                for i in tl.static_range(S * S):
                    query = add_tap(sums[2 + i], token, weights, 0, y - i // S, x - i % S, K)
                    grown = grown + (query,)
                sums = grown

        corner = offsets(image, row, column, h, w, C, CLASS, CHANNELS)
        write(k + corner, real, sums[0])
        write(v + corner, real, sums[1])
        if HAS_MOMENTS:
            stats_k = note(stats_k, sums[0], real, turn == 0)
            stats_v = note(stats_v, sums[1], real, turn == 0)
            n_k += real.to(tl.float32)
        corner = offsets(image, row * S, column * S, H, W, C, CLASS, CHANNELS)
        for i in tl.static_range(S * S):
            inside = on_grid(row * S + i // S, column * S + i % S, real, H, W)
            write(q + (corner + (i // S * W + i % S) * C), inside, sums[2 + i])
            if HAS_MOMENTS:
                stats_q = note(stats_q, sums[2 + i], inside, (turn == 0) & (i == 0))
                n_q += inside.to(tl.float32)

    if HAS_MOMENTS:
        write_moments(moments, 0, n_q, stats_q, C, CHANNELS)
        write_moments(moments, 1, n_k, stats_k, C, CHANNELS)
        write_moments(moments, 2, n_k, stats_v, C, CHANNELS)


@triton.jit
def whole(upstream, output, result, inside, offset, slope, HAS_MOMENTS: tl.constexpr):
    """The gradient of an output, through its moments too, which is then written to `result`."""
    gradient = read(upstream, inside)
    if HAS_MOMENTS:
        gradient += slope * read(output, inside)
        gradient += inside.to(tl.float32)[:, None] * offset
        write(result, inside, gradient)
    return gradient


@triton.jit(do_not_specialize=SIZES)
def outputs_kernel(
    tokens, grad_q, grad_k, grad_v, q, k, v, lines, whole_q, whole_k, whole_v, grad_taps,
    turns, cells, H, W, h, w,
    C: tl.constexpr, CLASS: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The whole gradients of q, k and v; a program's part of those of weights, then of biases."""
    PAD: tl.constexpr = K // 2
    PATCH: tl.constexpr = S - 1 + K
    TAPS: tl.constexpr = K * K
    line = rows_of(lines, 6, C, CHANNELS)
    sums = zeros(3 * TAPS + 3, CELLS, CHANNELS)

    for turn in range(turns):
        image, row, column, real = cells_of(turn, turns, cells, h, w, CELLS)
        key = offsets(image, row, column, h, w, C, CLASS, CHANNELS)
        grad_key = whole(grad_k + key, k + key, whole_k + key, real, line[2], line[3], HAS_MOMENTS)
        grad_value = whole(
            grad_v + key, v + key, whole_v + key, real, line[4], line[5], HAS_MOMENTS
        )
        corner = offsets(image, row * S, column * S, H, W, C, CLASS, CHANNELS)
        grad_query = ()
        grad_bias = sums[3 * TAPS]
        for i in tl.static_range(S * S):
            inside = on_grid(row * S + i // S, column * S + i % S, real, H, W)
            query = corner + (i // S * W + i % S) * C
            grad = whole(
                grad_q + query, q + query, whole_q + query, inside, line[0], line[1], HAS_MOMENTS
            )
            grad_query = grad_query + (grad,)
            grad_bias += grad
        grad_biases = (grad_bias, sums[3 * TAPS + 1] + grad_key, sums[3 * TAPS + 2] + grad_value)

        top, left = row * S - PAD, column * S - PAD
        corner = offsets(image, top, left, H, W, C, CLASS, CHANNELS)
        for y in tl.static_range(PATCH):
            in_row = tokens + (corner + y * W * C)
            for x in tl.static_range(PATCH):
                token = read(in_row + x * C, on_grid(top + y, left + x, real, H, W))
                grown = ()
                for t in tl.static_range(TAPS):
                    total = sums[t]
                    for i in tl.static_range(S * S):
                        if y == t // K + i // S and x == t % K + i % S:
                            total += token * grad_query[i]
                    grown = grown + (total,)
                for t in tl.static_range(2 * TAPS):
                    total = sums[TAPS + t]
                    if y == t % TAPS // K and x == t % K:
                        total += token * (grad_key if t < TAPS else grad_value)
                    grown = grown + (total,)
                sums = grown + grad_biases

    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    for t in tl.static_range(3 * TAPS + 3):
        row_of = tl.program_id(0) * (3 * TAPS + 3) + t
        tl.store(grad_taps + row_of * C + c, tl.sum(sums[t], axis=0))


@triton.jit(do_not_specialize=SIZES)
def tokens_kernel(
    grad_q, grad_k, grad_v, taps, grad_tokens,
    turns, cells, H, W, h, w,
    C: tl.constexpr, CLASS: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of the tokens, of S x S in each cell, for whole gradients of q, k and v."""
    PAD: tl.constexpr = K // 2
    PATCH: tl.constexpr = S - 1 + K
    # Row y of a cell lies under tap t of the key in row (y + PAD - t) / S from there.
    FIRST: tl.constexpr = -(PAD // S)
    KEYS: tl.constexpr = (S - 1 + PAD) // S - FIRST + 1
    weights = rows_of(taps, 3 * K * K, C, CHANNELS)

    for turn in range(turns):
        image, row, column, real = cells_of(turn, turns, cells, h, w, CELLS)
        sums = zeros(S * S, CELLS, CHANNELS)
        top, left = row * S - PAD, column * S - PAD
        corner = offsets(image, top, left, H, W, C, CLASS, CHANNELS)
        for y in tl.static_range(PATCH):
            in_row = grad_q + (corner + y * W * C)
            for x in tl.static_range(PATCH):
                grad = read(in_row + x * C, on_grid(top + y, left + x, real, H, W))
                grown = ()
                for i in tl.static_range(S * S):
                    grown = grown + (
                        add_tap(
                            sums[i], grad, weights, 0,
                            i // S + 2 * PAD - y, i % S + 2 * PAD - x, K,
                        ),
                    )  # fmt: skip
                sums = grown

        top, left = row + FIRST, column + FIRST
        corner = offsets(image, top, left, h, w, C, CLASS, CHANNELS)
        for y in tl.static_range(KEYS):
            in_row = corner + y * w * C
            for x in tl.static_range(KEYS):
                inside = on_grid(top + y, left + x, real, h, w)
                grad_key = read(grad_k + (in_row + x * C), inside)
                grad_value = read(grad_v + (in_row + x * C), inside)
                grown = ()
                for i in tl.static_range(S * S):
                    key_sum = add_tap(
                        sums[i], grad_key, weights, 1,
                        i // S + PAD - (FIRST + y) * S, i % S + PAD - (FIRST + x) * S, K,
                    )  # fmt: skip
                    grown = grown + (
                        add_tap(
                            key_sum, grad_value, weights, 2,
                            i // S + PAD - (FIRST + y) * S, i % S + PAD - (FIRST + x) * S, K,
                        ),
                    )  # fmt: skip
                sums = grown

        corner = offsets(image, row * S, column * S, H, W, C, CLASS, CHANNELS)
        for i in tl.static_range(S * S):
            inside = on_grid(row * S + i // S, column * S + i % S, real, H, W)
            write(grad_tokens + (corner + (i // S * W + i % S) * C), inside, sums[i])


# ------------------------------------------------------------------------------ launching


class Launch:
    """How the kernels go through some tokens.

    Args:
        tokens: (B, N, C), contiguous.
        taps: (3, K², C).
        size: H, W.
        stride: S.
    """

    def __init__(self, tokens: Tensor, taps: Tensor, size: tuple[int, int], stride: int) -> None:
        assert all(tensor.is_contiguous() for tensor in (tokens, taps))
        N, C = tokens.shape[1:]
        _, _, (h, w) = grids(size, stride)
        channels = min(64, C & -C)  # a power of 2 that divides C
        at_once = 4 * 32 * WARPS // channels  # four channels of a cell for each thread
        cells, columns = len(tokens) * h * w, C // channels
        tiles = -(-cells // at_once)
        turns = max(1, tiles * columns // PROGRAMS)
        self.programs, self.columns = -(-tiles // turns), columns
        self.sizes = (turns, cells, *size, h, w)
        self.options = {
            "C": C,
            "CLASS": N - size[0] * size[1],
            "K": int(taps.shape[1] ** 0.5),
            "S": stride,
            "CELLS": at_once,
            "CHANNELS": channels,
            "num_warps": WARPS,
        }

    def __call__(self, kernel: Any, *tensors: Tensor, **flags: bool) -> None:
        """Run a kernel on tensors."""
        with torch.cuda.device_of(tensors[0]):
            kernel[self.programs, self.columns](*tensors, *self.sizes, **self.options, **flags)


def forward(
    tokens: Tensor,
    taps: Tensor,
    bias: Tensor,
    size: tuple[int, int],
    stride: int,
    moments: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `qkv_projection.convolve` gives, but for class tokens."""
    launch = Launch(tokens, taps, size, stride)
    keys = keys_shape(tokens.shape, size, stride)
    q, k, v = torch.empty_like(tokens), tokens.new_empty(keys), tokens.new_empty(keys)
    table = taps.new_empty(launch.programs if moments else 0, 3, 3, taps.shape[2])
    launch(forward_kernel, tokens, taps, bias, q, k, v, table, HAS_MOMENTS=moments)
    if not moments:
        return q, k, v, table[:, 0]
    count, means, squares = table.unbind(2)  # (programs, 3, C) each
    total = count.sum(0)
    mean = (count * means).sum(0) / total
    variance = (squares + count * (means - mean) ** 2).sum(0) / total
    return q, k, v, torch.stack((mean, variance))


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
    launch = Launch(tokens, taps, size, stride)
    grad_tokens = torch.empty_like(tokens)
    grad_taps = taps.new_empty(launch.programs, 3 * taps.shape[1] + 3, taps.shape[2])
    whole = [torch.empty_like(each) for each in upstream] if moments else upstream
    launch(
        outputs_kernel, tokens, *upstream, *outputs, lines, *whole, grad_taps, HAS_MOMENTS=moments
    )
    launch(tokens_kernel, *whole, taps, grad_tokens)
    return grad_tokens, grad_taps.sum(0)
