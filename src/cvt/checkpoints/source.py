"""What the name of a model means, resolved once."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cvt import hub
from cvt.architecture import VARIANTS
from cvt.checkpoints.errors import CheckpointError
from cvt.files import ADAPTER, TENSORFLOW, check_path, model_folder, sha256, weight_files
from cvt.hub import PUBLISHED

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", TENSORFLOW, ADAPTER)
# What a repository of the hub holds of a model, an adapter or an export; all else in it is left.
EXPORT_FILES = (
    "export.json", "labels.txt", "model/*", "model.onnx", "model.onnx.data", "model.xml",
    "model.bin", "model.pt2", "model.tflite",
)  # fmt: skip
MODEL_FILES = (
    "README.md", "config.json", "preprocessor_config.json", "processor_config.json",
    "checksums.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    ADAPTER, "adapter_model.safetensors", *EXPORT_FILES,
)  # fmt: skip
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
# What a model does not compute by, or what is written anew with each export.
DESCRIBING = ("README.md", "checksums.json", "export.json", "labels.txt")
BY_FILE = {checkpoint.authors_file: checkpoint for checkpoint in PUBLISHED.values()}


@dataclass(frozen=True)
class ModelSource:
    """What a name means.

    Attributes:
        name: as it was given.
        kind: a `file` of weights, a model `folder` or an exported one, a folder with an `adapter`
            of PEFT, a `published` checkpoint on the hub, or a `variant`, which has no weights.
        path: the file or the folder on this machine, of a run its `best`, also of a model that was
            downloaded from the hub; else the name.
        hub_id: the repository on the hub, if it comes from there.
        revision: of the repository: the commit of the files in `path`; of a published checkpoint
            what was asked for, if anything.
        variant: of a published checkpoint, or the variant itself.
        image_size: height and width, in pixels, that a published checkpoint is for, also where
            it is known by the name of the authors' file only.

    Example:
        >>> from cvt.checkpoints import model_source
        >>> model_source("cvt-13").image_size
        224
    """

    name: str
    kind: Literal["file", "folder", "adapter", "published", "variant"]
    path: Path
    hub_id: str | None = None
    revision: str | None = None
    variant: str | None = None
    image_size: int | None = None

    @property
    def is_export(self) -> bool:
        """Whether it is an exported folder."""
        return Path(self.path, "export.json").is_file()

    @property
    def has_weights(self) -> bool:
        """Whether it is more than a configuration."""
        if self.kind == "folder":
            return any(file for pattern in WEIGHT_FILES for file in self.path.glob(pattern))
        return self.kind != "variant"

    @property
    def sha256(self) -> str:
        """Of the files of the model by which it computes, in hexadecimal digits.

        Of a published checkpoint, whose files are not here yet, that of its name and revision.
        """
        files = {self.path} if self.kind == "file" else set()
        if self.path.is_dir():
            patterns = (*MODEL_FILES, *PICKLED, TENSORFLOW, "model/variables/*")
            files = {file for pattern in patterns for file in self.path.glob(pattern)}
            files |= set(weight_files(self.path))  # an index may name shards in any way
        sums = sorted(
            (file.name, sha256(file))
            for file in files
            if file.is_file() and file.name not in DESCRIBING
        )
        identity = json.dumps(sums or [self.hub_id, self.revision, self.variant])
        return hashlib.sha256(identity.encode()).hexdigest()


def model_source(name: str | Path | ModelSource) -> ModelSource:
    """What the name of a model means; of a `ModelSource`, itself.

    A file or a folder on this machine comes before a model on the hub, USER/NAME or
    USER/NAME@REVISION, which is downloaded, and that before a variant.

    Raises:
        CheckpointError: a folder holds both a model and an adapter.
        FileNotFoundError: the name means none of these, or the hub does not have it.
        TypeError: it is no name.
        ValueError: a folder on this machine is asked for a revision.

    Example:
        >>> from cvt.checkpoints import model_source
        >>> model_source("microsoft/cvt-13").kind, model_source("cvt-digits").kind
        ('published', 'variant')
    """
    if isinstance(name, ModelSource):
        return name
    check_path(name, "source")
    text, path = str(name), Path(name)
    if path.is_file():
        published = BY_FILE.get(path.name)
        image_size = published.image_size if published else None
        return ModelSource(text, "file", path, image_size=image_size)
    if path.is_dir():
        path = model_folder(path)
        return ModelSource(text, folder_kind(path), path)
    found = hub.repository(text)
    if found and (checkpoint := hub.published(text)):
        about = (checkpoint.hub_id, found.revision, checkpoint.variant, checkpoint.image_size)
        return ModelSource(text, "published", path, *about)
    if found:
        folder = hub.snapshot(text, MODEL_FILES)
        if not any([*folder.glob("*.safetensors"), *folder.glob("export.json")]):
            # As older models have only, and those of TensorFlow.
            for patterns in (PICKLED, (TENSORFLOW,)):
                if not weight_files(folder):
                    hub.snapshot(f"{found.hub_id}@{folder.name}", patterns)
        return ModelSource(text, folder_kind(folder), folder, found.hub_id, folder.name)
    if text in VARIANTS:
        return ModelSource(text, "variant", path, variant=text)
    raise unknown_model(name)


def check_exists(name: str | Path) -> None:
    """Make sure that a name means a model, without opening it; the hub is not asked.

    Raises:
        FileNotFoundError: it means none.
        ValueError: it is empty, or a folder on this machine is asked for a revision.
    """
    check_path(name, "source")
    text = str(name)
    if not (Path(name).exists() or hub.repository(text) or text in VARIANTS):
        raise unknown_model(name)


def check_folder(folder: Path) -> None:
    """Make sure that the folder of a model, or of a run, is there, without opening it.

    Raises:
        FileNotFoundError: it is a file, or nothing.
    """
    if not folder.is_dir():
        what = "a file; `cvt convert` writes a folder" if folder.is_file() else "no folder here"
        raise FileNotFoundError(f"{folder} is {what}; the folder of a model can be uploaded")


def folder_kind(folder: Path) -> Literal["folder", "adapter"]:
    """Whether a folder holds a model, or an adapter.

    Raises:
        CheckpointError: it holds both.
    """
    if not Path(folder, ADAPTER).is_file():
        return "folder"
    if weight_files(folder):
        raise CheckpointError(
            f"{folder} holds both a model and an adapter: move {ADAPTER} and the adapter's "
            "weights to a folder of their own"
        )
    return "adapter"


def unknown_model(name: str | Path) -> FileNotFoundError:
    """The error for a name that means no model; of a variant there is one without weights."""
    return hub.unknown_model(name, dict.fromkeys([*PUBLISHED, *VARIANTS]))
