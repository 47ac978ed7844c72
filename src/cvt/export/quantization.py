"""Weights and activations in 8 bits, by nncf: ranges from real images, accuracy from others."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from itertools import chain, repeat
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cvt.data.decoding import decode
from cvt.data.preprocessing import preprocessing_of
from cvt.inference.predict import find_images
from cvt.libraries import quiet

Graph = TypeVar("Graph")  # of ONNX or of OpenVINO
LARGEST_BATCH = 32


def two_splits(folder: Path, most: int) -> tuple[list[Path], list[Path]]:
    """Images to calibrate with and others to check with, taken in turns from the whole folder.

    Args:
        folder: with images in it or below it.
        most: of each.

    Raises:
        FileNotFoundError: there are no images.
        ValueError: there is only one.
    """
    found = list(find_images([folder]))
    if len(found) < 2:
        raise ValueError(f"{folder} has a single image; some calibrate int8, and others check it")
    count = min(len(found), 2 * most)
    chosen = [found[i * len(found) // count] for i in range(count)]
    return chosen[::2], chosen[1::2]


def quantized(graph: Graph, images: Sequence[Path], processor: Any) -> Graph:
    """The graph in int8.

    Products of matrices and convolutions are computed in int8, softmax and norms are not. Of nncf
    3.4's defaults two are not for this network: smoothing outliers away (SmoothQuant) leaves a
    trained model with a third of its answers, and a scale for each channel of an activation is
    one for each token here, which holds for a single size of images.

    Args:
        graph: for ONNX or OpenVINO, in fp32; takes `pixel_values`.
        images: to calibrate with.
        processor: the model's.

    Raises:
        ImageError: an image cannot be decoded.
    """
    import nncf  # before its logger exists: it brings a logger class of its own
    from nncf.quantization.advanced_parameters import QuantizationParameters

    def inputs(path: Path) -> dict[str, Any]:
        return {"pixel_values": preprocessed([path], processor)}

    with quiet("nncf"), redirect_stdout(sys.stderr):  # its progress is no output
        settings = nncf.AdvancedQuantizationParameters(
            activations_quantization_params=QuantizationParameters(per_channel=False),
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1),
        )
        return nncf.quantize(
            graph,
            nncf.Dataset(images, inputs),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(images),
            advanced_parameters=settings,
        )


def real_batches(
    images: Sequence[Path], processor: Any, shapes: Sequence[tuple[int, int, int]]
) -> Iterator[Tensor]:
    """Pixels, (B, C, H, W), of all images, each once: in these shapes first, then in large batches.

    Args:
        images: to check with.
        processor: the model's.
        shapes: number, height and width of the images of a batch; they are resized from what the
            processor computes from them.
    """
    remaining = list(images)
    for B, *size in chain(shapes, repeat((LARGEST_BATCH, *shapes[0][1:]))):
        if not remaining:
            return
        batch, remaining = remaining[:B], remaining[B:]
        pixels = torch.from_numpy(preprocessed(batch, processor))
        resized = pixels.shape[2:] != torch.Size(size)
        yield F.interpolate(pixels, size, mode="bilinear") if resized else pixels


def preprocessed(images: Sequence[Path], processor: Any) -> np.ndarray:
    """Pixels, (B, C, H, W), of images.

    Raises:
        ImageError: an image cannot be decoded.
    """
    return preprocessing_of(processor)([decode(image) for image in images])
