"""Graphs that were converted once, in the user's cache."""

import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256 as new_digest
from pathlib import Path

from cvt import __version__
from cvt.checkpoints import ModelSource
from cvt.files import CHECKSUMS, read_json, staged, sums_of, write_checksums
from cvt.libraries import version_of
from cvt.runtime.features import FeatureSettings

logger = logging.getLogger(__name__)
CACHE_BYTES = 2 * 2**30  # of all entries; those that were not used for longest go first
GRAPH = "model.xml"
ABOUT = "config.json"  # what an entry is of; its sum is kept with those of the graph


@dataclass(frozen=True)
class Entry:
    """A converted graph.

    Attributes:
        folder: where it is.
        about: the model's name, the image size and the versions.
        size: its bytes.
        used: when it was last used, in seconds since the epoch.
    """

    folder: Path
    about: dict[str, str]
    size: int
    used: float


def cache_folder() -> Path:
    """The folder of the entries; it need not exist."""
    from platformdirs import user_cache_path

    return user_cache_path("cvt-vision", appauthor=False) / "graphs"


def entries() -> list[Entry]:
    """The entries, the one that was used last first; what is no whole entry is one, too."""
    found = []
    for folder in _folders():
        about = {}
        with suppress(OSError, ValueError):
            about = json.loads((folder / ABOUT).read_text("utf-8"))
        with suppress(OSError):  # another process has deleted it
            size = sum(file.stat().st_size for file in folder.iterdir())
            found.append(Entry(folder, about, size, folder.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def clear() -> tuple[int, int]:
    """Delete all entries.

    Returns:
        How many there were, and their bytes.
    """
    found = entries()
    for entry in found:
        shutil.rmtree(entry.folder, ignore_errors=True)
    return len(found), sum(entry.size for entry in found)


def _folders() -> Iterator[Path]:
    with suppress(OSError):  # there is none yet
        for path in cache_folder().iterdir():
            if path.is_dir() and not path.name.startswith("."):
                yield path


class GraphCache:
    """The converted graphs of a model.

    An entry is found by the SHA-256 of the model's files, the features that it gives, the image
    size, the processor and the versions of this package, PyTorch and OpenVINO. Where nothing can be
    written, nothing is kept.

    Args:
        source: the model, a folder or a file.
        features: that the graphs give, see `FeatureSettings.of`.
    """

    def __init__(self, source: ModelSource, features: FeatureSettings | None = None) -> None:
        self.name = source.name
        self.outputs = {"features": f"stage {features.stage}, {features.pool}"} if features else {}
        self.sha256 = source.sha256

    def _about(self, image_size: tuple[int, int]) -> dict[str, str]:
        libraries = {name: str(version_of(name)) for name in ("torch", "openvino")}
        height, width = image_size
        return {
            "image_size": f"{height} x {width}",
            "processor": f"{platform.machine()} {platform.processor()}".strip(),
            "cvt-vision": __version__,
            **libraries,
            **self.outputs,
        }

    def _folder(self, image_size: tuple[int, int]) -> Path:
        key = json.dumps([self.sha256, self._about(image_size)], sort_keys=True)
        return cache_folder() / new_digest(key.encode()).hexdigest()[:32]

    def find(self, image_size: tuple[int, int]) -> Path | None:
        """The file of a graph for images of a height and width; None if there is none.

        A damaged entry is deleted.
        """
        folder = self._folder(image_size)
        if not folder.is_dir():
            return None
        try:
            sums = read_json(folder / CHECKSUMS)
            found = {name: list(each) for name, each in sums_of(folder, sums).items()}
            is_whole = GRAPH in found and found == sums
        except (OSError, ValueError, TypeError):
            is_whole = False
        if not is_whole:
            logger.info("%s is damaged; the model is converted again", folder)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        with suppress(OSError):
            os.utime(folder)
        return folder / GRAPH

    def keep(self, image_size: tuple[int, int], graph: object) -> None:
        """Write a graph of OpenVINO for images of a height and width."""
        import openvino

        folder = self._folder(image_size)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with staged(folder) as written:
                written.mkdir()
                openvino.save_model(graph, written / GRAPH, compress_to_fp16=False)
                about = {"model": self.name, **self._about(image_size)}
                (written / ABOUT).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
                write_checksums(written, [path.name for path in written.iterdir()])
            _shrink(folder)
        except (OSError, RuntimeError) as error:  # a full disk, a home that cannot be written to
            logger.info("the converted graph was not kept: %s", error)


def _shrink(newest: Path) -> None:
    """Delete what was not used for longest, until all fits; the newest entry stays."""
    total = 0
    for entry in entries():
        total += entry.size
        if total > CACHE_BYTES and entry.folder != newest:
            shutil.rmtree(entry.folder, ignore_errors=True)
