"""How fast are inference and training of CvT on a GPU, compared with transformers' CvT?

    python benchmarks/gpu.py                # `make gpu` also sets up the environment and runs tests
    python benchmarks/gpu.py --budget 240   # stop after so many seconds, compilation included
    python benchmarks/gpu.py --list         # print what is measured, in this order
    python benchmarks/gpu.py --quick        # one block, on a CPU too: does the script run?

Tasks: inference from images to logits, in bf16, and a training step of forward, cross-entropy,
backward and fused AdamW, under bf16 autocast. Both process one random batch that stays on the
device, with random weights and without drop path.

Models: transformers' CvT, ours and, at 224 pixels, timm's models of the size of cvt-13. "eager" is
PyTorch without compilation, "compiled" is torch.compile for the size at hand, without
max-autotune. Ours is also measured in the inference form ("fused", `cvt.fuse`); its last rows
decide about code that is off until it has run on a GPU: the Triton kernels
(`cvt.kernels.apply_triton`) and CUDA graphs (torch.compile's mode "reduce-overhead"). All use
channels-last but transformers' CvT, which cannot.

What needs no compilation comes first. Each row is printed and written to the csv as soon as it is
measured; at the end of the budget the row in progress is cut, and each row without figures has its
reason in the column `note`.

Speed: a model and transformers' eager one take turns in one process. A turn is a burst of steps,
queued without waiting for them, between two CUDA events. `ms_per_step` is the median of the
turns, `speed_ratio` the median of the turns' own ratios.

Memory: the peak of what a step allocates, weights, batch and optimizer included.

Operations: two for each multiply-accumulate of the forward pass, as `cvt.macs` counts them, and
three times as many in a training step. `matrix_share` is their rate, compared with that of a
matrix product in bf16, the first row.

Writes `results/gpu-<device>-torch<version>-<date>.csv`. So far it has run on a CPU only.
"""

import argparse
import csv
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from common import (
    CLOCKS,
    VARIANTS,
    Row,
    command_line,
    count,
    duration,
    per_image,
    result_file,
)
from peers import YARDSTICKS, Logits, build, forward_operations, shape, training_step

from cvt import fuse
from cvt.inference.benchmark import device_name, in_turns, middle, speed_ratios, versions
from cvt.kernels import apply_triton, recompute_activations

BF16 = torch.bfloat16
QUICK = ("one-block", 32, 2)  # compiling more takes a CPU many minutes
BURST = 0.2  # seconds
MODES = {"compiled": None, "CUDA graph": "reduce-overhead"}  # of torch.compile
LIBRARIES = ("torch", "triton", "transformers", "timm", "cvt")


class Case(NamedTuple):
    """A task, and the size that all models have in it."""

    task: str
    variant: str
    image_size: int
    batch_size: int


class Peer(NamedTuple):
    """A model, the form of ours, and how it runs."""

    model: str
    form: str
    run: str


REFERENCE = Peer("transformers", "", "eager")
FIGURES = (
    "images_per_second",
    "ms_per_step",
    "speed_ratio",
    "memory_mib",
    "tflops",
    "matrix_share",
)
COLUMNS = (*Case._fields, *Peer._fields, *FIGURES, "note")
WIDTHS = (14, 7, 10, 10, 28, 6, 10, *(len(name) for name in FIGURES), 0)
References = dict[Case, Callable[[], object]]


def plan(options: argparse.Namespace) -> list[tuple[Case, Peer]]:
    """What is measured, most important first, and what has to be compiled last."""
    sizes = [QUICK] if options.quick else [VARIANTS["cvt-13"], VARIANTS["cvt-13-384"]]
    sizes = [(name, side, options.batch_size or images) for name, side, images in sizes]
    others = ("test_convnext",) if options.quick else YARDSTICKS
    cases = [Case(task, *size) for size in sizes for task in ("inference", "training")]
    first_inference, first_training = cases[:2]

    def rows(case: Case, run: str) -> list[tuple[Case, Peer]]:
        fused = [Peer("cvt", "fused", run)] if case.task == "inference" else []
        return [
            (case, peer) for peer in (Peer("transformers", "", run), Peer("cvt", "", run), *fused)
        ]

    eager = [row for case in cases for row in rows(case, "eager")]
    timm = [(case, Peer(name, "", "eager")) for case in cases[:2] for name in others]
    compiled = [row for case in cases for row in rows(case, "compiled")]
    undecided = [
        *((first_training, Peer("cvt", "triton", run)) for run in ("eager", "compiled")),
        (first_inference, Peer("cvt", "fused", "CUDA graph")),
    ]
    return [*eager, *timm, *compiled, *undecided]


# ------------------------------------------------------------------------------ peers


def prepare(case: Case, peer: Peer, device: str) -> Callable[[], object]:
    """A function that takes a step of a model; it does not wait for a GPU."""
    with torch.device(device):
        model = build(peer.model, shape(case.variant))
    images = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=device)
    if peer.model != "transformers":
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if peer.form == "triton":
        apply_triton(model)
    if case.task == "training":
        if peer.model == "cvt":
            recompute_activations(model)  # as `cvt train` does
        return training_step(model, runnable(model, peer.run), images, BF16)
    model = fuse(model, BF16) if peer.form == "fused" else model.to(BF16)
    forward, pixels = runnable(model, peer.run), images.to(BF16)

    @torch.no_grad()
    def classify() -> None:
        forward(pixels)

    return classify


def runnable(model: torch.nn.Module, run: str) -> torch.nn.Module:
    """Pixels to logits, eager or compiled."""
    if run == "eager":
        return Logits(model)
    torch.compiler.reset()  # else each model would be a recompilation of the one before it
    return Logits(torch.compile(model, dynamic=False, mode=MODES[run]))


def operations(case: Case, peer: Peer) -> int:
    """Floating point operations of a step."""
    passes = 3 if case.task == "training" else 1  # backward: of the inputs and of the weights
    each = forward_operations(peer.model, case.variant, case.image_size, peer.form == "fused")
    return passes * case.batch_size * each


# ------------------------------------------------------------------------------ measuring


class BudgetSpentError(BaseException):
    """The time is up; no `except Exception` of a compiler holds it."""


@contextmanager
def within(options: argparse.Namespace) -> Iterator[None]:
    """Interrupts what runs, compilation too, at the end of the budget.

    Raises:
        BudgetSpentError: the budget is spent, before or while it runs.
    """

    def stop(*_: object) -> None:
        raise BudgetSpentError(f"cut: the budget of {options.budget:g} s is spent")

    left = options.deadline - time.monotonic()
    if left <= 0:
        raise BudgetSpentError(f"skipped: the budget of {options.budget:g} s is spent")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(left, 1e6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def repeat(step: Callable[[], object], times: int) -> None:
    """Take so many steps."""
    for _ in range(times):
        step()


def burst_of(step: Callable[[], object], device: str) -> int:
    """How many steps fill a burst."""
    return max(1, int(BURST / max(CLOCKS[device](step), 1e-6)))


def matrix_product(options: argparse.Namespace) -> Row:
    """The rate of a product of matrices of 8192 x 8192 in bf16."""
    n = 64 if options.quick else 8192
    a, b = torch.randn(2, n, n, device=options.device).to(BF16)
    multiply = partial(torch.mm, a, b)
    multiply()
    steps = burst_of(multiply, options.device)
    clock = CLOCKS[options.device]
    times = in_turns({"": partial(repeat, multiply, steps)}, 0, options.turns, turn=0, clock=clock)
    return {"tflops": f"{2 * n**3 * steps / middle(times['']) / 1e12:.4g}"}


def measure(
    case: Case, peer: Peer, references: References, peak: float, options: argparse.Namespace
) -> Row:
    """The figures of a model, in turns with transformers' eager one, which is kept for the next."""
    device, on_gpu = options.device, options.device == "cuda"
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    step = prepare(case, peer, device)
    repeat(step, 2)  # compiles, and records a CUDA graph
    figures = {}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step()
        figures["memory_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    runs = {peer: step}
    if case in references:
        runs[REFERENCE] = references[case]
    bursts = {name: burst_of(run, device) for name, run in runs.items()}
    repeated = {name: partial(repeat, run, bursts[name]) for name, run in runs.items()}
    times = in_turns(repeated, options.seconds, options.turns, turn=0, clock=CLOCKS[device])
    times = {name: per_image(bursts[name], turns) for name, turns in times.items()}
    if peer == REFERENCE:
        references[case] = step
    seconds = middle(times[peer])
    figures |= {"ms_per_step": 1000 * seconds, "images_per_second": case.batch_size / seconds}
    if REFERENCE in times:
        figures["speed_ratio"] = speed_ratios(times[REFERENCE], times[peer])[1]
    tflops = operations(case, peer) / seconds / 1e12
    figures |= {"tflops": tflops, "matrix_share": tflops / peak}
    return {name: f"{value:.4g}" for name, value in figures.items()}


def attempt(labels: Row, run: Callable[[], Row], options: argparse.Namespace) -> Row:
    """A row with the figures that a function returns, or with the reason why there are none."""
    row = dict.fromkeys(COLUMNS, "") | labels
    try:
        with within(options):
            return row | run()
    except BudgetSpentError as end:
        return row | {"note": str(end)}
    except Exception as error:
        return row | {"note": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each measurement, as soon as it is done."""
    matrices = attempt({"task": "matrix product"}, partial(matrix_product, options), options)
    yield matrices
    peak = float(matrices["tflops"] or "nan")
    references: References = {}
    for case, peer in plan(options):
        run = partial(measure, case, peer, references, peak, options)
        yield attempt(case._asdict() | peer._asdict(), run, options)


# ------------------------------------------------------------------------------ command line


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, on_gpu=True)
    parser.add_argument(
        "--quick", action="store_true", help="measure a model of one block on 2 images"
    )
    parser.add_argument("--list", action="store_true", help="print what is measured, and stop")
    parser.add_argument(
        "--budget", type=duration, default=300.0, help="stop after so many seconds (default 300)"
    )
    parser.add_argument(
        "--batch-size", type=count, help="images in a step, for a GPU with little memory"
    )
    parser.add_argument(
        "--seconds", type=duration, default=1.5, help="measure each model for at least so long"
    )
    parser.add_argument("--turns", type=count, default=5, help="take at least so many turns")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.quick:
        parser.error("there is no GPU; --quick tries the script on a CPU")
    if options.quick:
        options.seconds = 0
    options.deadline = time.monotonic() + options.budget
    return options


def show(cells: list[object]) -> None:
    """Print a line of the table."""
    print(*(f"{cell!s:{width}}" for cell, width in zip(cells, WIDTHS, strict=True)), flush=True)


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    name = "gpu-quick" if options.quick else "gpu"
    path = result_file(options.results, name, options.device, options.overwrite)
    if options.list:
        for case, peer in plan(options):
            print(*case, *filter(None, peer))
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    show(list(COLUMNS))
    with path.open("w" if options.overwrite else "x", newline="") as file:
        columns = (*COLUMNS, "device", *LIBRARIES)
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows(options):
            show([row[name] for name in COLUMNS])
            about = {"device": device_name(options.device), **versions(LIBRARIES)}
            writer.writerow(row | about)
            file.flush()
    print(path)


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
