"""Triton's kernels in a process of their own: on a GPU, or in Triton's interpreter without one."""

import os

import torch

torch.backends.cudnn.allow_tf32 = False  # of the convolutions that are compared with
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported
