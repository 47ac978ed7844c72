"""What a run folder tells of its run: settings, versions, results, TensorBoard events, model cards.

| file | what is in it |
|---|---|
| `args.yaml` | the resolved recipe; `cvt train --config` takes it |
| `environment.json` | versions, device, processes, command, git: an entry a start |
| `results.csv` | a row an epoch |
| `learning_curve.png` | the same as a picture |
| `speed.csv` | images per second, and the share of the time that went by waiting for them |
| `split.csv` | which images were trained on, where the run drew the validation images itself |
| `test/` | the best model's evaluation on the images that were held out, where there are any |
| `confusion_matrix.png`, `mistakes.png` | of the best epoch |
| `tensorboard/` | events for TensorBoard |
| `corrupt.txt` | the training images that could not be read |
| `best/`, `last/` | model folders, with preprocessing, a model card and `checksums.json` |
| `checkpoints/` | what the run goes on from |
"""

import csv
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

from cvt.files import staged, write_checksums
from cvt.inference.metrics import Evaluation
from cvt.inference.report import plot_confusion, plot_curves, plot_mistakes
from cvt.libraries import version_of
from cvt.text import printable
from cvt.train.loader import Plan
from cvt.train.progress import Row
from cvt.train.recipe import Recipe

PACKAGES = ("cvt-vision", "torch", "torchvision", "transformers", "timm", "accelerate", "datasets",
            "peft", "numpy", "pillow")  # fmt: skip


def write_settings(output: Path, recipe: Recipe, plan: Plan, device: torch.device) -> None:
    """Write `args.yaml`, and a further entry of `environment.json`."""
    with staged(output / "args.yaml", overwrite=True) as file:
        settings = dataclasses.asdict(recipe)
        file.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "utf-8")
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


def write_results(output: Path, history: Sequence[Row]) -> None:
    """Write the epochs so far as a table and as a picture."""
    with (
        staged(output / "results.csv", overwrite=True) as path,
        open(path, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    with staged(output / "learning_curve.png", overwrite=True) as path:
        plot_curves(history, path)


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
    with staged(output / "corrupt.txt", overwrite=True) as path:
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
                # An absolute path means nothing on another machine, and says what is on this one.
                settings.base_model_name_or_path = os.path.relpath(base, folder / "adapter")
            adapter.save_pretrained(beside / "adapter", save_embedding_layers=False)
            for saved in (model.config, processor):  # so that it has its labels wherever it goes
                saved.save_pretrained(beside / "adapter")
            settings.base_model_name_or_path = base
            write_checksums(beside / "adapter")
        write_checksums(beside)
        card = model_card(model.config, recipe, row)
        for place in (beside, *beside.glob("adapter")):  # there it replaces PEFT's own card
            (place / "README.md").write_text(card, "utf-8")


def write_pictures(output: Path, evaluation: Evaluation) -> None:
    """Draw what the best epoch gets wrong."""
    with staged(output / "confusion_matrix.png", overwrite=True) as path:
        plot_confusion(evaluation, path)
    with staged(output / "mistakes.png", overwrite=True) as path:
        plot_mistakes(evaluation, path)


def model_card(config: Any, recipe: Recipe, row: Row) -> str:
    """A model card for the hub: what the model is, how good, how it was trained, how to use it."""
    metrics = {name: value for name, value in row.items() if name.startswith(("val_", "ema_"))}
    name = Path(recipe.model).name
    shown = dataclasses.replace(
        recipe, model=name, data="", val_data=None, classes=None
    )  # no paths of ours
    head = {
        "library_name": "cvt-vision",
        "pipeline_tag": "image-classification",
        "tags": ["cvt", "image-classification", "vision"],
        "metrics": ["accuracy"],
    }
    start = "random weights" if recipe.from_scratch else f"`{name}`"
    classes = printable(", ".join(config.class_names[:20])) + (
        ", ..." if config.num_labels > 20 else ""
    )
    results = "\n".join(f"| {k} | {v:.4f} |" for k, v in metrics.items() if v is not None)
    settings = yaml.safe_dump(dataclasses.asdict(shown), sort_keys=False, allow_unicode=True)
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---

# CvT, trained from {start}

Classifies images into {config.num_labels} classes: {classes}.

After epoch {row["epoch"]:.0f}, on the validation images:

| measure | value |
|---|---|
{results}

```python
import cvt
from cvt.data.decoding import decode

model = cvt.CvtForImageClassification.from_pretrained("FOLDER").eval()
processor = cvt.image_processor("FOLDER")
logits = model(**processor(decode("photo.jpg"), return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])
```

Trained with cvt-vision {version_of("cvt-vision")} and this recipe:

```yaml
{settings.strip()}
```
"""


class Events:
    """TensorBoard's events of a run; a resumed run takes back what came after its checkpoint."""

    def __init__(self, output: Path, step: int) -> None:
        # TensorBoard's own way to be told to do without TensorFlow, which takes seconds to load.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, values: dict[str, float | None]) -> None:
        """Scalars of a step."""
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left to write."""
        self.writer.close()
