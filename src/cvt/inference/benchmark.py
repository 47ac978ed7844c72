"""How fast a model is: every runtime, precision, batch size and image size, in turns.

Those that are compared take turns in one process, so that a busy machine slows all of them, and are
compared turn by turn.
"""

import csv
import itertools
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cvt.checkpoints import (
    ModelSource,
    image_size_of,
    load_classifier,
    load_config,
    load_preprocessing,
    model_source,
)
from cvt.configuration import CvtConfig
from cvt.data.processor_settings import IMAGE_SIZE
from cvt.limits import check_counts
from cvt.modeling import CvtForImageClassification
from cvt.runtime import PRECISIONS, RUNTIMES, open_runtime
from cvt.runtime.base import Runtime
from cvt.runtime.factory import check_device

Name = TypeVar("Name", bound=Hashable)
Turns = list[list[float]]  # seconds of every call, turn by turn

TURNS = 8  # of each, at least
TURN = 0.2  # seconds, filled with calls: the first finds the data of others in the caches
LIBRARIES = ("torch", "transformers", "onnxruntime", "openvino", "cvt")
GREY, BLUE = "#9a9a9a", "#2166ac"


@dataclass(frozen=True)
class Measurement:
    """One combination: its figures, or the reason why there are none.

    Attributes:
        runtime: one of `RUNTIMES`.
        precision: one of `PRECISIONS`.
        batch_size: images in a call.
        image_size: height and width, in pixels.
        median_ms: milliseconds of a call, in the middle.
        p95_ms: milliseconds that 95 % of the calls did not exceed.
        images_per_second: with calls of `median_ms` one after the other.
        ratio: how many times as fast as the first combination of the same batch and image size:
            the median of the turns' own ratios.
        calls: how many were measured.
        device: model of the GPU or of the processor.
        reason: why this combination did not run.
    """

    runtime: str
    precision: str
    batch_size: int
    image_size: int
    median_ms: float | None = None
    p95_ms: float | None = None
    images_per_second: float | None = None
    ratio: float | None = None
    calls: int = 0
    device: str = ""
    reason: str = ""


# ------------------------------------------------------------------------------ measuring


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(
    runs: Mapping[Name, Callable[[], object]],
    seconds: float = 0.0,
    least: int = TURNS,
    turn: float = TURN,
    clock: Callable[[Callable[[], object]], float] = timed,
) -> dict[Name, Turns]:
    """The time of every call of several functions that take turns, without the warm-up.

    Args:
        runs: the functions; one that works on a GPU waits for it, unless the clock does.
        seconds: to spend on each of them.
        least: turns of each, whatever `seconds` is.
        turn: seconds that a turn lasts, if a call takes less; with 0, a turn is one call.
        clock: calls a function and returns its seconds.
    """
    calls = {}
    for name, run in runs.items():
        run()  # compiles, packs weights, allocates
        calls[name] = max(1, int(turn / max(clock(run), 1e-6)))
    times: dict[Name, Turns] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    done = 0
    while done < least or time.perf_counter() < end:
        for name, run in runs.items():
            times[name].append([clock(run) for _ in range(calls[name])])
        done += 1
    return times


def middle(turns: Turns) -> float:
    """Seconds of the median call."""
    return statistics.median(itertools.chain(*turns))


def speed_ratios(reference: Turns, turns: Turns) -> list[float]:
    """Quartiles, over the turns, of how many times as fast as the reference one is."""
    pairs = zip(map(statistics.median, reference), map(statistics.median, turns), strict=True)
    return statistics.quantiles([theirs / own for theirs, own in pairs], n=4, method="inclusive")


def benchmark(
    source: str | Path,
    runtimes: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    image_sizes: Sequence[int] | None = None,
    threads: int | None = None,
    device: str = "auto",
    seconds: float = 3.0,
    step: Callable[[], object] = lambda: None,
    *,
    verify: bool = True,
) -> list[Measurement]:
    """Time a model on random images, from pixels to logits.

    The combinations of one batch and image size take turns. One that a runtime cannot do, or that
    fails, is among the results with its reason.

    Args:
        source: a model folder, an exported folder, an authors' file; or the name of a published
            model or a variant, which is given random weights: nothing is downloaded.
        runtimes: by default all but `compiled`, which takes minutes to compile; of an exported
            folder its own.
        precisions: by default fp32 and bf16; of an exported folder its own.
        batch_sizes: images in a call.
        image_sizes: height and width in pixels; by default those of the model's preprocessing.
        threads: of the processor; each runtime's own choice by default.
        device: `auto`, `cpu` or `cuda`.
        seconds: to spend on each combination, its preparation not counted.
        step: called whenever a combination is done.
        verify: as in `open_runtime`.

    Raises:
        FileNotFoundError: `source` is none of these.
        ValueError: an argument or the model is illegal, or no combination runs; names the reason.
    """
    named = model_source(source)
    exported = named.is_export
    runtimes = runtimes or (["auto"] if exported else [r for r in RUNTIMES if r != "compiled"])
    wanted: Sequence[str | None] = precisions or ([None] if exported else ["fp32", "bf16"])
    for name, values, known in (
        ("runtimes", runtimes, ("auto", *RUNTIMES)),
        ("precisions", wanted, (None, *PRECISIONS)),
    ):
        if unknown := [value for value in values if value not in known]:
            choices = ", ".join(filter(None, known))
            raise ValueError(f"{name}: {unknown[0]} is none of {choices}")
    for name, sizes in (("batch_sizes", batch_sizes), ("image_sizes", image_sizes or [1])):
        if not sizes or min(sizes) < 1:
            raise ValueError(f"{name} = {list(sizes)}: must be integers of at least 1")
    for batch_size in batch_sizes:
        check_counts(batch_size=batch_size)
    if threads is not None:
        check_counts(threads=threads)
    check_device(device)

    config = load_config(named)
    model = named if exported else _classifier(named, config, verify)
    combinations: dict[tuple[str, str], Runtime | str] = {}  # or why there is none
    for runtime, precision in itertools.product(runtimes, wanted):
        try:
            opened = open_runtime(model, runtime, precision, device, threads, verify=verify)
            combinations[opened.name, opened.precision] = opened
        except (ValueError, ImportError, RuntimeError) as error:
            combinations[runtime, precision or ""] = str(error)

    results = []
    for image_size in image_sizes or [_image_size(named, config)]:
        for batch_size in batch_sizes:
            generator = torch.Generator().manual_seed(0)
            shape = (batch_size, config.num_channels, image_size, image_size)
            measurements = _compare(combinations, torch.randn(shape, generator=generator), seconds)
            for measurement in measurements:
                results.append(measurement)
                step()
    if not any(result.calls for result in results):
        reasons = dict.fromkeys(result.reason for result in results)
        raise ValueError(f"{source}: nothing could be measured: {'; '.join(reasons)}")
    return results


def _classifier(source: ModelSource, config: CvtConfig, verify: bool) -> CvtForImageClassification:
    """The model itself; of a name, one like it with random weights, which are as fast."""
    if source.kind not in ("published", "variant"):
        return load_classifier(source, verify=verify).eval()
    return CvtForImageClassification(config).eval()


def _image_size(source: ModelSource, config: CvtConfig) -> int:
    """Height and width, in pixels, that the preprocessing is set for."""
    return (
        IMAGE_SIZE
        if source.kind == "variant"
        else image_size_of(load_preprocessing(source, config))
    )


def _compare(
    combinations: Mapping[tuple[str, str], Runtime | str], pixels: Tensor, seconds: float
) -> list[Measurement]:
    """A measurement of each combination on a batch (B, C, H, H)."""
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    reasons, devices = {}, {}
    for key, runtime in combinations.items():
        if isinstance(runtime, str):
            reasons[key] = runtime
            continue
        run = partial(runtime, pixels.to(runtime.device))
        try:
            run()
            runs[key], devices[key] = run, device_name(runtime.device)
        except (ValueError, RuntimeError) as error:  # RuntimeError: out of memory, for one
            reasons[key] = str(error)
    times = in_turns(runs, seconds)
    results = []
    for key in combinations:
        where = (*key, len(pixels), pixels.shape[2])
        if key in reasons:
            results.append(Measurement(*where, reason=reasons[key]))
            continue
        calls = [call for turn in times[key] for call in turn]
        median = statistics.median(calls)
        reference = next(iter(times.values()))
        results.append(
            Measurement(
                *where,
                median_ms=round(1000 * median, 3),
                p95_ms=round(1000 * float(np.percentile(calls, 95)), 3),
                images_per_second=round(len(pixels) / median, 2),
                ratio=round(speed_ratios(reference, times[key])[1], 3),
                calls=len(calls),
                device=devices[key],
            )
        )
    return results


# ------------------------------------------------------------------------------ results


def device_name(device: str) -> str:
    """Model of the GPU or of the processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # Linux
        if found := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor() or platform.machine()


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Of those libraries that took part."""
    return {name: getattr(sys.modules.get(name), "__version__", "") for name in libraries}


def write_benchmark(
    results: Sequence[Measurement], folder: Path, about: Mapping[str, object], title: str
) -> None:
    """Write `benchmark.csv` and `benchmark.png`.

    Args:
        results: what to write.
        folder: to write to; it is created.
        about: columns that all rows share.
        title: of the picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "benchmark.csv", "w", newline="", encoding="utf-8") as file:
        names = [field.name for field in fields(Measurement)]
        writer = csv.DictWriter(file, [*names, *about], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(result) | dict(about) for result in results)
    plot_benchmark(results, folder / "benchmark.png", title)


def plot_benchmark(results: Sequence[Measurement], path: Path, title: str) -> None:
    """Images per second as bars, a panel for each batch and image size, as a PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    panels: dict[tuple[int, int], list[Measurement]] = {}
    for result in results:
        if result.calls:
            panels.setdefault((result.image_size, result.batch_size), []).append(result)
    most = max(map(len, panels.values()))
    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False}):
        size = (1.5 + 3.5 * len(panels), 1.2 + 0.35 * most)
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        figure.suptitle(title)
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, ((image_size, batch_size), shown) in zip(row, panels.items(), strict=True):
            bars = axes.barh(
                [f"{r.runtime} {r.precision}" for r in shown],
                [r.images_per_second for r in shown],
                color=[GREY, *[BLUE] * (len(shown) - 1)],
            )
            labels = [f"{r.images_per_second:,.1f}  ({r.ratio:.2f}×)" for r in shown]
            axes.bar_label(bars, labels, padding=3)
            axes.margins(x=0.45)
            axes.set(title=f"batch {batch_size}, {image_size} pixels", xlabel="images per second")
            axes.spines[["top", "right"]].set_visible(False)
        row[0].invert_yaxis()
        figure.savefig(path, format="png")
