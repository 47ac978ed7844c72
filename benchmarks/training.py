"""How fast and how large is a training step of CvT on a CPU, beside transformers' CvT?

    python benchmarks/training.py --batch-size 16 --image-size 224 --variant cvt-13 --precision bf16

A step is forward, cross-entropy, backward and a fused AdamW, on one random batch that stays where
it is; under autocast unless the precision is fp32. Both models have the same shape and a drop path
of zero, so that neither skips work and transformers' drop path does no harm; each has the
activation that it gives the variant, QuickGELU here and GELU there; ours is prepared as `cvt train`
does. Both are eager, or both
compiled with `--compile`.

Speed: the two take turns, step by step in one process, so that a busy machine slows both; the
ratio is the median of the turns' own ratios, and its spread their quartiles. Memory: each runs
alone in a process of its own, of which it is the peak (Linux).

Prints a table and writes it to `results/training-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import sys
from collections.abc import Callable

import torch
import transformers
from common import (
    SHAPES,
    command_line,
    count,
    in_fresh_process,
    peak_memory,
    result_file,
    write_rows,
)
from peers import DTYPES, Logits, build, shape, training_step

import cvt
from cvt.inference.benchmark import device_name, in_turns, middle, speed_ratios
from cvt.kernels import apply_cpu_bf16, recompute_activations

PEERS = ("cvt", "transformers")


def prepared(peer: str, options: argparse.Namespace) -> Callable[[], None]:
    """A peer's step."""
    torch.set_num_threads(options.threads)
    inner = build(peer, shape(options.variant))
    if peer == "cvt":  # as `cvt train` has it
        recompute_activations(inner)
        if options.precision == "bf16":
            apply_cpu_bf16(inner)
    model = Logits(inner)
    forward = torch.compile(model) if options.compile else model
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size)
    return training_step(model, forward, images, DTYPES[options.precision])


def peak_of_training(peer: str, options: argparse.Namespace) -> float:
    """Peak of this process when it trains that peer alone, in MiB."""
    step = prepared(peer, options)
    for _ in range(5):
        step()
    return peak_memory()


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """One row for each peer."""
    steps = {peer: prepared(peer, options) for peer in PEERS}
    times = in_turns(steps, least=options.steps, turn=0)
    quartiles = speed_ratios(times["transformers"], times["cvt"])
    rows = []
    for peer in PEERS:
        # A fresh process each, so that the second does not start on the memory of the first.
        memory = in_fresh_process(peak_of_training, peer, options)
        step = middle(times[peer])
        rows.append(
            {
                "model": peer,
                "images_per_second": round(options.batch_size / step, 2),
                "ms_per_image": round(1000 * step / options.batch_size, 2),
                "speed_ratio": round(quartiles[1], 3) if peer == "cvt" else 1,
                "ratio_quartiles": f"{quartiles[0]:.3f} to {quartiles[2]:.3f}",
                "peak_memory_mib": round(memory),
                "variant": options.variant,
                "image_size": options.image_size,
                "batch_size": options.batch_size,
                "precision": options.precision,
                "compiled": options.compile,
                "steps": options.steps,
                "device": device_name("cpu"),
                "threads": options.threads,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "cvt": cvt.__version__,
            }
        )
    return rows


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--variant", choices=SHAPES, default="cvt-13")
    parser.add_argument("--image-size", type=count, default=224)
    parser.add_argument("--batch-size", type=count, default=16)
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--compile", action="store_true", help="both models with torch.compile")
    parser.add_argument("--steps", type=count, default=20, help="of each model, after the warm-up")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    path = result_file(options.results, "training", "cpu", options.overwrite)
    rows = measure(options)
    for column in list(rows[0])[:6]:
        print(f"{column:20}", *(f"{row[column]!s:>18}" for row in rows))
    write_rows(path, rows, "w" if options.overwrite else "x")


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
