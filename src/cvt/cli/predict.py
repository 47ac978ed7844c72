"""`cvt predict`."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cvt.cli.options import (
    FILE,
    argument,
    command,
    exact_decoding_option,
    force_option,
    max_pixels_option,
    no_verify_option,
    run_options,
    tta_option,
    verbose_option,
)

if TYPE_CHECKING:
    from cvt.inference.predict import Prediction


@command
@argument("model", help="MODEL that classifies, or an exported folder.")
@argument(
    "images",
    nargs=-1,
    required=True,
    help="Image files, folders, glob patterns, csv files of paths.",
)
@click.option(
    "--topk",
    type=click.IntRange(min=1),
    default=5,
    help="Classes to name for each image; a regression names all.",
)
@run_options(1)
@exact_decoding_option
@max_pixels_option
@tta_option
@click.option(
    "--output",
    type=FILE,
    help="Write .csv (a row per class), .jsonl (a line per image) or .parquet (a row per image).",
)
@click.option(
    "--logits", is_flag=True, help="Write logits and probabilities of all classes, into a .parquet."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line per image.")
@click.option("--resume", is_flag=True, help="Resume an interrupted run and its output.")
@no_verify_option
@verbose_option
@force_option("Overwrite the output file, and what an interrupted run left.")
def predict(
    model: str,
    images: tuple[str, ...],
    topk: int,
    batch_size: int,
    workers: int,
    runtime: str,
    precision: str | None,
    device: str,
    threads: int | None,
    exact_decoding: bool,
    max_pixels: int | None,
    tta: str | None,
    output: Path | None,
    logits: bool,
    as_json: bool,
    resume: bool,
    no_verify: bool,
    verbose: bool,
    force: bool,
) -> None:
    """Classify images; those that cannot be decoded are reported and skipped (exit code 3)."""
    if output is not None and output.suffix not in (".csv", ".jsonl", ".parquet"):
        message = f"{output} must end in .csv, .jsonl or .parquet"
        raise click.BadParameter(message, param_hint="--output")
    if logits and (output is None or output.suffix != ".parquet"):
        raise click.BadParameter("needs an --output that ends in .parquet", param_hint="--logits")
    if as_json and output is not None:
        raise click.BadParameter("prints, and --output writes", param_hint="--json")
    if resume and output is None:
        raise click.BadParameter("needs an --output", param_hint="--resume")
    from cvt.checkpoints import model_source
    from cvt.cli.console import err, open_classifier, quiet_libraries
    from cvt.cli.progress import consume, exit_if_skipped
    from cvt.inference.predict import find_images, scores_per_image
    from cvt.inference.predict import predict as predict_files
    from cvt.inference.prediction_file import open_predictions
    from cvt.inference.result_file import run_settings
    from cvt.runtime.factory import MANY_IMAGES

    quiet_libraries(verbose)
    paths = find_images(list(images))
    opened = open_predictions(output, resume, force, logits) if output else nullcontext()
    with opened as file:
        first = list(islice(paths, MANY_IMAGES))  # to count them; the rest is read later
        paths = chain(first, paths)
        source, how = model_source(model), (runtime, precision, device, threads)
        classifier, processor = open_classifier(source, *how, len(first), not no_verify)
        topk = scores_per_image(topk, classifier.config)
        decoding = {"exact_decoding": exact_decoding, "max_pixels": max_pixels, "tta": tta}
        if file:
            how_run = run_settings(str(source.path), classifier, topk=topk, **decoding)
            paths = file.missing(paths, how_run | file.settings_of(classifier.config))
            if file.count:
                err.print(f"{file.count} images are classified already")
        settings = (topk, batch_size, workers, exact_decoding, max_pixels, tta)
        results = predict_files(classifier, processor, paths, *settings)
        write = file.write if file else printer(as_json)
        done = consume("predict", results, write, lambda each: getattr(each, "error", None), file)
        if file:
            err.print(f"{output}: {file.count} images classified")
    exit_if_skipped(*done)


def printer(as_json: bool) -> "Callable[[Prediction], None]":
    """A function that prints a prediction as a line of text or of JSON."""
    from cvt.inference.prediction_file import json_line
    from cvt.text import printable

    def print_text(prediction: "Prediction") -> None:
        form = "{label} {score:g}" if prediction.are_values else "{label} {score:.1%}"
        texts = [form.format(**record) for record in prediction.records]
        if prediction.has is not None:
            pairs = zip(texts, prediction.has, strict=True)
            texts = [text if has else f"({text})" for text, has in pairs]
        classes = "  ".join(texts)
        print(printable(f"{prediction.path}: {classes}"), flush=True)

    return (lambda each: print(json_line(each), flush=True)) if as_json else print_text
