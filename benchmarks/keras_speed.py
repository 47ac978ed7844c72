"""How fast is CvT in TensorFlow, beside the one that transformers had?

    python benchmarks/keras_speed.py --peer path/to/python
    python benchmarks/keras_speed.py --peer path/to/python --quick    # a tiny model: does it run?

`--peer` is the Python of an environment with transformers 4, the last to have TensorFlow:

    python -m venv peer
    peer/bin/pip install transformers==4.57.6 tensorflow-cpu==2.21.0 tf-keras==2.21.0

Both have the same shape, random weights, fp32, images (B, 3, H, W), and each the activation that it
gives the variant, QuickGELU here and GELU there. Questions:
- inference: from pixels to logits in a `tf.function`, compiled by XLA and not; the faster of
  transformers' two is the reference.
- training: forward, cross-entropy, backward and AdamW, on one random batch that stays where it is.
  Transformers' must be compiled: plain TensorFlow cannot train it on a CPU. Drop path is zero, so
  that neither skips work and transformers' does no harm.

The two take turns, each in a process of its own, which waits while the other works; so a busy
machine slows both. The ratio is the median of the turns' own ratios, and its spread their
quartiles. What it takes to tell a process to run, about a tenth of a millisecond, is counted.

Prints a table and writes it to `results/keras-<device>-tf<version>-<date>.csv`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    SHAPES,
    Row,
    command_line,
    count,
    counts,
    duration,
    per_image,
    ratio,
    result_file,
    show,
    speed,
    write_rows,
)
from peers import shape

import cvt
from cvt.inference.benchmark import device_name, in_turns, middle


class Peer(NamedTuple):
    """A model, and whether XLA compiles it."""

    model: str
    jit: bool


OURS = (Peer("cvt", True), Peer("cvt", False))
PEERS = {
    "inference": (Peer("transformers", False), Peer("transformers", True)),
    "training": (Peer("transformers", True),),
}


class Worker:
    """A process with a model, which runs when it is told to, while a `with` block lasts."""

    def __init__(self, python: str, model: str, folder: Path, threads: int) -> None:
        script = Path(__file__).with_name("keras_worker.py")
        self.model = model
        self.process = subprocess.Popen(
            [python, str(script), model, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Worker":
        self.versions = self.answer()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def answer(self) -> Any:
        """What it says next; the program ends with it."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.model} has ended; it says above why")
        return json.loads(line)

    def run(self, **task: object) -> None:
        """Let it run a task once."""
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        self.answer()


def measure(workers: dict[str, Worker], options: argparse.Namespace) -> Iterator[Row]:
    """A row for each peer, question and batch size."""
    asked = [("inference", size) for size in options.batch_sizes]
    for question, batch_size in [*asked, ("training", options.training_batch_size)]:
        where = {"batch_size": batch_size, "image_size": options.image_size}
        runs = {
            c: partial(workers[c.model].run, question=question, jit=c.jit, **where)
            for c in (*PEERS[question], *OURS)
        }
        times = in_turns(runs, options.seconds, options.turns)
        reference = min((times[peer] for peer in PEERS[question]), key=middle)
        for peer, turns in times.items():
            figures = speed(per_image(batch_size, turns)) | ratio(turns, reference)
            yield {"question": question, **peer._asdict(), **where, **figures}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--peer", metavar="PYTHON", required=True, help="of transformers 4")
    parser.add_argument("--variant", choices=SHAPES, default="cvt-13")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few and small images")
    parser.add_argument("--image-size", type=count, default=224)
    parser.add_argument("--batch-sizes", type=counts, default=[1, 32], help="of inference")
    parser.add_argument("--training-batch-size", type=count, default=16)
    parser.add_argument(
        "--seconds", type=duration, default=5.0, help="of each model and batch size"
    )
    parser.add_argument("--turns", type=count, default=12, help="of each peer, at least")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.quick:
        options.variant, options.image_size = "tiny", 32
        options.turns, options.seconds = 2, 0.0
        options.batch_sizes, options.training_batch_size = [1, 2], 2
    return options


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    config = shape(options.variant)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        config.save_pretrained(folder)
        pythons = {"transformers": options.peer, "cvt": sys.executable}
        workers = {
            model: stack.enter_context(Worker(python, model, Path(folder), options.threads))
            for model, python in pythons.items()
        }
        versions = workers["cvt"].versions
        name, library = "keras-quick" if options.quick else "keras", f"tf{versions['tensorflow']}"
        path = result_file(options.results, name, "cpu", options.overwrite, library)
        rows = list(measure(workers, options))
    show(rows)
    about = {
        "variant": options.variant,
        "device": device_name("cpu"),
        "threads": options.threads,
        **versions,
        **{f"peer_{library}": v for library, v in workers["transformers"].versions.items()},
        "cvt": cvt.__version__,
    }
    write_rows(path, [row | about for row in rows], "w" if options.overwrite else "x")


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
