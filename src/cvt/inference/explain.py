"""Where a classifier looks: Grad-CAM, the class token's attention, and attention rollout.

Grad-CAM: arXiv 1610.02391. Attention rollout: arXiv 2005.00928.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, count
from pathlib import Path
from threading import Lock
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn

from cvt.architecture import Architecture, StageConfig
from cvt.checkpoints import ModelSource, model_source
from cvt.data.decoding import ImageError, decode
from cvt.data.preprocessing import visible_box
from cvt.inference.class_matching import class_indices
from cvt.inference.classifier import Classifier, image_source
from cvt.inference.explanation import THUMBNAIL, Explanation, interpolation, sheet
from cvt.inference.predict import ranked, reader, scores
from cvt.modeling import CvtForImageClassification
from cvt.runtime.torch_runtime import TorchRuntime
from cvt.views import split_tokens

Method = Literal["gradcam", "attention", "rollout"]
ON_SHEET = 60  # images
TINY = 224  # pixels of the long side, below which a written picture is enlarged
FULL_SIDE = 4096  # pixels that the short side of a very large picture keeps


def explain(
    model: str | Path | CvtForImageClassification,
    images: Any,
    class_name: str | int | None = None,
    method: Method = "gradcam",
    stage: int | None = None,
    **how: Any,
) -> Explanation | list[Explanation]:
    """Explain what a classifier answers to an image or to a list of them.

        explanation = cvt.explain("cvt-13", "cat.jpg")
        explanation.overlay().show()

    Args:
        model: as `Explainer` takes it.
        images: an image, or a list of images, as `Classifier` takes them.
        class_name: as in `Explainer.__call__`.
        method: likewise.
        stage: likewise.
        how: other arguments of `Explainer`.

    Returns:
        An `Explanation`, or a list of one for each image.

    Raises:
        ValueError: as by `Explainer` and by its call.
        cvt.data.decoding.ImageError: an image cannot be decoded; names it.

    Example:
        >>> import cvt, numpy
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> model = cvt.CvtForImageClassification(config)
        >>> processor = cvt.image_processor(config, image_size=32)
        >>> photo = numpy.random.default_rng(0).random((48, 64, 3))
        >>> explanation = cvt.explain(model, photo, class_name=7, stage=3, processor=processor)
        >>> explanation.method, explanation.stage, explanation.class_id
        ('gradcam', 3, 7)
        >>> explanation.overlay().size  # that of the photo
        (64, 48)
    """
    explainer = Explainer(model, **how)
    if isinstance(images, list | tuple):
        return [explainer(image, class_name, method, stage) for image in images]
    return explainer(images, class_name, method, stage)


class Explainer:
    """Explains what one classifier answers; several threads may share one.

        explainer = cvt.Explainer("cvt-13")
        explainer("cat.jpg").save("cat.png")  # Grad-CAM of the best class
        explainer("cat.jpg", class_name="tabby, tabby cat", stage=2)
        explainer("cat.jpg", method="attention").attention  # (blocks, heads, h, w)

    It computes in fp32 with PyTorch, since fused and exported models have no gradients.

    Args:
        model: a published name, a model folder, a file of weights, or a loaded model.
        device: as in `Classifier`.
        threads: likewise.
        processor: the image processor, if not the model's own; a loaded model needs one.
        exact: as in `Classifier`.
        max_pixels: likewise.
        verify: likewise.

    Raises:
        TypeError: the model is a fused one, or no model; names which to use.
        ValueError: the model is an export, or has no classes; names which to use.

    Example:
        >>> import cvt, numpy
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> model = cvt.CvtForImageClassification(config)
        >>> processor = cvt.image_processor(config, image_size=32)
        >>> explainer = cvt.Explainer(model, processor=processor)
        >>> photo = numpy.random.default_rng(0).random((48, 64, 3))
        >>> explainer(photo, stage=1).grid.shape  # a value for each token of 32 x 32 pixels
        (16, 16)
        >>> explainer(photo, method="attention").attention.shape  # blocks, heads, h, w
        (4, 4, 2, 2)
    """

    def __init__(
        self,
        model: str | Path | ModelSource | CvtForImageClassification,
        device: str = "auto",
        threads: int | None = None,
        *,
        processor: Callable | None = None,
        exact: bool = False,
        max_pixels: int | None = None,
        verify: bool = True,
    ) -> None:
        opened = Classifier(
            *(_resolved(model), "torch", "fp32", device, threads),
            processor=processor,
            verify=verify,
        )
        runtime = opened.runtime
        assert isinstance(runtime, TorchRuntime)
        self.model = cast(CvtForImageClassification, runtime.model)
        self.config, self.device = runtime.config, runtime.device
        self.processor, self.lock = opened.processor, Lock()
        if not self.config.class_names:
            raise ValueError("num_labels = 0: the model has no classes to explain")
        self.read = reader(self.processor, exact, max_pixels)
        self.read_full = partial(decode, max_pixels=max_pixels, least_of_large=FULL_SIDE)

    def __call__(
        self,
        image: Any,
        class_name: str | int | None = None,
        method: Method = "gradcam",
        stage: int | None = None,
    ) -> Explanation:
        """Explain the answer to one image.

        Args:
            image: as `Classifier` takes it.
            class_name: the class to explain, by name or by index; by default the best one. The
                maps of `attention` and `rollout` do not depend on it.
            method: `gradcam`: the tokens before the last block of a stage, weighted by the gradient
                of the class's logit. `attention`: the attention of the class token, of every head
                and block. `rollout`: that attention, followed through the blocks of its stage.
            stage: counted from 1; by default the last one that has what the method needs: a class
                token, or a Grad-CAM that is not zero everywhere.

        Raises:
            ValueError: the model has no such class or stage, or the stage has no class token.
            TypeError: `image` or `class_name` is of another type.
            cvt.data.decoding.ImageError: the image cannot be decoded.
        """
        source = image_source(image)
        numbers = _stages(self.config, method, stage)
        wanted = None if class_name is None else _class_id(class_name, self.config)
        seen = self.read(source)
        pixels = torch.from_numpy(self.processor([seen])).to(self.device)
        with self.lock:
            if method == "gradcam":
                number, logits, grid = _last_grad_cam(self.model, pixels, numbers, wanted)
                maps = {"grid": grid}
            else:
                number = numbers[-1]
                logits, weights, grids = _attention(self.model, pixels, number)
                maps = (_class_token_row if method == "attention" else _rollout)(weights, *grids)
        answer = logits.cpu().numpy()
        class_id = int(ranked(answer)[0]) if wanted is None else wanted
        full = self.read_full(source)
        left, top, right, bottom = visible_box(self.processor, seen.size)
        box = (left * full.width, top * full.height, right * full.width, bottom * full.height)
        layers = _convolutions(self.config.stages[: number + 1], keys=method == "attention")
        rows, columns = _centres(layers, maps["grid"].shape, pixels.shape[2:], box)
        return Explanation(
            name=str(source),
            method=method,
            stage=number + 1,
            class_name=self.config.class_names[class_id],
            class_id=class_id,
            score=scores(answer, self.config)[class_id].item(),
            is_value=self.config.problem_type == "regression",
            image=full,
            box=box,
            rows=rows,
            columns=columns,
            **{name: each.cpu().numpy() for name, each in maps.items()},
        )


def write_explanations(
    explainer: Explainer,
    sources: Iterable[Any],
    folder: str | Path,
    class_name: str | int | None = None,
    method: Method = "gradcam",
    stage: int | None = None,
) -> Iterator[Explanation | ImageError]:
    """Explain images and write the pictures and arrays to a new folder, image by image.

    Each image gets `NAME.png`, enlarged if it is tiny, and `NAME.npz`; of the method `attention`
    also `NAME-heads.png`. Several images get `sheet.png`, of the first `ON_SHEET`.

    Args:
        explainer: of the model.
        sources: the images.
        folder: does not exist yet.
        class_name: as in `Explainer.__call__`.
        method: likewise.
        stage: likewise.

    Returns:
        An iterator of the explanations, and of the errors of images that cannot be decoded.

    Raises:
        ValueError: as by `Explainer.__call__`.
    """
    os.makedirs(folder)
    taken = {"sheet"}
    shown: list[Explanation] = []
    for source in sources:
        try:
            explanation = explainer(source, class_name, method, stage)
        except ImageError as error:
            yield error
            continue
        stem = Path(explanation.name).stem
        numbered = (f"{stem}-{number}" for number in count(2))
        name = next(name for name in chain([stem], numbered) if name not in taken)
        taken |= {name, f"{name}-heads"}
        file = Path(folder, name)
        is_tiny = max(explanation.image.size) < TINY
        (explanation.resized(2 * TINY) if is_tiny else explanation).save(f"{file}.png")
        explanation.save(f"{file}.npz")
        if method == "attention":
            explanation.heads().save(f"{file}-heads.png")
        if len(shown) < ON_SHEET:
            shown.append(explanation.resized(THUMBNAIL))
        yield explanation
    if len(shown) > 1:
        sheet(shown).save(Path(folder, "sheet.png"))


# ------------------------------------------------------------------------------ what is asked


def _resolved(model: Any) -> ModelSource | CvtForImageClassification:
    """The model, its name resolved once; an error if it has no gradients."""
    if isinstance(model, CvtForImageClassification):
        return model
    if not isinstance(model, str | os.PathLike | ModelSource):
        raise TypeError(
            f"model is of type {type(model).__name__}: give the name or the folder of a model, or "
            "a loaded cvt.CvtForImageClassification; of a fused model, the one that was fused"
        )
    source = model_source(model if isinstance(model, ModelSource) else os.fspath(model))
    if source.is_export:
        raise ValueError(
            f"{source.name} is an export, which has neither gradients nor attention weights: give "
            "the model that it was exported from"
        )
    return source


def _class_id(wanted: str | int, config: Architecture) -> int:
    if isinstance(wanted, str):
        return class_indices([wanted], config)[wanted]
    if isinstance(wanted, bool) or not isinstance(wanted, int):
        raise TypeError(f"class_name = {wanted!r}: must be the name of a class or its index")
    if not 0 <= wanted < len(config.class_names):
        raise ValueError(f"class_name = {wanted}: must be from 0 to {len(config.class_names) - 1}")
    return wanted


def _stages(config: Architecture, method: str, stage: int | None) -> list[int]:
    """The indices of the stages that may be explained, or of the one that is asked for.

    Raises:
        ValueError: there is no such method or stage, or the stage lacks what the method needs.
    """
    if method not in get_args(Method):
        raise ValueError(f"method = {method!r}: must be one of {', '.join(get_args(Method))}")
    count = len(config.stages)
    if stage is not None and (
        isinstance(stage, bool) or not isinstance(stage, int) or not 1 <= stage <= count
    ):
        raise ValueError(f"stage = {stage!r}: must be a whole number from 1 to {count}")
    usable = [
        i + 1 for i, each in enumerate(config.stages) if method == "gradcam" or each.cls_token
    ]
    if not usable:
        raise ValueError(
            f"method = {method}: it shows the attention of the class token, and this model, which "
            "averages all tokens, has none: use gradcam"
        )
    if stage is not None and stage not in usable:
        raise ValueError(
            f"stage = {stage}: method = {method} shows the attention of the class token, which "
            f"only stage {', '.join(map(str, usable))} has"
        )
    return [number - 1 for number in ([stage] if stage else usable)]


# ------------------------------------------------------------------------------ what is computed


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of a module, while this lasts."""
    kept: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        yield kept
    finally:
        hook.remove()


def _last_grad_cam(
    model: Any, pixels: Tensor, stages: list[int], class_id: int | None
) -> tuple[int, Tensor, Tensor]:
    """The last of the stages whose Grad-CAM is not zero, else the last, and its `_grad_cam`.

    In the last stage of a small model, the gradient of the logit is often the same at all tokens.
    """
    found = ((stage, *_grad_cam(model, pixels, stage, class_id)) for stage in reversed(stages))
    first = next(found)
    return next((each for each in chain([first], found) if each[2].any()), first)


def _grad_cam(
    model: Any, pixels: Tensor, stage: int, class_id: int | None
) -> tuple[Tensor, Tensor]:
    """The logits (K,) of one image, and the Grad-CAM (H, W) of a stage.

    The tokens are those that the last block normalises first: behind it, only the class token has
    a gradient.
    """
    layer = model.cvt.encoder.stages[stage].layers[-1].layernorm_before
    # The pixels have a gradient, so that the tokens have one where all weights are frozen.
    with torch.inference_mode(False), torch.enable_grad(), _outputs(layer) as kept:
        pixels = pixels.clone().requires_grad_()
        output = model(pixels, output_hidden_states=True, return_dict=True)
        logits = output.logits[0]
        chosen = logits[ranked(logits.detach())[0] if class_id is None else class_id]
        (gradient,) = torch.autograd.grad(chosen, kept[0])  # (1, N, C)
    grid = output.hidden_states[stage].shape[2:]
    _, tokens = split_tokens(kept[0].detach(), grid)  # (1, H·W, C)
    _, gradient = split_tokens(gradient, grid)
    weights = gradient.mean(dim=1, keepdim=True)  # (1, 1, C)
    return logits.detach().cpu(), (weights * tokens).sum(dim=2).relu().view(grid)


@torch.no_grad()
def _attention(model: Any, pixels: Tensor, stage: int) -> tuple[Tensor, Tensor, tuple[Any, Any]]:
    """The logits (K,) of one image, the attention (blocks, h, N, N') of a stage, and its grids.

    The grids are that of the tokens and that of the keys, of which there are fewer with a stride.
    """
    layer = model.cvt.encoder.stages[stage].layers[-1].attention.attention
    with _outputs(layer.convolution_projection_key.convolution_projection) as kept:
        output = model(pixels, output_attentions=True, output_hidden_states=True, return_dict=True)
    first = sum(model.config.depth[:stage])
    blocks = output.attentions[first : first + model.config.depth[stage]]
    grids = output.hidden_states[stage].shape[2:], kept[0].shape[2:]
    return output.logits[0].cpu(), torch.cat(blocks), grids


def _class_token_row(weights: Tensor, tokens: torch.Size, keys: torch.Size) -> dict[str, Tensor]:
    """What the class token attends to, of every block and head, and the mean of these."""
    row = weights[:, :, 0]  # (blocks, h, 1 + H'·W')
    attention = row[:, :, 1:].unflatten(2, keys)
    return {"grid": attention.mean(dim=(0, 1)), "attention": attention, "class_token": row[:, :, 0]}


def _rollout(weights: Tensor, tokens: torch.Size, keys: torch.Size) -> dict[str, Tensor]:
    """The attention of the class token to the tokens that enter a stage, through all its blocks.

    Where there are fewer keys than tokens, the attention to keys is a density over the image: it is
    interpolated at the tokens, and scaled to the sum that it had.
    """
    if keys != tokens:
        stride = [round(t / k) for t, k in zip(tokens, keys, strict=True)]
        rows, columns = (
            torch.from_numpy(interpolation(step * np.arange(k), np.arange(t))).to(weights)
            for t, k, step in zip(tokens, keys, stride, strict=True)
        )
        to_class, to_keys = weights.split((1, weights.shape[3] - 1), dim=3)
        dense = rows @ to_keys.unflatten(3, keys) @ columns.T  # (blocks, h, N, H, W)
        dense = dense.flatten(3)
        dense = dense * (to_keys.sum(3, keepdim=True) / dense.sum(3, keepdim=True))
        weights = torch.cat((to_class, dense), dim=3)
    identity = torch.eye(weights.shape[2]).to(weights)
    rollout = identity
    for block in weights.mean(dim=1):  # (N, N): the mean of the heads
        rollout = (block + identity) / 2 @ rollout  # the residual path counts as much as the block
    return {"grid": rollout[0, 1:].view(tokens)}


# ------------------------------------------------------------------------------ where that lies


def _convolutions(stages: Sequence[StageConfig], keys: bool) -> list[tuple[int, int, int]]:
    """Kernel, stride and padding of the convolutions up to the tokens, or the keys, of a stage."""
    layers = [(each.patch_sizes, each.patch_stride, each.patch_padding) for each in stages]
    last = stages[-1]
    if keys and last.projection_methods["key"] != "linear":
        layers.append((last.kernel_qkv, last.stride_kv, last.padding_kv))
    return layers


def _centres(
    layers: Sequence[tuple[int, int, int]],
    grid: tuple[int, ...],
    size: tuple[int, ...],
    box: tuple[float, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """Where the centres of a grid's receptive fields lie in the picture: rows and columns.

    The paddings move them: of stage 3 of cvt-13 by 6.5 of the model's pixels against an even
    division of the image.

    Args:
        layers: kernel, stride and padding of the convolutions before it.
        grid: its height and width.
        size: height and width of the model's pixels.
        box: left, top, right and bottom of these in the picture.
    """
    step, offset = 1.0, 0.5
    for kernel, stride, padding in layers:
        offset += step * ((kernel - 1) / 2 - padding)
        step *= stride
    left, top, right, bottom = box
    rows, columns = (
        start + (offset + step * np.arange(count)) * (end - start) / pixels
        for count, pixels, start, end in zip(grid, size, (top, left), (bottom, right), strict=True)
    )
    return rows, columns
