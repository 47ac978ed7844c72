"""Operators of the model that PyTorch has not, or has slower."""

from cvt.kernels.operators import (
    GELU,
    BatchNorm,
    DepthwiseConv,
    QuickGELU,
    autocast,
    channels_last,
    chunked_attention,
    chunks_pay,
    is_captured,
    linear,
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
    "GELU",
    "BatchNorm",
    "DepthwiseConv",
    "Part",
    "QuickGELU",
    "autocast",
    "channels_last",
    "chunked_attention",
    "chunks_pay",
    "convolve",
    "is_captured",
    "linear",
    "parts_of",
    "project",
    "projections",
    "projections_as",
    "runs_on",
    "set_projections",
    "taps_of",
    "with_dense_gradient",
]
