"""How fast does CvT train and answer on a GPU, and how much of that GPU does it use?

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only training --variants cvt-13,cvt-w24-384 --precisions bf16
    python benchmarks/gpu.py --budget 480     # begin nothing new after so many seconds
    python benchmarks/gpu.py --quick          # a tiny model, on a CPU too: does all of it run?

Questions:
- inference: from images to logits.
- training: a step of forward, cross-entropy, backward and a fused AdamW.
Both on one random batch that stays where it is, by random weights without drop path. All of it
takes hours, most of them to compile, so what matters most comes first, and every table is added to
the csv as soon as it is there.

Peers: transformers' CvT and ours, of the same shape, eager and compiled by torch.compile for
that very size. Forms of ours are the model as `cvt train` has it, that with Triton's kernels
(`cvt.kernels.apply_triton`), and the fused one (`cvt.fuse`), which also runs as a CUDA graph
(mode="reduce-overhead"). Beside cvt-13 at 224, timm's models of its size. All are
channels-last but transformers' CvT, which cannot be. bf16 is autocast, but for the fused form,
whose weights are bf16; tf32 and fp32 say how products and convolutions of fp32 are computed.

Speed: all of a table take turns in one process. A turn is a burst of steps, queued without waiting
for them, between two CUDA events. Figures are medians of the turns, and ratios medians of the
turns' own ratios to transformers' eager and compiled.

Memory: the most that a peer has allocated at a time in its steps, batch, weights and
optimizer included, but not what compiling takes, nor what was there before it.

Operations: those of matrix products, convolutions and attention, forward and backward, as
`cvt.macs` counts them, in an eager step on fake tensors; of what is compiled or has kernels,
in its form without. What attention computes again on the way back is counted. The matrix
share is their rate beside that of a product of matrices in the same precision.

Bytes: the least that these operations could move, which is the inputs and outputs of each, as if
all else (norms, activations, sums, copies, the optimizer) were fused into them. A step moves more.
The copy share is the rate of these bytes beside that of a copy on the device. Product and copy take
their turns with the peers.

A peer that fails has a row that says why. Prints tables and writes
`results/gpu-<device>-torch<version>-<date>.csv`. So far it has run on a CPU only,
where PyTorch's own operators take the place of the kernels.
"""

import argparse
import functools
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from common import (
    CLOCKS,
    QUICK,
    VARIANTS,
    Row,
    command_line,
    count,
    duration,
    per_image,
    result_file,
    show,
    some_of,
    write_rows,
)
from peers import YARDSTICKS, Logits, build, shape, training_step
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

from cvt import fuse
from cvt.inference.benchmark import Turns, device_name, in_turns, middle, speed_ratios, versions
from cvt.kernels import apply_triton, recompute_activations
from cvt.macs import MacCounter

QUESTIONS = ("inference", "training")
PRECISIONS = ("bf16", "tf32", "fp32")
TURN = 0.2  # seconds of a burst


class Case(NamedTuple):
    """What is asked of all peers of one table."""

    question: str
    variant: str
    image_size: int
    batch_size: int
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class Peer(NamedTuple):
    """A model, the form of ours, and how it runs."""

    model: str
    form: str
    run: str


RUNS = ("eager", "compiled")
EAGER, COMPILED = REFERENCES = tuple(Peer("transformers", "", run) for run in RUNS)
MODELS = tuple(Peer("cvt", form, run) for form in ("", "triton") for run in RUNS)
FUSED = tuple(Peer("cvt", "fused", run) for run in (*RUNS, "CUDA graph"))
LIMITS = MATRICES, COPY = Peer("product of matrices", "", ""), Peer("copy", "", "")
COLUMNS = (
    *Case._fields,
    *Peer._fields,
    *("images_per_second", "ms_per_step", "ratio_to_eager", "ratio_to_compiled"),
    *("peak_memory_mib", "tflops", "matrix_share", "gb_per_second", "copy_share", "note"),
)


def peers(case: Case) -> list[Peer]:
    """What the shares are of, then who takes part in a case, most important first."""
    fused = FUSED if case.question == "inference" else ()
    beside = {VARIANTS["cvt-13"]: YARDSTICKS, QUICK: ("test_convnext",)}
    others = beside.get((case.variant, case.image_size, case.batch_size), ())
    yardsticks = [Peer(name, "", run) for run in ("compiled", "eager") for name in others]
    return [*LIMITS, *REFERENCES, *MODELS, *fused, *yardsticks]


# ------------------------------------------------------------------------------ peers


def case_model(name: str, case: Case, device: str) -> nn.Module:
    """A model of the size of a case."""
    with torch.device(device):
        model = build(name, shape(case.variant))
    return model if name == "transformers" else model.to(memory_format=torch.channels_last)


def stepping(model: nn.Module, peer: Peer, case: Case, device: str) -> Callable[[], object]:
    """A function that takes a step of a peer's model; a GPU is not waited for."""
    name, form, run = peer
    images = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=device)
    if name != "transformers":
        images = images.contiguous(memory_format=torch.channels_last)
    training = case.question == "training"
    if name == "cvt" and training:
        recompute_activations(model)
    if form == "triton":
        apply_triton(model)
    if form == "fused":
        model = fuse(model, case.dtype)
    mode = "reduce-overhead" if run == "CUDA graph" else None
    forward = Logits(model if run == "eager" else torch.compile(model, dynamic=False, mode=mode))
    autocast = case.dtype is not torch.float32 and form != "fused"

    @torch.no_grad()
    def answer() -> None:
        with torch.autocast(device, case.dtype, enabled=autocast):
            forward(images)

    return training_step(model, forward, images, case.dtype) if training else answer


class Counter(MacCounter):
    """Adds up the operations of products, convolutions and attention, and the bytes at their ends.

    Attributes:
        bytes: of the tensors that these operators read and write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def add(self, macs: int, args: tuple, result: Any) -> None:
        """Count one call of an operator."""
        super().add(macs, args, result)
        tensors = (x for x in tree_leaves((args, result)) if isinstance(x, Tensor))
        self.bytes += sum(tensor.nbytes for tensor in tensors)

    @property
    def operations(self) -> int:
        """Floating point: two for each multiply-accumulate."""
        return 2 * self.macs


@functools.cache
def counted(name: str, form: str, case: Case, device: str) -> tuple[int, int]:
    """The operations and the bytes of a model's step."""
    model = case_model(name, case, "meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=device)
        step = stepping(model, Peer(name, form, "eager"), case, device)
        with Counter() as counter:
            step()
    return counter.operations, counter.bytes


# ------------------------------------------------------------------------------ measuring


class Prepared(NamedTuple):
    """What is ready to take steps: how many are a burst, and what is in a step."""

    step: Callable[[], object]
    burst: int
    images: int = 0
    operations: int = 0
    bytes: int = 0
    memory: int = 0
    note: str = ""


def burst(step: Callable[[], object], device: str) -> int:
    """How many steps make a burst."""
    return max(1, int(TURN / max(CLOCKS[device](step), 1e-6)))


def prepare_limit(limit: Peer, case: Case, device: str) -> Prepared:
    """A product of matrices of 8192 x 8192, or a copy of a GiB."""
    n = 64 if case.variant == "tiny" else 8192
    if limit == MATRICES:
        a, b = torch.randn(2, n, n, device=device).to(case.dtype)
        step, executed = partial(torch.mm, a, b), {"operations": 2 * n**3}
    else:
        numbers = torch.randn(4 * n * n, device=device)
        step = partial(torch.empty_like(numbers).copy_, numbers)
        executed = {"bytes": 2 * numbers.nbytes}
    step()
    return Prepared(step, burst(step, device), **executed)


def prepare(peer: Peer, case: Case, device: str) -> Prepared:
    """Make a peer, compile it, and see how much memory its steps take."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = stepping(case_model(peer.model, case, device), peer, case, device)
    step()  # compiles
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()  # records, if it is a CUDA graph
    ready = Prepared(step, burst(step, device), case.batch_size)
    ready = ready._replace(memory=torch.cuda.max_memory_allocated() - before)
    form = "" if peer.form == "triton" else peer.form
    # On a CPU the fused form packs its weights, which fake tensors do not know.
    on = "cuda" if form == "fused" else device
    try:
        operations, moved = counted(peer.model, form, case, on)
    except Exception as error:
        return ready._replace(note=f"not counted: {reason(error)}")
    return ready._replace(operations=operations, bytes=moved)


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def prepare_all(
    case: Case, options: argparse.Namespace
) -> tuple[dict[Peer, Prepared], dict[Peer, str]]:
    """Those that are ready, and the reasons why others are not."""
    prepared, reasons = {}, {}
    for peer in peers(case):
        one = prepare_limit if peer in LIMITS else prepare
        try:
            if time.monotonic() > options.deadline:
                raise TimeoutError(f"the budget of {options.budget:g} seconds is spent")
            prepared[peer] = one(peer, case, options.device)
        except Exception as error:
            reasons[peer] = reason(error)
    return prepared, reasons


def seconds_of_steps(
    prepared: dict[Peer, Prepared],
    reasons: dict[Peer, str],
    options: argparse.Namespace,
) -> dict[Peer, Turns]:
    """Seconds of a step, turn by turn, of those that never failed; adds to the reasons."""

    def take_turn(peer: Peer) -> None:
        step, steps, *_ = prepared[peer]
        try:
            for _ in range(0 if peer in reasons else steps):
                step()
        except Exception as error:  # now that all are there, each has less memory
            reasons[peer] = reason(error)

    runs = {peer: partial(take_turn, peer) for peer in prepared}
    clock = CLOCKS[options.device]
    times = in_turns(runs, options.seconds, options.turns, turn=0, clock=clock)
    return {c: per_image(prepared[c].burst, times[c]) for c in times if c not in reasons}


def speed_rows(case: Case, options: argparse.Namespace) -> list[Row]:
    """A row for each peer of a case, and for what the shares are of."""
    torch.compiler.reset()  # else this case's models would count as recompilations of another's
    tf32 = case.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    prepared, reasons = prepare_all(case, options)
    times = seconds_of_steps(prepared, reasons, options)
    rows = []
    for peer in peers(case):
        row = dict.fromkeys(COLUMNS, "") | case._asdict() | peer._asdict()
        if peer in times:
            row |= figures(peer, prepared, times)
        row["note"] = reasons.get(peer) or prepared[peer].note
        rows.append(row)
    return rows


def figures(
    peer: Peer,
    prepared: dict[Peer, Prepared],
    times: dict[Peer, Turns],
) -> Row:
    """What a row tells of a peer that was measured."""
    own, seconds = prepared[peer], middle(times[peer])
    found = {"ms_per_step": 1000 * seconds}
    if own.images:
        found["images_per_second"] = own.images / seconds
        for column, reference in (("ratio_to_eager", EAGER), ("ratio_to_compiled", COMPILED)):
            if reference in times:
                found[column] = speed_ratios(times[reference], times[peer])[1]
    if own.memory:
        found["peak_memory_mib"] = own.memory / 2**20
    if own.operations:
        found["tflops"] = own.operations / seconds / 1e12
    if own.operations and MATRICES in times:
        share = own.operations / prepared[MATRICES].operations
        found["matrix_share"] = share * middle(times[MATRICES]) / seconds
    if own.bytes:
        found["gb_per_second"] = own.bytes / seconds / 1e9
    if own.bytes and COPY in times:
        found["copy_share"] = own.bytes / prepared[COPY].bytes * middle(times[COPY]) / seconds
    return {column: f"{value:.4g}" for column, value in found.items()}


# ------------------------------------------------------------------------------ command line


def measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    """The tables, one after the other."""
    sizes = [QUICK] if options.quick else [VARIANTS[name] for name in options.variants]
    for precision, size, question in product(options.precisions, sizes, options.only):
        yield speed_rows(Case(question, *size, precision), options)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__, on_gpu=True)
    for name, choices in (
        ("--only", QUESTIONS),
        ("--variants", VARIANTS),
        ("--precisions", PRECISIONS),
    ):
        parser.add_argument(
            name, type=some_of(choices), default=list(choices), help=f"of {', '.join(choices)}"
        )
    parser.add_argument("--quick", action="store_true", help="a tiny model on 2 small images")
    parser.add_argument("--seconds", type=duration, default=3.0, help="of each peer's turns")
    parser.add_argument("--turns", type=count, default=8, help="of each peer, at least")
    parser.add_argument(
        "--budget", type=duration, default=math.inf, help="seconds, after which nothing is begun"
    )
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.quick:
        parser.error("there is no GPU; --quick tries the program on a CPU")
    if options.quick:
        options.turns, options.seconds = 2, 0.0
    options.deadline = time.monotonic() + options.budget
    return options


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    name = "gpu-quick" if options.quick else "gpu"
    path = result_file(options.results, name, options.device, options.overwrite)
    mode = "w" if options.overwrite else "x"
    for rows in measure(options):
        print(*(f"{name} {rows[0][name]}" for name in Case._fields), sep=", ")
        show([{name: row[name] for name in COLUMNS if name not in Case._fields} for row in rows])
        libraries = ("torch", "triton", "transformers", "timm", "cvt")
        about = {"device": device_name(options.device), **versions(libraries)}
        write_rows(path, [row | about for row in rows], mode)
        mode = "a"


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
