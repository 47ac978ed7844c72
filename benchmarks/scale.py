"""What do 10^6 and 10^9 pictures take, and at how many processes does training stop scaling?

    python benchmarks/scale.py              # about ten minutes on two cores
    python benchmarks/scale.py --no-int8    # without calibrating int8
    python benchmarks/scale.py --quick      # a tiny model, one turn

**Pictures.** Milliseconds of one core for each step of a picture's way, all with one thread, in
turns: decoding a JPEG of 640 x 427, of 1024 x 768 and of 12 megapixels as `cvt predict` does;
resizing, cropping and normalising; the model, by variant and precision, in the runtime that
`auto` takes, in batches of 32, of 4 at 384; and what a row of 20 kB costs in Ray Data that is read,
goes through `map_batches` without a model, and is written. From these follow core-hours: the sum,
for 10^6 and 10^9 pictures of 1024 x 768, and the share of the model in it.

**Processes.** One step of the paper's batch, 2048 images, divided among N processes that hold all
weights each. Its time is that of counted operations (three times the forward pass) at `--rate`
FLOP/s; its all-reduce, of 4 bytes a parameter, takes 2 (N - 1) / N times the bytes at
`--bandwidth`, and 2 (N - 1) times `--latency` (a ring); the backward pass, two thirds of the step,
hides it, as DistributedDataParallel does. The efficiency is the ideal time divided by this one.
Those are assumptions, not measurements: no cluster ran it.

Prints both tables and writes them to `results/scale-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import Row, command_line, count, duration, result_file, show, write_pictures, write_rows
from peers import shape

import cvt
from cvt.data.preprocessing import preprocessing_of
from cvt.export import export
from cvt.inference.benchmark import device_name, in_turns, middle, timed, versions
from cvt.inference.predict import reader
from cvt.profile import profile
from cvt.runtime import open_runtime
from cvt.runtime.base import Runtime
from cvt.runtime.factory import MANY_IMAGES, fastest

MODELS = {"cvt-13": 224, "cvt-21": 224, "cvt-w24": 384}
PICTURES = {"640 x 427": (640, 427), "1024 x 768": (1024, 768), "12 megapixels": (4000, 3000)}
USUAL = "1024 x 768"
BATCH = 32
PAPER_BATCH = 2048


# ------------------------------------------------------------------------------ pictures


def steps(options: argparse.Namespace, work: Path) -> dict[str, float]:
    """Milliseconds of one core for each step of a picture's way."""
    runs: dict[str, tuple[int, Callable[[], object]]] = {}
    processor = cvt.image_processor(shape("cvt-13"), 224)
    read, preprocessing = reader(processor, False, None), preprocessing_of(processor)
    for name, size in PICTURES.items():
        paths = write_pictures(work / name.replace(" ", ""), 8, *size, quality=90)
        runs[f"decode {name}"] = len(paths), partial(each, read, paths)
    images = [read(path) for path in sorted((work / USUAL.replace(" ", "")).iterdir())]
    runs["preprocess"] = len(images), lambda: preprocessing.normalise(preprocessing.resize(images))
    for variant, size in options.models.items():
        for precision in options.precisions:
            runtime = opened(variant, size, precision, options, work)
            batch = BATCH if size <= 224 else BATCH // 8
            pixels = np.random.default_rng(0).standard_normal((batch, 3, size, size), "float32")
            name = f"{variant} {size} {runtime.precision}"
            runs[name] = batch, partial(runtime, pixels, preprocessed=True)
    times = in_turns({name: run for name, (_, run) in runs.items()}, least=options.turns, turn=0)
    found = {name: 1000 * middle(turns) / runs[name][0] for name, turns in times.items()}
    return found | {"Ray Data": 1000 * ray_seconds(options.ray_rows, work)}


def each(read: Callable, paths: list[Path]) -> None:
    """Decode pictures one after the other."""
    for path in paths:
        read(path)


def opened(
    variant: str, size: int, precision: str, options: argparse.Namespace, work: Path
) -> Runtime:
    """A model with random weights; in int8 an export that is calibrated on pictures."""
    folder = work / variant
    if not folder.exists():
        config = shape(variant)
        cvt.CvtForImageClassification(config).save_pretrained(folder)
        cvt.image_processor(config, size).save_pretrained(folder)
    if precision != "int8":
        return open_runtime(folder, fastest("cpu", precision, MANY_IMAGES), precision, threads=1)
    calibration = work / USUAL.replace(" ", "")
    written = work / f"{variant}-int8"
    export(folder, written, "openvino", precision="int8", calibration=calibration, min_agreement=0)
    return open_runtime(written, threads=1)


def ray_seconds(rows: int, work: Path) -> float:
    """Seconds of a core for a row that Ray Data reads, hands to a worker and writes."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    import pyarrow
    import ray
    from pyarrow import parquet

    pictures = pyarrow.array([os.urandom(20_000)] * 1000)  # encoded ones
    for number in (BATCH, rows):
        table = pyarrow.table({"bytes": pictures.take(np.arange(number) % len(pictures))})
        parquet.write_table(table, work / f"{number}.parquet", use_dictionary=False)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)

    def job(number: int) -> None:
        read = ray.data.read_parquet(str(work / f"{number}.parquet"))
        labels = read.map_batches(lambda batch: {"label": [""] * len(batch["bytes"])})
        labels.write_parquet(str(work / "labels"))

    try:
        job(BATCH)  # starts the workers
        return (timed(partial(job, rows)) - timed(partial(job, BATCH))) / rows
    finally:
        ray.shutdown()


def cost_rows(found: dict[str, float], models: Iterable[str]) -> list[Row]:
    """Core-hours of many pictures."""
    rows = []
    others = found[f"decode {USUAL}"] + found["preprocess"] + found["Ray Data"]
    for name, milliseconds in found.items():
        variant, *rest = name.split()
        if variant not in models:
            continue
        size, precision = rest
        total = others + milliseconds
        rows.append(
            {
                "question": "pictures",
                "model": f"{variant} at {size}",
                "precision": precision,
                "ms of a core": round(total, 1),
                "share of the model": f"{milliseconds / total:.0%}",
                "core-hours, 10^6": f"{total / 3.6:,.1f}",
                "core-hours, 10^9": f"{1000 * total / 3.6:,.0f}",
            }
        )
    return rows


# ------------------------------------------------------------------------------ processes


def step_seconds(
    macs: int, parameters: int, processes: int, options: argparse.Namespace
) -> tuple[float, float]:
    """Seconds of one step and of the all-reduce in it, see the head of this file."""
    compute = 3 * 2 * macs * PAPER_BATCH / processes / options.rate
    others = processes - 1
    reduce = 2 * others / processes * 4 * parameters / options.bandwidth
    reduce += 2 * others * options.latency
    return compute / 3 + max(compute * 2 / 3, reduce), reduce


def process_rows(options: argparse.Namespace) -> list[Row]:
    """Of each model the bytes of a step, and how many processes still help."""
    rows = []
    for variant, size in options.models.items():
        found = profile(shape(variant), size)
        alone, _ = step_seconds(found.macs, found.parameters, 1, options)
        numbers = [2**power for power in range(PAPER_BATCH.bit_length())]
        times = [step_seconds(found.macs, found.parameters, n, options)[0] for n in numbers]
        good = [
            n for n, time in zip(numbers, times, strict=True) if alone / n / time >= options.good
        ]
        rows.append(
            {
                "question": "processes",
                "model": f"{variant} at {size}",
                "all-reduce MB": round(4 * found.parameters / 1e6, 1),
                "TFLOP of a step": round(6 * found.macs * PAPER_BATCH / 1e12, 1),
                "seconds, 1 process": round(alone, 3),
                f"processes, {options.good:.0%} efficient": good[-1],
                "fastest with": numbers[int(np.argmin(times))],
                "times as fast": round(alone / min(times), 1),
            }
        )
    return rows


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--turns", type=count, default=5)
    parser.add_argument("--ray-rows", type=count, default=20_000)
    parser.add_argument("--no-int8", action="store_true", help="fp32 and bf16 only")
    parser.add_argument("--rate", type=duration, default=3e14, help="FLOP/s of a process")
    parser.add_argument("--bandwidth", type=duration, default=2.5e10, help="bytes/s of a process")
    parser.add_argument("--latency", type=duration, default=5e-6, help="seconds of a message")
    parser.add_argument("--good", type=duration, default=0.9, help="efficiency that is asked for")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one turn")
    options = parser.parse_args(arguments)
    options.models = {"tiny": 64} if options.quick else MODELS
    options.precisions = ["fp32", "bf16"] + ["int8"] * (not options.no_int8)
    if options.quick:
        options.turns, options.ray_rows = 1, 1000
    return options


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    name = "scale-quick" if options.quick else "scale"
    path = result_file(options.results, name, "cpu", options.overwrite)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        found = steps(options, Path(work))
    step_rows: list[Row] = [
        {"question": "steps", "step": name, "ms of a core": round(ms, 3)}
        for name, ms in found.items()
    ]
    tables = [step_rows, cost_rows(found, options.models), process_rows(options)]
    for rows in tables:
        show(rows)
        print()
    columns = {name: "" for rows in tables for name in rows[0]}
    about = {"device": device_name("cpu"), **versions(("torch", "openvino", "cvt"))}
    written = [columns | row | about for rows in tables for row in rows]
    write_rows(path, written, "w" if options.overwrite else "x")
    print(path)


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
