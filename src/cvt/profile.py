"""What a CvT costs at an image size: parameters, multiply-accumulates and memory.

Nothing of it is allocated: the model runs on fake tensors, which have a shape, a type and a device
but no data. Operators are chosen as eager PyTorch chooses them on a CPU, fused attention included.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import initialization

from cvt.configuration import CvtConfig
from cvt.kernels import recompute_activations
from cvt.macs import MacCounter
from cvt.modeling import CvtForImageClassification


@dataclass(frozen=True)
class StageProfile:
    """What one stage costs.

    Attributes:
        name: `stage1`, ..., as in `CvtConfig.stage_names`.
        grid: its tokens, as rows and columns (H, W).
        tokens: their number, the class token included.
        width: channels of a token.
        depth: number of blocks.
        heads: attention heads.
        parameters: of the token embedding, the class token, the position embedding and the blocks.
        macs: per image; see `Profile`.
    """

    name: str
    grid: tuple[int, int]
    tokens: int
    width: int
    depth: int
    heads: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class Profile:
    """What a `CvtForImageClassification` costs.

    Parameters and MACs are those of the stages and of the head (a LayerNorm and a Linear).

    The two peaks are bytes of live tensors, each storage counted once. What a kernel allocates for
    itself, what an allocator keeps in reserve and what the libraries take are not in them.

    Attributes:
        parameters: trainable numbers.
        macs: multiply-accumulates of one forward per image, as `cvt.macs.MacCounter` counts them:
            matrix products and convolutions, attention included; norms, activations and softmax
            are not counted.
        stages: the same, stage by stage.
        weight_bytes: parameters and buffers.
        inference_bytes: peak of one eager forward of a batch without gradients, weights and images
            included.
        training_bytes: peak of forward, backward and AdamW step with a batch, weights, gradients
            and optimizer state included; None if PyTorch cannot train on it, since BatchNorm needs
            more than one key per channel (one small image can leave just that).
        image_size: height and width, in pixels.
        batch_size: images in the batch of the two peaks.
        dtype: of weights, images and optimizer state.
    """

    parameters: int
    macs: int
    stages: list[StageProfile]
    weight_bytes: int
    inference_bytes: int
    training_bytes: int | None
    image_size: tuple[int, int]
    batch_size: int
    dtype: torch.dtype


class LiveMemory(TorchDispatchMode):
    """Watches tensors created inside it, fake or real; `peak` is the most bytes alive at a time.

    Args:
        tensors: those alive from the start, to be counted too.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.storages: set[int] = set()
        for tensor in tensors:
            self.add(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` until it is freed; views and second sights cost nothing."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self.storages:
            self.storages.add(address)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, address, size)

    def free(self, address: int, size: int) -> None:
        """The storage at `address` is gone."""
        self.storages.remove(address)
        self.live -= size


def inference_peak(model: CvtForImageClassification, pixels: Tensor) -> int:
    """Most bytes alive in one eager forward of `pixels` (B, C, H, W) without gradients."""
    model.eval()
    with torch.no_grad(), LiveMemory([*model.state_dict().values(), pixels]) as memory:
        model(pixels)
    return memory.peak


def training_peak(model: CvtForImageClassification, pixels: Tensor) -> int:
    """Most bytes alive in a forward, backward and AdamW step on `pixels` (B, C, H, W).

    The model recomputes its activations, as in `cvt train`. It is not the first step: the optimizer
    has its state from the start.

    Raises:
        ValueError: a BatchNorm sees one value per channel.
    """
    model.train()
    recompute_activations(model)
    return step_peak(model, torch.optim.AdamW(model.parameters(), fused=True), pixels)


def step_peak(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pixels: Tensor,
    dtype: torch.dtype = torch.float32,
    others: Sequence[Tensor] = (),
) -> int:
    """Most bytes alive in a step of an optimizer on `pixels` (B, C, H, W), not the first.

    Args:
        model: a classifier as it is trained.
        optimizer: of what is trained of it.
        pixels: a batch.
        dtype: of autocast.
        others: tensors that are there all the time, too.
    """
    with LiveMemory([*model.state_dict().values(), pixels, *others]) as memory:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast(pixels.device.type, dtype, dtype != torch.float32):
            logits = model(pixels, return_dict=True).logits
        F.cross_entropy(logits.float(), torch.zeros_like(logits)).backward()
        optimizer.step()
    return memory.peak


def count_parameters(module: nn.Module) -> int:
    """Trainable numbers in `module`."""
    return sum(parameter.numel() for parameter in module.parameters())


def _grids(config: CvtConfig, height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns of the tokens of each stage, for images of this size."""
    grids = []
    for stage in config.stages:
        height, width = stage.grid(height, width)
        grids.append((height, width))
    return grids


def _peaks(model: CvtForImageClassification, pixels: Tensor) -> tuple[int, int | None, list[int]]:
    """Peaks of inference and training in bytes, and the MACs counted before and after each stage.

    The last MACs are those of the whole model.
    """
    counter, after_stages = MacCounter(), [0]
    hooks = [
        stage.register_forward_hook(lambda *_: after_stages.append(counter.macs))
        for stage in model.cvt.encoder.stages
    ]
    with counter:
        inference_bytes = inference_peak(model, pixels)
    for hook in hooks:
        hook.remove()
    try:
        training_bytes = training_peak(model, pixels)
    except ValueError:  # of BatchNorm: in eval mode the same forward went well above
        training_bytes = None
    return inference_bytes, training_bytes, [*after_stages, counter.macs]


def profile(
    config: CvtConfig,
    image_size: int | tuple[int, int] = 224,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Profile:
    """Count what `CvtForImageClassification(config)` costs; takes neither its memory nor its time.

    Args:
        config: its attention implementation is that of the peaks: SDPA by default.
        image_size: pixels of a square image's side, or (height, width).
        batch_size: images in the batch of the two peaks.
        dtype: a floating point type, of weights and images.

    Raises:
        ValueError: the image is smaller than the model needs, `batch_size` is below 1, or `dtype`
            is no floating point type.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    minimum = config.minimum_image_size
    if min(height, width) < minimum:
        raise ValueError(
            f"image_size = {height} x {width}: "
            f"this model needs at least {minimum} x {minimum} pixels"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}: must be at least 1")

    with FakeTensorMode():
        with initialization.no_init_weights():
            model = CvtForImageClassification._from_config(copy.deepcopy(config), dtype=dtype)
        pixels = torch.empty(batch_size, config.num_channels, height, width, dtype=dtype)
        weight_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        inference_bytes, training_bytes, macs_after = _peaks(model, pixels)

    macs = [(after - before) // batch_size for before, after in pairwise(macs_after[:-1])]
    stages = [
        StageProfile(
            name=name,
            grid=grid,
            tokens=grid[0] * grid[1] + stage.cls_token,
            width=stage.embed_dim,
            depth=stage.depth,
            heads=stage.num_heads,
            parameters=stage.parameters,
            macs=count,
        )
        for name, grid, stage, count in zip(
            *(config.stage_names, _grids(config, height, width), config.stages, macs), strict=True
        )
    ]
    return Profile(
        parameters=count_parameters(model),
        macs=macs_after[-1] // batch_size,
        stages=stages,
        weight_bytes=weight_bytes,
        inference_bytes=inference_bytes,
        training_bytes=training_bytes,
        image_size=(height, width),
        batch_size=batch_size,
        dtype=dtype,
    )
