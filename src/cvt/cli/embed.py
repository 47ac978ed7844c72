"""`cvt embed`."""

from contextlib import nullcontext
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any

import click

from cvt.cli.options import (
    FILE,
    argument,
    command,
    data_options,
    exact_decoding_option,
    force_option,
    max_pixels_option,
    no_verify_option,
    run_options,
    verbose_option,
)


@command
@argument("model", help="MODEL whose features are wanted, or an export with features.")
@argument(
    "data",
    nargs=-1,
    required=True,
    help="Labelled data as `cvt check` takes it, or image files, folders of these, glob patterns, "
    "csv files of paths.",
)
@click.option("--output", type=FILE, required=True, help="Write .parquet, .npz or .npy.")
@click.option(
    "--stage", type=click.IntRange(min=1), help="Stage whose output is pooled; default: the last."
)
@click.option(
    "--pool",
    type=click.Choice(("cls", "mean")),
    help="Class token, or mean of the other tokens; default: the class token, if there is one.",
)
@click.option("--normalize", is_flag=True, help="Scale the features of an image to length 1.")
@click.option(
    "--plot",
    type=FILE,
    help="Write a map of the images to this .html; each point shows its picture.",
)
@click.option(
    "--plot-method",
    type=click.Choice(("tsne", "pca")),
    help="Method of the map; default: t-SNE up to 10,000 images, else PCA.",
)
@run_options(1)
@exact_decoding_option
@max_pixels_option
@data_options
@click.option("--resume", is_flag=True, help="Resume an interrupted run and its output.")
@no_verify_option
@verbose_option
@force_option("Overwrite the output file, and what an interrupted run left.")
def embed(
    model: str,
    data: tuple[str, ...],
    output: Path,
    stage: int | None,
    pool: str | None,
    normalize: bool,
    plot: Path | None,
    plot_method: str | None,
    batch_size: int,
    workers: int,
    runtime: str,
    precision: str | None,
    device: str,
    threads: int | None,
    exact_decoding: bool,
    max_pixels: int | None,
    resume: bool,
    no_verify: bool,
    verbose: bool,
    force: bool,
    **how_labelled: Any,
) -> None:
    """Write the features of images; those that cannot be decoded are skipped (exit code 3)."""
    from cvt.checkpoints import model_source
    from cvt.cli.console import err, open_classifier, quiet_libraries
    from cvt.cli.progress import consume, exit_if_skipped
    from cvt.files import staged
    from cvt.inference.embed import embed as embed_images
    from cvt.inference.embed import open_images
    from cvt.inference.embedding_file import EmbeddingFile, about_run, read_embeddings
    from cvt.inference.embedding_map import check_output, write_map
    from cvt.runtime import FeatureSettings
    from cvt.runtime.factory import MANY_IMAGES

    quiet_libraries(verbose)
    if plot_method and not plot:
        raise click.UsageError("--plot-method needs a --plot.")
    if plot:
        check_output(plot)
    # What may not be written is refused before the work begins.
    with (
        staged(plot, force) if plot else nullcontext() as page,
        EmbeddingFile(output, resume, force) as file,
    ):
        images = open_images(data, **how_labelled)
        first = list(islice(images, MANY_IMAGES))  # to count them; the rest is read later
        source, how = model_source(model), (runtime, precision, device, threads)
        features = FeatureSettings(stage, pool)
        classifier, processor = open_classifier(
            source, *how, len(first), not no_verify, features=features
        )
        settings = about_run(source, classifier, processor, normalize) | {
            "exact_decoding": exact_decoding,
            "max_pixels": max_pixels,
        }
        found = file.missing(chain(first, images), settings, lambda image: str(image[0]))
        if file.count:
            err.print(f"{file.count} images are embedded already")
        decoded, labelled = tee(found)
        sources = (image for image, _ in decoded)
        results = embed_images(
            classifier,
            processor,
            sources,
            batch_size,
            workers,
            exact_decoding,
            max_pixels,
            normalize=normalize,
        )
        rows = zip(results, (label for _, label in labelled), strict=False)
        done = consume("embed", rows, file.write, lambda row: row[0].error, file)
        err.print(f"{output}: {file.count} images embedded, {file.width} numbers each")
        if page:
            sources = (image for image, _ in open_images(data, **how_labelled))
            write_map(read_embeddings(output), page, str(output), plot_method, sources)
    exit_if_skipped(*done)
