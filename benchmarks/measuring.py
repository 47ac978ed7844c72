"""What the benchmarks share: a peer of the same shape, memory, and results as csv files."""

import csv
import datetime
import multiprocessing
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.cvt import modeling_cvt as port

from cvt import CvtConfig
from cvt.benchmark import device_name

RESULTS = Path(__file__).parent / "results"


def transformers_cvt(config: CvtConfig) -> torch.nn.Module:
    """Transformers' own classifier of the shape of `config`, with random weights."""
    known = transformers.CvtConfig().to_dict().keys() - {"layer_norm_eps", "dtype"}
    shape = {name: value for name, value in config.to_dict().items() if name in known}
    return port.CvtForImageClassification(transformers.CvtConfig(**shape))


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """What a function returns in a process that does nothing else, and has not before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_memory(device: str) -> float:
    """The most that this process has taken so far (Linux), or of the GPU's memory, in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


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


def write_rows(path: Path, rows: Sequence[Mapping[str, object]], overwrite: bool) -> None:
    """Write rows of the same columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if overwrite else "x", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(path)
