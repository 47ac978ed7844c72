"""Faster training, or training in less memory, applied to a model from outside, as `cvt.fuse` is.

Each function changes a model in place and gives the same outputs and gradients; none leaves a trace
in a state dict or a saved config.
"""

from cvt.kernels.cpu_bf16 import apply_cpu_bf16
from cvt.kernels.qkv_projection import apply_triton
from cvt.kernels.recompute import recompute_activations

__all__ = ["apply_cpu_bf16", "apply_triton", "recompute_activations"]
