"""export.json: what an exported folder holds, and how it was checked when it was written."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from cvt.files import Sums, read_json, sha256
from cvt.runtime import PRECISIONS
from cvt.runtime.features import FEATURES, LOGITS

NAME = "export.json"
FORMATS = {  # → runtime
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "torch-export": "torch",
    "saved-model": "tensorflow",
    "litert": "litert",
    "web": "onnxruntime",
}
DYNAMIC = ("batch", "size")


def _is_sum(name: str, value: Any) -> bool:
    return (
        ".." not in name.split("/")
        and not os.path.isabs(name)
        and isinstance(value, list)
        and [type(each) for each in value] == [int, str]
    )


@dataclass(frozen=True)
class Manifest:
    """The description of an exported classifier; its configuration and preprocessing lie beside it.

    Attributes:
        format: a key of `FORMATS`.
        precision: one of `PRECISIONS`.
        file: name of the graph's file, or folder, in the folder.
        image_size: height and width in pixels; where the size is dynamic, the preprocessing's.
        dynamic: what may differ from call to call, of `DYNAMIC`; without `batch` the graph takes
            one image at a time.
        versions: of the libraries that wrote the export.
        parity: how close it came to the torch model.
        agreement: share of images that were not used for calibration on which an int8 export names
            the class that the torch model names; None for other precisions.
        files: size and SHA-256 of every file beside export.json; empty in exports of before.
        outputs: what the graph gives: `logits`, and `features` where they were asked for.
    """

    format: str
    precision: str
    file: str
    image_size: tuple[int, int]
    dynamic: tuple[str, ...]
    versions: dict[str, str]
    parity: dict[str, Any]
    agreement: float | None = None
    files: Sums = field(default_factory=dict)
    outputs: tuple[str, ...] = (LOGITS,)

    def verify(self, folder: Path) -> None:
        """Make sure that the files of an export are as they were written.

        Raises:
            ValueError: one is damaged or missing; names it.
        """
        for name, (size, digest) in self.files.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size or sha256(path) != digest:
                fault = "is missing" if found is None else "is damaged or was changed"
                raise ValueError(
                    f"{path} {fault}: its SHA-256 is not the one in {NAME}; export the model "
                    "again, or open it with --no-verify (verify=False)"
                )

    def write(self, folder: Path) -> None:
        """Write export.json into a folder; only an export with features names its outputs."""
        content = asdict(self)
        if self.outputs == (LOGITS,):
            del content["outputs"]
        (folder / NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check the export.json of a folder.

        Raises:
            ValueError: it is not what `write` writes, or its graph is not beside it.
            OSError: it cannot be read.
        """
        path = folder / NAME
        try:
            found = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        names = {each.name for each in fields(cls)}
        if isinstance(found, dict):
            found.setdefault("files", {})
            found.setdefault("outputs", [LOGITS])
        if not isinstance(found, dict) or found.keys() != names:
            raise ValueError(f"{path}: must be an object of {', '.join(sorted(names))}")
        size = found["image_size"]
        is_size = isinstance(size, list) and len(size) == 2
        fits = {
            "format": found["format"] in (*FORMATS,),
            "precision": found["precision"] in PRECISIONS,
            "image_size": is_size and all(type(side) is int and side > 0 for side in size),
            "dynamic": isinstance(found["dynamic"], list)
            and all(name in DYNAMIC for name in found["dynamic"]),
            "versions": isinstance(found["versions"], dict),
            "parity": isinstance(found["parity"], dict),
            "agreement": found["agreement"] is None or isinstance(found["agreement"], float),
            "outputs": found["outputs"] in ([LOGITS], [LOGITS, FEATURES], [FEATURES]),
            "files": isinstance(found["files"], dict)
            and all(_is_sum(name, value) for name, value in found["files"].items()),
        }
        for name, fit in fits.items():
            if not fit:
                raise ValueError(
                    f"{path}: {name} = {found[name]!r} is not what an export has there"
                )
        if found["file"] not in os.listdir(folder):
            raise ValueError(f"{path}: file = {found['file']!r} is not beside it")
        files = {name: tuple(value) for name, value in found["files"].items()}
        tuples = {name: tuple(found[name]) for name in ("image_size", "dynamic", "outputs")}
        return cls(**found | tuples | {"files": files})
