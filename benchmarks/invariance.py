"""What is left of the accuracy at other resolutions, and with shifted, scaled or rotated pictures?

    apt-get download openclipart-png && dpkg -x openclipart-png_*.deb clipart
    python benchmarks/invariance.py clipart/usr/share/openclipart/png --figure invariance.png
    python benchmarks/invariance.py PATH --quick    # an epoch of two folds: does all of it run?

CvT, a ViT and a ResNet of about the same size are trained at 64 pixels as by `clipart.py`, on its
folds, and evaluated without further training on the pictures of the fold that each has not seen:

- resolution: the whole picture at 48 to 128 pixels. CvT has no position embedding, and a ResNet
  has none; that of the ViT is interpolated, as timm does. The pictures are stored at 80 pixels:
  above that they are enlarged, and have no more detail.
- shift: by 1 to 8 pixels of 64, the mean of four directions; what is uncovered is white.
- scale: the picture at 0.5 to 1.5 times its size, on white or cut.
- rotation: by 15 to 180 degrees, on white.

Each row has the accuracy and `unchanged`, the share of pictures that keep the class that the model
gives them as they are. The csv file gets the rows of a training as it ends; the same command
resumes after the last, with `--resume FILE` on another day. Prints a table and writes
`results/invariance-<processor>-torch<version>-<date>.csv`; `--figure` draws the curves as a PNG.
"""

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from clipart import RECIPE, build
from common import Row, show, some_of
from PIL import Image
from small_training import (
    RATES,
    Job,
    Pictures,
    Rows,
    compared,
    file_of,
    folder_of_clip_art,
    logits_on,
    mean_and_error,
    options_of,
    parser_of,
    processor_of,
    save,
    shortened,
    train,
)

from cvt.train import Recipe, load_recipe

PEERS = ("cvt", "vit", "resnet")
SIDES = (48, 56, 64, 80, 96, 112, 128)
SHIFTS = (0, 1, 2, 3, 4, 6, 8)
SCALES = (0.5, 0.6, 0.75, 0.9, 1.0, 1.15, 1.3, 1.5)
ANGLES = (0, 15, 30, 45, 60, 90, 135, 180)
AXES = {
    "resolution": "pixels",
    "shift": "pixels of 64",
    "scale": "times the size",
    "rotation": "degrees",
}
Change = Callable[[Image.Image], Image.Image]
Case = tuple[str, float, int, list[Change]]


# ------------------------------------------------------------------------------ pictures


def resized(picture: Image.Image, side: int) -> Image.Image:
    """The whole picture at so many pixels."""
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def shifted(picture: Image.Image, side: int, right: int, down: int) -> Image.Image:
    """The picture at so many pixels, moved, on white."""
    moved = Image.new("RGB", (side, side), "white")
    moved.paste(resized(picture, side), (right, down))
    return moved


def scaled(picture: Image.Image, side: int, factor: float) -> Image.Image:
    """The picture at `factor` times so many pixels, in the middle of a square of these."""
    inner = round(side * factor)
    around = Image.new("RGB", (side, side), "white")
    around.paste(resized(picture, inner), ((side - inner) // 2,) * 2)
    return around


def rotated(picture: Image.Image, side: int, angle: float) -> Image.Image:
    """The picture turned to the left, on white, at so many pixels."""
    turned = picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white")
    return resized(turned, side)


def cases(side: int) -> Iterator[Case]:
    """Question, value, pixels, and the changes over which the accuracy is averaged."""
    for pixels in SIDES:
        yield "resolution", pixels, pixels, [partial(resized, side=pixels)]
    for pixels in SHIFTS:
        ways = [(pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)] if pixels else [(0, 0)]
        moves = [partial(shifted, side=side, right=right, down=down) for right, down in ways]
        yield "shift", pixels, side, moves
    for factor in SCALES:
        yield "scale", factor, side, [partial(scaled, side=side, factor=factor)]
    for angle in ANGLES:
        yield "rotation", angle, side, [partial(rotated, side=side, angle=angle)]


# ------------------------------------------------------------------------------ rows


def choice_of(job: Job, work: Path, recipe: Recipe) -> list[Row]:
    """The row of a training by which a learning rate is chosen, in the columns of all rows."""
    _, row = train(job, build, work, recipe)
    return [columns_of(row, "choice", 0, row["top1"], 100.0)]


def rows_of_model(job: Job, work: Path, recipe: Recipe) -> list[Row]:
    """The rows of a training: all questions."""
    model, row = train(job, build, work, recipe)
    pictures, side = Pictures.load(work), recipe.image_size
    truth = torch.from_numpy(pictures.classes[pictures.folds == job.fold])
    as_it_is = logits_on(model, pictures, job.fold, processor_of(side)).argmax(dim=1)
    found = []
    for question, value, pixels, changes in cases(side):
        right, unchanged = [], []
        for change in changes:
            logits = logits_on(model, pictures, job.fold, processor_of(pixels), change)
            guess = logits.argmax(dim=1)
            right.append(100 * (guess == truth).float().mean().item())
            unchanged.append(100 * (guess == as_it_is).float().mean().item())
        means = (round(statistics.mean(shares), 2) for shares in (right, unchanged))
        found.append(columns_of(row, question, value, *means))
    return found


def columns_of(row: Row, question: str, value: float, top1: object, unchanged: object) -> Row:
    """A row of the file."""
    names = ("peer", "fold", "recipe", "lr", "epochs", "images", "parameters", "macs")
    answer = {"question": question, "value": value, "top1": top1, "unchanged": unchanged}
    return {name: row[name] for name in names} | answer


# ------------------------------------------------------------------------------ answers


Curves = dict[str, dict[str, dict[float, list[float]]]]  # by question, peer and value: of folds


def curves_of(rows: Rows, column: str) -> Curves:
    """The values of a column, one for each fold."""
    curves: Curves = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        if row["question"] in AXES:
            curves[row["question"]][row["peer"]][float(row["value"])].append(float(row[column]))
    return curves


def table(rows: Rows) -> list[Row]:
    """The mean accuracy of each peer with its standard error over the folds, case by case."""
    top1, unchanged = (curves_of(rows, column) for column in ("top1", "unchanged"))
    found = []
    for question, peers in top1.items():
        for value in next(iter(peers.values())):
            row: Row = {"question": question, "by": f"{value:g} {AXES[question]}"}
            for peer, of_peer in peers.items():
                row[peer] = "{:.1f} ± {:.1f}".format(*mean_and_error(of_peer[value]))
                kept = mean_and_error(unchanged[question][peer][value])
                row[f"{peer}, unchanged"] = f"{kept[0]:.1f}"
            found.append(row)
    return found


def draw(rows: Rows, figure: Path) -> None:
    """The accuracy of each peer as a curve with standard errors, a panel for each question."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = curves_of(rows, "top1")
    drawing, panels = pyplot.subplots(2, 2, figsize=(8, 6), layout="constrained", sharey=True)
    for (question, peers), panel in zip(curves.items(), panels.flat, strict=True):
        for peer, of_peer in peers.items():
            means, errors = zip(*map(mean_and_error, of_peer.values()), strict=True)
            panel.errorbar(list(of_peer), means, yerr=errors, marker="o", capsize=3, label=peer)
        panel.set_title(question)
        panel.set_xlabel(AXES[question])
    for panel in panels[:, 0]:
        panel.set_ylabel("top-1, %")
    panels[0, 0].legend()
    save(drawing, figure)
    pyplot.close(drawing)


# ------------------------------------------------------------------------------ command line


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--peers", type=some_of(PEERS), default=list(PEERS))
    parser.add_argument("--figure", type=Path, help="PNG file to draw")
    return options_of(parser, arguments)


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    recipe = shortened(load_recipe(RECIPE), options.epochs)
    path = file_of("invariance", options, recipe)
    with tempfile.TemporaryDirectory() as temporary:
        work = folder_of_clip_art(options, Path(temporary))
        choose = partial(choice_of, work=work, recipe=recipe)
        measure = partial(rows_of_model, work=work, recipe=recipe)
        rows = compared(options.peers, RATES, measure, path, options, choose)
    show(table(rows))
    print(path)
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
