"""`cvt predict`."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cvt.predict import Prediction


def predict(
    model: Annotated[str, typer.Argument(help="MODEL that classifies.")],
    images: Annotated[list[str], typer.Argument(help="Image files, folders, glob patterns.")],
    topk: Annotated[int, typer.Option(min=1, help="Classes to name for each image.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    output: Annotated[
        Path | None, typer.Option(help="Write .csv (a row per class) or .jsonl (a line per image).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line per image.")] = False,
    force: Annotated[bool, typer.Option(help="Overwrite the output file.")] = False,
) -> None:
    """Classify images; those that cannot be decoded are reported and skipped (exit code 3)."""
    if output is not None and output.suffix not in (".csv", ".jsonl"):
        raise typer.BadParameter(f"{output} must end in .csv or .jsonl", param_hint="--output")
    from cvt.checkpoints import load_classifier, load_processor
    from cvt.cli.console import bar, err, quiet_libraries
    from cvt.predict import Prediction, find_images
    from cvt.predict import predict as predict_files

    quiet_libraries()
    paths = find_images(images)
    skipped = 0
    with writer(output, as_json, force) as write:
        classifier = load_classifier(model)
        processor = load_processor(model, classifier.config)
        with bar("predict", len(paths)) as step:
            for result in predict_files(classifier, processor, paths, topk, batch_size):
                step()
                if isinstance(result, Prediction):
                    write(result)
                else:
                    skipped += 1
                    err.print(f"skipped {result.error}", style="yellow")
    if output:
        err.print(f"{output}: {len(paths) - skipped} images classified")
    if skipped:
        err.print(f"{skipped} of {len(paths)} images skipped")
        raise typer.Exit(3)


@contextmanager
def writer(
    output: Path | None, as_json: bool, force: bool
) -> "Iterator[Callable[[Prediction], object]]":
    """A function that writes a prediction to the file, or prints it."""
    if output is None:
        yield lambda prediction: sys.stdout.write(line(prediction, as_json))
        return
    from cvt.files import staged

    with (
        staged(output, overwrite=force) as path,
        open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        if output.suffix == ".jsonl":
            yield lambda prediction: file.write(line(prediction, as_json=True))
            return
        rows = csv.writer(file)
        rows.writerow(["path", "rank", "label", "score"])
        yield lambda prediction: rows.writerows(
            (prediction.path, rank, label, f"{score:.6f}")
            for rank, (label, score) in enumerate(pairs(prediction), start=1)
        )


def pairs(prediction: "Prediction") -> Iterator[tuple[str, float]]:
    """Labels with their scores."""
    return zip(prediction.labels, prediction.scores, strict=True)


def line(prediction: "Prediction", as_json: bool) -> str:
    """A prediction as a line of text or of JSON."""
    if as_json:
        records = [{"label": label, "score": score} for label, score in pairs(prediction)]
        record = {"path": str(prediction.path), "predictions": records}
        return json.dumps(record, ensure_ascii=False) + "\n"
    classes = "  ".join(f"{label} {score:.1%}" for label, score in pairs(prediction))
    return f"{prediction.path}: {classes}\n"
