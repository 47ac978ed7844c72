"""One interface over what runs a classifier: pixels in, logits and features out."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvt.libraries import is_installed
from cvt.limits import check_counts
from cvt.runtime.features import FeatureSettings as FeatureSettings

if TYPE_CHECKING:
    from cvt.checkpoints import ModelSource
    from cvt.modeling import CvtForImageClassification
    from cvt.runtime.base import Runtime

RUNTIMES = ("torch", "fused", "compiled", "onnxruntime", "openvino")
OF_EXPORTS = ("tensorflow", "litert")  # these run exports, and no models
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
LIBRARIES = {
    "onnxruntime": ("onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "tensorflow": ("tensorflow",),
    "litert": ("ai_edge_litert",),
}


def available(runtime: str) -> bool:
    """Whether what a runtime needs is installed; imports nothing.

    Example:
        >>> from cvt.runtime import available
        >>> available("fused")
        True
    """
    return is_installed(*LIBRARIES.get(runtime, ()))


def is_classifier(model: Any) -> bool:
    """Whether it is a loaded classifier; who has one has imported its module, others need not."""
    modeling = sys.modules.get("cvt.modeling")
    return modeling is not None and isinstance(model, modeling.CvtForImageClassification)


def open_runtime(
    source: "str | Path | ModelSource | CvtForImageClassification",
    runtime: str = "auto",
    precision: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    *,
    images: int | None = None,
    verify: bool = True,
    features: FeatureSettings | None = None,
) -> "Runtime":
    """Make a classifier ready to run.

    Args:
        source: a published name, USER/NAME or USER/NAME@REVISION of the hub, a model folder, an
            authors' file, an exported folder, or what `model_source` returned for one of them; or
            a loaded classifier, which is put in eval mode and otherwise left as it is.
        runtime: one of `RUNTIMES`, of an export one of `OF_EXPORTS`, too, or `auto`: of an export
            its own; of a model the fastest that is installed and computes in `precision`, which is
            `fused` on a GPU, `openvino` on a CPU, and `fused` there where OpenVINO does not compute
            in it, or where there are too few images for what it takes to convert the model.
        precision: one of `PRECISIONS`; by default an export's own, and fp32 for a model.
        device: `cpu`, or another of torch's, as `cuda:1`; `auto` is a CUDA device where there is
            one that the runtime can use.
        threads: that compute on a CPU; for PyTorch and TensorFlow a setting of the whole process,
            which TensorFlow takes only before it has computed anything.
        images: how many are to be classified, where that is known: `auto` converts a model for
            many only.
        verify: compare the files of an export or a model folder with the SHA-256 that were written
            with them; reading takes about a second for each GB.
        features: compute them in the same pass; the last stage's beside the logits, an earlier
            stage's in their place. An export has those that it was written with, asked or not.

    Raises:
        TypeError: an argument is of a wrong type; names it.
        FileNotFoundError: `source` names no model.
        ValueError: an argument is illegal, or the runtime cannot do what is asked; weights are
            offloaded, or pointers of git-lfs.
        ImportError: the runtime is not installed; names what to install.

    Example:
        >>> import cvt, torch
        >>> from cvt.runtime import open_runtime
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> runtime = open_runtime(cvt.CvtForImageClassification(config), "fused", threads=1)
        >>> runtime.describe
        'fused fp32 on cpu, 1 thread'
        >>> runtime(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """
    from cvt.checkpoints import ModelSource, model_source
    from cvt.runtime.factory import open_export, open_model

    for name, value, choices in (
        ("runtime", runtime, ("auto", *RUNTIMES, *OF_EXPORTS)),
        ("precision", precision, (None, *PRECISIONS)),
    ):
        if value not in choices:
            raise ValueError(
                f"{name} = {value!r}: must be one of {', '.join(filter(None, choices))}"
            )
    if threads is not None:
        check_counts(threads=threads)
    if features is not None and not isinstance(features, FeatureSettings):
        raise TypeError(f"features is of type {type(features).__name__}: must be FeatureSettings")
    given: Any = source
    opened = given if is_classifier(given) else model_source(given)
    if isinstance(opened, ModelSource) and opened.is_export:
        how = (runtime, precision, device, threads)
        return open_export(opened.path, *how, verify, features)
    chosen = (runtime, precision or "fp32", device, threads)
    return open_model(opened, *chosen, images=images, verify=verify, features=features)
