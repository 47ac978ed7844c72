"""Small models on which ours is held to the authors', and the weights and images both are given.

`CASES` are read by `make_authors_golden.py`, which runs the authors' code, and by
`test_authors.py`, which runs ours; `TRAININGS` by `make_authors_losses.py` and by
`test_authors_training.py`; what begins with `TF` by `make_tf_golden.py` and by
`test_keras_weights.py`; what begins with `DIALECT` by `make_dialects_golden.py` and by
`test_dialects.py`.
"""

import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN_FILE = Path(__file__).with_name("authors.npz")
LOSSES_FILE = Path(__file__).with_name("authors_losses.npz")
TF_CLASSIFIER = Path(__file__).with_name("tf_classifier")
TF_MODEL = Path(__file__).with_name("tf_model")
TF_IMAGES = (2, 40, 24)  # batch, height, width
DIALECTS_FOLDER = Path(__file__).with_name("dialects")
DIALECT_IMAGES = (2, 32, 32)  # batch, height, width
VARIANTS = ("cvt-13", "cvt-21", "cvt-w24")
NUM_CLASSES = 7
SEED = 0  # of the drop-path draws, set just before forward

# The fields of CvtConfig that have one value per stage, by their names in the authors' yaml files.
AUTHORS_FIELDS = {
    "PATCH_SIZE": "patch_sizes",
    "PATCH_STRIDE": "patch_stride",
    "PATCH_PADDING": "patch_padding",
    "DIM_EMBED": "embed_dim",
    "NUM_HEADS": "num_heads",
    "DEPTH": "depth",
    "MLP_RATIO": "mlp_ratio",
    "ATTN_DROP_RATE": "attention_drop_rate",
    "DROP_RATE": "drop_rate",
    "DROP_PATH_RATE": "drop_path_rate",
    "QKV_BIAS": "qkv_bias",
    "CLS_TOKEN": "cls_token",
    "QKV_PROJ_METHOD": "qkv_projection_method",
    "KERNEL_QKV": "kernel_qkv",
    "PADDING_KV": "padding_kv",
    "STRIDE_KV": "stride_kv",
    "PADDING_Q": "padding_q",
    "STRIDE_Q": "stride_q",
}

# The paper's models, narrower; heads are not 64 wide, so that the attention's scale matters.
BASE: dict[str, tuple] = {
    "patch_sizes": (7, 3, 3, 3),
    "patch_stride": (4, 2, 2, 2),
    "patch_padding": (2, 1, 1, 1),
    "embed_dim": (12, 24, 32, 40),
    "num_heads": (2, 3, 4, 2),
    "depth": (1, 1, 2, 1),
    "mlp_ratio": (4.0, 4.0, 4.0, 4.0),
    "attention_drop_rate": (0.0, 0.0, 0.0, 0.0),
    "drop_rate": (0.0, 0.0, 0.0, 0.0),
    "drop_path_rate": (0.0, 0.0, 0.1, 0.1),
    "qkv_bias": (True, True, True, True),
    "qkv_projection_method": ("dw_bn", "dw_bn", "dw_bn", "dw_bn"),
    "kernel_qkv": (3, 3, 3, 3),
    "padding_kv": (1, 1, 1, 1),
    "stride_kv": (2, 2, 2, 2),
    "padding_q": (1, 1, 1, 1),
    "stride_q": (1, 1, 1, 1),
}


@dataclass(frozen=True)
class Case:
    """A model, by the fields of CvtConfig, and what is asked of it."""

    settings: dict[str, list]
    image: tuple[int, int, int]  # batch, height, width
    training: bool = False
    gradients: tuple[str, ...] = ()  # authors' names


def case(
    image: tuple[int, int, int] = (2, 20, 20),
    stages: int = 3,
    training: bool = False,
    gradients: tuple[str, ...] = (),
    **changes: Any,
) -> Case:
    """`BASE` cut to so many stages; a change is a tuple, or one value for every stage."""
    settings = {name: list(values[:stages]) for name, values in BASE.items()}
    settings["cls_token"] = [False] * (stages - 1) + [True]
    for name, value in changes.items():
        settings[name] = list(value) if isinstance(value, tuple) else [value] * stages
    return Case(settings, image, training, gradients)


CASES = {
    "dw_bn": case(
        gradients=(
            "stage0.patch_embed.proj.weight",
            "stage1.blocks.0.attn.conv_proj_k.conv.weight",
            "stage2.cls_token",
        )
    ),
    "avg": case(qkv_projection_method="avg"),
    "linear": case(qkv_projection_method="linear"),
    "dw_bn, avg, linear": case(qkv_projection_method=("dw_bn", "avg", "linear")),
    "linear, dw_bn, avg": case(qkv_projection_method=("linear", "dw_bn", "avg")),
    "no class token": case(cls_token=False),
    "class token in every stage": case(cls_token=True),
    "class token in the first stage only": case(cls_token=(True, False, False)),
    "class token, avg and linear": case(
        cls_token=True, qkv_projection_method=("avg", "linear", "avg")
    ),
    "odd size": case(image=(2, 23, 23)),
    "not square": case(image=(2, 15, 28)),
    "avg, not square": case(image=(2, 19, 28), qkv_projection_method="avg"),
    "smallest image": case(image=(2, 3, 3)),
    # Gradients too: BatchNorm on a CPU misreads a gradient whose batch stride of one image is odd.
    "batch of one": case(
        image=(1, 20, 20),
        gradients=(
            "stage0.patch_embed.proj.bias",
            "stage0.blocks.0.attn.conv_proj_v.bn.weight",
            "stage2.blocks.1.attn.conv_proj_k.conv.weight",
        ),
    ),
    "batch of three": case(image=(3, 20, 20), cls_token=False),
    "no qkv bias": case(qkv_bias=False),
    "one stage": case(stages=1),
    "two stages": case(stages=2),
    "four stages": case(stages=4, image=(2, 29, 33)),
    "kernel of 5": case(kernel_qkv=5, padding_kv=2, padding_q=2),
    "kernel of 1": case(kernel_qkv=1, padding_kv=0, padding_q=0),
    "no key and value padding": case(stages=1, padding_kv=0),
    "key and value stride of 1": case(stride_kv=1),
    "key and value stride of 3": case(stride_kv=3),
    "avg, key and value stride of 3": case(stride_kv=3, qkv_projection_method="avg"),
    "avg, kernel of 2": case(
        image=(2, 19, 23), qkv_projection_method="avg", kernel_qkv=2, padding_kv=0
    ),
    "one query for all tokens": case(stages=1, stride_q=8, cls_token=False),
    "other patches": case(
        patch_sizes=(5, 2, 4), patch_stride=(3, 2, 1), patch_padding=(0, 0, 2), image=(2, 20, 23)
    ),
    "other MLP ratios": case(mlp_ratio=(2.5, 1.3, 3.0)),
    "training": case(
        image=(6, 16, 20),
        stages=2,
        training=True,
        gradients=(
            "stage0.patch_embed.proj.bias",
            "stage0.blocks.1.attn.conv_proj_q.conv.weight",
            "stage1.cls_token",
        ),
        depth=(2, 3),
        drop_path_rate=(0.3, 0.6),
    ),
    "training, batch of one": case(
        image=(1, 20, 28),
        stages=1,
        training=True,
        gradients=(
            "stage0.patch_embed.proj.bias",
            "stage0.blocks.0.attn.conv_proj_v.bn.weight",
            "stage0.cls_token",
        ),
    ),
}


# What every software can build: the MLP's ratio of 4 is fixed in some.
DIALECT_SETTINGS = case(embed_dim=(4, 8, 12), num_heads=(1, 2, 3), depth=(1, 1, 2)).settings


@dataclass(frozen=True)
class Training:
    """How the model of all trainings learns, with an optimizer by its name in the yaml files."""

    optimizer: str
    learning_rate: float
    weight_decay: float  # far above the recipes', so that what decays tells in 20 steps
    cosine: bool = False  # by SCHEDULE, each step an epoch; otherwise the rate stays
    soft_targets: bool = False


# Nothing is dropped, so that a step draws no random numbers.
LEARNER = case(image=(16, 48, 48), embed_dim=(16, 32, 64), num_heads=(1, 2, 4), drop_path_rate=0.0)
LEARNER_CLASSES = 10
STEPS = 20
SCHEDULE = {"epochs": STEPS, "warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5}
TRAININGS = {
    "AdamW": Training("adamW", learning_rate=3e-4, weight_decay=1.0),
    "SGD": Training("sgd", learning_rate=0.01, weight_decay=0.1),
    "AdamW, cosine, soft targets": Training(
        "adamW", learning_rate=1e-3, weight_decay=1.0, cosine=True, soft_targets=True
    ),
}


def training_images() -> np.ndarray:
    """The images of all trainings: two batches of 8, which the steps take in turn."""
    return image("trainings", LEARNER.image).reshape(2, 8, 3, *LEARNER.image[1:])


def training_targets(training: Training) -> np.ndarray:
    """A class for each image, or the probabilities of a mixup with label smoothing of 0.1."""
    labels = np.arange(16) % LEARNER_CLASSES
    one_hot = np.eye(LEARNER_CLASSES)[labels]
    share = np.linspace(0, 1, 16)[:, None]
    smooth = 0.9 * (share * one_hot + (1 - share) * one_hot[::-1]) + 0.1 / LEARNER_CLASSES
    values = smooth.astype(np.float32) if training.soft_targets else labels
    return values.reshape(2, 8, *values.shape[1:])


def authors_spec(settings: dict[str, Any]) -> dict[str, Any]:
    """The fields of a CvtConfig as the authors' yaml files have them."""
    spec = {theirs: list(settings[ours]) for theirs, ours in AUTHORS_FIELDS.items()}
    return {"NUM_STAGES": len(settings["depth"]), **spec}


def fill(tensors: Iterable[str]) -> dict[str, np.ndarray]:
    """A value for every tensor, given as lines of authors' name and shape; its name alone draws it.

    Scaled so that activations stay near 1, where 1e-5 is a strict tolerance. The token embedding is
    smaller, so that the epsilon of its LayerNorm tells.
    """
    return {name: _value(name, shape) for name, shape in map(_parse, tensors)}


def describe(name: str, shape: Iterable[int]) -> str:
    """The line of a tensor: its name, then its shape."""
    return " ".join((name, *map(str, shape)))


def image(name: str, shape: tuple[int, int, int]) -> np.ndarray:
    """The images of the case of that name, (B, 3, H, W)."""
    batch, height, width = shape
    return rng(name).standard_normal((batch, 3, height, width)).astype(np.float32)


def _parse(line: str) -> tuple[str, tuple[int, ...]]:
    name, *shape = line.split(" ")
    return name, tuple(map(int, shape))


def rng(name: str) -> np.random.RandomState:
    """The random numbers of a name."""
    return np.random.RandomState(zlib.crc32(name.encode()))


def _value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        return rng(name).uniform(0.1, 1.0, shape).astype(np.float32)
    normal = rng(name).standard_normal(shape)
    if name.endswith("cls_token"):
        value = normal
    elif len(shape) == 1:  # biases and running means; the weights of norms
        value = 0.2 * normal + name.endswith(".weight")
    else:
        value = normal / math.sqrt(math.prod(shape[1:]))
    if "patch_embed.proj" in name:
        value = 0.1 * value
    return value.astype(np.float32)
