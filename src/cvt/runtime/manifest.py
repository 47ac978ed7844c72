"""export.json: what an exported folder holds, and how it was checked when it was written."""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cvt.runtime import PRECISIONS

NAME = "export.json"
FORMATS = {  # → runtime
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "torch-export": "torch",
    "saved-model": "tensorflow",
    "litert": "litert",
}
DYNAMIC = ("batch", "size")


@dataclass(frozen=True)
class Manifest:
    """What is said of an exported classifier; its configuration and preprocessing lie beside it.

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
    """

    format: str
    precision: str
    file: str
    image_size: tuple[int, int]
    dynamic: tuple[str, ...]
    versions: dict[str, str]
    parity: dict[str, Any]
    agreement: float | None = None

    def write(self, folder: Path) -> None:
        """Write export.json into a folder."""
        (folder / NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check the export.json of a folder.

        Raises:
            ValueError: it is not what `write` writes, or its graph is not beside it.
            OSError: it cannot be read.
        """
        path = folder / NAME
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        names = {field.name for field in fields(cls)}
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
        }
        for name, fit in fits.items():
            if not fit:
                raise ValueError(
                    f"{path}: {name} = {found[name]!r} is not what an export has there"
                )
        if found["file"] not in os.listdir(folder):
            raise ValueError(f"{path}: file = {found['file']!r} is not beside it")
        tuples = {"image_size": tuple(size), "dynamic": tuple(found["dynamic"])}
        return cls(**found | tuples)
