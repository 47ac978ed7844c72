"""A page that classifies pictures in the visitor's browser, by ONNX Runtime Web.

The page's files lie in `web_page`. The runtime's come from one version of its npm package and are
checked by their SHA-256; `cvt.runtime.cache` keeps them.
"""

import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from cvt.data.preprocessing import SQUASHED, Preprocessing, preprocessing_of
from cvt.files import sha256, staged
from cvt.inference.page import page_name
from cvt.inference.predict import has_independent_scores
from cvt.modeling import CvtForImageClassification
from cvt.problem_type import MULTI_LABEL, REGRESSION
from cvt.runtime.cache import ABOUT, cache_folder
from cvt.runtime.manifest import Manifest
from cvt.text import printable

LANGUAGES = ("en", "zh")
PAGE = Path(__file__).with_name("web_page")
FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
EXAMPLE_LOGITS = 100  # at most, to check a visitor's GPU with

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web@{VERSION}"
FETCH_SECONDS = 600
# The files of its folder `dist` that the page loads: the first three on a processor, or the last
# three on a GPU.
RUNTIME_FILES = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs":
        "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm":
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    "ort-wasm-simd-threaded.asyncify.mjs":
        "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    "ort-wasm-simd-threaded.asyncify.wasm":
        "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}  # fmt: skip


def check_page(model: CvtForImageClassification, processor: Any) -> Preprocessing:
    """The preprocessing of a model, which the page computes too.

    Raises:
        ValueError: the page cannot show the model; names the reason.
    """
    preprocessing = preprocessing_of(processor)
    if not isinstance(preprocessing, Preprocessing):
        kind = type(processor).__name__
        raise ValueError(f"to = web: the page does not compute the preprocessing of a {kind}")
    if preprocessing.do_resize and preprocessing.resample not in FILTERS:
        raise ValueError(
            f"to = web: resample = {preprocessing.resample}: the page resizes with "
            f"{', '.join(f'{number} ({name})' for number, name in FILTERS.items())}"
        )
    if not model.config.class_names:
        raise ValueError("to = web: num_labels = 0: the model has no classes to name")
    return preprocessing


def write_page(
    folder: Path,
    source: str | Path,
    model: CvtForImageClassification,
    preprocessing: Preprocessing,
    manifest: Manifest,
    language: str,
    runtime: Path,
) -> None:
    """Write the page and the runtime beside a graph.

    Args:
        folder: has the graph.
        source: what the user called the model.
        model: the graph's, in float32 on a CPU.
        preprocessing: the model's.
        manifest: of the graph.
        language: of `LANGUAGES`; the visitor can change it.
        runtime: a folder with `RUNTIME_FILES`.
    """
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    for name in RUNTIME_FILES:  # not every server knows that .mjs is JavaScript
        shutil.copyfile(runtime / name, folder / "runtime" / name.replace(".mjs", ".js"))
    config = model.config
    has_thresholds = config.thresholds and config.problem_type == MULTI_LABEL
    content = {
        "name": page_name(str(source)),
        "language": language,
        "graph": manifest.file,
        "graph_bytes": (folder / manifest.file).stat().st_size,
        "precision": manifest.precision,
        "labels": [printable(name) for name in config.class_names],
        "problem": _problem(config),
        "thresholds": config.thresholds if has_thresholds else None,
        "preprocessing": {
            **_preprocessing(preprocessing),
            "any_size": "size" in manifest.dynamic,
        },
        "example": example_logits(model, preprocessing.image_size),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "page.json").write_text(text, encoding="utf-8")


def _problem(config: Any) -> str:
    """How the scores come from the logits, for the page."""
    if config.problem_type == REGRESSION:
        return "values"
    return "independent" if has_independent_scores(config) else "exclusive"


def _preprocessing(preprocessing: Preprocessing) -> dict[str, Any]:
    """The settings of a preprocessing, with nothing left to decide."""
    side, normalises = preprocessing.image_size, preprocessing.do_normalize
    mean, std = (
        np.broadcast_to(value if normalises else neutral, 3).tolist()
        for value, neutral in ((preprocessing.image_mean, 0.0), (preprocessing.image_std, 1.0))
    )
    return {
        "image_size": side,
        "filter": FILTERS[preprocessing.resample] if preprocessing.do_resize else None,
        "shortest_edge": None if side >= SQUASHED else int(side / preprocessing.crop_pct),
        "rescale_factor": preprocessing.rescale_factor if preprocessing.do_rescale else 1.0,
        "image_mean": mean,
        "image_std": std,
    }


@torch.no_grad()
def example_logits(model: CvtForImageClassification, side: int) -> list[float]:
    """The first logits of a fixed pattern, which the page compares with those of a GPU."""
    pattern = np.arange(3 * side * side) % 251 / 125 - 1
    pixels = torch.from_numpy(pattern.astype(np.float32)).reshape(1, 3, side, side)
    return model(pixels).logits[0, :EXAMPLE_LOGITS].tolist()


# ------------------------------------------------------------------------------ the runtime


def runtime_folder(
    given: str | Path | None = None, progress: Callable[[str], object] = lambda step: None
) -> Path:
    """A folder with the files of the runtime: the given one, the user's cache, or npm's package.

    Args:
        given: the unpacked npm package, or its folder `dist`.
        progress: called with a description, if something is fetched.

    Raises:
        FileNotFoundError: they are nowhere, or npm cannot fetch them.
        ValueError: a file is another one than that of `VERSION`; names it.
    """
    if given is not None:
        folder = Path(given, "dist") if Path(given, "dist").is_dir() else Path(given)
        _check_files(folder)
        return folder
    kept = cache_folder() / PACKAGE.replace("@", "-")
    with suppress(FileNotFoundError, ValueError):
        _check_files(kept)
        os.utime(kept)
        return kept
    shutil.rmtree(kept, ignore_errors=True)
    progress(f"fetching {PACKAGE} by npm")
    with _package() as package, staged(kept) as folder:
        folder.mkdir()
        for name in RUNTIME_FILES:
            member = package.extractfile(f"package/dist/{name}")
            assert member is not None
            with member, open(folder / name, "wb") as file:
                shutil.copyfileobj(member, file)
        _check_files(folder)
        (folder / ABOUT).write_text(json.dumps({"model": PACKAGE}) + "\n", "utf-8")
    return kept


def _check_files(folder: Path) -> None:
    for name, expected in RUNTIME_FILES.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, a file of the npm package {PACKAGE}")
        if sha256(folder / name) != expected:
            raise ValueError(f"{folder / name} is not that of the npm package {PACKAGE}")


@contextmanager
def _package() -> Iterator[tarfile.TarFile]:
    """The npm package, fetched by npm from the registry that it is configured for.

    Raises:
        FileNotFoundError: npm is not installed, or cannot fetch it.
    """
    advice = (
        f"unpack the npm package {PACKAGE} and give its folder with --runtime-files (runtime_files)"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(f"to = web: npm, which fetches the runtime, is not found: {advice}")
    with TemporaryDirectory() as folder:
        command = [npm, "pack", PACKAGE, "--pack-destination", folder, "--fetch-retries", "1"]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=FETCH_SECONDS
            )
            reason = "" if done.returncode == 0 else _reason(done.stderr)
        except subprocess.TimeoutExpired:
            reason = f"no answer within {FETCH_SECONDS} seconds"
        if reason:
            raise FileNotFoundError(f"to = web: npm cannot fetch {PACKAGE} ({reason}): {advice}")
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as package:
            yield package


def _reason(printed: str) -> str:
    """What npm names as the fault."""
    errors = [line.partition(" ")[2].removeprefix("error ") for line in printed.splitlines()]
    return printable(next((error for error in errors if error), "an error without a message"))
