"""Model cards for the hub: of trained classifiers, and of any other model, adapter or export."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cvt import hub
from cvt.architecture import LIBRARY
from cvt.configuration import CvtConfig
from cvt.inference.metrics import METRIC_NAMES
from cvt.libraries import version_of
from cvt.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from cvt.text import CLASSES, listed, printable
from cvt.train.best_epoch import result
from cvt.train.progress import Row
from cvt.train.recipe import Recipe

# What stands in a card until `cvt push` knows better.
PLACE = "path/to/this/folder"
IN_TRANSFORMERS = "## In transformers"
SECTION = re.compile(rf"^{IN_TRANSFORMERS}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
NO_LICENCE = "None is given: ask the author before you use the model."
METRICS = {  # of the model-index, by the hub's names of their kinds
    "top1": "accuracy",
    "top5": "accuracy",
    "loss": "loss",
    "balanced_accuracy": "recall",
    "f1_macro": "f1",
    "mean_average_precision": "mean_average_precision",
    "mae": "mae",
    "r2": "r_squared",
}
# What a model does, and the metric of the hub, by its problem_type; {} is its number of outputs.
PURPOSES = {
    SINGLE_LABEL: ("Classifies images into {} classes", "accuracy"),
    MULTI_LABEL: ("Finds which of {} classes an image has", "mean_average_precision"),
    REGRESSION: ("Predicts {} values of an image", "mae"),
}


def trained_card(
    config: CvtConfig, recipe: Recipe, row: Row, is_adapter: bool = False
) -> ModelCard:
    """The card of a classifier that a run has trained: how good it is, and how it was trained.

    Args:
        config: of the classifier.
        recipe: of the run; no path in it is shown, but the last name of one.
        row: the metrics of its epoch.
        is_adapter: whether it is the folder of the run's adapter.
    """
    start, model = hub.repository(recipe.model), model_name(recipe.model)
    dataset, data = data_names(recipe.data)
    teacher = recipe.teacher and model_name(recipe.teacher)
    shown = dataclasses.replace(
        recipe, model=model, teacher=teacher, data=data, val_data=None, classes=None
    )
    settings = yaml.safe_dump(dataclasses.asdict(shown), sort_keys=False, allow_unicode=True)
    metrics = {name: value for name, value in row.items() if name.startswith(("val_", "ema_"))}
    table = "\n".join(f"| {k} | {v:.4f} |" for k, v in metrics.items() if v is not None)
    head: dict[str, Any] = {"datasets": [dataset] if dataset else None}
    if start and not recipe.from_scratch:
        head["base_model"] = start.hub_id
        head["base_model_relation"] = "adapter" if is_adapter else "finetune"
    if results := eval_results(config, row, dataset or "image-folder", data):
        head |= {"model_name": f"CvT for {data}", "eval_results": results}
    origin = "random weights" if recipe.from_scratch else f"`{model}`"
    training = f"""## Training

On {data}, from {origin}. After epoch {row["epoch"]:.0f}, on the validation images:

| measure | value |
|---|---|
{table}

By cvt-vision {version_of("cvt-vision")}, with this recipe:

```yaml
{settings.strip()}
```"""
    kind = "adapter" if is_adapter else "folder"
    return model_card(config, f"CvT, trained from {origin}", training, kind, **head)


def eval_results(config: CvtConfig, row: Row, dataset: str, name: str) -> list[EvalResult]:
    """The metrics of an epoch for the model-index: of the averaged weights, where those are saved.

    Args:
        config: of the classifier.
        row: the metrics.
        dataset: the data set on the hub, or its kind.
        name: of the data.
    """
    few = {"top5"} if len(config.class_names) <= 5 else set()
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=name,
            dataset_split="validation",
            metric_type=kind,
            metric_name=METRIC_NAMES[metric],
            metric_value=round(value, 4),
        )
        for metric, kind in METRICS.items()
        if metric not in few and (value := result(row, metric)) is not None
    ]


def model_card(
    config: CvtConfig, title: str, about: str = "", kind: str = "folder", **head: Any
) -> ModelCard:
    """The card of a model: what it is and how to use it, here and in transformers.

    Args:
        config: of the model.
        title: of the page.
        about: further sections.
        kind: of a `folder` with a model, an `adapter` of PEFT, of `head["base_model"]`, or an
            `export`.
        head: fields of `huggingface_hub.ModelCardData`.
    """
    purpose, metric = PURPOSES[config.problem_type or SINGLE_LABEL]
    if len(config.class_names) == 1:
        purpose = purpose.replace("values", "value").replace("classes", "class")
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag="image-classification",
        tags=["cvt", "image-classification", "vision"],
        metrics=[metric],
        **head,
    )
    names = config.class_names
    classes = printable(listed(names, CLASSES))
    package = {"adapter": "'cvt-vision[train]'", "export": "'cvt-vision[export]'"}
    sections = [
        f"# {title}",
        f"{purpose.format(len(names))}: {classes}. The activation of its MLPs is "
        f"`{config.hidden_act}`.",
        f"""## Use

```sh
pip install {package.get(kind, "cvt-vision")}
cvt predict {PLACE} photo.jpg
```

```python
import cvt

classify = cvt.Classifier("{PLACE}")
print(classify("photo.jpg"))  # [{{"label": ..., "score": ...}}, ...]
```""",
        "" if kind == "export" else in_transformers(config, kind, head.get("base_model")),
        about,
        f"## Licence\n\n{NO_LICENCE}",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")


def in_transformers(
    config: CvtConfig, kind: str = "folder", base_model: str | None = None, with_code: bool = False
) -> str:
    """A section about transformers alone: how it loads the model, and whether it computes the same.

    It has one activation and one epsilon, whatever a configuration has, and projections by
    depthwise convolutions only.

    Args:
        config: of the model.
        kind: as in `model_card`.
        base_model: of an adapter.
        with_code: whether the folder carries this package's code.
    """
    if with_code:
        return f"""{IN_TRANSFORMERS}

```python
from transformers import pipeline

classify = pipeline("image-classification", model="{PLACE}", trust_remote_code=True)
```

`trust_remote_code=True` runs cvt-vision's model code, which is in this repository: it computes
`{config.hidden_act}` and needs Python 3.11. Without it, transformers takes its own CvT, which
always computes exact GELU."""
    blocks = all(depth > stage for stage, depth in enumerate(config.depth))
    kinds = {*config.qkv_projection_method, *config.position_embedding}
    if not blocks or kinds != {"dw_bn", "none"} or any(config.cls_token[:-1]):
        return (
            f"{IN_TRANSFORMERS}\n\nIts own CvT has no such stages; after "
            "`cvt.register_auto_classes()` its Auto classes and `pipeline` use this package's."
        )
    if kind == "adapter" and not base_model:
        return ""
    code = f"""from transformers import pipeline

classify = pipeline("image-classification", model="{PLACE}")"""
    if kind == "adapter":
        code = f"""from peft import PeftModel
from transformers import AutoModelForImageClassification

base = AutoModelForImageClassification.from_pretrained(
    "{base_model}", num_labels={config.num_labels}, ignore_mismatched_sizes=True
)
model = PeftModel.from_pretrained(base, "{PLACE}")"""
    differences = []
    if config.hidden_act != "gelu":
        differences.append(f"exact GELU instead of {config.hidden_act}")
    if config.layer_norm_eps != 1e-5:
        differences.append(f"an epsilon of 1e-05 instead of {config.layer_norm_eps:g}")
    caveat = "It computes what this package does: exact GELU."
    if differences:
        caveat = (
            f"Its CvT computes {' and '.join(differences)}, whatever config.json has. These "
            "weights were trained with the latter, so scores differ from those above; after "
            "`cvt.register_auto_classes()`, transformers loads this package's class, and they are "
            "the same."
        )
    return f"{IN_TRANSFORMERS}\n\n```python\n{code}\n```\n\n{caveat}"


def about_code(card: ModelCard, config: CvtConfig) -> ModelCard:
    """The card of a model whose repository carries this package's code.

    A card that has `trust_remote_code` stays as it is. In any other, the section about transformers
    is replaced, which does not hold with the code, or added.
    """
    if "trust_remote_code" in card.text:
        return card
    section = f"{in_transformers(config, with_code=True)}\n\n"
    text, replaced = SECTION.subn(lambda _: section, card.text, count=1)
    text = text if replaced else f"{text.rstrip()}\n\n{section}"
    card.text = f"{text.rstrip()}\n"
    return card


def model_name(model: str) -> str:
    """A model on the hub as a recipe names it; of any other the last name of its path."""
    return model if hub.repository(model) else printable(Path(model).name)


def data_names(data: str) -> tuple[str | None, str]:
    """The data set on the hub that a recipe's `data` names, if any, and a name without a path."""
    found = re.match(r"(?:stream:)?hub:([\w.-]+(?:/[\w.-]+)?)", data)
    return (found[1], found[1]) if found else (None, printable(Path(data).name) or "images")


def completed(card: ModelCard, hub_id: str, licence: str | None) -> ModelCard:
    """The card for a repository: with its name in the usage, the licence, and this package's tag.

    What the user has written into it stays.
    """
    for field, value in {"library_name": LIBRARY, "pipeline_tag": "image-classification"}.items():
        card.data[field] = card.data.get(field) or value
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), LIBRARY]))
    if licence:
        card.data["license"] = licence
    licence = card.data.get("license")
    text = card.text.replace(PLACE, hub_id)
    card.text = text.replace(NO_LICENCE, f"{licence}.") if licence else text
    return card
