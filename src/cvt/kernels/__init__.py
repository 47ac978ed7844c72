"""Operators of the model that PyTorch has not, or has slower."""

from cvt.kernels.operators import (
    BatchNorm,
    DepthwiseConv,
    QuickGELU,
    autocast,
    chunked_attention,
    chunks_pay,
    mlp,
    with_dense_gradient,
)
from cvt.kernels.projection import (
    Part,
    convolve,
    parts_of,
    project,
    projections,
    projections_as,
    runs_on,
    set_projections,
)
from cvt.kernels.torch_projection import taps_of

__all__ = [
    "BatchNorm",
    "DepthwiseConv",
    "Part",
    "QuickGELU",
    "autocast",
    "chunked_attention",
    "chunks_pay",
    "convolve",
    "mlp",
    "parts_of",
    "project",
    "projections",
    "projections_as",
    "runs_on",
    "set_projections",
    "taps_of",
    "with_dense_gradient",
]
