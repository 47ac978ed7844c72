"""Distillation: the soft targets of a teacher, beside the labels.

G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2
(arXiv 1503.02531).
"""

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cvt.checkpoints import load_classifier, load_preprocessing, model_source
from cvt.data.preprocessing import normalisation
from cvt.inference.class_matching import class_indices
from cvt.inference.predict import has_independent_scores
from cvt.runtime.fused import FusedCvt
from cvt.train.recipe import Recipe


class Teacher:
    """A trained classifier whose scores the model is to learn.

    It sees the views that the model sees, mixed and erased as they are, normalised by its own mean
    and deviation. Only its classes that the data has are compared.

    Args:
        recipe: of the run; it has a teacher.
        classes: of the run.
        processor: the image processor of the run.
        device: of the run.
        dtype: to compute in.

    Attributes:
        digest: of its weights.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it does not fit the run; names what does not.
    """

    def __init__(
        self,
        recipe: Recipe,
        classes: list[str],
        processor: Any,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        assert recipe.teacher is not None
        source, name = model_source(recipe.teacher), f"teacher = {recipe.teacher}"
        if source.is_export:
            raise ValueError(f"{name}: is an export; give the model that it was written from")
        model = load_classifier(source)
        config = model.config
        if has_independent_scores(config) or config.problem_type == "regression":
            raise ValueError(f"{name}: its scores are not those of classes of which one is right")
        if recipe.image_size < config.minimum_image_size:
            raise ValueError(
                f"{name}: needs images of {config.minimum_image_size} pixels; image_size = "
                f"{recipe.image_size}"
            )
        try:
            rows = class_indices(classes, config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self.rows = torch.tensor([rows[each] for each in classes], device=device)
        self.temperature = recipe.temperature
        self.model = FusedCvt(config, model.state_dict(), dtype).to(device)
        self.digest = _digest(model.state_dict())
        own = normalisation(load_preprocessing(source, config))
        given = normalisation(processor)
        (mean, std), (own_mean, own_std) = (
            [torch.tensor(values).view(3, 1, 1) for values in each] for each in (given, own)
        )
        self.scale = (std / own_std).to(device)
        self.shift = ((mean - own_mean) / own_std).to(device)

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Of the classes of the run, (B, classes) in float32, for its views, (B, 3, H, W)."""
        own = (pixels * self.scale + self.shift).to(self.model.dtype)
        options = {"output_hidden_states": False, "output_attentions": False}
        (logits,) = self.model(own, return_dict=False, **options)
        return logits.float()[:, self.rows]

    def loss(self, logits: Tensor, pixels: Tensor, weights: Tensor | None) -> Tensor:
        """The loss of logits, (B, classes), against the soft targets of the same views, ().

        Args:
            logits: of the model.
            pixels: that it has seen.
            weights: of the images, (B,), if the loss of the labels has some.
        """
        return soft_loss(logits, self.logits(pixels), self.temperature, weights)


def soft_loss(
    logits: Tensor, soft: Tensor, temperature: float, weights: Tensor | None = None
) -> Tensor:
    """T² · 1/B · Σ_i w_i · KL(softmax(soft_i / T) ‖ softmax(logits_i / T)), ().

    With T², its gradients have the size of those of the labels at every temperature.

    Args:
        logits: of the model, (B, classes).
        soft: of the teacher, (B, classes).
        temperature: T.
        weights: w, (B,); 1 by default.
    """
    model, teacher = ((each / temperature).log_softmax(1) for each in (logits, soft))
    losses = F.kl_div(model, teacher, reduction="none", log_target=True).sum(dim=1)
    losses = losses if weights is None else weights * losses
    return temperature**2 * losses.mean()


def _digest(weights: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in weights.items():
        found.update(name.encode())
        found.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
