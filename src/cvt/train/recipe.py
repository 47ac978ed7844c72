"""The settings of a training run: each with its default and its limits, in one table.

A recipe comes from a yaml file, from `key=value` words, or from Python; `cvt train` takes its
options from this table. The packaged recipes, the paper's among them, are `recipes/*.yaml`.
"""

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cvt.architecture import FIELDS as FIELDS_OF_MODEL
from cvt.architecture import PER_STAGE
from cvt.limits import MOST_AT_ONCE, MOST_IMAGES
from cvt.problem_type import MULTI_LABEL, PROBLEMS, REGRESSION, SINGLE_LABEL

PACKAGED = Path(__file__).parent / "recipes"
# Of a validation, in the order of results.csv; one of them chooses the best epoch.
METRICS = ("loss", "top1", "top5", "balanced_accuracy", "f1_macro", "lowest_recall")
METRICS_OF = {
    SINGLE_LABEL: METRICS,
    MULTI_LABEL: ("loss", "mean_average_precision", "f1_macro", "f1_micro"),
    REGRESSION: ("loss", "mae", "rmse", "r2"),
}
DEFAULT_METRIC = {SINGLE_LABEL: "top1", MULTI_LABEL: "mean_average_precision", REGRESSION: "mae"}
LOWER_IS_BETTER = ("loss", "mae", "rmse")
SMOOTHING = 0.1
OPTIMIZERS = ("adamw", "sgd", "adan", "adopt", "lamb", "lion", "mars", "muon", "nadamw")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
LARGEST: dict[type, int] = {int: 2**63 - 1}  # that a setting without a limit of its own may be


def setting(
    default: Any,
    help: str,
    *,
    group: str = "",
    ge: float = -math.inf,
    gt: float = -math.inf,
    le: float = math.inf,
    choices: tuple[str, ...] = (),
    meaning: str = "",
    advanced: bool = False,
) -> Any:
    """A field of `Recipe`; `group` opens a new group, to which the next fields belong too.

    An error explains the value with `meaning`, if that is given. Of an advanced setting, `-h` shows
    the name alone.
    """
    limits = {"ge": ge, "gt": gt, "le": le, "choices": choices, "meaning": meaning}
    shown = {"help": help, "group": group, "advanced": advanced}
    return field(default=default, metadata={**shown, **limits})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; `cvt train --schema` describes each setting.

    Raises:
        ValueError: settings have the wrong type, are out of their limits or contradict each other;
            lists all of them.

    Example:
        >>> from cvt.train import Recipe
        >>> recipe = Recipe(data="photos", epochs=20, batch_size=32)
        >>> recipe.optimizer
        'adamw'
        >>> Recipe(epochs=0)
        Traceback (most recent call last):
            ...
        ValueError: epochs...
    """

    data: str = setting(
        "",
        "Training data: folder, csv, parquet, cifar, hub:NAME, shards or digits.",
        group="Data",
    )
    val_data: str | None = setting(None, "Validation data, if DATA has no validation split.")
    classes: str | None = setting(None, "File of class names, one per line, for numeric labels.")
    image_column: str | None = setting(None, "Image column of a table that has several.")
    label_column: str | None = setting(None, "Label column of a table, or several: A,B,C.")
    label_separator: str | None = setting(None, "Separator of a label's classes, as ; in a;b.")
    problem_type: str | None = setting(
        None, "multi_label_classification or regression.", choices=PROBLEMS
    )
    group_column: str | None = setting(
        None, "Column of a table that says what an image shows: a split keeps groups whole."
    )
    folds: int | None = setting(
        None,
        "Cross-validation: a run for each of so many folds, in OUTPUT/fold-1 and so on.",
        ge=2,
        le=1000,
    )
    fold: int | None = setting(
        None, "Train the run of this fold alone, from 1 to FOLDS.", ge=1, advanced=True
    )
    epoch_images: int | None = setting(
        None, "Images per epoch of a stream of unknown length.", ge=1, advanced=True
    )
    max_corrupt: float = setting(
        0.01,
        "Share of the training images that may be unreadable; 10 always may.",
        ge=0,
        le=1,
        meaning="a share of the training images, as 0.01",
        advanced=True,
    )
    max_pixels: int | None = setting(
        None, "Skip images with more pixels (default 178956970).", ge=1, advanced=True
    )
    cache: str | None = setting(
        None,
        "Keep decoded images, reduced to what their crops need, for the next epochs.",
        choices=("ram", "disk"),
    )
    workers: int = setting(0, "Worker processes that decode and augment.", ge=0, le=MOST_AT_ONCE)

    model: str = setting(
        "cvt-13", "MODEL to start from, a variant, or a folder with a config.json.", group="Model"
    )
    from_scratch: bool = setting(False, "Start from random weights even if MODEL has trained ones.")
    architecture: str | None = setting(
        None,
        "Fields of the configuration to change, of random weights, as patch_sizes=4,2,2 "
        "stride_kv=1; a single value is that of every stage.",
        advanced=True,
    )
    drop_rate: float | None = setting(
        None, "Dropout rate, if not the model's.", ge=0, le=0.99, advanced=True
    )
    drop_path: float | None = setting(
        None, "Stochastic depth rate of the last block, if not the model's.", ge=0, le=0.99
    )
    freeze_stages: int = setting(0, "Freeze the first N stages.", ge=0)
    head_only: bool = setting(False, "Train only the final norm and the classifier.")
    views: int | None = setting(
        None,
        "Views of an image that the frozen stages see once, and whose features are kept: the first "
        "as in validation, the others random; 0: a new random view in every epoch (default 3 with "
        "head_only and without mixing, else 0).",
        ge=0,
        le=1024,
        advanced=True,
    )
    lora_r: int = setting(
        0, "Rank of low-rank adapters (LoRA); 0 trains without them.", ge=0, le=4096
    )

    teacher: str | None = setting(
        None, "Distil from this MODEL: learn its scores for the same views, too."
    )
    teacher_weight: float = setting(
        0.5,
        "Share of the teacher in the loss; the labels have the rest.",
        ge=0,
        le=1,
        advanced=True,
    )
    temperature: float = setting(
        2.0, "Temperature that softens the scores of teacher and model.", gt=0, advanced=True
    )

    image_size: int = setting(
        224, "Height and width of the images in pixels.", group="Images", ge=1, le=8192
    )
    crop_pct: float | None = setting(
        None,
        "Centre crop of validation; default: the starting model's or 0.875; none from 384 up.",
        gt=0,
        le=1,
        advanced=True,
    )
    crop_scale: float = setting(
        0.35, "Smallest area of a random crop, as a share of the image.", gt=0, le=1
    )
    crop_ratio: float = setting(
        4 / 3, "Largest aspect ratio of a random crop.", ge=1, advanced=True
    )
    interpolation: str | None = setting(
        None,
        "Interpolation of a random crop; default: the starting model's or bicubic.",
        choices=("bicubic", "bilinear", "random"),
        advanced=True,
    )
    flip: float = setting(0.5, "Probability of a horizontal flip.", ge=0, le=1)
    vertical_flip: float = setting(
        0.0, "Probability of a vertical flip.", ge=0, le=1, advanced=True
    )
    auto_augment: str | None = setting(
        None, "timm's policy, such as rand-m9-mstd0.5-inc1; replaces colour jitter."
    )
    color_jitter: float = setting(
        0.0, "Strength of brightness, contrast and saturation jitter.", ge=0, advanced=True
    )
    random_erase: float = setting(0.0, "Probability of random erasing.", ge=0, le=1)
    repeats: int = setting(
        1, "Repeated augmentation: views of an image in a step.", ge=1, le=1024, advanced=True
    )
    mixup: float = setting(0.0, "Mixup's alpha; 0 switches it off.", ge=0)
    cutmix: float = setting(0.0, "CutMix's alpha; 0 switches it off.", ge=0)
    mixup_prob: float = setting(
        1.0, "Probability that a batch is mixed.", ge=0, le=1, advanced=True
    )
    mixup_switch: float = setting(
        0.5, "Probability of CutMix instead of mixup, if both are on.", ge=0, le=1, advanced=True
    )
    mixup_mode: str = setting(
        "batch", "Mix by batch, pair or element.", choices=("batch", "pair", "elem"), advanced=True
    )
    mixup_off_epoch: int = setting(
        0, "Epoch from which nothing is mixed; 0 mixes to the end.", ge=0, advanced=True
    )
    label_smoothing: float = setting(SMOOTHING, "Label smoothing, of single classes.", ge=0, le=1)
    sampler: str | None = setting(
        None, "balanced draws all classes equally often.", choices=("balanced",)
    )
    class_weights: str | None = setting(
        None, "balanced weights the loss by 1 / images of the class.", choices=("balanced",)
    )

    epochs: int = setting(30, "Epochs to train.", group="Optimisation", ge=1)
    steps: int | None = setting(None, "Optimizer steps to train, instead of epochs.", ge=1)
    batch_size: int | Literal["auto"] = setting(
        64, "Images in a batch of each process; auto counts what fits.", ge=1, le=MOST_IMAGES
    )
    accumulate: int = setting(1, "Batches of each process in a step.", ge=1, le=65536)
    optimizer: str = setting(
        "adamw",
        "Optimizer: adamw, sgd, adan, adopt, lamb, lion, mars, muon, nadamw.",
        choices=OPTIMIZERS,
    )
    lr: float | Literal["find"] | None = setting(
        None, "Peak learning rate (default LR_BASE, scaled by the images); find searches one.", gt=0
    )
    lr_base: float = setting(
        2.5e-4,
        "Peak learning rate for LR_BASE_SIZE images in a step; scales linearly.",
        gt=0,
        advanced=True,
    )
    lr_base_size: int = setting(
        256, "Images in a step that LR_BASE is given for.", ge=1, advanced=True
    )
    weight_decay: float = setting(
        0.05, "Weight decay; none on norms, biases, class tokens and positions.", ge=0
    )
    momentum: float = setting(0.9, "Momentum of SGD.", ge=0, le=0.9999, advanced=True)
    layer_decay: float = setting(
        1.0, "Factor of the learning rate from block to block, towards the input.", gt=0, le=1
    )
    clip_grad: float | None = setting(None, "Largest norm of the gradient.", gt=0)
    warmup_epochs: float | None = setting(
        None, "Epochs of linear warm-up (default 1, or 1/2 of the epochs).", ge=0
    )
    warmup_lr: float = setting(
        1e-6, "Learning rate at the start of the warm-up.", ge=0, advanced=True
    )
    min_lr: float = setting(
        0.0, "Learning rate at the end of the cosine schedule.", ge=0, advanced=True
    )
    cooldown_epochs: int = setting(0, "Epochs at MIN_LR after the schedule.", ge=0, advanced=True)
    lr_updates: str = setting(
        "step",
        "Update the learning rate every step or epoch.",
        choices=("step", "epoch"),
        advanced=True,
    )
    ema_decay: float = setting(
        0.0,
        "Decay of the exponential moving average of the weights; 0 keeps none.",
        ge=0,
        le=0.999999,
    )

    precision: str = setting(
        "auto",
        "Precision; auto is bf16 on a GPU that has it, else fp32.",
        group="Machine",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: bool = setting(False, "Compile the model with torch.compile.")
    recompute_activations: bool = setting(
        True, "Recompute the MLPs' activations in the backward pass: less memory.", advanced=True
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute whole blocks: less memory for about a third more time.", advanced=True
    )
    device: str = setting("auto", "cpu, cuda, cuda:1, mps; auto is a GPU where there is one.")
    sync_batchnorm: bool = setting(
        False,
        "BatchNorm by the statistics of all processes, on GPUs; else by each one's own.",
        advanced=True,
    )
    fsdp: bool = setting(
        False, "Shard weights and optimizer over the processes (FSDP).", advanced=True
    )
    triton: bool = setting(
        False,
        "Triton's kernels for query, key and value on a GPU; not run on one yet.",
        advanced=True,
    )

    seed: int = setting(0, "Seed of weights, order, augmentation and split.", group="Run", ge=0)
    eval_every: int = setting(1, "Epochs between validations.", ge=1, advanced=True)
    metric: str = setting(
        "auto",
        "Metric of the best epoch, as f1_macro.",
        choices=("auto", *dict.fromkeys(name for names in METRICS_OF.values() for name in names)),
    )
    patience: int | None = setting(
        None, "Stop after so many validations without a new best epoch.", ge=1
    )
    max_hours: float | None = setting(
        None, "Stop after so many hours, those before a resume included.", gt=0
    )
    save_steps: int | None = setting(
        None, "Steps between checkpoints within an epoch.", ge=1, advanced=True
    )
    keep: int = setting(2, "Checkpoints to keep.", ge=1, advanced=True)
    track: str | None = setting(
        "tensorboard", f"Trackers, with commas between: {', '.join(TRACKERS)}; or none."
    )

    def __post_init__(self) -> None:
        faults = []
        for spec in dataclasses.fields(self):
            try:
                object.__setattr__(self, spec.name, checked(spec, getattr(self, spec.name)))
            except ValueError as error:
                faults.append(str(error))
        if faults := faults or self.contradictions():
            raise ValueError("\n".join(faults))
        if self.metric == "auto":
            object.__setattr__(self, "metric", DEFAULT_METRIC[self.problem])

    def contradictions(self) -> list[str]:
        """A sentence for each pair of settings that exclude each other."""
        faults = []
        try:
            self.config_changes()
        except ValueError as error:
            faults.append(f"architecture = {self.architecture}: {error}")
        if self.fold and self.fold > (self.folds or 0):
            faults.append(f"fold = {self.fold}: must be at most folds, which is {self.folds}")
        if self.folds and self.val_data:
            faults.append(f"folds = {self.folds}: each validates the others; drop val_data")
        if self.mixes and self.batch_size != "auto" and self.batch_size % 2:
            faults.append(f"batch_size = {self.batch_size}: mixup and cutmix need an even one")
        if self.fsdp and (self.ema_decay or self.lora_r):
            faults.append("fsdp: sharded weights can neither be averaged nor have adapters")
        if self.lora_r and (self.head_only or self.freeze_stages):
            faults.append("lora_r: adapters leave the model frozen; drop head_only, freeze_stages")
        if self.views and not (self.head_only or self.freeze_stages):
            faults.append(f"views = {self.views}: needs frozen stages: head_only, freeze_stages")
        if self.views and self.mixes:
            faults.append(f"views = {self.views}: mixup and cutmix mix pixels; set both to 0")
        if self.views and self.teacher:
            faults.append(f"views = {self.views}: a teacher sees pixels; set views to 0")
        if self.triton and self.sync_batchnorm:
            faults.append("triton: its kernels have the statistics of one process alone")
        if self.class_weights and self.sampler:
            faults.append(
                "class_weights: with sampler=balanced too, classes would be balanced twice"
            )
        if self.class_weights and self.label_smoothing == 1:
            faults.append("class_weights: with label_smoothing = 1, no target has a class")
        if self.label_separator and self.problem_type not in (None, MULTI_LABEL):
            faults.append(
                f"label_separator = {self.label_separator}: means several classes of an image, not "
                f"problem_type = {self.problem_type}"
            )
        if self.metric not in ("auto", *METRICS_OF[self.problem]):
            faults.append(
                f"metric = {self.metric}: of {self.problem}, one of "
                + ", ".join(METRICS_OF[self.problem])
            )
        if self.problem != SINGLE_LABEL:
            settings = {
                "mixup and cutmix": self.mixes,
                "sampler": self.sampler,
                "class_weights": self.class_weights,
                "teacher": self.teacher,
                "label_smoothing": self.label_smoothing not in (0, SMOOTHING),
            }
            faults += [
                f"{name}: for images of one class each, not for {self.problem}"
                for name, is_set in settings.items()
                if is_set
            ]
        if self.lr_updates == "epoch" and (self.warmup_epochs or 0.0) % 1:
            faults.append(f"warmup_epochs = {self.warmup_epochs}: with lr_updates=epoch, whole")
        if not set(self.trackers) <= set(TRACKERS):
            faults.append(f"track = {self.track}: must be of {', '.join(TRACKERS)}")
        return faults

    def config_changes(self, stages: int = 1) -> dict[str, Any]:
        """What `architecture` changes in the configuration of a model of so many stages.

        Raises:
            ValueError: it is no list of fields and values, or names a field twice.
        """
        changes: dict[str, Any] = {}
        for word in (self.architecture or "").split():
            name, equals, text = word.partition("=")
            if name not in FIELDS_OF_MODEL:
                near = get_close_matches(name, FIELDS_OF_MODEL, n=1)
                hint = f"; is it {near[0]}?" if near else ""
                raise ValueError(f"a configuration has no field {name}{hint}")
            if not equals or name in changes:
                raise ValueError(f"{name} is given {'twice' if equals else 'without a value'}")
            values = [_value_of(value) for value in text.split(",")]
            if len(values) == 1:
                values = values * stages if name in PER_STAGE else values[0]
            changes[name] = values
        return changes

    @property
    def problem(self) -> str:
        """What the model predicts, one of `cvt.problem_type.PROBLEMS`."""
        return self.problem_type or (MULTI_LABEL if self.label_separator else SINGLE_LABEL)

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed at all."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def trackers(self) -> list[str]:
        """The names in `track`, each once."""
        names = self.track.split(",") if self.track else []
        return list(dict.fromkeys(name.strip() for name in names))

    def peak_lr(self, images: int) -> float:
        """The learning rate after the warm-up, for so many images a step."""
        assert self.lr != "find"
        return self.lr_base * images / self.lr_base_size if self.lr is None else self.lr


def _value_of(text: str) -> Any:
    """A number, True or False where the text is one, else the text."""
    for read in (int, float):
        with suppress(ValueError):
            return read(text)
    return {"true": True, "false": False}.get(text.lower(), text)


# Settings that may change when a run is resumed: the result does not depend on them, or, for the
# length, only where the steps done would have been the same.
LENGTH = ("epochs", "steps", "cooldown_epochs")
RESUME_OVERRIDES = (
    "data", "val_data", "classes", "teacher", "device", "workers", "max_corrupt", "save_steps",
    "keep", *LENGTH, "patience", "max_hours", "track",
)  # fmt: skip
FIELDS = {spec.name: spec for spec in dataclasses.fields(Recipe)}
# Values that the start of a run replaces by what they mean there: a resumed run may be given them.
SETTLED = {"precision": "auto", "batch_size": "auto", "lr": "find", "views": None}


@cache
def type_hints() -> dict[str, Any]:
    """The types of the settings by name."""
    return typing.get_type_hints(Recipe)


class Kind(NamedTuple):
    """The type of a setting.

    Attributes:
        type: of its values.
        words: that may stand in the place of a value.
        optional: whether it may be None.
    """

    type: type
    words: tuple[str, ...]
    optional: bool


def value_type(spec: dataclasses.Field) -> Kind:
    """The type of a setting."""
    hint = type_hints()[spec.name]
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    parts = typing.get_args(hint) if is_union else (hint,)
    words = [word for part in parts for word in typing.get_args(part)]  # of a Literal
    kind = next(part for part in parts if not typing.get_args(part) and part is not type(None))
    return Kind(kind, tuple(words), type(None) in parts)


def checked(spec: dataclasses.Field, value: Any) -> Any:
    """The value in the setting's type; words such as `true` and `1e-3` are read, as yaml does not.

    Raises:
        ValueError: it is of another type or out of its limits.
    """
    kind, words, optional = value_type(spec)
    if (value is None and optional) or (isinstance(value, str) and value in words):
        return value
    limits, fault = spec.metadata, ""
    largest = min(limits["le"], LARGEST.get(kind, math.inf))
    if kind is bool:
        switch = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        value = switch.get(value.lower(), value) if isinstance(value, str) else value
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
            fault += "".join(f" or {word}" for word in words)
        elif number < limits["ge"]:
            fault = f"must be at least {limits['ge']}"
        elif number <= limits["gt"]:
            fault = f"must be above {limits['gt']}"
        elif number > largest:
            fault = f"must be at most {largest}"
        else:
            value = int(value) if isinstance(value, str) and value.isdigit() else kind(number)
    if fault:
        shown = value if isinstance(value, str) and len(value) < 100 else reprlib.repr(value)
        meaning = f"; it is {limits['meaning']}" if limits["meaning"] else ""
        raise ValueError(f"{spec.name} = {shown}: {fault}{meaning}")
    return value


JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
JSON_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum"}


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe's yaml file, by which an editor completes and checks it."""
    properties = {}
    for name, spec in FIELDS.items():
        kind, words, optional = value_type(spec)
        types_ = [JSON_TYPES[kind], *(["null"] if optional else [])]
        limits = {key: spec.metadata[limit] for limit, key in JSON_LIMITS.items()}
        value = {"type": types_} | {k: limit for k, limit in limits.items() if math.isfinite(limit)}
        schema = {"description": spec.metadata["help"], "default": spec.default}
        schema |= {"anyOf": [value, {"enum": list(words)}]} if words else value
        if choices := spec.metadata["choices"]:
            schema["enum"] = [*choices, *([None] if optional else [])]
        properties[name] = schema
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Recipe of cvt train",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with this package: name to yaml file, sorted by name."""
    files = {
        file.relative_to(PACKAGED).with_suffix("").as_posix(): file
        for file in PACKAGED.rglob("*.yaml")
    }
    return dict(sorted(files.items()))


def packaged_recipe(name: str | Path) -> Path:
    """The yaml file of a packaged recipe; its name may lack `.yaml`.

    Raises:
        FileNotFoundError: there is none of that name; lists those that there are.
    """
    packaged = packaged_recipes()
    stem = str(name).removesuffix(".yaml")
    if stem not in packaged:
        near = get_close_matches(stem, packaged, n=1)
        near = near or get_close_matches(Path(stem).name, packaged, n=1)
        hint = f"; is it {near[0]}?" if near else ""
        raise FileNotFoundError(
            f"no packaged recipe is called {name}; there are {', '.join(packaged)}{hint}"
        )
    return packaged[stem]


def find_recipe(name: str | Path) -> Path:
    """The yaml file of a recipe, by its path or by the name of a packaged one; a path comes first.

    Either may lack `.yaml`. A folder is no recipe: `photos` is often a folder, too.

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
        ValueError: keys are unknown; names each and the nearest.
    """
    settings: dict[str, Any] = {}
    if file is not None:
        from cvt.train.strict_yaml import read_yaml  # which `cvt train --help` does without

        try:
            read = read_yaml(find_recipe(file).read_text(encoding="utf-8"))
        except ValueError as error:  # not UTF-8; a date of month 13
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
            and value_type(FIELDS[name]).optional
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
        ValueError: keys are unknown, or values do not fit; lists all of them.

    Example:
        >>> from cvt.train import load_recipe
        >>> recipe = load_recipe("digits", {"epochs": 3})
        >>> recipe.model, recipe.epochs
        ('cvt-digits', 3)
    """
    return Recipe(**read_settings(file, changes))


def _refuse_unknown(names: Mapping[str, Any], prefix: str = "") -> None:
    faults = []
    for name in names:
        if name not in FIELDS:
            near = get_close_matches(name.replace("-", "_"), FIELDS, n=1, cutoff=0.5)
            hint = f"; is it {near[0]}?" if near else "; cvt train -h lists them"
            faults.append(f"{prefix}there is no setting {name}{hint}")
    if faults:
        raise ValueError("\n".join(faults))


def resumed_recipe(run: Recipe, given: Mapping[str, Any], source: str = "") -> Recipe:
    """A run's recipe with the settings that change, of `RESUME_OVERRIDES`.

    Args:
        run: the recipe of the run.
        given: settings by name; those of others must be the run's.
        source: where they are from, for errors.

    Raises:
        ValueError: another setting differs; names each.
    """
    settings = read_settings(None, given).items()
    given = {name: value for name, value in settings if value != SETTLED.get(name, ())}
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
