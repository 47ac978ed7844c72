"""How much memory does a training step of CvT take, beside transformers' CvT?

    python benchmarks/memory.py
    python benchmarks/memory.py --variants cvt-13,cvt-w24-384
    python benchmarks/memory.py --quick    # a tiny model on 2 small images

Nothing is allocated and no GPU is needed: an eager step on fake tensors, which have a shape and a
type but no data, and the most bytes alive at a time, each storage once: images, weights, gradients,
what AdamW remembers, all that is kept for the backward pass and what comes and goes. What a library
takes for itself, and an allocator's gaps, are not in it.

Peers: transformers' CvT; timm's swin_tiny, convnext_tiny and pvt_v2_b2, beside cvt-13 at 224;
ours as `cvt train` has it, as it is built, with Triton's kernels (`cvt.kernels.apply_triton`), and
with gradient checkpointing. Precisions: fp32, and bf16 by autocast, as a GPU's: LayerNorm and
softmax in fp32.

Prints a table and writes `results/memory-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from common import QUICK, VARIANTS, Row, command_line, result_file, show, some_of, write_rows
from peers import DTYPES, YARDSTICKS, Logits, build, shape, training_step
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cvt.inference.benchmark import versions
from cvt.kernels import apply_triton, recompute_activations
from cvt.profile import LiveMemory

FORMS = ("", "plain", "triton", "gradient checkpointing")  # of ours
COLUMNS = ("variant", "image_size", "batch_size", "precision", "model", "form")


def in_fp32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What autocast computes in fp32 on a GPU, and on a CPU does not."""

    def computed(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        x = x.float() if torch.is_autocast_enabled("cpu") else x
        return function(x, *arguments, **options)

    return computed


def peak(size: tuple[str, int, int], precision: str, name: str, form: str) -> int:
    """The most bytes alive at a time in training steps of a model."""
    variant, pixels, batch = size
    with torch.device("meta"):
        model = build(name, shape(variant))
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        patch.object(F, "layer_norm", in_fp32(F.layer_norm)),
        patch.object(F, "softmax", in_fp32(F.softmax)),
        patch.object(Tensor, "softmax", in_fp32(Tensor.softmax)),
    ):
        model.to_empty(device="cpu")
        if name == "cvt" and form != "plain":
            recompute_activations(model)
        if form == "triton":
            apply_triton(model)
        if form == "gradient checkpointing":
            model.activation_checkpointing_enable()
        images = torch.empty(batch, 3, pixels, pixels)
        step = training_step(model, Logits(model), images, DTYPES[precision])
        with LiveMemory([*model.state_dict().values(), images]) as memory:
            step()
            step()  # now AdamW remembers
    return memory.peak


def rows_of(size: tuple[str, int, int], precision: str) -> list[Row]:
    """A row for each peer."""
    others = YARDSTICKS if size == VARIANTS["cvt-13"] else ()
    peers = [*((name, "") for name in ("transformers", *others)), *product(["cvt"], FORMS)]
    peaks = {peer: peak(size, precision, *peer) for peer in peers}
    return [
        dict(zip(COLUMNS, (*size, precision, *peer), strict=True))
        | {
            "peak_memory_mib": f"{bytes_ / 2**20:.1f}",
            "share": f"{bytes_ / peaks['transformers', '']:.3f}",
        }
        for peer, bytes_ in peaks.items()
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    choices = ", ".join(VARIANTS)
    parser.add_argument(
        "--variants", type=some_of(VARIANTS), default=VARIANTS, help=f"of {choices}"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model on 2 small images")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Counts, prints, writes."""
    name = "memory-quick" if options.quick else "memory"
    path = result_file(options.results, name, "cpu", options.overwrite)
    sizes = [QUICK] if options.quick else [VARIANTS[name] for name in options.variants]
    rows = [row for size, how in product(sizes, DTYPES) for row in rows_of(size, how)]
    show(rows)
    about = versions(("torch", "transformers", "timm", "cvt"))
    write_rows(path, [row | about for row in rows], "w" if options.overwrite else "x")


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
