"""Pictures of a run: learning curves, the confusion matrix, a sheet of predictions."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from cvt.evaluate import Evaluation
from cvt.images import decode
from cvt.predict import Prediction

INK, RIGHT, WRONG = "#222222", "#1b7837", "#c51b29"
matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})


def plot_curves(history: Sequence[dict[str, float]], path: Path) -> None:
    """Loss and top-1 over the epochs, as a PNG."""
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["train_loss"] for row in history], color="#9a9a9a", label="train")
    left.plot(epochs, [row["test_loss"] for row in history], color=INK, label="test")
    left.set(xlabel="epoch", ylabel="cross-entropy", title="Loss")
    left.legend(frameon=False)
    top1 = [100 * row["test_top1"] for row in history]
    best = int(np.argmax(top1))
    right.plot(epochs, top1, color=INK)
    right.plot(epochs[best], top1[best], "o", color=RIGHT)
    right.annotate(
        f"{top1[best]:.2f} %", (epochs[best], top1[best]), (0, -14), textcoords="offset points",
        ha="center", color=RIGHT,
    )  # fmt: skip
    right.set(xlabel="epoch", ylabel="top-1, %", title="Test accuracy")
    figure.savefig(path, format="png")


def plot_confusion(evaluation: Evaluation, path: Path, most: int = 40) -> None:
    """The confusion matrix as a PNG; of more than `most` classes, those most often confused."""
    counts, labels = evaluation.confusion, evaluation.labels
    title = "Confusion matrix"
    if len(labels) > most:
        wrong = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
        chosen = np.sort(np.argsort(wrong)[-most:])
        counts, labels = counts[np.ix_(chosen, chosen)], [labels[i] for i in chosen]
        title += f", the {most} classes most often confused"
    size = 2.5 + 0.32 * len(labels)
    figure = Figure(figsize=(size, size), dpi=120, layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in zip(*counts.nonzero(), strict=True):
        colour = "white" if shares[i, j] > 0.5 else WRONG if i != j else INK
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=colour, fontsize=7)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.savefig(path, format="png")


def plot_predictions(
    predictions: Sequence[Prediction], truths: Sequence[str], path: Path, most: int = 60
) -> None:
    """A sheet of images with class and score, the wrong ones first and marked, as a PNG."""
    pairs = list(zip(predictions, truths, strict=True))
    wrong = [pair for pair in pairs if pair[0].labels[0] != pair[1]][:most]
    right = [pair for pair in pairs if pair[0].labels[0] == pair[1]]
    step = max(1, len(right) // max(1, most - len(wrong)))
    shown = [*wrong, *right[::step]][:most]
    columns = 10
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(columns * 1.05, rows * 1.35 + 0.6), dpi=120, layout="constrained")
    figure.suptitle(f"{len(pairs)} images, {len(pairs) - len(right)} wrong")
    for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.axis("off")
    for axes, (prediction, truth) in zip(grid.flat, shown, strict=False):
        correct = prediction.labels[0] == truth
        axes.imshow(decode(prediction.path))
        title = f"{prediction.labels[0]}  {100 * prediction.scores[0]:.0f} %"
        title += "" if correct else f"\ntruly {truth}"
        axes.set_title(title, color=RIGHT if correct else WRONG)
        if not correct:
            axes.axis("on")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(visible=True, color=WRONG, linewidth=3)
    figure.savefig(path, format="png")
