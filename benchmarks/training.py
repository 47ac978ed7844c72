"""How fast and how large is a training step of CvT, beside transformers' CvT?

    python benchmarks/training.py --batch-size 16 --image-size 224 --variant cvt-13 --precision bf16

A step is forward, cross-entropy, backward and a fused AdamW, on one random batch that stays where
it is; under autocast unless the precision is fp32. Both models have the same shape and a drop path
of zero, so that neither skips work and transformers' drop path does no harm; each has the
activation that it gives the variant, QuickGELU here and GELU there. Both are eager, or both
compiled with `--compile`.

Speed: the two take turns, step by step in one process, so that a busy machine slows both; the
ratio is the median of the turns' own ratios, and its spread their quartiles. Memory: each runs
alone in a process of its own, of which it is the peak (Linux), or the peak on the GPU.

Prints a table and writes it to `results/training-<device>-torch<version>-<date>.csv`.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from measuring import (
    RESULTS,
    in_fresh_process,
    peak_memory,
    result_file,
    transformers_cvt,
    write_rows,
)

from cvt import CvtConfig, CvtForImageClassification
from cvt.benchmark import device_name, in_turns, middle, speed_ratios

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONTESTANTS = ("cvt", "transformers")


def build(contestant: str, config: CvtConfig) -> torch.nn.Module:
    """A fresh model of a contestant, of the shape of `config`."""
    torch.manual_seed(0)
    return (CvtForImageClassification if contestant == "cvt" else transformers_cvt)(config)


def training_step(contestant: str, options: argparse.Namespace) -> Callable[[], None]:
    """A function that takes one step."""
    torch.set_num_threads(options.threads)
    config = CvtConfig.from_variant(options.variant)
    config.drop_path_rate = [0.0] * len(config.depth)
    model = build(contestant, config).train().to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    shape = (options.batch_size, config.num_channels, options.image_size, options.image_size)
    images = torch.randn(shape, device=options.device)
    labels = torch.arange(options.batch_size, device=options.device) % config.num_labels
    precision = PRECISIONS[options.precision]
    scaler = torch.amp.GradScaler(options.device, enabled=precision is torch.float16)
    forward = torch.compile(model) if options.compile else model

    def step() -> None:
        with torch.autocast(options.device, precision, enabled=precision is not torch.float32):
            loss = F.cross_entropy(forward(pixel_values=images).logits, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step


def peak_of_training(contestant: str, options: argparse.Namespace) -> float:
    """Peak of this process, or of its GPU memory, when it trains that contestant alone, in MiB."""
    step = training_step(contestant, options)
    for _ in range(5):
        step()
    return peak_memory(options.device)


def measure(options: argparse.Namespace) -> list[dict[str, object]]:
    """One row for each contestant."""
    steps = {contestant: training_step(contestant, options) for contestant in CONTESTANTS}
    times = in_turns(steps, least=options.steps, turn=0)
    quartiles = speed_ratios(times["transformers"], times["cvt"])
    rows = []
    for contestant in CONTESTANTS:
        # A fresh process each, so that the second does not start on the memory of the first.
        memory = in_fresh_process(peak_of_training, contestant, options)
        step = middle(times[contestant])
        rows.append(
            {
                "model": contestant,
                "images_per_second": round(options.batch_size / step, 2),
                "ms_per_image": round(1000 * step / options.batch_size, 2),
                "speed_ratio": round(quartiles[1], 3) if contestant == "cvt" else 1,
                "ratio_quartiles": f"{quartiles[0]:.3f} to {quartiles[2]:.3f}",
                "peak_memory_mib": round(memory),
                "variant": options.variant,
                "image_size": options.image_size,
                "batch_size": options.batch_size,
                "precision": options.precision,
                "compiled": options.compile,
                "steps": options.steps,
                "device": device_name(options.device),
                "threads": options.threads,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "cvt": importlib.metadata.version("cvt-vision"),
            }
        )
    return rows


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    summary, _, details = __doc__.partition("\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=formatter)
    parser.add_argument("--variant", default="cvt-13", help="cvt-13, cvt-21 or cvt-w24")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--compile", action="store_true", help="both models with torch.compile")
    parser.add_argument("--steps", type=int, default=20, help="of each model, after the warm-up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--overwrite", action="store_true", help="replace a result of today")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    path = result_file(options.results, "training", options.device, options.overwrite)
    rows = measure(options)
    for column in list(rows[0])[:6]:
        print(f"{column:20}", *(f"{row[column]!s:>18}" for row in rows))
    write_rows(path, rows, options.overwrite)


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
