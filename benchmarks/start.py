"""How soon does a whole process answer for one picture?

    python benchmarks/start.py
    python benchmarks/start.py --turns 9
    python benchmarks/start.py --quick    # a tiny model, one turn

Processes: a bare Python; `python -c "import torch"`; `cvt --help` and `cvt predict --help`;
`cvt predict` on an export for ONNX Runtime and for OpenVINO, on a model folder with a cold cache of
graphs (which takes `fused`) and with a warm one (which takes OpenVINO); transformers' `pipeline` on
a folder of the same shape. The picture is a JPEG of 640 x 427, the model cvt-13 at 224 with random
weights, the threads are as many as each takes by itself.

They take turns. Figures are medians of the turns: seconds from the start of the process to its end,
seconds of CPU time, and the ratios of the former to `import torch` and to the pipeline, turn by
turn. Prints a table and writes `results/start-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import (
    Row,
    command_line,
    count,
    result_file,
    show,
    transformers_cvt,
    write_pictures,
    write_rows,
)
from peers import shape

import cvt
from cvt.export import export
from cvt.inference.benchmark import versions

CVT = (sys.executable, "-m", "cvt")
TORCH, PIPELINE = "import torch", "transformers.pipeline"
PIPELINE_CODE = (
    "import sys; from transformers import pipeline; "
    "print(pipeline('image-classification', model=sys.argv[1], top_k=5)(sys.argv[2]))"
)


def prepare(folder: Path, variant: str, size: int) -> Path:
    """Write the model, its exports and transformers' own model; returns the picture."""
    (picture,) = write_pictures(folder / "pictures", 1, 640, 427, 90)
    config = shape(variant)
    processor = cvt.image_processor(config, size)
    cvt.CvtForImageClassification(config).save_pretrained(folder / "model")
    transformers_cvt(config).save_pretrained(folder / "transformers")
    for name in ("model", "transformers"):
        processor.save_pretrained(folder / name)
    for to in ("onnx", "openvino"):
        export(folder / "model", folder / to, to)
    return picture


def processes(folder: Path, picture: Path) -> dict[str, tuple[str, ...]]:
    """The command of each process."""
    python = (sys.executable, "-c")
    predict = (*CVT, "predict")
    return {
        "python": (*python, "pass"),
        TORCH: (*python, TORCH),
        "cvt --help": (*CVT, "--help"),
        "cvt predict --help": (*predict, "--help"),
        "cvt predict, onnx": (*predict, str(folder / "onnx"), str(picture)),
        "cvt predict, openvino": (*predict, str(folder / "openvino"), str(picture)),
        "cvt predict, folder, cold": (*predict, str(folder / "model"), str(picture)),
        "cvt predict, folder, warm": (*predict, str(folder / "model"), str(picture)),
        PIPELINE: (*python, PIPELINE_CODE, str(folder / "transformers"), str(picture)),
    }


def timed(command: tuple[str, ...], cache: Path) -> tuple[float, float]:
    """Seconds of a process, and seconds of its CPU time."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, sum(after[:2]) - sum(before[:2])


def measure(folder: Path, picture: Path, turns: int) -> list[Row]:
    """A row for each process."""
    commands, cold, warm = processes(folder, picture), folder / "cold", folder / "warm"
    timed((*commands["cvt predict, folder, warm"], "--runtime", "openvino"), warm)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(turns + 1):  # the first fills the caches of the disk
        for name, command in commands.items():
            shutil.rmtree(cold, ignore_errors=True)
            measured[name].append(timed(command, cold if name.endswith("cold") else warm))
    seconds = {name: [each[0] for each in found[1:]] for name, found in measured.items()}
    rows: list[Row] = []
    for name, found in measured.items():
        row: Row = {"process": name, "seconds": f"{median(seconds[name]):.2f}"}
        row["cpu_seconds"] = f"{median(each[1] for each in found[1:]):.2f}"
        for reference in (TORCH, PIPELINE):
            pairs = zip(seconds[name], seconds[reference], strict=True)
            row[f"times {reference}"] = f"{median(own / other for own, other in pairs):.2f}"
        rows.append(row)
    return rows


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--turns", type=count, default=5, help="of each process")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one turn")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    name = "start-quick" if options.quick else "start"
    path = result_file(options.results, name, "cpu", options.overwrite)
    variant, size, turns = ("tiny", 64, 1) if options.quick else ("cvt-13", 224, options.turns)
    with tempfile.TemporaryDirectory() as place:
        picture = prepare(Path(place), variant, size)
        rows = measure(Path(place), picture, turns)
    show(rows)
    about = versions(("torch", "transformers", "onnxruntime", "openvino", "cvt"))
    write_rows(path, [row | about for row in rows], "w" if options.overwrite else "x")


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
