"""TensorFlow and PyTorch in one process."""

from cvt.libraries import keep_triton_apart

keep_triton_apart()  # before any test imports TensorFlow
