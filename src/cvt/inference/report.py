"""Pictures of a run and of an evaluation, and one page with all of them."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from cvt.data.decoding import Source
from cvt.files import staged
from cvt.inference.explain import Explainer
from cvt.inference.metrics import BINS, METRIC_NAMES, NOT_SHARES, Evaluation, Mistake, metric_text
from cvt.inference.output_metrics import (
    MultiLabelEvaluation,
    OutputEvaluation,
    RegressionEvaluation,
    precision_recall,
)
from cvt.inference.page import SIDE, embedded, embedded_thumbnail, render, thumbnail, write_page
from cvt.inference.predict import Prediction
from cvt.text import printable

logger = logging.getLogger(__name__)
INK, GREY, BLUE, RIGHT, WRONG = "#222222", "#9a9a9a", "#2166ac", "#1b7837", "#c51b29"
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a class may be called $1$
}
# Fonts that have the characters of Chinese, Japanese and Korean, and more.
WIDE_FONTS = (
    *("Noto Sans CJK SC", "WenQuanYi Micro Hei", "Noto Sans CJK JP", "Noto Sans SC"),
    *("WenQuanYi Zen Hei", "Source Han Sans SC", "Source Han Sans CN", "Droid Sans Fallback"),
    *("Microsoft YaHei", "SimHei", "PingFang SC", "PingFang HK", "Hiragino Sans GB", "Heiti TC"),
    *("Arial Unicode MS", "AR PL UMing CN", "IPAGothic", "Noto Sans CJK KR", "NanumGothic"),
    *("Malgun Gothic", "Unifont"),
)
# Of the curves: what the loss is, by the metric that is usually beside it.
LOSS_NAMES = {
    "top1": "cross-entropy",
    "mean_average_precision": "binary cross-entropy",
    "mae": "mean squared error of scaled values",
}
CURVES = 10  # classes whose precision and recall are drawn
COLUMNS, CELL, MARGIN = 10, (144, 188), 8  # of a sheet; a cell is an image below its caption
ROWS = 1000  # of the table of classes on the page


# ------------------------------------------------------------------------------ pictures


P = ParamSpec("P")


def _styled(
    names: Callable[[Any], Iterable[str]],
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Our style for a function; `names` gives the names that are drawn, of its first argument."""

    def decorated(draw: Callable[P, None]) -> Callable[P, None]:
        @wraps(draw)
        def styled(*arguments: P.args, **options: P.kwargs) -> None:
            with _style(names(arguments[0])):
                draw(*arguments, **options)

        return styled

    return decorated


@contextmanager
def _style(texts: Iterable[str]) -> Iterator[None]:
    """Our style, with a font that has the characters of the texts, if this machine has one."""
    fonts = list(matplotlib.rcParams["font.family"])
    missing = _missing("".join(texts), font_manager.findfont(font_manager.FontProperties()))
    installed = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    for name in WIDE_FONTS:
        if missing and name in installed:
            left = _missing(missing, installed[name])
            if left != missing:
                fonts.append(name)
                missing = left
    if missing:
        _warn_of_glyphs()
    with matplotlib.rc_context({**STYLE, "font.family": fonts}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def _missing(text: str, font: str) -> str:
    """The characters of a text, each once, that are not in a font file."""
    known = font_manager.get_font(font).get_charmap()
    return "".join(sorted({c for c in text if c.isprintable() and ord(c) not in known}))


@cache
def _warn_of_glyphs() -> None:
    logger.warning(
        "no font for the characters of some names was found; pictures show boxes for them. "
        "Install one, such as %s",
        " or ".join(WIDE_FONTS[:2]),
    )


@matplotlib.rc_context(STYLE)
def plot_curves(
    history: Sequence[Mapping[str, float | None]], path: Path, metric: str = "top1"
) -> None:
    """Loss and a metric over the epochs, of the averaged model too where there is one, as a PNG.

    Args:
        history: for every epoch `epoch`, `train_loss`, `val_loss` and `val_top1`, and perhaps
            `ema_loss` and `ema_top1`; those of the validation are None where there was none.
        path: the picture.
        metric: to draw beside the loss; if it is the loss, the first of `LOSS_NAMES` that there is.
    """
    main, loss = next((m, n) for m, n in LOSS_NAMES.items() if f"val_{m}" in history[0])
    metric = main if metric == "loss" else metric
    name = METRIC_NAMES[metric]
    scale, unit = (1, "") if metric in NOT_SHARES else (100, ", %")
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, history, "train_loss", 1, GREY, "train")
    _draw(left, history, "val_loss", 1, INK, "validation")
    _draw(left, history, "ema_loss", 1, BLUE, "validation, averaged weights")
    left.set(xlabel="epoch", ylabel=loss, title="Loss")
    left.legend(frameon=False)
    points = _draw(right, history, f"val_{metric}", scale, INK, "weights as trained")
    averaged = _draw(right, history, f"ema_{metric}", scale, BLUE, "averaged weights")
    right.set(xlabel="epoch", ylabel=f"{name}{unit}", title=f"Validation {name}")
    if averaged:
        right.legend(frameon=False, loc="lower right")
    if points + averaged:
        choose = min if metric in ("mae", "rmse") else max
        best = choose(points + averaged, key=lambda point: point[1])
        right.plot(*best, "o", color=RIGHT)
        text = metric_text(metric, best[1] / scale).removeprefix(f"{name} ")
        right.set(title=f"Validation {name}, at best {text}")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    figure.savefig(path, format="png")


def _draw(
    axes: Axes,
    history: Sequence[Mapping[str, float | None]],
    name: str,
    scale: float,
    colour: str,
    label: str,
) -> list[tuple[float, float]]:
    """Draw the figure called `name` over the epochs that have it; returns the points."""
    points = [
        (epoch, scale * value)
        for row in history
        if (epoch := row["epoch"]) is not None and (value := row.get(name)) is not None
    ]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=".", markersize=3)
    return points


@matplotlib.rc_context(STYLE)
def plot_rates(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    path: Path,
    chosen: float,
) -> None:
    """The loss over the learning rates of a range test, as a PNG.

    Args:
        rates: of the steps.
        losses: of the steps.
        smoothed: the moving average of the losses.
        path: the picture.
        chosen: the learning rate to mark.
    """
    figure = Figure(figsize=(6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, ".", color=GREY, markersize=3, label="steps")
    axes.plot(rates, smoothed, color=INK, label="smoothed")
    axes.axvline(chosen, color=RIGHT, linestyle="--", label=f"steepest descent, {chosen:g}")
    low, high = min(smoothed), max(smoothed[0], 1.5 * min(smoothed))  # not all of its explosion
    axes.set_ylim(low - 0.3 * (high - low), high + 0.5 * (high - low))
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title="Range test")
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path, format="png")


@_styled(lambda evaluation: evaluation.labels)
def plot_confusion(evaluation: Evaluation, path: Path, most: int = 40) -> None:
    """The confusion matrix as a PNG; of more than `most` classes, those most often confused."""
    true, predicted, count = evaluation.cells.T
    chosen, title = np.arange(len(evaluation.labels)), "Confusion matrix"
    if len(chosen) > most:
        wrong = np.where(true != predicted, count, 0)
        confused = sum(np.bincount(ends, wrong, len(chosen)) for ends in (true, predicted))
        chosen = np.sort(np.argsort(confused, kind="stable")[-most:])
        title += f", the {most} classes most often confused"
    counts = np.zeros((len(chosen), len(chosen)), dtype=int)
    shown = np.isin(true, chosen) & np.isin(predicted, chosen)
    rows, columns = np.searchsorted(chosen, true[shown]), np.searchsorted(chosen, predicted[shown])
    counts[rows, columns] = count[shown]
    images = np.bincount(true, count, len(evaluation.labels))[chosen, None]
    shares = counts / np.maximum(images, 1)
    labels = [short(evaluation.labels[i], 24) for i in chosen]

    size = 2.5 + 0.32 * len(labels)
    figure = Figure(figsize=(size, size), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in zip(*counts.nonzero(), strict=True):
        colour = "white" if shares[i, j] > 0.5 else WRONG if i != j else INK
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=colour, fontsize=7)
    axes.set_xticks(range(len(labels)), labels, rotation=90)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    figure.savefig(path, format="png")


@matplotlib.rc_context(STYLE)
def plot_reliability(evaluation: Evaluation, path: Path) -> None:
    """Top-1 of the images in bins by their score, and how many those are, as a PNG."""
    images, score, top1 = evaluation.reliability
    centres = (np.arange(BINS) + 0.5) / BINS
    figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.bar(centres, 100 * top1, 0.9 / BINS, color=BLUE)
    above.plot([0, 1], [0, 100], "--", color=GREY)
    above.plot(score, 100 * top1, "o", color=INK, markersize=4)
    above.annotate("perfect calibration", (0.02, 5), rotation=35, color=GREY)
    error = 100 * evaluation.calibration_error
    above.set(ylabel="top-1, %", title=f"Calibration error {error:.2f} %", ylim=(0, 104))
    below.bar(centres, images, 0.9 / BINS, color=GREY)
    below.set(xlabel="score of the predicted class", ylabel="images", xlim=(0, 1))
    figure.savefig(path, format="png")


@_styled(lambda evaluation: evaluation.labels)
def plot_precision_recall(evaluation: MultiLabelEvaluation, path: Path) -> None:
    """Precision over recall of the classes with the lowest average precision, as a PNG.

    A point marks the threshold.
    """
    classes = [item for item in evaluation.per_class.items() if item[1].images]
    classes.sort(key=lambda item: item[1].average_precision)
    figure = Figure(figsize=(7.5, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for label, figures in classes[:CURVES]:
        k = evaluation.labels.index(label)
        precision, recall = precision_recall(evaluation.targets[:, k] > 0, evaluation.scores[:, k])
        name = f"{short(label, 20)}  {100 * figures.average_precision:.1f} %"
        recall, precision = np.append(0, recall), np.append(precision[:1], precision)
        (line,) = axes.step(recall, precision, where="pre", label=name, linewidth=1.2)
        axes.plot(figures.recall, figures.precision, "o", color=line.get_color(), markersize=5)
    title = "Precision and recall, with the thresholds"
    if len(classes) > CURVES:
        title += f"; the worst {CURVES} of {len(classes)} classes"
    axes.set(xlabel="recall", ylabel="precision", title=title, xlim=(0, 1.02), ylim=(0, 1.02))
    if classes:
        figure.legend(loc="outside right upper", title="average precision", frameon=False)
    figure.savefig(path, format="png")


@_styled(lambda evaluation: evaluation.labels)
def plot_values(evaluation: RegressionEvaluation, path: Path, most: int = 6) -> None:
    """Predicted over true values, as a PNG; of several values the first `most`."""
    labels = evaluation.labels[:most]
    columns = min(3, len(labels))
    rows = -(-len(labels) // columns)
    figure = Figure(figsize=(4 * columns, 4 * rows), dpi=120, layout="constrained")
    for k, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if k >= len(labels):
            axes.axis("off")
            continue
        true, predicted = evaluation.targets[:, k], evaluation.outputs[:, k]
        axes.axline((true.mean(), true.mean()), slope=1, linestyle="--", color=GREY)
        axes.plot(true, predicted, "o", color=BLUE, markersize=3, alpha=0.6)
        figures = evaluation.per_value[labels[k]]
        axes.set(xlabel=f"true {short(labels[k], 24)}", ylabel="predicted")
        axes.set(title=f"mean absolute error {figures.mae:.4g}, R² {figures.r2:.3f}")
    figure.savefig(path, format="png")


def plot_outputs(evaluation: OutputEvaluation, path: Path) -> None:
    """What is drawn of several classes, or of values, as a PNG."""
    if isinstance(evaluation, MultiLabelEvaluation):
        plot_precision_recall(evaluation, path)
    else:
        assert isinstance(evaluation, RegressionEvaluation)
        plot_values(evaluation, path)


class Cell(NamedTuple):
    """An image of a sheet, with what stands above it.

    Attributes:
        source: the image.
        caption: one line or two.
        is_right: whether the caption is right, by which it has its colour; wrong ones are framed.
            None where there is neither.
    """

    source: Source
    caption: str
    is_right: bool | None = True


def _answer(source: Source, predicted: str, score: float, true: str) -> Cell:
    """An image with its predicted class, its score, and the true class where that is another."""
    caption = f"{short(predicted, 14)}  {100 * score:.0f} %"
    if predicted == true:
        return Cell(source, caption)
    return Cell(source, f"{caption}\ntruly {short(true, 12)}", is_right=False)


def plot_predictions(
    predictions: Sequence[Prediction], truths: Sequence[str], path: Path, most: int = 60
) -> None:
    """A sheet of images with class and score, the wrong ones first and marked, as a PNG."""
    pairs = list(zip(predictions, truths, strict=True))
    wrong = [pair for pair in pairs if pair[0].labels[0] != pair[1]][:most]
    right = [pair for pair in pairs if pair[0].labels[0] == pair[1]]
    step = max(1, len(right) // max(1, most - len(wrong)))
    shown = [
        _answer(prediction.path, prediction.labels[0], prediction.scores[0], truth)
        for prediction, truth in [*wrong, *right[::step]][:most]
    ]
    plot_sheet(shown, f"{len(pairs)} images, {len(pairs) - len(right)} wrong", path)


def plot_mistakes(evaluation: Evaluation, path: Path, most: int = 30) -> None:
    """A sheet of the images that the model is most wrongly sure of, the worst first, as a PNG."""
    shown = [_answer(m.source, m.predicted, m.score, m.true) for m in evaluation.mistakes[:most]]
    wrong = evaluation.images - int(evaluation.right.sum())
    title = f"{wrong} of {evaluation.images} images wrong"
    plot_sheet(shown, title + (", the most confident" if wrong > len(shown) else ""), path)


def plot_worst(evaluation: OutputEvaluation, path: Path, most: int = 30) -> None:
    """A sheet of the images with the largest loss, the worst first, as a PNG."""
    cells = []
    for each in evaluation.worst[:most]:
        predicted, true = (short(text or "none", 20) for text in evaluation.texts(each.position))
        cells.append(Cell(each.source, f"{predicted}\ntruly {true}", predicted == true))
    plot_sheet(cells, f"the {len(cells)} of {evaluation.images} images with the largest loss", path)


@_styled(lambda cells: [cell.caption for cell in cells])
def plot_sheet(cells: Sequence[Cell], title: str, path: Path, columns: int = COLUMNS) -> None:
    """A sheet of images with captions, as a PNG."""
    columns = min(columns, max(4, len(cells)))  # wide enough for the title
    rows = max(1, -(-len(cells) // columns))
    sheet = Image.new("RGB", (columns * CELL[0], rows * CELL[1]), "white")
    figure = Figure(figsize=(sheet.width / 120, sheet.height / 120 + 0.4), dpi=120)
    axes = figure.add_axes((0, 0, 1, sheet.height / 120 / figure.get_figheight()))
    figure.text(0.5, 1 - 0.2 / figure.get_figheight(), title, ha="center", va="center")
    for k, cell in enumerate(cells):
        x, y = k % columns * CELL[0] + MARGIN, (k // columns + 1) * CELL[1] - MARGIN - SIDE
        sheet.paste(thumbnail(cell.source), (x, y))
        if cell.is_right is False:
            frame = Rectangle((x, y), SIDE, SIDE, fill=False, edgecolor=WRONG, linewidth=2)
            axes.add_patch(frame)
        colour = {True: RIGHT, False: WRONG, None: INK}[cell.is_right]
        place = x + SIDE / 2, y - 4
        axes.text(*place, cell.caption, color=colour, fontsize=8, ha="center", va="bottom")
    axes.imshow(sheet)
    axes.axis("off")
    figure.savefig(path, format="png")


def short(name: str, width: int) -> str:
    """A name of at most so many characters, safe to draw."""
    name = printable(name)
    return name if len(name) <= width else name[: width - 1] + "…"


# ------------------------------------------------------------------------------ the page


def write_report(
    evaluation: Evaluation | OutputEvaluation,
    path: str | Path,
    title: str,
    overwrite: bool = False,
    explainer: Explainer | None = None,
) -> None:
    """Write one HTML page of figures, tables and pictures; it needs no other file.

    Args:
        evaluation: what to show.
        path: the page.
        title: its heading.
        overwrite: whether a file that is there already may be replaced.
        explainer: of the model, for a Grad-CAM of the predicted class beside each mistake; by
            default, and of images that do not have one class each, the page has none.

    Raises:
        FileExistsError: `path` is there already and may not be overwritten.
    """
    if isinstance(evaluation, OutputEvaluation):
        page = _page_of_outputs(evaluation, title)
        with staged(path, overwrite) as written:
            write_page(written, page)
        return
    classes = sorted(evaluation.per_class.items(), key=lambda item: item[1].recall)
    mistakes = [
        (_pictures(mistake, evaluation.labels, explainer), mistake)
        for mistake in evaluation.mistakes
    ]
    page = render(
        "report.html.jinja",
        title=title,
        evaluation=evaluation,
        classes=classes[:ROWS],
        hidden=len(classes[ROWS:]),
        mistakes=mistakes,
        explained=explainer is not None,
        confusion=embedded(lambda file: plot_confusion(evaluation, file, most=30)),
        reliability=embedded(lambda file: plot_reliability(evaluation, file)),
    )
    with staged(path, overwrite) as written:
        write_page(written, page)


def _page_of_outputs(evaluation: OutputEvaluation, title: str) -> str:
    name = "per_class" if isinstance(evaluation, MultiLabelEvaluation) else "per_value"
    header, *rows = evaluation.tables()[name]
    if name == "per_class":
        rows.sort(key=lambda row: row[2] if row[1] else 2)  # those without images last
    return render(
        "report_outputs.html.jinja",
        title=title,
        evaluation=evaluation,
        heading="Classes, the worst first" if name == "per_class" else "Values",
        figures=[
            (METRIC_NAMES[metric], metric_text(metric, value).removeprefix(METRIC_NAMES[metric]))
            for metric, value in evaluation.metrics.items()
            if metric in METRIC_NAMES
        ],
        header=[column.replace("_", " ") for column in header],
        rows=[
            [f"{cell:.4g}" if isinstance(cell, float) else cell for cell in row]
            for row in rows[:ROWS]
        ],
        hidden=len(rows[ROWS:]),
        plot=embedded(lambda file: plot_outputs(evaluation, file)),
        worst=[
            (embedded_thumbnail(each.source), each, *evaluation.texts(each.position))
            for each in evaluation.worst
        ],
    )


def _pictures(mistake: Mistake, labels: list[str], explainer: Explainer | None) -> list[str]:
    """The image, and, where there is an explainer, the Grad-CAM of the predicted class."""
    if explainer is None:
        return [embedded_thumbnail(mistake.source)]
    predicted = labels.index(mistake.predicted)
    explanation = explainer(mistake.source, predicted).resized(2 * SIDE)
    shown = explanation.image, explanation.overlay()
    return [embedded(lambda file, image=image: image.save(file, "PNG")) for image in shown]
