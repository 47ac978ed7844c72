"""What the benchmarks share: a peer of the same shape, pictures, memory, tables and csv files."""

import argparse
import csv
import datetime
import multiprocessing
import random
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.cvt import modeling_cvt as port

from cvt import CvtConfig
from cvt.architecture import VARIANTS
from cvt.inference.benchmark import Turns, device_name, middle, speed_ratios, timed

SHAPES = (*VARIANTS, "tiny")  # of a model
RESULTS = Path(__file__).parent / "results"
Row = dict[str, object]
# Most important first. Transformers' step on 64 images of cvt-w24 would take 129 GiB in fp32.
VARIANTS = {
    "cvt-13": ("cvt-13", 224, 256),
    "cvt-w24-384": ("cvt-w24", 384, 32),
    "cvt-13-384": ("cvt-13", 384, 64),
    "cvt-21": ("cvt-21", 224, 256),
}
QUICK = ("tiny", 64, 2)


def transformers_cvt(config: CvtConfig) -> torch.nn.Module:
    """Transformers' own classifier of the shape of `config`, with random weights."""
    known = transformers.CvtConfig().to_dict().keys() - {"layer_norm_eps", "dtype"}
    shape = {name: value for name, value in config.to_dict().items() if name in known}
    return port.CvtForImageClassification(transformers.CvtConfig(**shape))


def write_pictures(folder: Path, count: int, width: int, height: int, quality: int) -> list[Path]:
    """JPEGs of one size in a new folder: parts of scikit-learn's two photographs, at random."""
    from PIL import Image, ImageOps
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427
    draw = random.Random(0)
    paths = [folder / f"{i:05d}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        part_width = draw.randrange(320, 560)
        part_height = part_width * height // width
        left, top = draw.randrange(640 - part_width + 1), draw.randrange(427 - part_height + 1)
        box = (left, top, left + part_width, top + part_height)
        part = photographs[i % 2].resize((width, height), Image.Resampling.BICUBIC, box)
        part = ImageOps.mirror(part) if draw.random() < 0.5 else part
        part.save(path, quality=quality)
    return paths


def command_line(about: str, on_gpu: bool = False) -> argparse.ArgumentParser:
    """The options of every benchmark, where it says what it is about.

    Args:
        about: its docstring, a question in the first line.
        on_gpu: it runs on a GPU, too; there by default, where there is one.
    """
    summary, _, details = about.partition("\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=formatter)
    parser.add_argument(
        "--results", type=results_folder, default=RESULTS, help="where the csv file goes"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a result of today")
    if on_gpu:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", type=present_device, choices=("cpu", "cuda"), default=best)
    return parser


def results_folder(text: str) -> Path:
    """For argparse: a folder that is there or can be made."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is no folder")
    return path


def present_device(text: str) -> str:
    """For argparse: a device, if it is there."""
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no GPU")
    return text


def count(text: str) -> int:
    """For argparse: a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def counts(text: str) -> list[int]:
    """For argparse: some of these, with commas."""
    return [count(number) for number in text.split(",")]


def duration(text: str) -> float:
    """For argparse: a number from 0 on, be it infinite."""
    with suppress(ValueError):
        if float(text) >= 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 on")


def some_of(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """For argparse: a list with commas of what there is to choose from."""

    def parse(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(choices):
            names = f"{', '.join(map(repr, sorted(unknown)))} is none of {', '.join(choices)}"
            raise argparse.ArgumentTypeError(names)
        return text.split(",")

    return parse


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """What a function returns in a process that does nothing else, and has not before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_memory() -> float:
    """The most that this process has taken so far, in MiB (Linux)."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


def between_events(run: Callable[[], object]) -> float:
    """Seconds that the GPU takes for what a function gives it to do."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


CLOCKS = {"cpu": timed, "cuda": between_events}


def ratio(turns: Turns, reference: Turns) -> Row:
    """How many times as fast as the reference."""
    lower, median, upper = speed_ratios(reference, turns)
    return {"ratio": round(median, 3), "ratio_quartiles": f"{lower:.3f} to {upper:.3f}"}


def speed(turns: Turns) -> Row:
    """The figures of turns that say how long an image takes."""
    seconds = middle(turns)
    return {"ms_per_image": round(1000 * seconds, 2), "images_per_second": round(1 / seconds, 2)}


def per_image(images: int, turns: Turns) -> Turns:
    """Turns of calls with so many images each, for one image."""
    return [[seconds / images for seconds in turn] for turn in turns]


def show(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows of the same columns, but for the columns that are empty."""
    table = [[name, *(str(row[name]) for row in rows)] for name in rows[0]]
    table = [column for column in table if any(column[1:])]
    widths = [max(map(len, column)) for column in table]
    for line in zip(*table, strict=True):
        print(*(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)), sep="  ")


def result_file(
    folder: Path,
    question: str,
    device: str,
    overwrite: bool,
    library: str = f"torch{torch.__version__}",
) -> Path:
    """Where a result of today belongs; one that is there already ends the program."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    version = library.partition("+")[0]
    path = folder / f"{question}-{slug}-{version}-{datetime.date.today()}.csv"
    if path.exists() and not overwrite:
        sys.exit(f"{path} exists; pass --overwrite to replace it, or --results FOLDER")
    return path


def write_rows(path: Path, rows: Sequence[Mapping[str, object]], mode: str) -> None:
    """Write rows of the same columns; the mode is that of the file: x, or w to replace it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(path)
