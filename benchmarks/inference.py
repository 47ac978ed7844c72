"""How fast and how large is CvT's inference, beside the other ways to run it?

    python benchmarks/inference.py
    python benchmarks/inference.py --only model,rate --batch-sizes 1
    python benchmarks/inference.py --quick    # a tiny model: does all of it run?

All have the same shape and random weights, and each the activation that it gives the variant.
Questions:
- model: from pixels to logits. On a CPU transformers' CvT eager in fp32 is the reference, beside
  its exports to ONNX Runtime and OpenVINO (for any batch, and compiled for the very shape) and our
  runtimes; on a GPU it is transformers' CvT eager in bf16, beside timm's models of that size.
  The int8 export is calibrated on the pictures of the folder; its accuracy is not asked here.
- rate: the machine's best rate of fp32 matrix products, as PyTorch's own and as oneDNN's with
  packed weights. With `model`, the fastest of them takes its turns too, and the matrix share is
  what a contestant reaches of its rate, counting the operations that it really executes.
- memory: one large image, each contestant alone in a process of its own; and ours on images of
  several sizes. Memory is the peak of the process, libraries and weights included.
- folder: JPEGs of 1024 x 768 end to end; transformers.pipeline with several batch sizes, of which
  the fastest is the reference, beside cvt.Classifier's stream.
- import: a new process that imports cvt, or prints `cvt --help`, beside one that imports
  transformers, or nothing.

Those that are compared take turns in one process, so that a busy machine slows all; the ratio is
the median of the turns' own ratios, and its spread their quartiles. Only memory is measured one
after the other.

Prints a table and writes it to `results/inference-<device>-torch<version>-<date>.csv`.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from contestants import CPU, CUDA, OURS, REFERENCE, Contestant, build, opened, operations, shape
from measuring import RESULTS, in_fresh_process, peak_memory, result_file, write_rows

from cvt import image_processor
from cvt.benchmark import Turns, device_name, in_turns, middle, speed_ratios, timed, versions
from cvt.classifier import Classifier
from cvt.runtime import open_runtime

INT8 = Contestant("cvt", "openvino", "int8")
PIPELINE = Contestant("transformers.pipeline", "torch", "fp32")
QUESTIONS = ("rate", "model", "memory", "folder", "import")
COLUMNS = (
    *("question", "contestant", "runtime", "precision", "batch_size", "image_size", "ms_per_image"),
    *("images_per_second", "seconds", "ratio", "ratio_quartiles", "gflops", "matrix_share"),
    "peak_memory_mib",
)
Row = dict[str, object]


def row(question: str, contestant: Contestant, **figures: object) -> Row:
    """A row of the table; what it does not tell is empty."""
    known = dict(zip(("contestant", "runtime", "precision"), contestant, strict=True))
    return dict.fromkeys(COLUMNS, "") | {"question": question} | known | figures


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


# ------------------------------------------------------------------------------ rate and model


class Product(NamedTuple):
    """A product of square fp32 matrices."""

    contestant: Contestant
    run: Callable[[], object]
    operations: int


def matrix_products(sizes: Iterable[int]) -> Iterator[Product]:
    """PyTorch's own, and oneDNN's with one matrix packed beforehand."""
    mkldnn = torch.ops.mkldnn
    for size in sizes:
        a, b = torch.randn(2, size, size)
        packed = mkldnn._reorder_linear_weight(b, size)
        onednn = partial(mkldnn._linear_pointwise, a, packed, None, "none", [], "")
        for runtime, run in (("torch", partial(torch.mm, a, b)), ("oneDNN", onednn)):
            yield Product(Contestant(f"matrices of {size}", runtime, "fp32"), run, 2 * size**3)


def rate_rows(options: argparse.Namespace) -> tuple[list[Row], Product]:
    """The rate of every product, and the fastest product."""
    products = list(matrix_products(options.matrix_sizes))
    times = in_turns({p.contestant: p.run for p in products}, least=options.turns)
    seconds = {p.contestant: middle(times[p.contestant]) for p in products}
    products.sort(key=lambda p: seconds[p.contestant] / p.operations)
    return [
        row("rate", contestant, gflops=round(executed / seconds[contestant] / 1e9, 1))
        for contestant, _, executed in products
    ], products[0]


def model_rows(options: argparse.Namespace, work: Path, product: Product | None) -> list[Row]:
    """From pixels to logits, for each batch size; shares are of the rate of `product`."""
    contestants = CUDA if options.contestants == "cuda" else CPU
    if not options.compiled:
        contestants = tuple(c for c in contestants if c.runtime != "compiled")
    models = {contestant: opened(contestant, options) for contestant in contestants}
    if options.contestants == "cpu":
        export = write_export(options, work)
        models[INT8] = open_runtime(export, threads=options.threads)
    rows = []
    for batch_size in options.batch_sizes:
        pixels = torch.randn(batch_size, 3, options.image_size, options.image_size)
        pixels = pixels.to(options.device)
        runs = {contestant: partial(model, pixels) for contestant, model in models.items()}
        if product:
            runs[product.contestant] = product.run
        times = in_turns(runs, options.seconds, options.turns)
        for contestant in models:
            turns = times[contestant]
            figures = speed(per_image(batch_size, turns)) | ratio(turns, times[contestants[0]])
            if product and contestant.precision == "fp32":
                executed = batch_size * operations(contestant, options)
                _, faster, _ = speed_ratios(times[product.contestant], turns)
                figures["gflops"] = round(executed / middle(turns) / 1e9, 1)
                figures["matrix_share"] = round(executed / product.operations * faster, 3)
            where = {"batch_size": batch_size, "image_size": options.image_size}
            rows.append(row("model", contestant, **where, **figures))
    return rows


def write_export(options: argparse.Namespace, work: Path) -> Path:
    """The folder of our int8 export, calibrated on the pictures."""
    from cvt.export import export

    folder = work / "int8"
    if not folder.exists():
        export(
            write_model(options, work),
            folder,
            to="openvino",
            precision="int8",
            calibration=write_pictures(options, work),
            calibration_images=64,
            min_agreement=0.0,  # what random weights tell apart may well change
        )
    return folder


def write_model(options: argparse.Namespace, work: Path) -> Path:
    """Our model's folder, with its preprocessing."""
    folder = work / "model"
    if not folder.exists():
        build("cvt", options).save_pretrained(folder)
        image_processor(shape(options), image_size=options.image_size).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------ memory


def one_image(contestant: Contestant, size: int, options: argparse.Namespace) -> Row:
    """Time and peak memory of this process for one image; ours has seen one before."""
    run = opened(contestant, options)
    pixels = torch.randn(1, 3, size, size)
    if contestant != REFERENCE:  # a call takes the reference half a minute, and it prepares nothing
        run(pixels)
    seconds = timed(partial(run, pixels))
    return {"ms_per_image": round(1000 * seconds, 1), "peak_memory_mib": round(peak_memory("cpu"))}


def memory_rows(options: argparse.Namespace) -> list[Row]:
    """The large image with each contestant, then images of other sizes with ours."""
    large, *others = options.large_sizes
    measured = [
        *((c, large) for c in (REFERENCE, OURS, OURS._replace(runtime="openvino"))),
        *((OURS, size) for size in others),
    ]
    rows = []
    for contestant, size in measured:
        figures = in_fresh_process(one_image, contestant, size, options)
        if size == large:
            slow = rows[0] if rows else figures
            figures["ratio"] = round(slow["ms_per_image"] / figures["ms_per_image"], 3)
        rows.append(row("memory", contestant, batch_size=1, image_size=size, **figures))
    return rows


# ------------------------------------------------------------------------------ folder


def write_pictures(options: argparse.Namespace, work: Path) -> Path:
    """A folder of JPEGs of 1024 x 768: parts of scikit-learn's two photographs, at random."""
    folder = work / "pictures"
    if folder.exists():
        return folder
    folder.mkdir()
    from PIL import Image, ImageOps
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640 x 427
    draw = random.Random(0)
    for i in range(options.images):
        photograph = photographs[i % 2]
        width = draw.randrange(320, 560)
        height = width * 3 // 4
        left, top = draw.randrange(640 - width + 1), draw.randrange(427 - height + 1)
        part = photograph.crop((left, top, left + width, top + height))
        part = part.resize((1024, 768), Image.Resampling.BICUBIC)
        part = ImageOps.mirror(part) if draw.random() < 0.5 else part
        part.save(folder / f"{i:05d}.jpg", quality=90)
    return folder


def folder_rows(options: argparse.Namespace, work: Path) -> list[Row]:
    """The folder of pictures from end to end; the reference is the fastest pipeline."""
    pictures = write_pictures(options, work)
    paths = [str(path) for path in sorted(pictures.iterdir())]
    torch.set_num_threads(options.threads)
    pipeline = transformers.pipeline(
        "image-classification",
        model=build("transformers", options).model,
        image_processor=image_processor(shape(options), image_size=options.image_size),
    )
    # A quarter of them for the pipeline, which then takes about as long.
    paths = paths[: -(-len(paths) // 4)]
    runs: dict[tuple[Contestant, int], Callable[[], object]] = {
        (PIPELINE, batch_size): partial(pipeline, paths, batch_size=batch_size)
        for batch_size in options.folder_batch_sizes
    }
    for source, precision in (
        (write_model(options, work), "fp32"),
        (write_model(options, work), "bf16"),
        (write_export(options, work), None),
    ):
        classifier = Classifier(source, precision=precision, threads=options.threads)
        contestant = Contestant(
            "cvt.Classifier", classifier.runtime.name, classifier.runtime.precision
        )
        runs[contestant, classifier.batch_size] = partial(consume, classifier, pictures)
    images = {key: len(paths) if key[0] == PIPELINE else options.images for key in runs}
    times = {
        key: per_image(images[key], turns)
        for key, turns in in_turns(runs, least=min(options.turns, 3), turn=0).items()
    }
    reference = min((turns for key, turns in times.items() if key[0] == PIPELINE), key=middle)
    return [
        row("folder", contestant, batch_size=batch_size, image_size=options.image_size)
        | speed(turns)
        | ratio(turns, reference)
        for (contestant, batch_size), turns in times.items()
    ]


def consume(classifier: Classifier, folder: Path) -> None:
    """Classify all pictures of a folder."""
    for _ in classifier.stream(folder):
        pass


# ------------------------------------------------------------------------------ import


def import_rows(options: argparse.Namespace) -> list[Row]:
    """New processes, from their start to their end."""
    statements = ("import transformers", "import cvt", "pass")
    commands = {statement: [sys.executable, "-c", statement] for statement in statements}
    commands["cvt --help"] = [str(Path(sys.executable).with_name("cvt")), "--help"]
    runs = {
        Contestant(name, "", ""): partial(
            subprocess.run, command, check=True, stdout=subprocess.DEVNULL
        )
        for name, command in commands.items()
    }
    times = in_turns(runs, least=options.turns, turn=0)
    reference, *_ = times.values()
    return [
        row("import", contestant, seconds=round(middle(turns), 3), **ratio(turns, reference))
        for contestant, turns in times.items()
    ]


# ------------------------------------------------------------------------------ command line


def measure(options: argparse.Namespace, work: Path) -> Iterator[list[Row]]:
    """The rows of each question that is asked."""
    torch.set_num_threads(options.threads)
    product = None
    if "rate" in options.only:
        rows, product = rate_rows(options)
        yield rows
    if "model" in options.only:
        yield model_rows(options, work, product)
    if "memory" in options.only:
        yield memory_rows(options)
    if "folder" in options.only:
        yield folder_rows(options, work)
    if "import" in options.only:
        yield import_rows(options)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    summary, _, details = __doc__.partition("\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=formatter)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        help=f"of {', '.join(QUESTIONS)}; on a GPU only model is asked by default",
    )
    parser.add_argument("--variant", default="cvt-13", help="cvt-13, cvt-21 or cvt-w24")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few and small images")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-sizes", type=numbers, help="1,32 on a CPU, 1,256 on a GPU")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each model and batch size")
    parser.add_argument("--turns", type=int, default=8, help="of each contestant, at least")
    parser.add_argument(
        "--large-sizes",
        type=numbers,
        default=[1024, 512, 1448, 2048],
        help="the image of the question memory, then those that only ours are given",
    )
    parser.add_argument("--images", type=int, default=256, help="of the folder")
    parser.add_argument("--folder-batch-sizes", type=numbers, default=[1, 8, 32])
    parser.add_argument("--matrix-sizes", type=numbers, default=[512, 1024, 2048, 4096])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--contestants", choices=("cpu", "cuda"), help="who takes part: by default by the device"
    )
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="with torch.compile too; by default on a GPU",
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--overwrite", action="store_true", help="replace a result of today")
    options = parser.parse_args(arguments)
    if options.quick:
        options.turns, options.seconds = 2, 0.0
        options.large_sizes, options.images, options.folder_batch_sizes = [128, 64], 4, [1, 2]
        options.batch_sizes, options.matrix_sizes = options.batch_sizes or [1, 2], [64]
    options.contestants = options.contestants or options.device
    on_gpu = options.contestants == "cuda"
    options.only = options.only or (["model"] if on_gpu else list(QUESTIONS))
    options.batch_sizes = options.batch_sizes or [1, 256 if on_gpu else 32]
    options.compiled = on_gpu if options.compiled is None else options.compiled
    if unknown := set(options.only) - set(QUESTIONS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(QUESTIONS)}")
    return options


def show(rows: list[Row]) -> None:
    """Print the columns that are not empty."""
    table = [[name, *(str(row[name]) for row in rows)] for name in COLUMNS]
    widths = [max(map(len, column)) for column in table if any(column[1:])]
    for line in zip(*(column for column in table if any(column[1:])), strict=True):
        print(*(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)), sep="  ")


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    name = "inference-quick" if options.quick else "inference"
    path = result_file(options.results, name, options.device, options.overwrite)
    transformers.utils.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for of_question in measure(options, Path(work)):
            show(of_question)
            rows += of_question
    about = {
        "variant": "tiny" if options.quick else options.variant,
        "device": device_name(options.device),
        "threads": options.threads,
        **versions(),
    }
    write_rows(path, [of_contestant | about for of_contestant in rows], options.overwrite)


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
