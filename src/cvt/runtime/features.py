"""Features beside the logits of a classifier, or of an earlier stage in their place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cvt.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

POOLS = ("cls", "mean")
LOGITS, FEATURES = "logits", "features"  # the outputs of a graph, in this order


@dataclass(frozen=True)
class FeatureSettings:
    """Which features of an image a runtime computes.

    Attributes:
        stage: whose output they are, from 1; the last by default, whose features are normed, as
            the classifier receives them. Those of an earlier stage are its output as it is; the
            stages behind it are not computed, and there are no logits.
        pool: `cls` for the class token, `mean` for the mean of the other tokens; by default the
            class token where the stage has one.

    Example:
        >>> import cvt, torch
        >>> from cvt.runtime import FeatureSettings, open_runtime
        >>> model = cvt.CvtForImageClassification(cvt.CvtConfig.from_variant("cvt-digits"))
        >>> runtime = open_runtime(model, "fused", features=FeatureSettings())
        >>> runtime.features(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 128])
        >>> runtime = open_runtime(model, "fused", features=FeatureSettings(stage=1))
        >>> runtime.features(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 32])
    """

    stage: int | None = None
    pool: str | None = None

    def of(self, config: Architecture) -> "FeatureSettings":
        """The settings for a model, without defaults.

        Raises:
            TypeError: `stage` is no whole number.
            ValueError: the model has no such stage, the stage has no class token, or `pool` is
                unknown.
        """
        stages = len(config.stages)
        number = stages if self.stage is None else self.stage
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"stage is of type {type(number).__name__}: must be a whole number")
        if not 1 <= number <= stages:
            raise ValueError(f"stage = {number}: the model has the stages 1 to {stages}")
        if self.pool not in (None, *POOLS):
            raise ValueError(f"pool = {self.pool!r}: must be one of {', '.join(POOLS)}")
        has_class_token = config.stages[number - 1].cls_token
        if self.pool == "cls" and not has_class_token:
            raise ValueError(f"pool = cls: stage {number} of the model has no class token")
        return FeatureSettings(number, self.pool or ("cls" if has_class_token else "mean"))

    def width(self, config: Architecture) -> int:
        """How many numbers the features of an image are."""
        return config.embed_dim[(self.stage or 0) - 1]


def output_names(config: Architecture, features: FeatureSettings | None) -> tuple[str, ...]:
    """The names of what a model gives with these features, or with none."""
    if features is None:
        return (LOGITS,)
    is_last = features.stage in (None, len(config.stages))
    return (LOGITS, FEATURES) if is_last and config.num_labels else (FEATURES,)


def pooled(
    settings: FeatureSettings,
    class_token: "Tensor | None",
    tokens: "Tensor",
    norm: Callable[..., Any],
    classifier: Callable[..., Any] | None,
) -> "tuple[Tensor, ...]":
    """The outputs of a model from those of the stage whose features are wanted.

    Args:
        settings: of the model, see `FeatureSettings.of`.
        class_token: (B, 1, C); None where the stage has none.
        tokens: the others, (B, N, C).
        norm: of the tokens.
        classifier: of the pooled tokens; None where there are to be no logits.

    Returns:
        Logits, (B, K), if there is a classifier, and features, (B, C).
    """
    features = norm(class_token if settings.pool == "cls" else tokens).mean(dim=1)
    if classifier is None:
        return (features,)
    classified = features
    if class_token is not None and settings.pool == "mean":
        classified = norm(class_token).mean(dim=1)
    return classifier(classified), features
