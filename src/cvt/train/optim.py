"""The optimizer, its parameter groups, and the learning rate of every step."""

import math
import re
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cvt.train.plan import Plan
from cvt.train.recipe import Recipe


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """The trainable parameters, grouped for an optimizer.

    Norms, biases, class tokens and position embeddings do not decay. With a layer decay, the
    learning rate falls by that factor from block to block, from the head, at 1, down to the
    embedding of the first stage; the product is the group's `lr_scale`.
    """
    places = {name: _place(name) for name, _ in model.named_parameters()}
    order = sorted(set(places.values()), reverse=True)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_kept = parameter.ndim == 1 or name.endswith(("cls_token", "position_embedding"))
            decay = 0.0 if is_kept else weight_decay
            scale = layer_decay ** order.index(places[name])
            groups.setdefault((decay, scale), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]


def _place(name: str) -> tuple[float, float]:
    """Stage and block of a parameter; a stage's embedding is before its blocks, the head last."""
    found = re.search(r"stages\.(\d+)\.(?:layers\.(\d+)\.)?", name)
    return (float(found[1]), float(found[2] or -1)) if found else (math.inf, 0.0)


def optimizer_for(model: nn.Module, recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    """The recipe's optimizer of the trainable parameters."""
    groups = parameter_groups(model, recipe.weight_decay, recipe.layer_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, fused=True)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(groups, recipe.optimizer, lr, recipe.weight_decay)
    if recipe.optimizer == "muon" and not _has_bf16():
        _orthogonalize_in_fp32(optimizer)
    return optimizer


def _has_bf16() -> bool:
    """Whether oneDNN multiplies matrices in bf16 on this processor."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _orthogonalize_in_fp32(muon_optimizer: torch.optim.Optimizer) -> None:
    """Let timm's Muon multiply matrices in fp32 on a CPU that has no products in bf16.

    There PyTorch's take 20 to 35 times as long, and a step of `few-pictures` 3 times. timm 1.0.31
    has no setting for it.
    """
    from timm.optim import muon

    in_bf16 = muon.zeropower_via_newtonschulz
    in_fp32 = partial(in_bf16, dtype=torch.float32)

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if optimizer.param_groups[0]["params"][0].is_cpu:
            muon.zeropower_via_newtonschulz = in_fp32

    def after(*_: Any) -> None:
        muon.zeropower_via_newtonschulz = in_bf16

    muon_optimizer.register_step_pre_hook(before)
    muon_optimizer.register_step_post_hook(after)


class LearningRates(ABC):
    """The learning rate of every step."""

    @abstractmethod
    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0, where layer decay leaves it whole."""

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Give the optimizer the learning rates of a step, counted from 0."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step) * group["lr_scale"]


class Schedule(LearningRates):
    """The learning rate: a linear warm-up, a cosine, a cool-down; timm's formulas.

    Raises:
        ValueError: the warm-up is not shorter than the run, or ends below `min_lr`.
    """

    def __init__(self, recipe: Recipe, plan: Plan) -> None:
        self.peak = recipe.peak_lr(plan.images_per_step)
        self.start, self.end = recipe.warmup_lr, recipe.min_lr
        # In units of updates: a step's or, as the authors have it, an epoch's.
        self.unit = plan.steps_per_epoch if recipe.lr_updates == "epoch" else 1
        per_epoch = plan.steps_per_epoch / self.unit
        length = recipe.steps / self.unit if recipe.steps else recipe.epochs * per_epoch
        asked = recipe.warmup_epochs
        self.warmup = round(min(per_epoch, length / 2) if asked is None else asked * per_epoch)
        if self.warmup >= max(1, length):
            raise ValueError(f"warmup_epochs = {asked}: must be shorter than the run")
        if self.end > self.peak:
            raise ValueError(f"min_lr = {self.end}: is above the highest learning rate")
        # The authors' cosine begins under the warm-up.
        self.cosine_start = self.warmup if recipe.lr_updates == "step" else 0
        self.cosine_length = max(1, round(length) - self.cosine_start)

    def rate(self, step: int) -> float:
        """See `LearningRates`."""
        update = step // self.unit
        if update < self.warmup:
            return self.start + update * ((self.peak - self.start) / self.warmup)
        update -= self.cosine_start
        if update >= self.cosine_length:
            return self.end
        share = 1 + math.cos(math.pi * update / self.cosine_length)
        return self.end + 0.5 * (self.peak - self.end) * share
