"""The files of a run folder.

| file | what is in it |
|---|---|
| `args.yaml` | the resolved recipe, for `cvt train --config` |
| `environment.json` | versions, device, processes, command, git: an entry for each start |
| `results.csv` | a row for each epoch |
| `learning_curve.png` | the same as a picture |
| `speed.csv` | images per second, and the share of the time that was spent waiting for them |
| `lr_find.csv`, `lr_find.png` | the range test, of a run with `lr: find` |
| `split.csv` | which images were trained on, where the run drew the validation images itself |
| `test/` | the best model's evaluation on the images that were held out, where there are any |
| `confusion_matrix.png`, `mistakes.png` | of the best epoch; of several classes or values \
`predictions.png` and `mistakes.png` |
| `tensorboard/` | events for TensorBoard |
| `trackers.json` | the ids by which other trackers know the run |
| `corrupt.txt` | the training images that could not be read |
| `best/`, `last/` | model folders, with preprocessing, a model card and `checksums.json` |
| `checkpoints/` | what the run resumes from |
| `features/` | outputs of the frozen stages, of a run that keeps them; deleted at its end |
"""

import csv
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cvt.files import locked, staged, write_checksums
from cvt.inference.evaluate import AnyEvaluation
from cvt.inference.metrics import Evaluation
from cvt.inference.report import (
    plot_confusion,
    plot_curves,
    plot_mistakes,
    plot_outputs,
    plot_worst,
)
from cvt.libraries import version_of
from cvt.text import printable
from cvt.train.model_card import trained_card
from cvt.train.plan import Plan
from cvt.train.progress import Row
from cvt.train.recipe import Recipe
from cvt.train.strict_yaml import write_yaml

PACKAGES = ("cvt-vision", "torch", "torchvision", "transformers", "timm", "accelerate", "datasets",
            "peft", "numpy", "pillow")  # fmt: skip
CORRUPT = "corrupt.txt"
OF_BEST = ("best", "confusion_matrix.png", "predictions.png", "mistakes.png")
# What a run writes before its first checkpoint, and what one of them is always among.
BEFORE_CHECKPOINT = {"environment.json", "args.yaml", "split.csv", "lr_find.csv", "lr_find.png",
                     "features", "checkpoints"}  # fmt: skip
FIRST_WRITTEN = {"environment.json", "lr_find.csv"}
KEPT = "checkpoints/best"  # what a run is resumed with that ended between two validations


def killed_start(output: Path) -> list[Path]:
    """What a run has left that ended before its first checkpoint, if there is nothing else.

    Args:
        output: a folder without a checkpoint.
    """
    left = [path for path in output.glob("*") if path.name[0] != "."]
    names = {path.name for path in left}
    return left if names <= BEFORE_CHECKPOINT and names & FIRST_WRITTEN else []


def delete_killed_start(output: Path) -> None:
    """Delete what `killed_start` finds.

    Raises:
        FileExistsError: the run is not killed, but starts in another process.
    """
    if left := killed_start(output):
        with locked(output):
            for path in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_settings(output: Path, recipe: Recipe, plan: Plan, device: torch.device) -> None:
    """Write a further entry of `environment.json`, and `args.yaml`."""
    entry = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "processes": plan.world,
        "images_per_step": plan.images_per_step,
        "lr": recipe.peak_lr(plan.images_per_step),
        "git": git_state(),
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
    }
    path = output / "environment.json"
    earlier = json.loads(path.read_text("utf-8")) if path.exists() else []
    with staged(path, overwrite=True) as file:
        file.write_text(json.dumps([*earlier, entry], indent=2) + "\n", "utf-8")
    with staged(output / "args.yaml", overwrite=True) as file:
        file.write_text(write_yaml(dataclasses.asdict(recipe)), "utf-8")


def git_state() -> dict[str, Any] | None:
    """Commit and changed files of the repository that the process was started in, if in one."""
    try:
        answers = [
            subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    commit, status = (answer.stdout for answer in answers)
    return {"commit": commit.strip(), "changed": [line[3:] for line in status.splitlines()]}


def write_rows(table: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a csv file with the columns of the last row."""
    with (
        staged(table, overwrite=True) as path,
        open(path, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)


def write_curve(output: Path, history: Sequence[Row], metric: str) -> None:
    """Draw the epochs so far."""
    with staged(output / "learning_curve.png", overwrite=True) as path:
        plot_curves(history, path, metric)


def write_speed(output: Path, row: Row) -> None:
    """Add the speed of an epoch, or of what a resumed run did of it; of each start in turn.

    It is no part of `results.csv`, which a resumed run ends with as one that was never stopped.
    """
    path = output / "speed.csv"
    earlier = path.read_text("utf-8") if path.exists() else ",".join(row) + "\n"
    with staged(path, overwrite=True) as file:
        file.write_text(earlier + ",".join(str(value) for value in row.values()) + "\n", "utf-8")


def write_corrupt(output: Path, corrupt: dict[str, str]) -> None:
    """Write the training images that could not be read, and why, a line each."""
    with staged(output / CORRUPT, overwrite=True) as path:
        lines = "".join(f"{printable(error)}\n" for error in corrupt.values())
        path.write_text(lines, "utf-8")


def write_model(
    folder: Path, model: Any, processor: Any, recipe: Recipe, row: Row, adapter: Any = None
) -> None:
    """Write a model folder: weights, labels, preprocessing, model card, and a LoRA adapter."""
    with staged(folder, overwrite=True) as beside:
        model.save_pretrained(beside)
        processor.save_pretrained(beside)
        if adapter is not None:
            settings = adapter.peft_config["default"]
            base = settings.base_model_name_or_path
            if base and (Path(base).is_absolute() or Path(base).exists()):
                # An absolute path means nothing on another machine, and reveals this one.
                settings.base_model_name_or_path = os.path.relpath(base, folder / "adapter")
            adapter.save_pretrained(beside / "adapter", save_embedding_layers=False)
            for saved in (model.config, processor):  # so that a copy of it has its labels
                saved.save_pretrained(beside / "adapter")
            settings.base_model_name_or_path = base
            write_checksums(beside / "adapter")
        write_checksums(beside)
        for place in (beside, *beside.glob("adapter")):  # there it replaces PEFT's own card
            card = trained_card(model.config, recipe, row, is_adapter=place != beside)
            (place / "README.md").write_text(str(card), "utf-8")


def write_pictures(output: Path, evaluation: AnyEvaluation) -> None:
    """Draw what the best epoch gets wrong."""
    if not isinstance(evaluation, Evaluation):
        with staged(output / "predictions.png", overwrite=True) as path:
            plot_outputs(evaluation, path)
        with staged(output / "mistakes.png", overwrite=True) as path:
            plot_worst(evaluation, path)
        return
    with staged(output / "confusion_matrix.png", overwrite=True) as path:
        plot_confusion(evaluation, path)
    with staged(output / "mistakes.png", overwrite=True) as path:
        plot_mistakes(evaluation, path)


def keep_best(output: Path) -> None:
    """Keep a copy of the best model and its pictures beside the checkpoints, for `restore_best`."""
    copy_best(output, output / KEPT)


def restore_best(output: Path) -> None:
    """Put back what `keep_best` has kept, if anything."""
    if (output / KEPT).exists():
        copy_best(output / KEPT, output)
        shutil.rmtree(output / KEPT)


def copy_best(source: Path, target: Path) -> None:
    """Copy the model and the pictures of the best epoch from one folder to another."""
    for name in OF_BEST:
        if (source / name).exists():
            with staged(target / name, overwrite=True) as path:
                (shutil.copytree if (source / name).is_dir() else shutil.copy)(source / name, path)
