"""How well does CvT learn from a few thousand pictures, beside a ViT, a ResNet and a PVT?

    apt-get download openclipart-png && dpkg -x openclipart-png_*.deb clipart
    python benchmarks/clipart.py clipart/usr/share/openclipart/png    # about three hours, two cores
    python benchmarks/clipart.py PATH --search    # recipes for CvT, on the fold that is kept for it
    python benchmarks/clipart.py PATH --quick     # an epoch of two folds: does all of it run?

All are trained from scratch at 64 pixels by one recipe, `few-pictures` of this package, with about
the same parameters and multiply-adds. The data is cleaned by `cvt check`: no links, no blank or
unreadable pictures, one of each group of equal or similar ones, none of a group that has several
labels, no `shapes/stars`, and classes of at least 50. Pictures of one series, whose names differ
in digits only, stay together.

The pictures are divided into six folds. The first is kept: on it, `--search` compares recipes, and
every model's learning rate is chosen. The others are the test sets of five trainings, on all
other folds. The accuracy is that of the last epoch. Differences are between trainings on the same
folds; their standard error is over the five.

The csv file gets a row for each training as it ends; the same command resumes after the last,
with `--resume FILE` on another day. Prints a table; the file is
`results/clipart-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import Row, show, some_of
from small_training import (
    RATES,
    Job,
    by_fold,
    compared,
    file_of,
    folder_of_clip_art,
    measured,
    options_of,
    paired,
    parser_of,
    row_of,
    shortened,
    with_error,
)
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import cvt
from cvt.train import Recipe, load_recipe

RECIPE = "few-pictures"
# Where the search began: AdamW, and about the augmentation of `photos`.
STRONG: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "crop_scale": 0.35,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erase": 0.1,
    "mixup": 0.2,
    "cutmix": 1.0,
}
# What `--search` changes in the recipe.
SEARCH: dict[str, dict[str, Any]] = {
    "as it is": {},
    "strong augmentation": STRONG,
    "strong augmentation with larger crops": STRONG | {"crop_scale": 0.6},
    "adamw": {"optimizer": "adamw", "lr": 1e-3},
    "adamw with smaller batches": {"optimizer": "adamw", "lr": 1e-3, "batch_size": 32},
    "lion": {"optimizer": "lion", "lr": 2e-4},
    "auto_augment": {"auto_augment": "rand-m9-mstd0.5-inc1"},
    "weaker auto_augment": {"auto_augment": "rand-m5-mstd0.5-inc1"},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "erasing": {"random_erase": 0.1},
    "smaller crops": {"crop_scale": 0.35},
    "no drop path": {"drop_path": 0.0},
    "more drop path": {"drop_path": 0.2},
    "less weight decay": {"weight_decay": 0.02},
    "more weight decay": {"weight_decay": 0.2},
    "no label smoothing": {"label_smoothing": 0.0},
    "smaller batches": {"batch_size": 32},
    **{f"lr {rate:g}": {"lr": rate} for rate in (1e-3, 2e-3, 4e-3, 16e-3)},
    "averaged weights": {"ema_decay": 0.998},
}


def build(name: str, classes: int, recipe: Recipe) -> nn.Module:
    """A model of about 2.3 M parameters."""
    drop_path = recipe.drop_path or 0.0
    if name == "cvt":
        config = cvt.CvtConfig.from_variant("cvt-7", num_labels=classes)
        config.drop_path_rate = [0.0, 0.0, drop_path]
        return cvt.CvtForImageClassification(config)
    settings = {"num_classes": classes, "drop_path_rate": drop_path}
    if name == "vit":
        shape = {"patch_size": 8, "embed_dim": 192, "depth": 5, "num_heads": 3}
        return VisionTransformer(recipe.image_size, dynamic_img_size=True, **shape, **settings)
    if name == "resnet":
        widths = (32, 64, 128, 224)
        stem = {"stem_type": "deep", "stem_width": 24, "avg_down": True}
        return ResNet(BasicBlock, (2, 2, 2, 2), channels=widths, **stem, **settings)
    return PyramidVisionTransformerV2(
        depths=(2, 2, 2, 2),
        embed_dims=(40, 80, 160, 200),
        num_heads=(1, 2, 5, 5),
        mlp_ratios=(4, 4, 4, 4),
        sr_ratios=(4, 2, 1, 1),
        **settings,
    )


PEERS = ("cvt", "vit", "resnet", "pvt")


# ------------------------------------------------------------------------------ questions


def search(options: argparse.Namespace, work: Path, recipe: Recipe, path: Path) -> None:
    """Recipes for CvT, the best first, on the fold that is kept for it."""
    names = options.only or list(SEARCH)
    jobs = [Job("cvt", 0, name, SEARCH[name]) for name in names]
    measure = partial(row_of, build=build, work=work, recipe=recipe)
    rows = measured(jobs, measure, path, options.processes)
    columns = ("recipe", "top1", "balanced_accuracy", "loss", "core_seconds")
    rows.sort(key=lambda row: -float(row["top1"]))
    show([{name: row[name] for name in columns} for row in rows])


def compare(options: argparse.Namespace, work: Path, recipe: Recipe, path: Path) -> None:
    """The peers, each at its best learning rate."""
    measure = partial(row_of, build=build, work=work, recipe=recipe)
    rows = compared(options.peers, RATES, measure, path, options)
    by_peer = by_fold(rows)
    show([summary(peer, by_peer) for peer in options.peers])


def summary(peer: str, by_peer: Mapping[str, Mapping[str, Mapping[str, str]]]) -> Row:
    """A row of the table: means over the folds, and what differs from CvT on the same ones."""
    rows = by_peer[peer]
    row = {
        "peer": peer,
        "parameters": f"{int(next(iter(rows.values()))['parameters']) / 1e6:.2f} M",
        "multiply-adds": f"{int(next(iter(rows.values()))['macs']) / 1e6:.0f} M",
        "lr": next(iter(rows.values()))["lr"],
    }
    ours = by_peer.get("cvt", rows)
    for name in ("top1", "balanced_accuracy"):
        values, of_cvt = (
            {fold: float(each[name]) for fold, each in found.items()} for found in (rows, ours)
        )
        row[name] = f"{statistics.mean(values.values()):.1f}"
        row[f"{name}, CvT = 0"] = "" if rows is ours else with_error(paired(values, of_cvt))
    device = next(iter(ours.values()))["device"]  # another one has another speed
    seconds = [float(each["core_seconds"]) for each in rows.values() if each["device"] == device]
    return row | {"core-minutes": f"{statistics.mean(seconds) / 60:.1f}"}


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--search", action="store_true", help="compare recipes for CvT instead")
    parser.add_argument("--only", type=some_of(SEARCH), help="recipes of the search")
    parser.add_argument("--peers", type=some_of(PEERS), default=list(PEERS))
    return options_of(parser, arguments)


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    name = "clipart-search" if options.search else "clipart"
    recipe = shortened(load_recipe(RECIPE), options.epochs)
    path = file_of(name, options, recipe)
    with tempfile.TemporaryDirectory() as temporary:
        work = folder_of_clip_art(options, Path(temporary))
        (search if options.search else compare)(options, work, recipe, path)
    print(path)


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
