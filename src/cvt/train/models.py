"""The classifier that a training run starts from, and what of it is trained."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cvt import hub
from cvt.checkpoints import (
    ModelSource,
    load_classifier,
    load_config,
    load_processor,
    model_source,
)
from cvt.configuration import CvtConfig
from cvt.data.image_processor import image_processor
from cvt.inference.class_matching import class_rows
from cvt.kernels import apply_cpu_bf16, apply_triton, recompute_activations
from cvt.modeling import CvtForImageClassification
from cvt.problem_type import REGRESSION, SINGLE_LABEL
from cvt.text import CLASSES, listed
from cvt.train.recipe import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT_VALUES = "the values are those of the starting model, and so is its last layer"


def classifier_for(
    name: str | Path | ModelSource,
    classes: list[str],
    from_scratch: bool = False,
    problem_type: str = SINGLE_LABEL,
    recipe: Recipe | None = None,
) -> tuple[CvtForImageClassification, str]:
    """A classifier of these classes: trained weights where `name` has some, else random ones.

    Args:
        name: a model on the hub, an authors' file, a variant, or a folder with a config.json; or
            what `model_source` returned for one of them.
        classes: their names, in the order of the classifier.
        from_scratch: random weights in any case.
        problem_type: what it is to predict. The head of a regression is kept for the same values
            alone.
        recipe: whose `architecture` changes the configuration of random weights.

    Returns:
        The classifier, in fp32 whatever its weights were saved in; and what became of the head that
        `name` has, in a sentence.

    Raises:
        FileNotFoundError: the name means none of these.
        ValueError: `architecture` does not fit, or the weights are trained ones.
    """
    source = model_source(name)
    if source.has_weights and not from_scratch:
        if recipe and recipe.architecture:
            raise ValueError(
                f"architecture = {recipe.architecture}: {source.name} has trained weights, which "
                "are of its own; add from_scratch=true to start from random ones"
            )
        own = None  # an adapter brings the head that it was trained with
        if source.kind != "adapter":
            own = load_config(source).num_labels or len(classes)
        model = load_classifier(source, num_labels=own).float()
        model.config.dtype = torch.float32
        is_regression = REGRESSION in (problem_type, model.config.problem_type)
        before = (model.config.problem_type, model.config.class_names)
        reuses = not is_regression or before == (problem_type, classes)
        sentence = adapt_head(model, classes, reuses)
        if reuses and is_regression:
            sentence = KEPT_VALUES
    else:
        config = changed_config(load_config(source), recipe)
        config.name_or_path = ""  # where the weights are from
        config.class_names = classes
        model, sentence = CvtForImageClassification(config), ""
    # Those of the task, whatever the start was trained for.
    model.config.problem_type = None if problem_type == SINGLE_LABEL else problem_type
    model.config.thresholds = None
    return model, sentence


def changed_config(config: CvtConfig, recipe: Recipe | None) -> CvtConfig:
    """The configuration with the fields that the recipe's `architecture` changes.

    A position embedding is for the recipe's images, unless an image size is given.

    Raises:
        ValueError: a value is illegal.
    """
    changes = recipe.config_changes(len(config.depth)) if recipe else {}
    if not recipe or not changes:
        return config
    if "learned" in changes.get("position_embedding", ()):
        changes = {"image_size": recipe.image_size, **changes}
    try:
        return CvtConfig.from_dict(config.to_dict(), **changes)
    except ValueError as error:
        raise ValueError(f"architecture = {recipe.architecture}: {error}") from None


def adapt_head(model: Any, classes: list[str], reuses: bool = True) -> str:
    """Give a model the head of these classes: its own row where it knows the name, else a new one.

    Args:
        model: a classifier.
        classes: their names.
        reuses: whether its rows may be kept at all.

    Returns:
        What was reused, in a sentence.
    """
    if reuses and model.config.class_names == classes:
        return f"the classifier of {len(classes)} classes is that of the starting model"
    known = class_rows(model.config) if reuses else {}
    reused = {i: known[name] for i, name in enumerate(classes) if name in known}
    new = [name for name in classes if name not in known]
    if not new:
        sentence = (
            f"the classifier is that of the starting model, its {len(classes)} rows ordered by "
            "class name"
        )
    elif reused:
        sentence = (
            f"{len(reused)} of {len(classes)} rows of the classifier are those of the starting "
            f"model, by class name; new, random rows: {listed(new, CLASSES)}"
        )
    else:
        outputs = "classes" if reuses else "outputs"
        sentence = f"a new, random classifier: the start has none of the {len(classes)} {outputs}"
    old = model.classifier
    model.classifier = nn.Linear(old.in_features, len(classes))
    model._init_weights(model.classifier)
    with torch.no_grad():
        for i, row in reused.items():
            model.classifier.weight[i] = old.weight[row]
            model.classifier.bias[i] = old.bias[row]
    model.config.class_names = classes
    model.num_labels = len(classes)
    return sentence


def processor_for(source: ModelSource, recipe: Recipe, config: CvtConfig) -> Any:
    """The start's image processor, at the recipe's size; CvT's own for random weights."""
    if source.has_weights and not recipe.from_scratch:
        return load_processor(source, config, recipe.image_size, recipe.crop_pct)
    return image_processor(config, image_size=recipe.image_size, crop_pct=recipe.crop_pct)


def regularised(model: CvtForImageClassification, recipe: Recipe) -> CvtForImageClassification:
    """The same weights in a model with the recipe's dropout and stochastic depth."""
    config = copy.deepcopy(model.config)
    stages = len(config.depth)
    if recipe.drop_rate is not None:
        config.drop_rate = [recipe.drop_rate] * stages
    if recipe.drop_path is not None:
        config.drop_path_rate = [*[0.0] * (stages - 1), recipe.drop_path]
    if config.to_dict() == model.config.to_dict():
        return model
    changed = CvtForImageClassification(config)
    changed.load_state_dict(model.state_dict())
    return changed


def as_trained(model: CvtForImageClassification, recipe: Recipe, device: torch.device) -> Any:
    """The model with the cheaper steps of the recipe on a device, and with what it trains."""
    if recipe.recompute_activations:
        recompute_activations(model)
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if recipe.triton:
        apply_triton(model)
    if device.type == "cpu" and recipe.precision == "bf16":
        apply_cpu_bf16(model)
    return trainable(model, recipe)


def trainable(model: CvtForImageClassification, recipe: Recipe) -> Any:
    """The model with only those weights left to train that the recipe wants.

    Raises:
        ValueError: there are not that many stages to freeze.
    """
    stages = model.cvt.encoder.stages
    if recipe.freeze_stages > len(stages):
        raise ValueError(f"freeze_stages = {recipe.freeze_stages}: there are {len(stages)} stages")
    if recipe.lora_r:
        from peft import LoraConfig, get_peft_model

        names = ("projection_query", "projection_key", "projection_value", "dense")
        adapters = LoraConfig(
            r=recipe.lora_r,
            lora_alpha=2 * recipe.lora_r,
            target_modules=list(names),
            modules_to_save=["classifier"],
        )
        adapted = get_peft_model(model, adapters)
        settings = adapted.peft_config["default"]
        settings.base_model_name_or_path, settings.revision = base_of(recipe)
        return adapted
    for module in frozen(model, recipe):
        module.requires_grad_(False)
    return model


def base_of(recipe: Recipe) -> tuple[str | None, str | None]:
    """How a run's adapters name the model that they were trained on, and its revision on the hub.

    Both are None if that is random. A resumed run names it as before, wherever the model is by
    then.
    """
    if recipe.from_scratch:
        return None, None
    if found := hub.repository(recipe.model):
        return found.hub_id, found.revision
    try:
        source = model_source(recipe.model)
    except FileNotFoundError:  # it was moved since the run began
        return str(recipe.model), None
    return (str(recipe.model) if source.has_weights else None), None


def frozen(model: Any, recipe: Recipe) -> list[nn.Module]:
    """What is to stay as it is, also in its BatchNorm statistics and without dropout."""
    body = (model.get_base_model() if recipe.lora_r else model).cvt
    if recipe.lora_r:
        return [module for module in body.modules() if isinstance(module, _BatchNorm)]
    return [body] if recipe.head_only else list(body.encoder.stages[: recipe.freeze_stages])


def set_training(model: Any, recipe: Recipe) -> None:
    """Put a model into training mode, but for what stays as it is."""
    model.train()
    for module in frozen(model, recipe):
        module.eval()


def frozen_stages(model: Any, recipe: Recipe) -> int:
    """How many stages stay as they are, with all that is before them; 0 with adapters."""
    return len(model.config.stages) if recipe.head_only else recipe.freeze_stages


def merged(model: Any) -> CvtForImageClassification:
    """A model with adapters as a plain classifier: they are added to the weights of a copy."""
    return copy.deepcopy(model).merge_and_unload()


def rebuilt(config: dict[str, Any]) -> CvtForImageClassification:
    """A classifier of a saved configuration, with random weights."""
    return CvtForImageClassification(CvtConfig.from_dict(config))
