"""How near do the kernels of the projections come to the rate of a copy, and what do they save?

    python benchmarks/projections.py
    python benchmarks/projections.py --variant cvt-w24 --image-size 384 --batch-size 32
    python benchmarks/projections.py --quick    # a tiny model, on a CPU too: does all of it run?

For each stage of a CvT, on random tokens in bf16:
- forward, backward: `cvt::convolve` and its gradients alone. Bytes are those of the tensors that
  their kernels read and write, each once; the copy share is their rate as a share of that of a copy
  on the device.
- projections: queries, keys and values with their gradients, by the modules, which is the
  reference, and after `cvt.kernels.apply_triton`, both eager and compiled by torch.compile.

All of a stage take turns, timed by CUDA events; figures are medians, and ratios the medians of the
turns' own ratios.

Prints a table and writes `results/projections-<device>-torch<version>-<date>.csv`.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial

import torch
from common import CLOCKS, SHAPES, Row, command_line, count, duration, result_file, show, write_rows
from peers import shape
from torch import Tensor

from cvt.inference.benchmark import device_name, in_turns, middle, speed_ratios, versions
from cvt.kernels import apply_triton
from cvt.kernels.qkv_projection import convolve, parts_of
from cvt.kernels.qkv_reference import taps_of
from cvt.modeling import SelfAttention

Runs = dict[tuple[str, str], Callable[[], object]]
COPIED = 2**28  # numbers, a GiB
COLUMNS = ("stage", "what", "how", "ms", "gb_per_second", "copy_share", "ratio")


def of_kernels(attention: SelfAttention, x: Tensor, grid: tuple[int, int]) -> tuple[Runs, Row]:
    """The operator alone, forward and backward, and the bytes of both."""
    parts = parts_of(attention)
    taps = taps_of(part.convolution.weight.detach() for part in parts)
    bias = torch.zeros(3, x.shape[2], device=x.device)
    geometry = (*grid, parts[1].convolution.stride[0], True)
    *outputs, class_token, _ = convolve(x, taps, bias, *geometry)
    upstream = [torch.randn_like(output) for output in outputs]
    lines = torch.randn(3, 2, x.shape[2], device=x.device)
    backward = torch.ops.cvt.convolve_backward
    runs = {
        ("forward", ""): partial(convolve, x, taps, bias, *geometry),
        ("backward", ""): partial(
            backward, upstream, class_token, outputs, lines, x, taps, *geometry
        ),
    }
    # Backward, the first kernel reads and writes gradients of the outputs, the second reads them.
    made = sum(output.nbytes for output in outputs)
    return runs, {"forward": x.nbytes + made, "backward": 2 * x.nbytes + 4 * made}


def of_projections(attention: SelfAttention, x: Tensor, grid: tuple[int, int]) -> Runs:
    """Queries, keys and values, forward and backward, in every way."""
    x = x.clone().requires_grad_()
    upstream = None

    def step(project: Callable) -> None:
        nonlocal upstream
        with torch.autocast(x.device.type, torch.bfloat16):
            made = project(x, grid)
        upstream = upstream or [torch.randn_like(tokens) for tokens in made]
        torch.autograd.backward(made, upstream)

    one_pass = copy.deepcopy(attention)
    apply_triton(one_pass)
    runs: Runs = {}
    for how, module in (("modules", attention), ("triton", one_pass)):
        runs["projections", f"{how} eager"] = partial(step, module.project)
        compiled = torch.compile(module.project, dynamic=False)
        runs["projections", f"{how} compiled"] = partial(step, compiled)
    return runs


def stage_rows(number: int, options: argparse.Namespace) -> list[Row]:
    """The rows of a stage, counted from 0."""
    config = shape(options.variant)
    stage = config.stages[number]
    H = W = options.image_size // 4 // 2**number
    with torch.device(options.device):
        attention = SelfAttention(config, stage).train()
        tokens = torch.randn(options.batch_size, H * W + stage.cls_token, stage.embed_dim)
        copied = torch.randn(COPIED)
    x = tokens.to(torch.bfloat16)
    runs, moved = of_kernels(attention, x, (H, W))
    runs |= of_projections(attention, x, (H, W))
    runs["copy", ""] = partial(torch.empty_like(copied).copy_, copied)
    moved["copy"] = 2 * copied.nbytes
    clock = CLOCKS[options.device]
    times = in_turns(runs, options.seconds, options.turns, clock=clock)
    rows = []
    for (what, how), turns in times.items():
        seconds = middle(turns)
        row = dict.fromkeys(COLUMNS, "") | {"stage": number + 1, "what": what, "how": how}
        row["ms"] = f"{1000 * seconds:.4g}"
        if what in moved:
            rate = moved[what] / seconds
            row["gb_per_second"] = f"{rate / 1e9:.4g}"
            row["copy_share"] = f"{rate / moved['copy'] * middle(times['copy', '']):.3f}"
        else:
            row["ratio"] = f"{speed_ratios(times['projections', 'modules eager'], turns)[1]:.3f}"
        rows.append(row)
    return rows


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, on_gpu=True)
    parser.add_argument("--variant", choices=SHAPES, default="cvt-13")
    parser.add_argument("--image-size", type=count, default=224)
    parser.add_argument("--batch-size", type=count, default=256)
    parser.add_argument("--seconds", type=duration, default=1.0, help="of each that takes turns")
    parser.add_argument("--turns", type=count, default=8, help="of each, at least")
    parser.add_argument("--quick", action="store_true", help="a tiny model on 2 small images")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.quick:
        parser.error("there is no GPU; --quick tries the program on a CPU")
    if options.quick:
        options.variant, options.image_size, options.batch_size = "tiny", 64, 2
        options.turns, options.seconds = 2, 0.0
    return options


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    name = "projections-quick" if options.quick else "projections"
    path = result_file(options.results, name, options.device, options.overwrite)
    rows = [row for number in range(3) for row in stage_rows(number, options)]
    show(rows)
    about = {
        "variant": options.variant,
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "device": device_name(options.device),
        **versions(("torch", "triton", "cvt")),
    }
    write_rows(path, [row | about for row in rows], "w" if options.overwrite else "x")


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
