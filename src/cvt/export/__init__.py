"""Exports: a classifier as a folder that other software runs, checked as it is written.

| format | its file | precisions |
|---|---|---|
| onnx | `model.onnx` | fp32, fp16, int8 |
| openvino | `model.xml`, `model.bin` | fp32, int8; bf16 and fp16: weights in 16 bits, and arithmetic where the processor has it |
| torch-export | `model.pt2` | fp32, bf16, fp16 (slow on a CPU) |
| saved-model | the folder `model` | fp32 |
| litert | `model.tflite` | fp32; fp16: weights in 16 bits; int8: weights in 8 bits, activations rounded as they come |
| web | `model.onnx`, and a page that runs it in the visitor's browser | fp32, fp16, int8 |

Beside it lie `config.json` (with the labels), `preprocessor_config.json`, and `export.json`, which records how it was
checked, and for saved-model and litert `labels.txt`; `cvt.runtime.open_runtime` takes the folder. `model.pt2` holds tensors, JSON,
and the example that the graph was traced with, which needs no more than `weights_only` to read. `open_runtime` refuses a
`model.pt2` or a SavedModel that holds anything but weights and arithmetic.
"""  # noqa: E501

import io
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cvt.checkpoints import image_size_of, load_classifier, load_processor, model_source
from cvt.export.parity import (
    Check,
    LoadedProgram,
    compare,
    features_difference,
    random_batches,
    shapes,
)
from cvt.export.quantization import quantized, real_batches, two_splits
from cvt.export.tensorflow import (
    demand_backend,
    write_labels,
    write_litert,
    write_saved_model,
)
from cvt.export.web import LANGUAGES, check_page, runtime_folder, write_page
from cvt.files import check_folder_name, check_path, staged, sums_of
from cvt.libraries import require, version_of
from cvt.modeling import CvtForImageClassification
from cvt.problem_type import REGRESSION
from cvt.runtime import PRECISIONS, open_runtime
from cvt.runtime.capture import onnx_graph, openvino_graph, torch_graph
from cvt.runtime.features import FeatureSettings, output_names
from cvt.runtime.fused import fuse
from cvt.runtime.manifest import DYNAMIC, FORMATS, NAME, Manifest
from cvt.runtime.torch_runtime import DTYPES

FILES = {
    "onnx": "model.onnx",
    "openvino": "model.xml",
    "torch-export": "model.pt2",
    "saved-model": "model",
    "litert": "model.tflite",
    "web": "model.onnx",
}
LIBRARIES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "torch-export": (),
    "saved-model": ("keras", "tensorflow"),
    "litert": ("keras", "tensorflow", "ai_edge_litert"),
    "web": ("onnx", "onnxscript", "onnxruntime"),
}
BY_KERAS = ("saved-model", "litert")
INSTEAD = {
    ("onnx", "bf16"): "ONNX Runtime has no bf16 convolution on a CPU; use fp16, or openvino",
    ("web", "bf16"): "browsers have no bf16; use fp16",
    ("saved-model", "bf16"): "a SavedModel is in fp32; use openvino or torch-export",
    ("saved-model", "fp16"): "a SavedModel is in fp32; use litert, onnx or openvino",
    ("litert", "bf16"): "LiteRT has no weights in bf16; use fp16, or openvino",
} | {
    (to, "int8"): "int8 exists for openvino, onnx and litert; use one of them"
    for to in ("torch-export", "saved-model")
}


def export(
    source: str | Path,
    output: str | Path,
    to: str,
    *,
    precision: str = "fp32",
    dynamic: Collection[str] = ("batch",),
    image_size: int | None = None,
    features: bool = False,
    calibration: str | Path | None = None,
    min_agreement: float = 0.99,
    calibration_images: int = 300,
    language: str = "en",
    runtime_files: str | Path | None = None,
    verify: bool = True,
    overwrite: bool = False,
    progress: Callable[[str], object] = lambda step: None,
) -> Manifest:
    """Export a classifier to a folder, run the result and compare it with the torch model.

    Several batch sizes are compared and, where the size is dynamic, several resolutions. In fp32
    logits differ by at most 1e-4 (1e-5 of logits above 10), in bf16 by 5 % of the largest, in fp16
    by 1 %, and every image gets the same class; where the scores of classes are independent, the
    same set of classes that reach their thresholds. In int8 the classes of images that were not
    used for calibration are compared, and at other resolutions than the preprocessing's only
    reported.
    Features are compared as logits are; in int8 their difference is only reported.

    Args:
        source: a published name, a model folder or an authors' .pth file.
        output: the folder to write.
        to: a key of `FILES`; see the table above.
        precision: `fp32`, `bf16`, `fp16` or `int8`.
        dynamic: what may differ from call to call: `batch`, `size`, both or neither.
        image_size: height and width, in pixels, that the graph and the preprocessing are set
            for; the source's by default.
        features: the graph has a second output, `features`, (B, C): what the classifier's Linear
            receives.
        calibration: for int8, a folder with images of the kind that the model is for. LiteRT needs
            none to calibrate with, and is checked with them alone.
        min_agreement: for int8, the share of images, from 0 to 1, that must get the same class.
        calibration_images: from that folder at most, and as many others to check with.
        language: of the page of `web`: `en` or `zh`; the visitor can change it.
        runtime_files: for `web`, a folder with the unpacked npm package of ONNX Runtime Web; by
            default npm fetches it once, into the user's cache.
        verify: compare the source with its `checksums.json`, where it has one.
        overwrite: replace files in `output`.
        progress: called with a description of every step.

    Returns:
        What was written into export.json.

    Raises:
        ValueError: an argument is illegal, or the export fails a check. Nothing is written.
        ImageError: a calibration image cannot be decoded. Nothing is written.
        FileExistsError: `output` exists and may not be overwritten.
        FileNotFoundError: `source` is no model, the calibration folder has no images, or the files
            of ONNX Runtime Web cannot be had.
        ImportError: a library is missing; names what to install.

    Example:
        >>> import cvt
        >>> from cvt.export import export
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", depth=[1, 1, 1])
        >>> cvt.CvtForImageClassification(config).save_pretrained("digits-model")
        >>> _ = cvt.image_processor(config, 16).save_pretrained("digits-model")
        >>> export("digits-model", "exported", "torch-export").file
        'model.pt2'
        >>> cvt.Classifier("exported").runtime.name
        'torch'
    """
    _check_arguments(to, precision, dynamic, calibration, min_agreement, language)
    libraries = LIBRARIES[to] + (("nncf",) if precision == "int8" and to not in BY_KERAS else ())
    extra = "tensorflow" if to in BY_KERAS else "export"
    require(f"an export to {to} in {precision}", *libraries, extra=extra)
    check_path(source, "source")
    check_folder_name(output)
    if Path(output).resolve() == Path(source).resolve():
        raise ValueError(f"{output} is the model itself; export to another folder")
    with staged(output, overwrite=overwrite) as folder:
        if to in BY_KERAS:
            demand_backend(to)
        runtime = runtime_folder(runtime_files, progress) if to == "web" else None
        calibrating, held_out = (
            ([], []) if calibration is None else two_splits(Path(calibration), calibration_images)
        )
        progress(f"loading {source}")
        named = model_source(source)
        model = load_classifier(named, verify=verify).float().eval()
        if precision == "int8" and model.config.problem_type == REGRESSION:
            raise ValueError(
                "precision = int8: an int8 export is accepted by the classes that images get, and "
                "a regression has none"
            )
        processor = load_processor(named, model.config, image_size)
        preprocessing = check_page(model, processor) if to == "web" else None
        size = (image_size_of(processor),) * 2
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
        beside = FeatureSettings() if features else None
        if beside and not model.config.num_labels:
            raise ValueError(
                "features: the model has no classes, and its features are the output `logits`"
            )
        progress(f"converting to {to} in {precision}")
        _write_graph(
            *(model, folder / FILES[to], to, precision, size, dynamic, calibrating, processor),
            beside,
        )
        manifest = Manifest(
            format=to,
            precision=precision,
            file=FILES[to],
            image_size=size,
            dynamic=tuple(name for name in DYNAMIC if name in dynamic),
            versions={name: str(version_of(name)) for name in ("cvt-vision", "torch", *libraries)},
            parity={},
            outputs=output_names(model.config, beside),
        )
        manifest.write(folder)
        progress("comparing with the torch model")
        parity = _parity(model, processor, folder, manifest, held_out, output)
        if (found := parity.pop("agreement")) < min_agreement:
            raise ValueError(
                f"{output} was not written: of {parity['images']} images that were not used for "
                f"calibration {found:.2%} get the class that they get in fp32, where "
                f"{min_agreement:.2%} is required; bf16 is more accurate than int8"
            )
        manifest = replace(
            manifest,
            parity=parity,
            agreement=found if precision == "int8" else None,
            files=sums_of(folder, [path.name for path in folder.iterdir() if path.name != NAME]),
        )
        manifest.write(folder)
        if preprocessing and runtime:
            write_page(folder, source, model, preprocessing, manifest, language, runtime)
    return manifest


def _parity(
    model: CvtForImageClassification,
    processor: Any,
    folder: Path,
    manifest: Manifest,
    held_out: Sequence[Path],
    output: str | Path,
) -> dict[str, Any]:
    """How an export compares with the model, over batch sizes and resolutions.

    Raises:
        ValueError: they differ by more than is accepted.
    """
    size = manifest.image_size
    smallest = model.config.minimum_image_size if "size" in manifest.dynamic else None
    batches = shapes(size, smallest)
    pixels = (
        real_batches(held_out, processor, batches)
        if manifest.precision == "int8"
        else random_batches(model.config.num_channels, batches)
    )
    runtime = open_runtime(folder, device="cpu")
    if manifest.format == "torch-export":  # its graph as it is; others load what may refuse a size
        runtime = LoadedProgram(folder / manifest.file, runtime)
    checks: list[Check] = []
    of_features: dict[str, float] = {}
    for batch in pixels:
        checks.append(check := compare(model, runtime, batch))
        if not check.passed:
            raise ValueError(f"{output} was not written: {check}")
        if runtime.feature_settings:
            difference, passed = features_difference(model, runtime, batch)
            if not passed:
                raise ValueError(
                    f"{output} was not written: its features differ from the torch model's by "
                    f"{difference:.3g}"
                )
            largest = max(difference, of_features.get("features_difference", 0.0))
            of_features["features_difference"] = largest
    at_size = [check for check in checks if (check.height, check.width) == size]
    images = sum(check.images for check in at_size)
    return {
        "images": images,
        "largest_difference": max(check.difference for check in checks),
        **of_features,
        "checks": [asdict(check) for check in checks],
        "agreement": sum(check.same_class for check in at_size) / images,
    }


def _check_arguments(
    to: str,
    precision: str,
    dynamic: Collection[str],
    calibration: str | Path | None,
    min_agreement: float,
    language: str,
) -> None:
    for name, value, choices in (
        ("to", to, FORMATS),
        ("precision", precision, PRECISIONS),
        ("language", language, LANGUAGES),
    ):
        if value not in choices:
            raise ValueError(f"{name} = {value!r}: must be one of {', '.join(choices)}")
    if (to, precision) in INSTEAD:
        raise ValueError(f"precision = {precision}, to = {to}: {INSTEAD[to, precision]}")
    if not set(dynamic) <= set(DYNAMIC):
        raise ValueError(f"dynamic = {dynamic!r}: may hold {' and '.join(DYNAMIC)}")
    if not 0 <= min_agreement <= 1:
        raise ValueError(f"min_agreement = {min_agreement}: must be a share from 0 to 1")
    if (precision == "int8") != (calibration is not None):
        raise ValueError(
            "calibration: a folder of images of the kind that the model is for is needed in int8"
            + ("" if precision == "int8" else f", and has no use in {precision}")
        )


def _write_graph(
    model: CvtForImageClassification,
    file: Path,
    to: str,
    precision: str,
    size: tuple[int, int],
    dynamic: Collection[str],
    calibrating: Sequence[Path],
    processor: Any,
    features: FeatureSettings | None,
) -> None:
    names = output_names(model.config, features)
    if to in BY_KERAS:
        write_labels(model.config.class_names, file.with_name("labels.txt"))
        if to == "saved-model":
            write_saved_model(model, file, size, dynamic, names)
        else:
            write_litert(model, file, precision, size, dynamic, names)
        return
    # OpenVINO itself computes a graph of fp32 in the precision that the caller chooses.
    dtype = torch.float32 if to == "openvino" else DTYPES.get(precision, torch.float32)
    program = torch_graph(fuse(model, dtype), size, dynamic, features)
    classes = json.dumps(model.config.class_names)
    if to == "torch-export":
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        archive = io.BytesIO()  # given a path on a full disk, PyTorch aborts the process
        torch.export.save(program, archive)
        file.write_bytes(archive.getbuffer())
    elif to in ("onnx", "web"):
        import onnx

        graph = onnx_graph(program, names)
        if precision == "int8":
            graph = quantized(graph, calibrating, processor)
        onnx.helper.set_model_props(graph, {"class_names": classes})
        onnx.save(graph, file)
    else:
        import openvino

        network = openvino_graph(program, names)
        if precision == "int8":
            network = quantized(network, calibrating, processor)
        network.set_rt_info(classes, ["model_info", "class_names"])
        openvino.save_model(network, file, compress_to_fp16=precision in ("bf16", "fp16"))
