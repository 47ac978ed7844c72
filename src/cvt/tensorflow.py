"""TensorFlow and PyTorch in one process."""

import sys
from importlib.util import find_spec


def keep_triton_apart() -> None:
    """Call this before TensorFlow is imported.

    TensorFlow and PyTorch's Triton each bring an LLVM; Triton's, when it comes second, ends the
    process ("Option ... registered more than once"). So it is loaded first, and kept from being
    loaded if TensorFlow is here already: PyTorch then does without.
    """
    if "triton" in sys.modules:
        return
    if "tensorflow" in sys.modules:
        sys.modules["triton"] = None  # type: ignore[assignment]  # what Python takes for missing
    elif find_spec("triton"):
        import triton  # noqa: F401
