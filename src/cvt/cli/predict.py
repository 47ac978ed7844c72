"""`cvt predict`."""

from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cvt.limits import BOUNDS

if TYPE_CHECKING:
    from cvt.inference.predict import Prediction
    from cvt.runtime.base import Runtime

# How a model is run, in every command that runs one.
RuntimeName = Annotated[
    Literal[
        "auto", "torch", "fused", "compiled", "onnxruntime", "openvino", "tensorflow", "litert"
    ],
    typer.Option("--runtime", help="What runs the model; auto is the fastest installed."),
]
Precision = Annotated[
    Literal["fp32", "bf16", "fp16", "int8"] | None,
    typer.Option(help="Of the numbers; fp32, or an export's own, unless given."),
]


def known_device(name: str) -> str:
    """The device, which there is."""
    if name in ("auto", "cpu"):  # there always; PyTorch is imported for the others alone
        return name
    from cvt.runtime.factory import check_device

    try:
        check_device(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return name


def count(name: str, help: str) -> Any:
    """An option for a whole number within `cvt.limits.BOUNDS`."""
    least, most = BOUNDS[name]
    return typer.Option(min=least, max=most, help=help)


Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1, ...; auto is CUDA where there is.", callback=known_device
    ),
]
Threads = Annotated[int | None, count("threads", "Threads that run the model on a CPU.")]
BatchSize = Annotated[int, count("batch_size", "Images at a time.")]
Workers = Annotated[int, count("workers", "Processes that decode images.")]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1, help="Pixels that an image may have; larger ones are skipped (default 178956970)."
    ),
]

NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify", help="Do not compare the files with the SHA-256 that were written with them."
    ),
]


def predict(
    model: Annotated[str, typer.Argument(help="MODEL that classifies, or an exported folder.")],
    images: Annotated[list[str], typer.Argument(help="Image files, folders, glob patterns.")],
    topk: Annotated[
        int, typer.Option(min=1, help="Classes to name for each image; a regression names all.")
    ] = 5,
    batch_size: BatchSize = 32,
    workers: Workers = 1,
    runtime: RuntimeName = "auto",
    precision: Precision = None,
    device: Device = "auto",
    threads: Threads = None,
    exact_decoding: Annotated[
        bool, typer.Option("--exact-decoding", help="Decode large JPEGs whole, which is slower.")
    ] = False,
    max_pixels: MaxPixels = None,
    output: Annotated[
        Path | None, typer.Option(help="Write .csv (a row per class) or .jsonl (a line per image).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line per image.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the output of an interrupted run.")
    ] = False,
    no_verify: NoVerify = False,
    force: Annotated[
        bool, typer.Option(help="Overwrite the output file, and what an interrupted run left.")
    ] = False,
) -> None:
    """Classify images; those that cannot be decoded are reported and skipped (exit code 3)."""
    if output is not None and output.suffix not in (".csv", ".jsonl"):
        raise typer.BadParameter(f"{output} must end in .csv or .jsonl", param_hint="--output")
    if resume and output is None:
        raise typer.BadParameter("goes on with an --output", param_hint="--resume")
    from cvt.checkpoints import load_processor
    from cvt.cli.console import bar, err, quiet_libraries
    from cvt.inference.predict import Prediction, find_images, scores_per_image
    from cvt.inference.predict import predict as predict_files
    from cvt.inference.prediction_file import Results
    from cvt.runtime import open_runtime
    from cvt.runtime.factory import MANY

    quiet_libraries()
    paths = find_images(images)
    skipped = classified = 0
    with Results(output, resume, force) if output else nullcontext() as results:
        first = list(islice(paths, MANY))  # to count them; the rest is read later
        paths = chain(first, paths)
        classifier = open_runtime(
            *(model, runtime, precision, device, threads),
            images=len(first),
            verify=not no_verify,
        )
        err.print(f"runtime: {classifier.describe}")
        processor = load_processor(model, classifier.config)
        topk = scores_per_image(topk, classifier.config)
        if results:
            settings = {
                "topk": topk,
                "exact_decoding": exact_decoding,
                "max_pixels": max_pixels,
            }
            paths = results.missing(paths, identity(model, classifier) | settings)
            if results.count:
                err.print(f"{results.count} images are classified already")
        try:
            with bar("predict", None) as step:
                for result in predict_files(
                    *(classifier, processor, paths, topk, batch_size, workers, exact_decoding),
                    max_pixels=max_pixels,
                ):
                    step()
                    if not isinstance(result, Prediction):
                        skipped += 1
                        err.print(f"skipped {result.error}", style="yellow")
                        continue
                    classified += 1
                    if results:
                        results.write(result)
                    else:
                        print(line(result, as_json), flush=True)
        except BaseException:
            if results and results.count:
                err.print(f"{results.count} images are in {results.part}: --resume goes on")
            raise
        if results:
            results.finish()
            err.print(f"{output}: {results.count} images classified")
    if skipped:
        err.print(f"{skipped} of {classified + skipped} images skipped")
        raise typer.Exit(3)


def identity(model: str, runtime: "Runtime") -> dict[str, Any]:
    """What tells a model and what runs it from others, for results to go on with."""
    path = Path(model)
    files = filter(Path.is_file, path.iterdir() if path.is_dir() else [path])
    return {
        "model": str(path.resolve()) if path.exists() else model,
        "changed": max((file.stat().st_mtime for file in files), default=None),
        "runtime": runtime.name,
        "precision": runtime.precision,
    }


def line(prediction: "Prediction", as_json: bool) -> str:
    """A prediction as a line of text or of JSON."""
    from cvt.inference.prediction_file import json_line
    from cvt.text import printable

    if as_json:
        return json_line(prediction)
    form = "{label} {score:g}" if prediction.are_values else "{label} {score:.1%}"
    classes = "  ".join(form.format(**record) for record in prediction.records)
    return printable(f"{prediction.path}: {classes}")
