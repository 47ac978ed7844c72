"""How fast and how large is CvT's inference on a CPU, beside the other ways to run it?

    python benchmarks/inference.py
    python benchmarks/inference.py --only model,rate --batch-sizes 1
    python benchmarks/inference.py --only openvino    # a few minutes
    python benchmarks/inference.py --quick    # a tiny model: does all of it run?

All have the same shape and random weights, and each the activation that it gives the variant.
Questions:
- model: from pixels to logits. Transformers' CvT eager in fp32 is the reference, beside its exports
  to ONNX Runtime and OpenVINO (for any batch, and compiled for the very shape) and our runtimes.
  The exports in int8, ours and transformers' as nncf quantizes a transformer, are calibrated on
  pictures of the folder; quantization.py asks for their accuracy.
- openvino: of the same, only transformers' CvT as an expert builds it by hand, and ours, in fp32
  and int8; `rate` with it. A run without --only has it in `model`.
- rate: the machine's best rate of matrix products in each precision, as PyTorch's own, as oneDNN's
  with packed weights and as OpenVINO's. With `model`, the fastest of each precision takes its turns
  too, and the matrix share is what a peer reaches of its rate, counting the operations that it
  really executes.
- memory: one large image, each peer alone in a process of its own; and ours on images of
  several sizes. Memory is the peak of the process, libraries and weights included.
- folder: JPEGs of 1024 x 768 end to end; transformers.pipeline with several batch sizes, of which
  the fastest is the reference, beside cvt.Classifier's stream.
- import: a new process that imports cvt, or prints `cvt --help`, beside one that imports
  transformers, or nothing.

What this processor cannot run has a row that says why.

Those that are compared take turns in one process, so that a busy machine slows all; the ratio is
the median of the turns' own ratios, and its spread their quartiles. Only memory is measured one
after the other.

Prints a table and writes it to `results/inference-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from common import (
    SHAPES,
    Row,
    command_line,
    count,
    counts,
    duration,
    in_fresh_process,
    peak_memory,
    per_image,
    ratio,
    result_file,
    show,
    some_of,
    speed,
    write_pictures,
    write_rows,
)
from peers import (
    BY_HAND,
    CPU,
    INT8,
    OPENVINO,
    OURS,
    REFERENCE,
    Peer,
    build,
    by_hand_in_int8,
    opened,
    operations,
    product,
    shape,
)

from cvt import image_processor
from cvt.inference.benchmark import device_name, in_turns, middle, speed_ratios, timed, versions
from cvt.inference.classifier import Classifier
from cvt.runtime import open_runtime
from cvt.runtime.openvino_runtime import computes

PIPELINE = Peer("transformers.pipeline", "torch", "fp32")
QUESTIONS = ("rate", "model", "memory", "folder", "import")  # openvino repeats rows of model
CALIBRATION = 32  # pictures
COLUMNS = (
    *("question", "peer", "runtime", "precision", "batch_size", "image_size", "ms_per_image"),
    *("images_per_second", "seconds", "ratio", "ratio_quartiles", "ratio_to_by_hand"),
    *("gflops", "matrix_share", "peak_memory_mib", "note"),
)


def row(question: str, peer: Peer, **figures: object) -> Row:
    """A row of the table; what it does not tell is empty."""
    known = dict(zip(("peer", "runtime", "precision"), peer, strict=True))
    return dict.fromkeys(COLUMNS, "") | {"question": question} | known | figures


# ------------------------------------------------------------------------------ rate and model


class Product(NamedTuple):
    """A product of square matrices."""

    peer: Peer
    run: Callable[[], object]
    operations: int


def matrix_products(options: argparse.Namespace) -> Iterator[Product]:
    """PyTorch's own, oneDNN's with one matrix packed beforehand, and OpenVINO's."""
    mkldnn = torch.ops.mkldnn
    for size in options.matrix_sizes:
        a, b = torch.randn(2, size, size)
        packed = mkldnn._reorder_linear_weight(b, size)
        onednn = partial(mkldnn._linear_pointwise, a, packed, None, "none", [], "")
        runs = {("torch", "fp32"): partial(torch.mm, a, b), ("oneDNN", "fp32"): onednn}
        for precision in ("fp32", *(["bf16"] if computes("bf16") else []), "int8"):
            runs["openvino", precision] = product(size, precision, options)
        for (runtime, precision), run in runs.items():
            yield Product(Peer(f"matrices of {size}", runtime, precision), run, 2 * size**3)


def rate_rows(options: argparse.Namespace) -> tuple[list[Row], dict[str, Product]]:
    """The rate of every product, and the fastest product in each precision."""
    products = list(matrix_products(options))
    times = in_turns({p.peer: p.run for p in products}, least=options.turns)
    seconds = {p.peer: middle(times[p.peer]) for p in products}
    products.sort(key=lambda p: p.operations / seconds[p.peer])
    return [
        row("rate", peer, gflops=round(executed / seconds[peer] / 1e9, 1))
        for peer, _, executed in reversed(products)
    ], {p.peer.precision: p for p in products}


def model_rows(
    options: argparse.Namespace,
    work: Path,
    products: dict[str, Product],
    peers: Iterable[Peer] | None = None,
    question: str = "model",
) -> list[Row]:
    """From pixels to logits, for each batch size; shares are of the rates of `products`."""
    models, rows = open_peers(CPU if peers is None else peers, options, work)
    for batch_size in options.batch_sizes:
        pixels = torch.randn(batch_size, 3, options.image_size, options.image_size)
        runs = {peer: partial(model, pixels) for peer, model in models.items()}
        runs |= {fastest.peer: fastest.run for fastest in products.values()}
        times = in_turns(runs, options.seconds, options.turns)
        for peer in models:
            turns = times[peer]
            figures = speed(per_image(batch_size, turns)) | ratio(turns, times[REFERENCE])
            if by_hand := times.get(BY_HAND[peer.precision]):
                figures["ratio_to_by_hand"] = ratio(turns, by_hand)["ratio"]
            if fastest := products.get(peer.precision):
                executed = batch_size * operations(peer, options)
                _, faster, _ = speed_ratios(times[fastest.peer], turns)
                figures["gflops"] = round(executed / middle(turns) / 1e9, 1)
                figures["matrix_share"] = round(executed / fastest.operations * faster, 3)
            where = {"batch_size": batch_size, "image_size": options.image_size}
            rows.append(row(question, peer, **where, **figures))
    return rows


def open_peers(
    peers: Iterable[Peer], options: argparse.Namespace, work: Path
) -> tuple[dict[Peer, Callable], list[Row]]:
    """What runs each peer, ours in int8 at the end; and a row for each that cannot run here."""
    models: dict[Peer, Callable] = {}
    rows = []
    for peer in peers:
        if peer.runtime == "compiled" and not options.compiled:
            continue
        try:
            if peer == BY_HAND["int8"]:
                calibrating = sorted(pictures(options, work).iterdir())[:CALIBRATION]
                models[peer] = by_hand_in_int8(calibrating, options)
            else:
                models[peer] = opened(peer, options)
        except ValueError as error:
            rows.append(row("model", peer, note=f"left out: {error}"))
    models[INT8] = open_runtime(write_export(options, work), threads=options.threads)
    return models, rows


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
            calibration=pictures(options, work),
            calibration_images=CALIBRATION,
            min_agreement=0.0,  # what random weights tell apart may well change
        )
    return folder


def write_model(options: argparse.Namespace, work: Path) -> Path:
    """Our model's folder, with its preprocessing."""
    folder = work / "model"
    if not folder.exists():
        config = shape(options.variant)
        build("cvt", config).save_pretrained(folder)
        image_processor(config, image_size=options.image_size).save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------ memory


def one_image(peer: Peer, size: int, options: argparse.Namespace) -> Row:
    """Time and peak memory of this process for one image; ours has seen one before."""
    run = opened(peer, options)
    pixels = torch.randn(1, 3, size, size)
    if peer != REFERENCE:  # a call takes the reference half a minute, and it prepares nothing
        run(pixels)
    seconds = timed(partial(run, pixels))
    return {"ms_per_image": round(1000 * seconds, 1), "peak_memory_mib": round(peak_memory())}


def memory_rows(options: argparse.Namespace) -> list[Row]:
    """The large image with each peer, then images of other sizes with ours."""
    large, *others = options.large_sizes
    measured = [
        *((c, large) for c in (REFERENCE, OURS, OURS._replace(runtime="openvino"))),
        *((OURS, size) for size in others),
    ]
    rows = []
    for peer, size in measured:
        figures = in_fresh_process(one_image, peer, size, options)
        if size == large:
            slow = rows[0] if rows else figures
            figures["ratio"] = round(slow["ms_per_image"] / figures["ms_per_image"], 3)
        rows.append(row("memory", peer, batch_size=1, image_size=size, **figures))
    return rows


# ------------------------------------------------------------------------------ folder


def pictures(options: argparse.Namespace, work: Path) -> Path:
    """The folder of pictures."""
    folder = work / "pictures"
    if not folder.exists():
        write_pictures(folder, options.images, 1024, 768, quality=90)
    return folder


def folder_rows(options: argparse.Namespace, work: Path) -> list[Row]:
    """The folder of pictures from end to end; the reference is the fastest pipeline."""
    folder = pictures(options, work)
    paths = [str(path) for path in sorted(folder.iterdir())]
    torch.set_num_threads(options.threads)
    pipeline = transformers.pipeline(
        "image-classification",
        model=build("transformers", shape(options.variant)),
        image_processor=image_processor(shape(options.variant), image_size=options.image_size),
    )
    # A quarter of them for the pipeline, which then takes about as long.
    paths = paths[: -(-len(paths) // 4)]
    runs: dict[tuple[Peer, int], Callable[[], object]] = {
        (PIPELINE, batch_size): partial(pipeline, paths, batch_size=batch_size)
        for batch_size in options.folder_batch_sizes
    }
    for source, precision in (
        (write_model(options, work), "fp32"),
        (write_model(options, work), "bf16"),
        (write_export(options, work), None),
    ):
        classifier = Classifier(source, precision=precision, threads=options.threads)
        peer = Peer("cvt.Classifier", classifier.runtime.name, classifier.runtime.precision)
        runs[peer, classifier.batch_size] = partial(consume, classifier, folder)
    images = {key: len(paths) if key[0] == PIPELINE else options.images for key in runs}
    times = {
        key: per_image(images[key], turns)
        for key, turns in in_turns(runs, least=min(options.turns, 3), turn=0).items()
    }
    reference = min((turns for key, turns in times.items() if key[0] == PIPELINE), key=middle)
    return [
        row("folder", peer, batch_size=batch_size, image_size=options.image_size)
        | speed(turns)
        | ratio(turns, reference)
        for (peer, batch_size), turns in times.items()
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
        Peer(name, "", ""): partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
        for name, command in commands.items()
    }
    times = in_turns(runs, least=options.turns, turn=0)
    reference, *_ = times.values()
    return [
        row("import", peer, seconds=round(middle(turns), 3), **ratio(turns, reference))
        for peer, turns in times.items()
    ]


# ------------------------------------------------------------------------------ command line


def measure(options: argparse.Namespace, work: Path) -> Iterator[list[Row]]:
    """The rows of each question that is asked."""
    torch.set_num_threads(options.threads)
    products: dict[str, Product] = {}
    if "rate" in options.only or "openvino" in options.only:
        rows, products = rate_rows(options)
        yield rows
    if "model" in options.only:
        yield model_rows(options, work, products)
    if "openvino" in options.only:
        yield model_rows(options, work, products, OPENVINO, "openvino")
    if "memory" in options.only:
        yield memory_rows(options)
    if "folder" in options.only:
        yield folder_rows(options, work)
    if "import" in options.only:
        yield import_rows(options)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--only",
        type=some_of((*QUESTIONS, "openvino")),
        default=list(QUESTIONS),
        help=f"of {', '.join(QUESTIONS)}, openvino",
    )
    parser.add_argument("--variant", choices=SHAPES, default="cvt-13")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few and small images")
    parser.add_argument("--image-size", type=count, default=224)
    parser.add_argument("--batch-sizes", type=counts, default=[1, 32])
    parser.add_argument(
        "--seconds", type=duration, default=5.0, help="of each model and batch size"
    )
    parser.add_argument("--turns", type=count, default=8, help="of each peer, at least")
    parser.add_argument(
        "--large-sizes",
        type=counts,
        default=[1024, 512, 1448, 2048],
        help="the image of the question memory, then those that only ours are given",
    )
    parser.add_argument("--images", type=count, default=256, help="of the folder")
    parser.add_argument("--folder-batch-sizes", type=counts, default=[1, 8, 32])
    parser.add_argument("--matrix-sizes", type=counts, default=[512, 1024, 2048, 4096])
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    parser.add_argument("--compiled", action="store_true", help="with torch.compile too")
    options = parser.parse_args(arguments)
    if options.quick:
        options.variant, options.turns, options.seconds = "tiny", 2, 0.0
        options.large_sizes, options.images, options.folder_batch_sizes = [128, 64], 4, [1, 2]
        options.batch_sizes, options.matrix_sizes = [1, 2], [64]
    return options


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    name = "inference-quick" if options.quick else "inference"
    path = result_file(options.results, name, "cpu", options.overwrite)
    transformers.utils.logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for of_question in measure(options, Path(work)):
            show(of_question)
            rows += of_question
    about = {
        "variant": options.variant,
        "device": device_name("cpu"),
        "threads": options.threads,
        **versions(),
    }
    mode = "w" if options.overwrite else "x"
    write_rows(path, [of_peer | about for of_peer in rows], mode)


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
