"""How much accuracy does int8 cost on a trained model, and how large and fast is its export?

    python benchmarks/quantization.py runs/demo/best runs/demo/digits/train runs/demo/digits/test
    python benchmarks/quantization.py runs/photos/best photos/train photos/val

The first folder is the model, the second calibrates, and the third, with a folder for each class,
is classified in fp32 and in int8. Lost are percentage points of the accuracy in fp32; the agreement
is the share of images, in percent, that get the class that they get in fp32; the largest
difference is that of a logit. Milliseconds are those of a single image; the models take turns.

OpenVINO's int8 has two rows. As exports run: without instructions for products of 8 bits,
activations stay in floats. As computed in 8 bits: by OpenVINO on every processor; without such
instructions, sums of two products are cut at 16 bits, which costs accuracy.

LiteRT has a row for each of its precisions, and one for "full integer", which `cvt export` does not
write: its activations have ranges from the calibration, and are rounded between layers, too.

Prints a table and writes it to `results/quantization-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row, command_line, count, result_file, show, write_rows
from peers import core, in_openvino

from cvt.checkpoints import load_classifier, load_processor, model_source
from cvt.data import image_folder
from cvt.export import export
from cvt.export.quantization import preprocessed, two_splits
from cvt.export.tensorflow import write_saved_model
from cvt.inference.benchmark import device_name, in_turns, middle, versions
from cvt.libraries import import_tensorflow, silence_stderr
from cvt.modeling import CvtForImageClassification
from cvt.runtime import open_runtime
from cvt.runtime.litert_runtime import LiteRtRuntime

BATCH = 32
FULL_INTEGER = "LiteRT full integer"


def full_integer(
    model: CvtForImageClassification, processor: Any, options: argparse.Namespace, work: Path
) -> Path:
    """A file of LiteRT whose activations have ranges from the calibration; returns its path."""
    tf = import_tensorflow()
    images, _ = two_splits(options.calibration, options.calibration_images)
    size = preprocessed(images[:1], processor).shape[2:]
    write_saved_model(model, work / "model", size, ("batch",))
    converter = tf.lite.TFLiteConverter.from_saved_model(str(work / "model"))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: (
        {"pixel_values": preprocessed([image], processor)} for image in images
    )
    path = work / "full.tflite"
    with silence_stderr():
        path.write_bytes(converter.convert())
    return path


def mebibytes(graph: Path) -> float:
    """The size of a graph, with its weights beside it where they are."""
    return sum(file.stat().st_size for file in graph.parent.glob(f"{graph.stem}.*")) / 2**20


def compare(options: argparse.Namespace, work: Path) -> list[Row]:
    """A row in fp32, and those in other precisions."""
    named = model_source(options.model)
    model = load_classifier(named).float().eval()
    processor = load_processor(named, model.config)
    images = image_folder(options.images)
    names = model.config.class_names
    labels = torch.tensor([names.index(label) for label in images.labels])
    batches = [
        torch.from_numpy(preprocessed(images.sources[start : start + BATCH], processor))
        for start in range(0, len(images.sources), BATCH)
    ]
    files, runs = {}, {"fp32": open_runtime(model, "fused", threads=options.threads)}
    for name, to, precision in (
        ("int8 as exports run here", "openvino", "int8"),
        *((f"LiteRT {precision}", "litert", precision) for precision in ("fp32", "fp16", "int8")),
    ):
        manifest = export(
            *(options.model, work / name, to),
            precision=precision,
            calibration=options.calibration if precision == "int8" else None,
            calibration_images=options.calibration_images,
            min_agreement=0.0,  # the agreement is what is asked
        )
        files[name] = work / name / manifest.file
        runs[name] = open_runtime(work / name, threads=options.threads)
    graph = core().read_model(files["int8 as exports run here"])
    runs["int8 as computed in 8 bits"] = in_openvino(graph, "int8", True, options)
    files[FULL_INTEGER] = full_integer(model, processor, options, work)
    runs[FULL_INTEGER] = LiteRtRuntime(
        files[FULL_INTEGER], model.config, "int8", options.threads, batches[0].shape[2:]
    )
    logits = {name: torch.cat([run(batch) for batch in batches]) for name, run in runs.items()}
    times = in_turns({name: partial(run, batches[0][:1]) for name, run in runs.items()})
    classes = {name: of_all.argmax(dim=1) for name, of_all in logits.items()}
    top1 = {
        name: 100 * (of_all == labels).float().mean().item() for name, of_all in classes.items()
    }
    return [
        {
            "precision": name,
            "images": len(labels),
            "top1": round(top1[name], 2),
            "points_lost": round(top1["fp32"] - top1[name], 2),
            "agreement": round(100 * (classes[name] == classes["fp32"]).float().mean().item(), 2),
            "largest_difference": f"{(logits[name] - logits['fp32']).abs().max().item():.2g}",
            "ms": round(1000 * middle(times[name]), 2),
            "mib": round(mebibytes(files[name]), 2) if name in files else "",
        }
        for name in runs
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
    about = {
        "model": options.model.parent.name,
        "calibration_images": options.calibration_images,
        "threads": options.threads,
        "device": device_name("cpu"),
        **versions(),
    }
    write_rows(path, [row | about for row in rows], "w" if options.overwrite else "x")


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
