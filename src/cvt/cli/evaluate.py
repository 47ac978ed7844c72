"""`cvt evaluate`."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cvt.cli.options import (
    FILE,
    FOLDER,
    argument,
    command,
    data_options,
    force_option,
    max_pixels_option,
    no_verify_option,
    run_options,
    tta_option,
    verbose_option,
)

if TYPE_CHECKING:
    from cvt.data import Images
    from cvt.data.decoding import Source
    from cvt.inference.evaluate import AnyEvaluation
    from cvt.inference.metrics import Evaluation
    from cvt.inference.output_metrics import OutputEvaluation


@command
@argument("model", help="MODEL to evaluate, or an exported folder.")
@argument(
    "data",
    help="Folder with a sub-folder per class, .csv, .parquet, hub:NAME, CIFAR, digits; "
    "of data with splits, the validation split.",
)
@run_options(0)
@max_pixels_option
@tta_option
@click.option(
    "--output",
    type=FOLDER,
    help="New folder for metrics.json, per_class.csv, confusion_matrix.csv, predictions.csv.",
)
@click.option("--report", type=FILE, help="New HTML page of figures, tables and pictures.")
@click.option(
    "--label-errors",
    type=FOLDER,
    help="New folder for the labels that are probably wrong: a page with the pictures, a csv file.",
)
@click.option(
    "--class-map",
    type=FILE,
    help="JSON object, or csv of two columns: names of classes in the data and in the "
    "model; nothing for classes to leave out.",
)
@click.option("--subset", is_flag=True, help="Predict only classes that occur in the data.")
@click.option(
    "--real",
    "--real-labels",
    "real_labels",
    type=FILE,
    help="ImageNet-ReaL's real.json, to compare with it too.",
)
@data_options
@no_verify_option
@verbose_option
@force_option("Overwrite existing files.")
def evaluate(
    model: str,
    data: str,
    batch_size: int,
    workers: int,
    runtime: str,
    precision: str | None,
    device: str,
    threads: int | None,
    max_pixels: int | None,
    tta: str | None,
    output: Path | None,
    report: Path | None,
    label_errors: Path | None,
    class_map: Path | None,
    subset: bool,
    real_labels: Path | None,
    no_verify: bool,
    verbose: bool,
    force: bool,
    **how_labelled: Any,
) -> None:
    """Measure accuracy, per class too, and calibration; classes are matched by name."""
    from cvt.cli.console import open_classifier, out, quiet_libraries
    from cvt.cli.progress import bar
    from cvt.data import LabelledImages, open_labelled
    from cvt.files import staged
    from cvt.inference.class_matching import read_class_map, read_real_labels
    from cvt.inference.evaluate import evaluate as evaluate_images
    from cvt.inference.evaluate import write_evaluation
    from cvt.inference.label_errors import label_errors as find_label_errors
    from cvt.inference.label_errors import write_label_errors
    from cvt.inference.metrics import Evaluation

    quiet_libraries(verbose)
    images = not_trained_on(open_labelled(data, **how_labelled), model)
    total = images.length

    def picture(position: int) -> "Source | None":
        return images[position][0] if isinstance(images, LabelledImages) else None

    if label_errors and not images.task.has_one_class:
        raise click.BadParameter(
            "labels of one class are compared, and the data has others", param_hint="--label-errors"
        )
    mapped = read_class_map(class_map) if class_map else None
    real = read_real_labels(real_labels) if real_labels else None
    # What may not be written is refused before the work begins.
    with (
        staged(output, force) if output else nullcontext() as folder,
        staged(report, force) if report else nullcontext() as page,
        staged(label_errors, force) if label_errors else nullcontext() as suspects,
    ):
        write_report = report_writer(model, device, threads, max_pixels) if page else None
        how = (runtime, precision, device, threads)
        classifier, processor = open_classifier(model, *how, total, not no_verify)
        with bar("evaluate", total) as step:
            result = evaluate_images(
                *(classifier, processor, images, batch_size, workers, step),
                class_map=mapped,
                subset=subset,
                real_labels=real,
                max_pixels=max_pixels,
                keep_scores=label_errors is not None,
                tta=tta,
            )
        if folder:
            write_evaluation(result, folder)
        if write_report:
            write_report(result, page, f"{model} on {data}")
        if suspects and isinstance(result, Evaluation):
            errors = find_label_errors(result)
            write_label_errors(result, errors, suspects, f"{model} on {data}", picture)
    print_evaluation(result, subset)
    if label_errors:
        out.print(f"{len(errors)} of {result.images} labels are probably wrong")
    for written in filter(None, (output, report, label_errors)):
        out.print(f"written to {written}")
    if result.failures:
        raise click.exceptions.Exit(3)


def report_writer(
    model: str, device: str, threads: int | None, max_pixels: int | None
) -> Callable[..., None]:
    """What writes the report, with heat maps; those of an export are missing, which is printed."""
    from cvt.checkpoints import model_source
    from cvt.cli.console import err
    from cvt.inference.explain import Explainer
    from cvt.inference.report import write_report

    source = model_source(model)
    if source.is_export:
        err.print("the report has no heat maps: an export has no gradients, its model has them")
        return write_report
    # The files are verified when the model is opened to be evaluated.
    explainer = Explainer(source, device, threads, max_pixels=max_pixels, verify=False)
    return partial(write_report, explainer=explainer)


def print_evaluation(result: "AnyEvaluation", subset: bool) -> None:
    """Print the images that were skipped, the worst classes, and the metrics."""
    from cvt.cli.console import err
    from cvt.inference.metrics import Evaluation

    for failure in result.failures:
        err.print(f"skipped {failure.error}", fg="yellow")
    if isinstance(result, Evaluation):
        print_classes(result, subset)
    else:
        print_outputs(result)
    if skipped := len(result.failures):
        err.print(f"{skipped} of {result.images + skipped} images skipped")


def print_outputs(result: "OutputEvaluation") -> None:
    """Print the figures of every class or value, and the metrics."""
    from rich.table import Column, Table

    from cvt.cli.console import out
    from cvt.cli.rich_console import print_table
    from cvt.inference.metrics import METRIC_NAMES, metric_text

    (header, *rows), *_ = result.tables().values()
    names = [name.replace("_", " ") for name in header]
    table = Table(names[0], *(Column(name, justify="right") for name in names[1:]))
    for row in rows[:20]:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    print_table(table)
    if len(rows) > 20:
        out.print(f"the first 20 of {len(rows)}; all of them in --output")
    texts = [metric_text(*item) for item in result.metrics.items() if item[0] in METRIC_NAMES]
    out.print("  ".join([*texts, f"{result.images} images"]))


def print_classes(result: "Evaluation", subset: bool) -> None:
    """Print the worst classes and the metrics of images of one class each."""
    from rich.table import Column, Table

    from cvt.cli.console import out
    from cvt.cli.rich_console import print_table
    from cvt.inference.metrics import metric_text

    numbers = [
        Column(name, justify="right") for name in ("images", "recall %", "precision %", "F1 %")
    ]
    table = Table("class", *numbers, "most often predicted")
    worst = sorted(result.per_class.items(), key=lambda item: item[1].recall)
    for name, (images, *shares) in worst[:20]:
        percent = [f"{100 * share:.1f}" for share in shares]
        table.add_row(name, str(images), *percent, result.mistaken_for(name))
    print_table(table)
    if len(worst) > 20:
        out.print(f"the worst 20 of {len(worst)} classes; all of them in --output")
    if (lacking := len(result.labels) - len(worst)) and not subset:
        out.print(
            f"the data has no images of {lacking} of the model's {len(result.labels)} classes; "
            "--subset ignores them"
        )
    top1, top5, loss, *of_classes = (
        metric_text(name, getattr(result, name))
        for name in ("top1", "top5", "loss", "balanced_accuracy", "f1_macro")
    )
    error = f"calibration error {100 * result.calibration_error:.2f} %"
    out.print("  ".join(of_classes))
    out.print("  ".join([top1, top5, loss, error, f"{result.images} images"]))
    if result.real_top1 is not None:
        out.print(
            f"top-1 by real labels {100 * result.real_top1:.2f} %  "
            f"top-5 {100 * (result.real_top5 or 0.0):.2f} %"
        )


def not_trained_on(images: "Images", model: str) -> "Images":
    """The validation images, if the run of the model has drawn them from these; else all.

    How many the model was trained on, by their names, is printed.
    """
    from cvt.cli.console import err
    from cvt.data import LabelledImages, without_trained
    from cvt.data.split_file import run_of

    split_file = run_of(model) / "split.csv"
    if not isinstance(images, LabelledImages) or not split_file.is_file():
        return images
    kept, trained = without_trained(images, split_file)
    if kept is not images:
        err.print(f"the {len(kept)} validation images of {len(images)}, by {split_file}")
    if trained:
        err.print(
            f"{trained} of the {len(kept)} images have the names of images that the model "
            f"was trained on, by {split_file}: it may be less accurate on others",
            fg="yellow",
        )
    return kept
