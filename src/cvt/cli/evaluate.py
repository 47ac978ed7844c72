"""`cvt evaluate`."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="MODEL to evaluate.")],
    data: Annotated[Path, typer.Argument(help="Image folder with one sub-folder per class.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    output: Annotated[
        Path | None,
        typer.Option(help="New folder for metrics.json, per_class.csv, confusion_matrix.csv."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Overwrite files in the output folder.")] = False,
) -> None:
    """Measure top-1, top-5 and per-class accuracy; classes are matched by name."""
    from rich.table import Table

    from cvt.checkpoints import load_classifier, load_processor
    from cvt.cli.console import bar, err, out, quiet_libraries
    from cvt.datasets import image_folder
    from cvt.evaluate import evaluate as evaluate_images
    from cvt.evaluate import write_evaluation

    quiet_libraries()
    images = image_folder(data)
    classifier = load_classifier(model)
    processor = load_processor(model, classifier.config)
    with bar("evaluate", len(images)) as step:
        result = evaluate_images(classifier, processor, images, batch_size, step)
    for failure in result.failures:
        err.print(f"skipped {failure.error}", style="yellow")
    table = Table("class", "images", "top-1 %", "most often taken for")
    table.columns[1].justify = table.columns[2].justify = "right"
    worst = sorted(result.per_class.items(), key=lambda item: item[1][1])
    for name, (count, top1) in worst[:20]:
        table.add_row(name, str(count), f"{100 * top1:.1f}", result.mistaken_for(name))
    out.print(table)
    if len(worst) > 20:
        out.print(f"the worst 20 of {len(worst)} classes; all of them in --output")
    out.print(
        f"top-1 {100 * result.top1:.2f} %  top-5 {100 * result.top5:.2f} %  "
        f"loss {result.loss:.4f}  {result.images} images"
    )
    if output:
        write_evaluation(result, output, overwrite=force)
        out.print(f"written to {output}")
    if result.failures:
        err.print(f"{len(result.failures)} of {len(images)} images skipped")
        raise typer.Exit(3)
