"""The training loop."""

import csv
import hashlib
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvt.checkpoints.reading import load_pickle
from cvt.configuration import CvtConfig
from cvt.datasets import LabelledImages, train_and_test, write_digits
from cvt.evaluate import Evaluation, evaluate
from cvt.files import staged
from cvt.images import image_processor
from cvt.modeling import CvtForImageClassification
from cvt.train.data import TrainingImages, augmentation, training_batches
from cvt.train.models import classifier_for
from cvt.train.report import plot_confusion, plot_curves

logger = logging.getLogger(__name__)

COLUMNS = ("epoch", "learning_rate", "train_loss", "test_loss", "test_top1", "test_top5")


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        model: a published name, a variant, or a folder with a config.json (and weights, or not).
        from_scratch: random weights though the model has trained ones.
        epochs: passes over the training images.
        batch_size: images a step.
        lr: highest learning rate of AdamW; by default the paper's, 0.002 at 2048 images a step.
        weight_decay: AdamW's, on all but norms, biases and class tokens.
        warmup_epochs: epochs over which the learning rate rises linearly.
        label_smoothing: share of the target given to all classes alike.
        image_size: height and width in pixels.
        crop_pct: what the centre crop of evaluation keeps of the short side.
        crop_scale: smallest share of the area that a training crop keeps.
        flip: mirror half of the training images.
        rotate: largest angle, in degrees, by which a training image is rotated.
        seed: of the weights, the order, the augmentation and the split.
        workers: processes that decode and augment; 0 does it in the training process.
    """

    model: str = "cvt-13"
    from_scratch: bool = False
    epochs: int = 30
    batch_size: int = 64
    lr: float | None = None
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.1
    image_size: int = 224
    crop_pct: float = 0.875
    crop_scale: float = 0.35
    flip: bool = True
    rotate: float = 0.0
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "image_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr = {self.lr}: must be above 0")
        for name in ("crop_pct", "crop_scale"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be above 0 and at most 1")

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return 0.002 * self.batch_size / 2048 if self.lr is None else self.lr


class Progress(Protocol):
    """What hears of a run; the command line shows it as bars."""

    def stage(self, name: str, total: int) -> Callable[[], None]:
        """A part of the run with `total` steps begins; call the answer after each step."""
        ...

    def epoch(self, row: dict[str, float]) -> None:
        """An epoch ended with these results, by the names in `COLUMNS`."""
        ...


class Silence:
    """The progress of which nobody hears."""

    def stage(self, name: str, total: int) -> Callable[[], None]:
        """Nothing."""
        return lambda: None

    def epoch(self, row: dict[str, float]) -> None:
        """Nothing."""


def train(
    data: str | Path,
    output: str | Path,
    recipe: Recipe,
    resume: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Train a classifier and leave a run folder.

    `output` gets `best/` (a model folder: the epoch of the highest top-1), `results.csv`,
    `learning_curve.png`, `confusion_matrix.png` and `checkpoint.pt`, from which a run that was
    stopped goes on after its last whole epoch, with the same result.

    Args:
        data: an image folder, see `cvt.datasets.train_and_test`, or "digits": scikit-learn's,
            written to `output/digits`.
        output: the run folder.
        recipe: how to train.
        resume: go on with the run in `output`; its own recipe is used.
        progress: hears of the progress.

    Returns:
        The best epoch's evaluation on the test images.

    Raises:
        FileExistsError: `output` exists and `resume` is not given.
        FileNotFoundError: there is nothing to resume, or no such data.
        ValueError: the data or the recipe cannot be used.
        FloatingPointError: the loss became NaN or infinite; says when and what to try.
    """
    output, progress = Path(output), progress or Silence()
    state = load_state(output) if resume else new_state(output, recipe)
    recipe = Recipe(**state["recipe"])
    if data == "digits":
        data = output / "digits"
        if not data.exists():
            write_digits(data, recipe.seed)
    train_images, test_images = train_and_test(data, recipe.seed)
    torch.manual_seed(recipe.seed)
    model: Any
    if state["model"] is None:
        model = classifier_for(recipe.model, train_images.classes, recipe.from_scratch)
        state |= {"config": model.config.to_dict(), "model": model.state_dict()}
        state["images"] = digest(train_images, test_images)
    else:
        if state["images"] != digest(train_images, test_images):
            raise ValueError(f"the images in {data} are not those of the run in {output}")
        model = CvtForImageClassification(CvtConfig.from_dict(state["config"]))
        model.load_state_dict(state["model"])
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor: Any = image_processor(
        model.config, image_size=recipe.image_size, crop_pct=recipe.crop_pct
    )
    augment = augmentation(
        recipe.image_size,
        processor.image_mean,
        processor.image_std,
        recipe.flip,
        recipe.crop_scale,
        recipe.rotate,
    )
    dataset = TrainingImages(train_images, augment)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.weight_decay), fused=True)
    if state["optimizer"] is not None:
        optimizer.load_state_dict(state["optimizer"])
    save_checkpoint(output, state)

    for epoch in range(len(state["history"]), recipe.epochs):
        # Each epoch draws from its own seed, so a resumed run draws as if it had never stopped.
        torch.manual_seed(1_000_003 * recipe.seed + epoch)
        batches = training_batches(dataset, recipe.batch_size, recipe.seed + epoch, recipe.workers)
        step = progress.stage(f"epoch {epoch + 1}/{recipe.epochs}", len(batches))
        loss = train_epoch(model, optimizer, batches, recipe, epoch, step)
        step = progress.stage("test", len(test_images))
        evaluation = evaluate(model, processor, test_images, recipe.batch_size, step)
        for failure in evaluation.failures if not state["history"] else ():
            logger.warning(f"not counted: {failure.error}")
        values = (epoch + 1, optimizer.param_groups[0]["lr"], loss, evaluation.loss)
        row = dict(zip(COLUMNS, (*values, evaluation.top1, evaluation.top5), strict=True))
        is_best = all(row["test_top1"] > earlier["test_top1"] for earlier in state["history"])
        state["history"].append(row)
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if is_best:
            with staged(output / "best", overwrite=True) as folder:
                model.save_pretrained(folder)
                processor.save_pretrained(folder)
            with staged(output / "confusion_matrix.png", overwrite=True) as file:
                plot_confusion(evaluation, file)
        save_results(output, state["history"])
        save_checkpoint(output, state)
        progress.epoch(row)

    best = CvtForImageClassification.from_pretrained(output / "best").to(model.device)
    return evaluate(best, processor, test_images, recipe.batch_size)


def train_epoch(
    model: CvtForImageClassification,
    optimizer: torch.optim.Optimizer,
    batches: Any,
    recipe: Recipe,
    epoch: int,
    step: Callable[[], None],
) -> float:
    """One pass over the training images; returns the mean loss."""
    model.train()
    losses = []
    for i, (pixels, targets) in enumerate(batches):
        set_learning_rate(optimizer, recipe, epoch + i / len(batches))
        logits = model(pixels.to(model.device)).logits
        loss = F.cross_entropy(
            logits, targets.to(model.device), label_smoothing=recipe.label_smoothing
        )
        if not loss.isfinite():
            raise FloatingPointError(
                f"the loss is {loss.item()} in epoch {epoch + 1}, step {i + 1}, at learning rate "
                f"{optimizer.param_groups[0]['lr']:.3g}; try a lower learning rate (--lr)"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        step()
    return torch.stack(losses).mean().item()


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: float) -> None:
    """A linear warm-up, then half a cosine down to nothing; `epoch` counts fractions too."""
    if epoch < recipe.warmup_epochs:
        share = (epoch + 0.01) / (recipe.warmup_epochs + 0.01)
    else:
        remaining = max(recipe.epochs - recipe.warmup_epochs, 1e-9)
        share = (1 + math.cos(math.pi * (epoch - recipe.warmup_epochs) / remaining)) / 2
    for group in optimizer.param_groups:
        group["lr"] = recipe.peak_lr * share


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that decay, and those that do not: norms, biases and class tokens."""
    decay: list[Tensor] = []
    keep: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (keep if parameter.ndim == 1 or name.endswith("cls_token") else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": keep, "weight_decay": 0.0},
    ]


def new_state(output: Path, recipe: Recipe) -> dict[str, Any]:
    """The state of a run that begins."""
    if output.exists() and any(path.name != "digits" for path in output.iterdir()):
        raise FileExistsError(f"{output} exists already; --resume goes on with the run in it")
    return {"recipe": asdict(recipe), "history": [], "model": None, "optimizer": None}


def load_state(output: Path) -> dict[str, Any]:
    """The state of a run that was stopped."""
    path = output / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; there is no run to resume in {output}")
    state = load_pickle(path)
    if not isinstance(state, dict) or not {"recipe", "history", "images"} <= state.keys():
        raise ValueError(f"{path} is not the checkpoint of a run")
    return state


def digest(*halves: LabelledImages) -> str:
    """What tells sets of images apart wherever their folder is: names of files and classes."""
    names = [[(path.name, label) for path, label in half.samples] for half in halves]
    return hashlib.sha256(repr(names).encode()).hexdigest()


def save_checkpoint(output: Path, state: dict[str, Any]) -> None:
    """Replace the one file from which the run can go on."""
    with staged(output / "checkpoint.pt", overwrite=True) as path:
        torch.save(state, path)


def save_results(output: Path, history: list[dict[str, float]]) -> None:
    """Write the epochs so far as a table and as a picture."""
    with (
        staged(output / "results.csv", overwrite=True) as path,
        open(path, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(history)
    with staged(output / "learning_curve.png", overwrite=True) as path:
        plot_curves(history, path)
