"""How much accuracy does int8 cost on a trained model?

    python benchmarks/quantization.py runs/demo/best runs/demo/digits/train runs/demo/digits/test
    python benchmarks/quantization.py runs/photos/best photos/train photos/val

The first folder is the model, the second calibrates, and the third, with a folder for each class,
is classified in fp32 and in int8. Lost are percentage points of the accuracy in fp32; the agreement
is the share of images, in percent, that get the class that they get in fp32.

int8 has two rows where they differ. As exports run: without instructions for products of 8 bits,
activations stay in floats. As computed in 8 bits: by OpenVINO on every processor; without such
instructions, sums of two products are cut at 16 bits, which costs accuracy.

Prints a table and writes it to `results/quantization-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import Row, command_line, count, result_file, show, write_rows
from peers import core, in_openvino
from torch import Tensor

from cvt.checkpoints import load_classifier, load_processor, model_source
from cvt.data import image_folder
from cvt.export import export
from cvt.export.quantization import preprocessed
from cvt.inference.benchmark import device_name, versions
from cvt.runtime import open_runtime

BATCH = 32


def classified(run: Callable[[Tensor], Tensor], batches: list[Tensor]) -> Tensor:
    """The class, (N,), of every image of batches (B, C, H, W)."""
    return torch.cat([run(batch).argmax(dim=1) for batch in batches])


def compare(options: argparse.Namespace, work: Path) -> list[Row]:
    """A row in fp32, and those in int8."""
    named = model_source(options.model)
    model = load_classifier(named).float().eval()
    processor = load_processor(named, model.config)
    images = image_folder(options.images)
    classes = model.config.class_names
    labels = torch.tensor([classes.index(label) for label in images.labels])
    batches = [
        torch.from_numpy(preprocessed(images.sources[start : start + BATCH], processor))
        for start in range(0, len(images.sources), BATCH)
    ]
    manifest = export(
        options.model,
        work / "int8",
        to="openvino",
        precision="int8",
        calibration=options.calibration,
        calibration_images=options.calibration_images,
        min_agreement=0.0,  # the agreement is what is asked
    )
    graph = core().read_model(work / "int8" / manifest.file)
    runs = {
        "fp32": open_runtime(model, "fused", threads=options.threads),
        "int8 as exports run here": open_runtime(work / "int8", threads=options.threads),
        "int8 as computed in 8 bits": in_openvino(graph, "int8", True, options),
    }
    answers = {name: classified(run, batches) for name, run in runs.items()}
    reference = answers["fp32"]
    top1 = {
        name: 100 * (answer == labels).float().mean().item() for name, answer in answers.items()
    }
    return [
        {
            "precision": name,
            "images": len(labels),
            "top1": round(top1[name], 2),
            "points_lost": round(top1["fp32"] - top1[name], 2),
            "agreement": round(100 * (answer == reference).float().mean().item(), 2),
            "calibration_images": 0 if name == "fp32" else options.calibration_images,
        }
        for name, answer in answers.items()
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("model", type=Path, help="folder of a trained model")
    parser.add_argument("calibration", type=Path, help="folder of images to calibrate with")
    parser.add_argument("images", type=Path, help="folder of labelled images to classify")
    parser.add_argument("--calibration-images", type=count, default=300)
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    path = result_file(options.results, "quantization", "cpu", options.overwrite)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as work:
        rows = compare(options, Path(work))
    show(rows)
    about = {"model": options.model.parent.name, "device": device_name("cpu"), **versions()}
    write_rows(path, [row | about for row in rows], "w" if options.overwrite else "x")


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
