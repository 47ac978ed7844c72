"""Triton's kernels in a process of their own: on a GPU, or in Triton's interpreter without one."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported
