"""What a training run is told: every setting, its default and its limits, in one table.

A recipe comes from a yaml file, from `key=value` words, or from Python; `cvt train` makes its
options from this table. The packaged recipes, the paper's among them, are `cvt/recipes/*.yaml`.
"""

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from cvt.limits import MOST_AT_ONCE, MOST_IMAGES

PACKAGED = Path(__file__).parents[1] / "recipes"
NESTED = 8  # levels of a yaml file; a recipe has two
LARGEST: dict[type, int] = {int: 2**63 - 1}  # that a setting without a limit of its own may be


def setting(
    default: Any,
    help: str,
    *,
    group: str = "",
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    choices: tuple[str, ...] = (),
    meaning: str = "",
) -> Any:
    """A field of `Recipe`; `group` opens a new group, to which the next fields belong too.

    An error says what the value means, if that is given.
    """
    limits = {"least": least, "above": above, "most": most, "choices": choices, "meaning": meaning}
    return field(default=default, metadata={"help": help, "group": group, **limits})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; `cvt train -h` shows what each setting means.

    Raises:
        ValueError: a setting has the wrong type or is out of its limits; names it.
    """

    data: str = setting(
        "", "Training data: a folder, csv, parquet, cifar, hub:NAME, shards, digits.", group="Data"
    )
    val_data: str | None = setting(None, "Evaluation data, where DATA does not hold both.")
    classes: str | None = setting(None, "File of class names, a line each, for numeric labels.")
    image_column: str | None = setting(None, "Column of the images, in a table of several.")
    label_column: str | None = setting(None, "Column of the labels, in a table of several.")
    epoch_images: int | None = setting(
        None, "Images that a stream of unknown length counts as an epoch.", least=1
    )
    max_corrupt: float = setting(
        0.01,
        "Share of the training images that may be unreadable; 10 always may.",
        least=0,
        most=1,
        meaning="a share of the training images, as 0.01",
    )
    max_pixels: int | None = setting(
        None,
        "Pixels that an image may have; larger ones are unreadable; by default 178956970.",
        least=1,
    )
    workers: int = setting(
        0, "Processes that decode and augment, besides this one.", least=0, most=MOST_AT_ONCE
    )

    model: str = setting(
        "cvt-13", "MODEL to start from, a variant, or a folder with a config.json.", group="Model"
    )
    from_scratch: bool = setting(False, "Random weights, though MODEL has trained ones.")
    drop_rate: float | None = setting(None, "Dropout, if not the model's.", least=0, most=0.99)
    drop_path: float | None = setting(
        None, "Stochastic depth at the last block, if not the model's.", least=0, most=0.99
    )
    freeze_stages: int = setting(0, "Keep the first N stages as they are.", least=0)
    head_only: bool = setting(False, "Train only the final norm and the classifier.")
    lora_r: int = setting(
        0, "Train low-rank adapters of rank N and the classifier.", least=0, most=4096
    )

    image_size: int = setting(
        224, "Height and width in pixels.", group="Images", least=1, most=8192
    )
    crop_pct: float | None = setting(
        None,
        "Centre crop of evaluation, if not the start's or 0.875; none from 384 pixels.",
        above=0,
        most=1,
    )
    crop_scale: float = setting(0.35, "Smallest area of a training crop.", above=0, most=1)
    crop_ratio: float = setting(4 / 3, "Largest aspect ratio of a training crop.", least=1)
    interpolation: str | None = setting(
        None,
        "Interpolation of a training crop, if not the start's or bicubic.",
        choices=("bicubic", "bilinear", "random"),
    )
    flip: float = setting(0.5, "Share of the images mirrored left to right.", least=0, most=1)
    vertical_flip: float = setting(0.0, "Share mirrored top to bottom.", least=0, most=1)
    auto_augment: str | None = setting(
        None, "timm's policy, such as rand-m9-mstd0.5-inc1 or original; then no colour jitter."
    )
    color_jitter: float = setting(0.0, "Brightness, contrast, saturation.", least=0)
    random_erase: float = setting(0.0, "Share with a random part erased.", least=0, most=1)
    repeats: int = setting(
        1, "Repeated augmentation: views of an image in a step.", least=1, most=1024
    )
    mixup: float = setting(0.0, "Mixup's alpha.", least=0)
    cutmix: float = setting(0.0, "CutMix' alpha.", least=0)
    mixup_prob: float = setting(1.0, "Share of batches that are mixed.", least=0, most=1)
    mixup_switch: float = setting(0.5, "Of these, CutMix' share.", least=0, most=1)
    mixup_mode: str = setting("batch", "What mixes alike.", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = setting(0, "Epochs after which nothing is mixed; 0: never.", least=0)
    label_smoothing: float = setting(0.1, "Target's share of all classes alike.", least=0, most=1)

    epochs: int = setting(30, "Passes over the training images.", group="Optimisation", least=1)
    steps: int | None = setting(None, "Steps of the optimizer, instead of epochs.", least=1)
    batch_size: int = setting(64, "Images at a time in each process.", least=1, most=MOST_IMAGES)
    accumulate: int = setting(1, "Batches of each process in a step.", least=1, most=65536)
    optimizer: str = setting("adamw", "Optimizer.", choices=("adamw", "sgd"))
    lr: float | None = setting(None, "Highest learning rate, whatever the batch.", above=0)
    lr_base: float = setting(2.5e-4, "The same for LR_BASE_SIZE images a step, scaled.", above=0)
    lr_base_size: int = setting(256, "Images a step that LR_BASE is meant for.", least=1)
    weight_decay: float = setting(0.05, "On all but norms, biases, class tokens.", least=0)
    momentum: float = setting(0.9, "Of SGD.", least=0, most=0.9999)
    layer_decay: float = setting(
        1.0, "Learning rate's factor from block to block.", above=0, most=1
    )
    clip_grad: float | None = setting(None, "Largest norm of the gradient.", above=0)
    warmup_epochs: float | None = setting(
        None, "Epochs of linear warm-up; by default 1, or half of them.", least=0
    )
    warmup_lr: float = setting(1e-6, "Learning rate at its start.", least=0)
    min_lr: float = setting(0.0, "Learning rate at the end of the cosine.", least=0)
    cooldown_epochs: int = setting(0, "Epochs at MIN_LR after EPOCHS.", least=0)
    lr_updates: str = setting("step", "When the rate changes.", choices=("step", "epoch"))
    ema_decay: float = setting(0.0, "Decay of averaged weights; 0: none.", least=0, most=0.999999)

    precision: str = setting(
        "auto",
        "auto is bf16 on a GPU that has it, else fp32.",
        group="Machine",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = setting(False, "Compile the model with torch.compile.")
    recompute_activations: bool = setting(
        True, "Recompute the MLPs' activations in the backward pass: less memory."
    )
    gradient_checkpointing: bool = setting(False, "Less memory for about a third more time.")
    fsdp: bool = setting(False, "Shard weights and optimizer over the processes.")
    triton: bool = setting(
        False, "Triton's kernels for query, key and value on a GPU; not run on one yet."
    )

    seed: int = setting(0, "Of weights, order, augmentation and split.", group="Run", least=0)
    eval_every: int = setting(1, "Epochs between evaluations.", least=1)
    save_steps: int | None = setting(None, "Steps between checkpoints within an epoch.", least=1)
    keep: int = setting(2, "Checkpoints to keep.", least=1)

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, checked(spec, getattr(self, spec.name)))
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size = {self.batch_size}: mixup and cutmix need an even one")
        if self.fsdp and (self.ema_decay or self.lora_r):
            raise ValueError("fsdp: sharded weights can neither be averaged nor have adapters")
        if self.lora_r and (self.head_only or self.freeze_stages):
            raise ValueError(
                "lora_r: adapters leave the model frozen; drop head_only, freeze_stages"
            )
        if self.lr_updates == "epoch" and (self.warmup_epochs or 0.0) % 1:
            raise ValueError(f"warmup_epochs = {self.warmup_epochs}: with lr_updates=epoch, whole")

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed at all."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def peak_lr(self, images: int) -> float:
        """The learning rate after the warm-up, for so many images a step."""
        return self.lr_base * images / self.lr_base_size if self.lr is None else self.lr


# What a resumed run may be given anew: the result does not depend on it, or, for the length, only
# where the steps done would have been the same.
LENGTH = ("epochs", "steps", "cooldown_epochs")
RESUME_OVERRIDES = (
    "data", "val_data", "classes", "workers", "max_corrupt", "save_steps", "keep", *LENGTH,
)  # fmt: skip
FIELDS = {spec.name: spec for spec in dataclasses.fields(Recipe)}


def value_type(spec: dataclasses.Field) -> tuple[type, bool]:
    """A setting's type, and whether it may be None."""
    hint = typing.get_type_hints(Recipe)[spec.name]
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None)), True
    return hint, False


def checked(spec: dataclasses.Field, value: Any) -> Any:
    """The value in the setting's type; words such as `true` and `1e-3` are read, as yaml does not.

    Raises:
        ValueError: it is of another type or out of its limits.
    """
    kind, optional = value_type(spec)
    if value is None and optional:
        return None
    limits, fault = spec.metadata, ""
    most = min(limits["most"], LARGEST.get(kind, math.inf))
    if kind is bool:
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        value = words.get(value.lower(), value) if isinstance(value, str) else value
        fault = "" if isinstance(value, bool) else "must be true or false"
    elif kind is str:
        value = str(value) if isinstance(value, str | Path) else value
        fault = "" if isinstance(value, str) else "must be text"
        if value == "" and spec.default:
            fault = "must not be empty"
        if not fault and limits["choices"] and value not in limits["choices"]:
            fault = "must be one of " + ", ".join(limits["choices"])
    else:
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or (kind is int and number != int(number)):
            fault = "must be a whole number" if kind is int else "must be a number"
        elif number < limits["least"]:
            fault = f"must be at least {limits['least']}"
        elif number <= limits["above"]:
            fault = f"must be above {limits['above']}"
        elif number > most:
            fault = f"must be at most {most}"
        else:
            value = int(value) if isinstance(value, str) and value.isdigit() else kind(number)
    if fault:
        shown = value if isinstance(value, str) and len(value) < 100 else reprlib.repr(value)
        meaning = f"; it is {limits['meaning']}" if limits["meaning"] else ""
        raise ValueError(f"{spec.name} = {shown}: {fault}{meaning}")
    return value


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which yaml would take the last, and what unfolds."""

    level = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        self.level += 1
        if self.level > NESTED:
            raise yaml.YAMLError(f"it is nested more than {NESTED} levels deep")
        node = super().compose_node(parent, index)
        self.level -= 1
        if alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.YAMLError(f"*{alias.anchor} repeats a list or a map; a recipe has neither")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"{', '.join(twice)} is given twice")
        return super().construct_mapping(node, deep)


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with this package: name to yaml file, sorted by name."""
    return {file.stem: file for file in sorted(PACKAGED.glob("*.yaml"))}


def packaged_recipe(name: str | Path) -> Path:
    """The yaml file of a packaged recipe; `.yaml` may be left out of its name.

    Raises:
        FileNotFoundError: there is none of that name; lists those that there are.
    """
    packaged = packaged_recipes()
    stem = str(name).removesuffix(".yaml")
    if stem not in packaged:
        near = get_close_matches(Path(stem).name, packaged, n=1)
        hint = f"; is it {near[0]}?" if near else ""
        raise FileNotFoundError(
            f"no packaged recipe is called {name}; there are {', '.join(packaged)}{hint}"
        )
    return packaged[stem]


def find_recipe(name: str | Path) -> Path:
    """The yaml file of a recipe, by its path or by the name of a packaged one; a path comes first.

    `.yaml` may be left out of either. A folder is no recipe: `photos` is often a folder, too.

    Raises:
        FileNotFoundError: there is neither; lists the packaged recipes.
    """
    for path in (Path(name), Path(f"{name}.yaml")):
        if path.exists() and not path.is_dir():  # not is_file: <(command) is a pipe
            return path
    try:
        return packaged_recipe(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {name}, and {error}") from None


def read_settings(
    file: str | Path | None = None, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The settings that a yaml file and changes to it give, by name, unchecked; see `load_recipe`.

    Raises:
        OSError: there is no such recipe, or the file cannot be read.
        ValueError: a key is unknown (names the nearest).
    """
    settings: dict[str, Any] = {}
    if file is not None:
        try:
            read = yaml.load(find_recipe(file).read_text(encoding="utf-8"), _Loader)
        except (yaml.YAMLError, ValueError) as error:  # not UTF-8; a date of month 13
            raise ValueError(f"{file} is not yaml: {' '.join(str(error).split())}") from None
        if not isinstance(read, dict):
            raise ValueError(f"{file} has no settings, one per line as `epochs: 30`")
        settings |= {str(key): value for key, value in read.items()}
        _refuse_unknown(settings, f"{file}: ")
    if changes:
        _refuse_unknown(changes)
        settings |= changes
    for name, value in settings.items():
        if (
            isinstance(value, str)
            and value.lower() in ("none", "null", "")
            and value_type(FIELDS[name])[1]
        ):
            settings[name] = None
    return settings


def load_recipe(file: str | Path | None = None, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a yaml file, or from the defaults, with some settings changed.

    Args:
        file: a yaml mapping of settings, or the name of a packaged one, see `find_recipe`; settings
            that it leaves out keep their defaults. Paths in it are relative to the working folder.
        changes: settings that win over the file; "none" in words is no value.

    Raises:
        OSError: there is no such recipe, or the file cannot be read.
        ValueError: a key is unknown (names the nearest), or a value does not fit.
    """
    return Recipe(**read_settings(file, changes))


def _refuse_unknown(names: Mapping[str, Any], prefix: str = "") -> None:
    for name in names:
        if name not in FIELDS:
            near = get_close_matches(name.replace("-", "_"), FIELDS, n=1, cutoff=0.5)
            hint = f"; is it {near[0]}?" if near else "; cvt train -h lists them"
            raise ValueError(f"{prefix}there is no setting {name}{hint}")


def resumed_recipe(run: Recipe, given: Mapping[str, Any], source: str = "") -> Recipe:
    """A run's recipe with the settings that are given anew, of `RESUME_OVERRIDES`.

    Args:
        run: the recipe of the run.
        given: settings by name; those of others must be the run's.
        source: where they are from, for errors.

    Raises:
        ValueError: another setting differs; names each.
    """
    if given.get("precision") == "auto":  # what it means here was settled when the run began
        given = {name: value for name, value in given.items() if name != "precision"}
    new = load_recipe(None, {**dataclasses.asdict(run), **given})
    differing = [
        f"{name} = {getattr(new, name)}, but the run has {getattr(run, name)}"
        for name in given
        if name not in RESUME_OVERRIDES and getattr(new, name) != getattr(run, name)
    ]
    if differing:
        raise ValueError(
            f"{source}{'; '.join(differing)}: a resumed run keeps its own settings, but for "
            + ", ".join(RESUME_OVERRIDES)
        )
    return new
