"""What a training run is built of: images, plan, model, optimizer, batches; restored on resume."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from cvt.checkpoints import model_source
from cvt.data import Images, LabelledImages, Splits, StreamedImages, open_training
from cvt.data.image_processor import build_processor
from cvt.data.processor_settings import ProcessorSettings
from cvt.modeling import Block
from cvt.problem_type import SINGLE_LABEL
from cvt.train.augmentation import augmentation, mixing
from cvt.train.balance import class_weights
from cvt.train.batch_size import chosen_batch_size
from cvt.train.checkpointing import check_weights
from cvt.train.frozen_features import (
    DEFAULT_VIEWS,
    FrozenFeatures,
    TrainedStages,
    chosen_views,
)
from cvt.train.image_cache import ImageCache
from cvt.train.loader import Batch, batches, pixels_needed, seed_all
from cvt.train.models import (
    DTYPES,
    KEPT_VALUES,
    as_trained,
    classifier_for,
    merged,
    processor_for,
    rebuilt,
    regularised,
)
from cvt.train.optim import LearningRates, Schedule, optimizer_for
from cvt.train.plan import Plan
from cvt.train.progress import Progress
from cvt.train.recipe import LENGTH, Recipe, load_recipe
from cvt.train.target_scale import TargetScale, in_units
from cvt.train.teacher import Teacher

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole, under sharding too


@dataclass
class Setup:
    """What a run is built of.

    Attributes:
        recipe: with the precision and the batches a step of this process.
        first_recipe: with the batches a step of a process that the run began with.
        output: the run folder.
        accelerator: the processes and their device.
        splits: the images.
        digest: of the training and validation images.
        plan: numbers of images, batches and steps.
        config: the classifier's.
        processor: the image processor of the model that is written.
        model: the classifier as it is trained, without what wraps it.
        wrapped: the same for several processes.
        forward: the same, or what is trained of it, compiled if the recipe asks for it; a step
            calls it.
        ema: the average of the weights, if the recipe asks for one.
        schedule: learning rates.
        optimizer: of the trainable parameters.
        scaler: of the loss, in fp16.
        mix: mixup and cutmix of a batch.
        teacher: whose scores the model learns too, if the recipe has one.
        cache: of decoded images, if the recipe has one: those of training, then the validation
            images of this process as they are resized for the model.
        features: of the frozen stages, if the recipe keeps any; then batches are of features.
        class_weights: of the loss, (classes,), if the recipe asks for them.
        scale: of the values that a regression learns; None of classes.
        batches: this process's, from the next step on.
    """

    recipe: Recipe
    first_recipe: Recipe
    output: Path
    accelerator: Accelerator
    splits: Splits
    digest: str
    plan: Plan
    config: Any
    processor: Any
    model: Any
    wrapped: Any
    forward: Any
    ema: ModelEmaV3 | None
    schedule: LearningRates
    optimizer: torch.optim.Optimizer
    scaler: Any
    mix: Callable
    teacher: Teacher | None
    cache: ImageCache | None
    features: FrozenFeatures | None
    class_weights: Tensor | None
    scale: TargetScale | None
    batches: Iterator[Batch]

    @property
    def device(self) -> torch.device:
        """Of this process."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.accelerator.is_main_process

    @property
    def is_sharded(self) -> bool:
        """Whether the processes share one copy of the weights, by FSDP."""
        return self.recipe.fsdp and self.plan.world > 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of an image, or of its features, in a batch."""
        side = self.recipe.image_size
        return self.features.shape if self.features else (3, side, side)

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Of an image: () of the index of its class, else (K,)."""
        return () if self.recipe.problem == SINGLE_LABEL else (self.config.num_labels,)

    @property
    def averaged(self) -> Any:
        """The model of averaged weights; None without an average."""
        return self.ema and self.ema.module

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it; whole in the main process, under sharding too."""
        model = get_model_state_dict(self.model, options=FULL)  # first: it shards what is whole
        optimizer = None
        if self.optimizer.state:  # else torch would take a step, to have something to save
            optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=FULL)
        return {
            "recipe": asdict(self.first_recipe),
            "config": self.config.to_dict(),
            "processor": json.loads(self.processor.to_json_string()),
            "images": self.digest,
            "batches_per_step": self.plan.batches_per_step,
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "ema": self.averaged.state_dict() if self.ema else None,
            "teacher": self.teacher and self.teacher.digest,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Load moments, average and scale of a checkpoint, whose weights the model has.

        Raises:
            ValueError: the average is not that of the model, or the teacher is another.
        """
        if self.teacher and state.get("teacher") != self.teacher.digest:
            raise ValueError(f"teacher = {self.recipe.teacher}: is not the one of the run")
        if self.ema:
            check_weights(state["ema"] or {}, self.averaged.state_dict(), "ema")
        if found := state["optimizer"]:
            set_optimizer_state_dict(self.model, self.optimizer, found, options=FULL)
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.averaged.load_state_dict(state["ema"])

    def final_model(self, state: dict[str, Any]) -> tuple[Any, Any]:
        """The model to write, averaged where there is an average, and its LoRA adapter."""
        if self.recipe.lora_r:
            adapted = self.averaged or self.model
            if self.scale:
                adapted = in_units(copy.deepcopy(adapted))
            return merged(adapted), adapted
        with torch.device("meta"):  # no time for random weights
            model = rebuilt(self.config.to_dict())
        weights = state["ema"] or state["model"]
        contiguous = {name: weight.contiguous() for name, weight in weights.items()}
        model.load_state_dict(contiguous, assign=True)
        if self.scale:
            self.scale.put_on(model)
            in_units(model)
        return model, None


def set_up(
    recipe: Recipe,
    output: Path,
    state: dict[str, Any],
    accelerator: Accelerator,
    progress: Progress,
    interrupted: Callable[[], bool],
) -> Setup:
    """Build what a run needs, as it was where there is a state.

    Args:
        recipe: how to train.
        output: the run folder.
        state: of the checkpoint that the run resumes from; empty for a new run.
        accelerator: the processes and their device.
        progress: receives what became of the classifier's head, and a summary.
        interrupted: whether to give up while a worker is stuck.

    Raises:
        OSError: there is no such data or model.
        ValueError: the recipe, the data and the state do not fit each other.
    """
    splits, found = _open_images(recipe, state, output)
    if state and recipe.views is None:  # of a run from before there were any
        recipe = replace(recipe, views=0)
    recipe = replace(
        recipe,
        precision=chosen_precision(recipe.precision, accelerator.device),
        views=chosen_views(recipe, splits.train, accelerator.num_processes),
    )
    if recipe.batch_size == "auto":
        images = images_per_epoch(recipe, splits.train)
        size, sentence = chosen_batch_size(recipe, splits.train.classes, images, accelerator)
        progress.log(sentence)
        recipe = replace(recipe, batch_size=size)
    first_recipe, step = recipe, state.get("step", 0)
    if state:
        recipe = redistributed(recipe, state["batches_per_step"], accelerator.num_processes)
    plan = _plan(recipe, splits, accelerator)
    weights = _class_weights(recipe, splits.train, accelerator.device)
    if state:
        check_length(load_recipe(None, state["recipe"]), recipe, plan, step, output)
    seed_all(recipe.seed)
    scale = TargetScale.of(splits.train)
    start, processor = _model(recipe, splits.train, scale, state, output, progress)
    augment = augmentation(recipe, processor)
    mix = mixing(recipe, len(start.config.class_names))
    model, ema = _prepared(start, recipe, accelerator.device, plan.world)
    if state:  # before the features of the frozen stages are computed from them
        check_weights(state["model"], model.state_dict(), "model")
        set_model_state_dict(model, state["model"], options=FULL)
    schedule = Schedule(recipe, plan)
    optimizer = optimizer_for(model, recipe, schedule.peak)
    is_sharded = recipe.fsdp and plan.world > 1
    wrapped = model if is_sharded else accelerator.prepare_model(model)
    fp16 = recipe.precision == "fp16"
    cache = _cache(recipe, splits, plan, output)
    teacher = None
    if recipe.teacher:
        dtype = DTYPES[recipe.precision]
        teacher = Teacher(recipe, splits.train.classes, processor, accelerator.device, dtype)
    features, forward = None, wrapped
    if recipe.views:
        assert isinstance(splits.train, LabelledImages)
        features = FrozenFeatures(
            *(output, recipe, plan, splits.train, model, augment, processor, interrupted, cache)
        )
        forward = TrainedStages(model, features.frozen)
    setup = Setup(
        *(recipe, first_recipe, output, accelerator, splits, found, plan),
        *(start.config, processor, model, wrapped),
        # A graph for each number of images: else an unreadable one would slow all sizes.
        forward=torch.compile(forward, dynamic=False) if recipe.compile else forward,
        ema=ema,
        schedule=schedule,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(accelerator.device.type, enabled=fp16),
        mix=mix,
        teacher=teacher,
        cache=cache,
        class_weights=weights,
        scale=scale,
        features=features,
        batches=(
            features.batches(step)
            if features
            else batches(splits.train, augment, recipe, plan, step, interrupted, cache)
        ),
    )
    if state:
        setup.restore(state)
    _summarise(setup, progress)
    return setup


def splits_for(recipe: Recipe, split_file: Path | None = None) -> Splits:
    """The images of a recipe; those of a split that a run has drawn, where its file is given.

    Where the recipe has folds and names none of them, the first one validates.
    """
    return open_training(
        recipe.data,
        recipe.val_data,
        seed=recipe.seed,
        classes=Path(recipe.classes) if recipe.classes else None,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        group_column=recipe.group_column,
        folds=recipe.folds,
        fold=recipe.fold or 1,
        label_separator=recipe.label_separator,
        problem_type=recipe.problem_type,
        split_file=split_file,
    )


def _open_images(recipe: Recipe, state: dict[str, Any], output: Path) -> tuple[Splits, str]:
    """The images and their digest, which has to be that of the state.

    A resumed run takes the split that it has drawn from its folder.
    """
    split_file = output / "split.csv"
    splits = splits_for(recipe, split_file if state and split_file.is_file() else None)
    found = digest(splits.train, splits.validation)
    if state and state["images"] != found:
        otherwise = f", or not split as it was: {split_file} is missing or changed"
        raise ValueError(
            f"the images in {recipe.data} are not those of the run in {output}"
            + (otherwise if splits.drawn else "")
        )
    return splits, found


def _plan(recipe: Recipe, splits: Splits, accelerator: Accelerator) -> Plan:
    assert recipe.batch_size != "auto"
    plan = Plan(
        images=images_per_epoch(recipe, splits.train),
        batch_size=recipe.batch_size,
        accumulate=recipe.accumulate,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        epochs=recipe.epochs + recipe.cooldown_epochs,
        only_steps=recipe.steps,
    )
    images = splits.validation
    if isinstance(images, StreamedImages) and images.length is None and plan.world > 1:
        raise ValueError(
            "val_data: processes cannot share a stream of unknown length; give a folder"
        )
    return plan


def _class_weights(recipe: Recipe, images: Images, device: torch.device) -> Tensor | None:
    if not (recipe.class_weights or recipe.sampler):
        return None
    if isinstance(images, StreamedImages):
        name = "sampler" if recipe.sampler else "class_weights"
        raise ValueError(
            f"{name} = balanced: the classes of a stream cannot be counted before it is read; "
            "take a folder or a table"
        )
    return class_weights(images).to(device) if recipe.class_weights else None


def _cache(recipe: Recipe, splits: Splits, plan: Plan, output: Path) -> ImageCache | None:
    if recipe.cache is None:
        return None
    if isinstance(splits.train, StreamedImages):
        raise ValueError(f"cache = {recipe.cache}: the images of a stream cannot be looked up")
    images = len(splits.train)
    if isinstance(splits.validation, LabelledImages):  # processes share them batch by batch
        step = plan.batch_size * plan.world
        images += plan.batch_size * -(-len(splits.validation) // step)
    return ImageCache(recipe.cache, output, images, pixels_needed(recipe), plan.world)


def images_per_epoch(recipe: Recipe, images: Images) -> int:
    """How many images an epoch has.

    Raises:
        ValueError: that is unknown.
    """
    if isinstance(images, LabelledImages):
        return len(images)
    if found := recipe.epoch_images or images.length:
        return found
    raise ValueError(f"epoch_images: {recipe.data} does not give its number of images")


def _model(
    recipe: Recipe,
    images: Images,
    scale: TargetScale | None,
    state: dict[str, Any],
    output: Path,
    progress: Progress,
) -> tuple[Any, Any]:
    """The classifier to train and its image processor."""
    if state:
        model = rebuilt(state["config"])
        settings = ProcessorSettings.parse(state["processor"], str(output)).changed({})
        processor, keeps_values = build_processor(settings), False
    else:
        start = model_source(recipe.model)
        task = images.task.problem_type
        model, sentence = classifier_for(start, images.classes, recipe.from_scratch, task, recipe)
        if sentence:
            progress.log(sentence)
        keeps_values = sentence == KEPT_VALUES
        model = regularised(model, recipe)
        processor = processor_for(start, recipe, model.config)
    if scale:
        scale.put_on(model, are_in_units=keeps_values)
    return model, processor


def _prepared(
    model: Any, recipe: Recipe, device: torch.device, world: int
) -> tuple[Any, ModelEmaV3 | None]:
    """The model on its device, as it is trained, and its average."""
    model = as_trained(model, recipe, device).to(device)
    if recipe.sync_batchnorm and world > 1:
        if device.type == "cpu":
            raise ValueError(
                "sync_batchnorm: PyTorch has it on GPUs only; on a CPU, one process with a larger "
                "batch_size has the same statistics"
            )
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if not recipe.fsdp:  # it shards contiguous weights only
        model.to(memory_format=torch.channels_last)
    ema = None
    if recipe.ema_decay:
        ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
    if recipe.fsdp and world > 1:
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            fully_shard(block)
        fully_shard(model)
    return model, ema


def _summarise(setup: Setup, progress: Progress) -> None:
    """Report what is about to be trained, and how the learning rate came about."""
    plan, recipe = setup.plan, setup.recipe
    if setup.features:
        progress.log(
            f"the frozen stages run once for {recipe.views} views of each image; views=0 draws a "
            "new view in every epoch"
        )
    elif recipe.head_only and recipe.mixes:
        progress.log(
            "the frozen stages run in every epoch, since mixup and cutmix mix pixels; with "
            f"mixup=0 cutmix=0 they run once for each of {DEFAULT_VIEWS} views"
        )
    outputs = "values" if setup.scale else "classes"
    trained = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    peak = f"{recipe.peak_lr(plan.images_per_step):.3g}"
    if recipe.lr is None:
        peak += f" = {recipe.lr_base:g} x {plan.images_per_step} / {recipe.lr_base_size}"
    progress.log(
        f"{plan.images:,} images of {setup.config.num_labels} {outputs}; {trained:,} parameters "
        f"to train on {setup.device.type} in {recipe.precision}"
        + (", sharded" if setup.is_sharded else "")
    )
    progress.log(
        f"{plan.steps:,} steps of {plan.images_per_step} images = {plan.batch_size} x "
        f"{plan.accumulate} x {plan.world} (batch_size, accumulate, processes); "
        f"highest learning rate {peak}"
    )


# ------------------------------------------------------------------------------ resuming


def redistributed(recipe: Recipe, batches: int, world: int) -> Recipe:
    """The recipe for as many batches a step on however many processes there are now.

    Raises:
        ValueError: the processes cannot share the batches equally.
    """
    if batches % world:
        raise ValueError(f"{world} processes cannot share the run's {batches} batches a step")
    return replace(recipe, accumulate=batches // world)


def check_length(before: Recipe, recipe: Recipe, plan: Plan, steps: int, output: Path) -> None:
    """Refuse another length of the run if the learning rates of its first `steps` would differ.

    Raises:
        ValueError: they would; names what to do.
    """
    names = [name for name in LENGTH if getattr(before, name) != getattr(recipe, name)]
    if not names:
        return
    old, new = Schedule(before, plan), Schedule(recipe, plan)
    done = range(0, steps, old.unit)
    if all(old.rate(step) == new.rate(step) for step in done) and steps <= plan.steps:
        return
    changed = ", ".join(f"{name} = {getattr(recipe, name)}" for name in names)
    raise ValueError(
        f"{changed}: the {steps} steps done would have had another learning rate. To train "
        f"on at min_lr = {before.min_lr:g}, raise cooldown_epochs; else start another run with "
        f"model={output / 'last'}"
    )


def chosen_precision(name: str, device: torch.device) -> str:
    """The precision that "auto" means on a device, or the one given.

    Raises:
        ValueError: the device cannot train in it.
    """
    if name == "fp16" and device.type != "cuda":
        raise ValueError("precision = fp16: needs a GPU; use bf16 or fp32")
    if name != "auto":
        return name
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if has_bf16 else "fp32"


def digest(*splits: Images) -> str:
    """A hash of the names of files and classes, which moving the folder does not change."""
    found = hashlib.sha256()
    for images in splits:
        found.update(repr(images.classes).encode())
        if not images.task.has_one_class:
            found.update(repr(images.task).encode())
        if isinstance(images, LabelledImages):
            found.update(repr(list(images.labels)).encode())
            for image in images.sources if isinstance(images.sources[0], Path) else ():
                found.update(repr(image.name).encode())
    return found.hexdigest()
