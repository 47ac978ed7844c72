"""Compare Grad-CAM with that of the package `grad-cam`, which the project does not depend on.

    pip install grad-cam && python benchmarks/grad_cam.py

Both explain the same random pictures with the same cvt-13, at every stage; the table has the
largest difference of the maps, each scaled to a maximum of 1, and the times, turn by turn.
"""

import statistics
import time

import numpy as np
import torch
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

import cvt
from cvt.views import split_tokens

PICTURES = 8
SIDES = {1: 56, 2: 28, 3: 14}  # of the grids at 224 pixels


class Logits(nn.Module):
    """A classifier that returns its logits, as the package expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """The logits (B, K) of pixels (B, C, H, W)."""
        return self.model(pixels).logits


def to_map(tokens: Tensor) -> Tensor:
    """Tokens (B, N, C), a class token among them or not, as (B, C, H, W)."""
    side = int(tokens.shape[1] ** 0.5)
    _, tokens = split_tokens(tokens, (side, side))
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def main() -> None:
    """Print a row for each stage."""
    torch.manual_seed(0)
    config = cvt.CvtConfig.from_variant("cvt-13")
    model = cvt.CvtForImageClassification(config).eval()
    explainer = cvt.Explainer(model, processor=cvt.image_processor(config))
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (224, 224, 3), np.uint8)) for _ in range(PICTURES)
    ]
    print(
        f"{'stage':>5} {'largest difference':>20} {'ms here':>9} {'ms grad-cam':>12} {'ratio':>7}"
    )
    for stage in SIDES:
        layer = model.cvt.encoder.stages[stage - 1].layers[-1].layernorm_before
        peer = GradCAM(Logits(model), [layer], reshape_transform=to_map)
        differences, times = [], []
        for k, picture in enumerate(pictures):
            pixels = explainer.processor(picture, return_tensors="pt")["pixel_values"]
            start = time.perf_counter()
            ours = explainer(picture, class_name=k, stage=stage).grid
            middle = time.perf_counter()
            theirs = peer(pixels, [ClassifierOutputTarget(k)])[0]  # (224, 224), scaled
            times.append((middle - start, time.perf_counter() - middle))
            tokens = peer.activations_and_grads.activations[0]  # (1, C, H, W)
            gradient = peer.activations_and_grads.gradients[0]
            weights = gradient.mean((2, 3), keepdim=True)
            grid = (weights * tokens).sum(1).relu()[0].numpy()
            differences.append(np.abs(ours / ours.max() - grid / grid.max()).max())
            assert theirs.shape == (224, 224)
        here, there = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"{stage:>5} {max(differences):>20.1e} {here:>9.0f} {there:>12.0f} {there / here:>7.2f}"
        )


if __name__ == "__main__":
    main()
