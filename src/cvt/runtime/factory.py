"""From a model or an export to a runtime: what `cvt.runtime.open_runtime` does."""

import logging
import os
import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cvt.architecture import ClassifierConfig
from cvt.checkpoints import ModelSource, load_preprocessing
from cvt.data.processor_settings import IMAGE_SIZE, read_settings
from cvt.files import check_checksums, pointer_fault
from cvt.libraries import is_installed, require
from cvt.runtime import OF_EXPORTS, available
from cvt.runtime.base import Runtime
from cvt.runtime.cache import GraphCache
from cvt.runtime.features import FEATURES, FeatureSettings
from cvt.runtime.manifest import FORMATS, Manifest
from cvt.runtime.onnx_runtime import OnnxRuntime
from cvt.runtime.openvino_runtime import OpenVinoRuntime, computes, demand

if TYPE_CHECKING:
    from cvt.modeling import CvtForImageClassification
    from cvt.runtime.fused import FusedCvt

logger = logging.getLogger(__name__)
# The files of a GPU on Linux: of NVIDIA, of Windows below it, of AMD.
DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
ON_A_CPU = ("openvino", *OF_EXPORTS)  # these compute nowhere else
# Images from which on it pays to convert a model for OpenVINO. For cvt-13 on two cores that took 11
# seconds longer than to fuse it, and an image, of batches of 32, then 3 ms less in fp32 and 7 ms in
# bf16 (docs/en/inference.md): the gain begins at 3700 and at 1600 images.
MANY_IMAGES = 2000


def open_model(
    source: "ModelSource | CvtForImageClassification",
    runtime: str,
    precision: str,
    device: str,
    threads: int | None,
    images: int | None = None,
    verify: bool = True,
    features: FeatureSettings | None = None,
) -> Runtime:
    """A runtime of a model that is loaded, or to be loaded."""
    if precision == "int8":
        raise ValueError(
            "precision = int8: is for exports; `cvt export` writes one, with --precision int8"
        )
    if runtime in OF_EXPORTS:
        (form,) = (form for form, own in FORMATS.items() if own == runtime)
        raise ValueError(
            f"runtime = {runtime}: is for exports; `cvt export` writes one, with --to {form}"
        )
    device = _device(device, runtime)
    named = source if isinstance(source, ModelSource) else None
    may_be_kept = named and runtime in ("auto", "openvino") and device == "cpu"
    kept = _kept(named, features) if named and may_be_kept else None
    if runtime == "auto":
        runtime = fastest(device, precision, images, is_converted=bool(kept and kept.is_ready))
    if runtime == "openvino" and named and kept:
        if verify:
            check_checksums(named.path)
        fused = cache(partial(_fused, named, "fp32", verify))
        if not kept.is_ready:  # it will be converted: what is wrong with it is reported now
            fused()
        converted = (kept.graphs, precision, threads, features)
        return OpenVinoRuntime.from_source(kept.config, fused, *converted)
    from cvt.runtime import torch_runtime

    how = (precision, device, threads)
    if runtime == "fused" and named:
        return torch_runtime.FusedRuntime(_fused(named, precision, verify), *how, features)
    from cvt.checkpoints import load_classifier

    model: Any = load_classifier(named, verify=verify) if named else source
    torch_runtime.refuse_offloaded(model)
    model.eval()
    if runtime == "openvino":
        return OpenVinoRuntime.from_model(model, precision, threads, features)
    if runtime == "onnxruntime":
        return OnnxRuntime.from_model(model, *how, features)
    if runtime == "fused":
        return torch_runtime.FusedRuntime(model, *how, features)
    if runtime == "compiled":
        return torch_runtime.CompiledRuntime(model, *how, features)
    is_copied = named is None
    return torch_runtime.TorchRuntime.from_model(model, *how, is_copied, features)


class _Kept(NamedTuple):
    """The converted graphs of a model folder.

    Attributes:
        config: the model's.
        graphs: those of all sizes of images.
        is_ready: whether there is one for the size that the preprocessing is set for.
    """

    config: ClassifierConfig
    graphs: GraphCache
    is_ready: bool


def _kept(source: ModelSource, features: FeatureSettings | None) -> _Kept | None:
    """The converted graphs of a model; None if it is no plain folder, or there is no OpenVINO."""
    if source.kind != "folder" or not source.has_weights or not available("openvino"):
        return None
    try:
        config = ClassifierConfig.from_file(source.path / "config.json")
        side = _image_size(source, config)
    except (OSError, ValueError):  # loading the model raises it again
        return None
    graphs = GraphCache(source, features and features.of(config))
    is_ready = side is not None and graphs.find((side, side)) is not None
    return _Kept(config, graphs, is_ready)


def _image_size(source: ModelSource, config: ClassifierConfig) -> int | None:
    """Height and width, in pixels, that a folder is preprocessed for; None if not by CvT's own."""
    if read_settings(source.path) is None:  # of which whoever opens the preprocessing is warned
        return IMAGE_SIZE
    return getattr(load_preprocessing(source, config), "image_size", None)


def _fused(source: ModelSource, precision: str, verify: bool) -> "FusedCvt":
    """The fused form of a classifier, on the CPU; without transformers where that can be."""
    from cvt.checkpoints.plain import read_plain
    from cvt.runtime.fused import FusedCvt, fuse
    from cvt.runtime.torch_runtime import DTYPES

    if plain := read_plain(source, verify):
        return FusedCvt(*plain, DTYPES[precision])
    from cvt.checkpoints import load_classifier

    return fuse(load_classifier(source, verify=verify).eval(), DTYPES[precision])


def open_export(
    folder: Path,
    runtime: str,
    precision: str | None,
    device: str,
    threads: int | None,
    verify: bool = True,
    features: FeatureSettings | None = None,
) -> Runtime:
    """The runtime of an exported folder; it computes the features that the export has."""
    manifest = Manifest.read(folder)
    own = FORMATS[manifest.format]
    if runtime not in ("auto", own):
        raise ValueError(f"runtime = {runtime}: {folder} is an export for {own}")
    if precision not in (None, manifest.precision):
        if own != "openvino" or manifest.precision != "fp32" or precision == "int8":
            raise ValueError(
                f"precision = {precision}: {folder} is an export in {manifest.precision}"
            )
        demand(precision)  # OpenVINO computes a graph of full precision in a lower one, too
    device = _device(device, own)
    if verify:
        manifest.verify(folder)
    config = ClassifierConfig.from_file(folder / "config.json")
    size = None if "size" in manifest.dynamic else manifest.image_size
    own_features = FeatureSettings() if FEATURES in manifest.outputs else None
    if features and not own_features:
        raise ValueError(
            f"{folder} is an export without features: write one with `cvt export --features`, or "
            "name the model itself"
        )
    if features and own_features and features.of(config) != own_features.of(config):
        raise ValueError(
            f"{folder} has the features of the last stage alone, by its own pooling: name the "
            "model itself for others"
        )
    rest: Any = (threads, size, "batch" not in manifest.dynamic, own_features)
    graph, precision = folder / manifest.file, precision or manifest.precision
    for file in sorted([*folder.glob(f"{graph.stem}.*"), *graph.rglob("*")]):  # model.bin, too
        if fault := pointer_fault(file):
            raise ValueError(fault)
    if own == "openvino":
        return OpenVinoRuntime.from_file(graph, config, precision, *rest)
    if own == "onnxruntime":
        return OnnxRuntime(graph, config, precision, device, *rest)
    if own == "tensorflow":
        from cvt.runtime.saved_model_runtime import SavedModelRuntime

        return SavedModelRuntime(graph, config, precision, *rest)
    if own == "litert":
        from cvt.runtime.litert_runtime import LiteRtRuntime

        return LiteRtRuntime(graph, config, precision, *rest)
    from cvt.runtime.exported_runtime import ExportedRuntime

    return ExportedRuntime(graph, config, precision, device, *rest)


def fastest(
    device: str, precision: str, images: int | None = None, *, is_converted: bool = False
) -> str:
    """The installed runtime that is through with images first, on a device and in a precision.

    Args:
        device: its name in torch.
        precision: to compute in.
        images: how many there are, where that is known.
        is_converted: whether the model was converted for OpenVINO earlier, and that was kept.
    """
    if device != "cpu" or precision == "fp16":
        chosen, reason = "fused", f"it is the fastest on {device} in {precision}"
    elif not available("openvino"):
        chosen, reason = "fused", "openvino is not installed"
    elif not computes(precision):
        chosen, reason = "fused", f"OpenVINO does not compute in {precision} on this processor"
    elif is_converted:
        chosen, reason = "openvino", "the model was converted earlier"
    elif images is not None and images >= MANY_IMAGES:
        chosen, reason = "openvino", f"with {images} images, conversion saves time"
    else:
        number = "an unknown number of" if images is None else images
        reason = f"{number} images; conversion saves time from {MANY_IMAGES} on"
        chosen = "fused"
    logger.info("runtime auto takes %s: %s", chosen, reason)
    return chosen


def check_device(device: str) -> None:
    """Make sure that there is a device: `auto`, or one of torch's.

    Raises:
        TypeError: it is no string.
        ValueError: there is none of that name.
    """
    if not isinstance(device, str):
        raise TypeError(
            f"device is of type {type(device).__name__}: must be a string, such as cpu or cuda:1"
        )
    if device in ("auto", "cpu"):  # there always; PyTorch is imported for the others alone
        return
    require(f"device = {device}", "torch", extra="train")
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device = {device!r}: {str(error).splitlines()[0]}") from error


def has_cuda() -> bool:
    """Whether PyTorch has a CUDA device; it is not imported where no driver has one."""
    if sys.platform == "linux" and not any(map(os.path.exists, DRIVERS)):
        return False
    if not is_installed("torch"):
        return False
    import torch

    return torch.cuda.is_available()


def _device(device: str, runtime: str) -> str:
    """The name of the device that is to be used.

    Raises:
        TypeError: it is no string.
        ValueError: there is none of that name, or the runtime cannot use it.
    """
    if device == "auto":
        usable = runtime not in (*ON_A_CPU, "onnxruntime")  # on a GPU, nobody has run that one yet
        return "cuda" if usable and has_cuda() else "cpu"
    if runtime in ON_A_CPU and device != "cpu":
        raise ValueError(f"device = {device}: the runtime {runtime} computes on a CPU")
    check_device(device)
    return device
