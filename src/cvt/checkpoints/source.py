"""What the name of a model means, resolved once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cvt import hub
from cvt.checkpoints.reading import CheckpointError
from cvt.configuration import VARIANTS
from cvt.files import check_path
from cvt.hub import PUBLISHED, Published
from cvt.strict_loading import ADAPTER, weight_files

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", ADAPTER)
BY_FILE = {checkpoint.authors_file: checkpoint for checkpoint in PUBLISHED.values()}


@dataclass(frozen=True)
class ModelSource:
    """What a name means.

    Attributes:
        name: as it was given.
        kind: a `file` of weights, a model `folder`, a folder with an `adapter` of PEFT, a
            `published` checkpoint on the hub, or a `variant`, which has no weights.
        published: the published checkpoint, by its name or by the name of the authors' file.

    Example:
        >>> from cvt.checkpoints import model_source
        >>> model_source("cvt-13").published.image_size
        224
    """

    name: str
    kind: Literal["file", "folder", "adapter", "published", "variant"]
    published: Published | None = None

    @property
    def path(self) -> Path:
        """The file or the folder."""
        return Path(self.name)

    @property
    def is_local(self) -> bool:
        """Whether it is a file or a folder."""
        return self.kind in ("file", "folder", "adapter")

    @property
    def image_size(self) -> int | None:
        """Height and width, in pixels, that a published checkpoint is for; None for others."""
        return self.published.image_size if self.published else None

    @property
    def has_weights(self) -> bool:
        """Whether it is more than a configuration."""
        if self.kind == "folder":
            return any(file for pattern in WEIGHT_FILES for file in self.path.glob(pattern))
        return self.kind != "variant"


def model_source(name: str | Path | ModelSource) -> ModelSource:
    """What the name of a model means; of a `ModelSource`, itself.

    A file or a folder on this machine comes before a published checkpoint of the same name, and
    that before a variant.

    Raises:
        CheckpointError: a folder holds both a model and an adapter.
        FileNotFoundError: the name means none of these.
        TypeError: it is no name.

    Example:
        >>> from cvt.checkpoints import model_source
        >>> model_source("microsoft/cvt-13").kind, model_source("cvt-digits").kind
        ('published', 'variant')
    """
    if isinstance(name, ModelSource):
        return name
    check_path(name, "source")
    if Path(name).is_file():
        return ModelSource(str(name), "file", BY_FILE.get(Path(name).name))
    if Path(name).is_dir():
        return ModelSource(str(name), "adapter" if is_adapter(name) else "folder")
    if checkpoint := hub.published(name):
        return ModelSource(str(name), "published", checkpoint)
    if str(name) in VARIANTS:
        return ModelSource(str(name), "variant")
    raise unknown_model(name)


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter.

    Raises:
        CheckpointError: it holds a model of its own, too.
    """
    if not Path(folder, ADAPTER).is_file():
        return False
    if weight_files(folder):
        raise CheckpointError(
            f"{folder} holds both a model and an adapter: move {ADAPTER} and the adapter's "
            "weights to a folder of their own"
        )
    return True


def unknown_model(name: str | Path) -> FileNotFoundError:
    """The error for a name that means no model."""
    return FileNotFoundError(
        f"no model {name}: it is no file, no folder and none of "
        + ", ".join(dict.fromkeys([*PUBLISHED, *VARIANTS]))
    )
