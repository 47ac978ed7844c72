"""The SHA-256 of a model, which identifies it wherever it lies."""

import hashlib
import json
from fnmatch import fnmatch
from pathlib import Path

from cvt.checkpoints.source import MODEL_FILES, PICKLED, ModelSource, model_source
from cvt.files import CHECKSUMS, sha256

ABOUT = ("README.md", CHECKSUMS)  # of what is in a model folder, what changes no output


def model_digest(source: str | Path | ModelSource) -> str | None:
    """The SHA-256 of the files that a model is read from.

    Args:
        source: as in `cvt.checkpoints.load_classifier`, or an exported folder.

    Returns:
        Hexadecimal digits: of a file of weights its own; of a folder that of the names and sums of
        its files; of an adapter, its base model included. None of a published model that is not
        in the hub library's cache, and of a variant.

    Example:
        >>> import cvt
        >>> from cvt.checkpoints.digest import model_digest
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> cvt.CvtForImageClassification(config).save_pretrained("digits-model")
        >>> len(model_digest("digits-model"))
        64
    """
    source = model_source(source)
    if source.kind == "file":
        return sha256(source.path)
    folder = _cached(source) if source.kind == "published" else source.path
    if source.kind == "variant" or folder is None:
        return None
    files = _matching(folder, MODEL_FILES)
    if not any(file.suffix == ".safetensors" for file in files):
        files += _matching(folder, PICKLED)
    sums = {file.relative_to(folder).as_posix(): sha256(file) for file in files}
    if source.kind == "adapter":
        from cvt.checkpoints.adapters import base_of  # which imports PyTorch

        sums["base"] = str(model_digest(base_of(folder)))
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [
        file
        for file in folder.rglob("*")
        if file.is_file() and file.name not in ABOUT
        if any(fnmatch(file.relative_to(folder).as_posix(), pattern) for pattern in patterns)
    ]


def _cached(source: ModelSource) -> Path | None:
    """The folder of a published model in the hub library's cache."""
    from huggingface_hub import try_to_load_from_cache

    assert source.hub_id
    config = try_to_load_from_cache(source.hub_id, "config.json", revision=source.revision)
    return Path(config).parent if isinstance(config, str) else None
