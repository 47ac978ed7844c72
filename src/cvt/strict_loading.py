"""Strict loading and saving over transformers' own: every fault is listed at once."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .architecture import check_file_size
from .configuration import CvtConfig
from .files import (
    ADAPTER,
    CHECKSUMS,
    TENSORFLOW,
    check_checksums,
    follow_umask,
    pointer_fault,
    weight_files,
)
from .hub import published, repository, resolved, snapshot
from .text import printable

logger = logging.getLogger(__name__)

COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm; nothing reads it, and old files lack it
CLASSIFIER = {"classifier.weight", "classifier.bias"}
HEAD = CLASSIFIER | {"layernorm.weight", "layernorm.bias"}


def load_pretrained(
    load: Callable[..., Any], name: str | os.PathLike, *args: Any, **kwargs: Any
) -> Any:
    """Call `PreTrainedModel.from_pretrained`, given as `load`, strictly; published names too.

    Weights of other software are read as well: a file of any dialect, a folder or a repository of
    transformers 4 in TensorFlow or of lucid-dl. A folder is compared with its `checksums.json`, if
    it has one, unless `verify=False` is given; its config is compared with the size of its files
    before a tensor exists.

    Raises:
        ValueError: a file is damaged, or as in `load_strictly`.
        OSError: as in `load_strictly`.
    """
    if kwargs.pop("verify", True):
        verify_folder(name)
    if name is not None and (path := foreign_file(name, kwargs)):
        # The module is above this one, which runs without it in a folder that carries its code.
        found = import_module("cvt.checkpoints.foreign").read(path, name, kwargs)
        if found:
            config, weights, fields = found

            def load_read(name: Any, *args: Any, **kwargs: Any) -> Any:
                others = {n: value for n, value in kwargs.items() if n not in fields}
                return load(None, *args, config=config, state_dict=weights, **others)

            return load_strictly(load_read, name, *args, **kwargs)
    if files := local_files(name, kwargs):
        config = kwargs.get("config") or name
        if isinstance(config, str | os.PathLike):
            config = CvtConfig.from_pretrained(config, **kwargs | {"config": None})
        new_head = "num_labels" in kwargs or "id2label" in kwargs
        size = sum(file.stat().st_size for file in files if file.is_file())
        check_file_size(config, size, name, new_head)
    try:
        return load_strictly(load, name, *args, **kwargs)
    except (OSError, ValueError):
        if (folder := foreign_snapshot(name, kwargs)) is None:
            raise
    return load_pretrained(load, folder, *args, **kwargs)


def load_strictly(
    load: Callable[..., Any], name: str | os.PathLike, *args: Any, **kwargs: Any
) -> Any:
    """Call `PreTrainedModel.from_pretrained`, given as `load`, and refuse weights that do not fit.

    If `num_labels` or `id2label` asks for another number of classes, a new, random classifier is
    created; that is logged. `ignore_mismatched_sizes` and `output_loading_info` leave the
    judgement to the caller.

    Raises:
        ValueError: weights are missing, unexpected or of the wrong shape; lists all of them.
        OSError: there is no such model, or it cannot be reached.
    """
    with resolved(name, kwargs) as source:
        if kwargs.get("ignore_mismatched_sizes") or kwargs.get("output_loading_info"):
            return load(source, *args, **kwargs)
        kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        try:
            model, loaded = load(source, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(f"the weights of {name} cannot be read: {error}") from error
        except Exception as error:  # torch advises to run what is in a pickle
            if fault := next(filter(None, map(pickle_fault, local_files(name, kwargs))), None):
                raise ValueError(fault) from error
            raise
    mismatched = {name: sizes for name, *sizes in loaded["mismatched_keys"]}
    new_head = "num_labels" in kwargs or "id2label" in kwargs
    new_weights(
        model, name, loaded["missing_keys"], loaded["unexpected_keys"], mismatched, new_head
    )
    return model


def local_files(name: str | os.PathLike | None, kwargs: Mapping[str, Any]) -> list[Path]:
    """The files of weights that `PreTrainedModel.from_pretrained` reads, where they are here.

    Args:
        name: of the model; if it is no folder, there are no such files.
        kwargs: its other arguments.

    Raises:
        ValueError: a file is a pointer of git-lfs, or there are weights of an adapter alone.
    """
    if name is None or not os.path.isdir(name):
        return []
    files = _weight_files(name, kwargs)
    if fault := next(filter(None, map(pointer_fault, files)), None):
        raise ValueError(fault)
    if not files and all(Path(name, file).is_file() for file in (ADAPTER, "config.json")):
        raise ValueError(
            f"{name} is an adapter: cvt.checkpoints.load_classifier merges it with its base, "
            "as every command does"
        )
    return files


def foreign_file(name: str | os.PathLike, kwargs: Mapping[str, Any]) -> Path | None:
    """The file of weights that transformers does not read, if the model has none that it reads.

    Args:
        name: of the model.
        kwargs: the other arguments of `PreTrainedModel.from_pretrained`.
    """
    if os.path.isfile(name):
        return Path(name)
    if not os.path.isdir(name):
        return None
    files = _weight_files(name, kwargs)
    if not files:
        path = Path(name, kwargs.get("subfolder") or "", TENSORFLOW)
        return path if path.is_file() else None
    if len(files) != 1 or files[0].suffix != ".safetensors":
        return None
    with suppress(SafetensorError, OSError), safe_open(files[0], "pt") as file:  # or it is damaged
        if not any(map(re.compile(r"(cvt|encoder)\.[^:]+$").match, file.keys())):
            return files[0]
    return None


def foreign_snapshot(name: str | os.PathLike, kwargs: Mapping[str, Any]) -> Path | None:
    """The files of a repository whose weights transformers does not read; None if there is none.

    Args:
        name: of the model.
        kwargs: as in `foreign_file`.
    """
    found = repository(name)
    if found is None or published(name):
        return None
    choices = ("revision", "cache_dir", "token", "local_files_only")
    options = {each: kwargs[each] for each in choices if each in kwargs}
    with suppress(OSError, ValueError):  # the error of what was tried before is the better one
        folder = snapshot(name, ("config.json", CHECKSUMS, "model.safetensors"), **options)
        if not _weight_files(folder, kwargs):
            options["revision"] = folder.name
            snapshot(found.hub_id, (TENSORFLOW,), **options)
        return folder if foreign_file(folder, kwargs) else None
    return None


def _weight_files(folder: str | os.PathLike, kwargs: Mapping[str, Any]) -> list[Path]:
    choices = ("subfolder", "variant", "use_safetensors")
    return weight_files(folder, **{each: kwargs[each] for each in choices if each in kwargs})


def verify_folder(name: str | os.PathLike | None) -> None:
    """Compare a model folder with its `checksums.json`, if it is a folder that has one.

    Raises:
        ValueError: a file is damaged; names it.
    """
    if name is not None and os.path.isdir(name):
        check_checksums(name)


def pickle_fault(path: Path) -> str:
    """Why a pickled file of weights cannot be used; empty if it can, or is no pickle."""
    import torch

    if path.suffix != ".bin":
        return ""
    with suppress(Exception):  # a damaged file fails in many ways: zip, pickle, storage sizes
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if isinstance(content, dict) and all(isinstance(v, torch.Tensor) for v in content.values()):
            return ""
    return (
        f"{path} was not read: it holds more than tensors, or is not whole; nothing in a file is "
        "run. `cvt convert` reads the weights of a checkpoint of training; else save "
        "model.state_dict() alone"
    )


def save_readable(
    save: Callable[..., None], folder: str | os.PathLike, *args: Any, **kwargs: Any
) -> None:
    """Call `PreTrainedModel.save_pretrained`, given as `save`; its weights follow the umask."""

    def weights() -> dict[Path, tuple[int, int]]:
        files = ((path, path.stat()) for path in Path(folder).glob("*.safetensors"))
        return {path: (found.st_ino, found.st_mtime_ns) for path, found in files}

    before = weights()
    if os.path.isdir(folder):
        Path(folder, CHECKSUMS).unlink(missing_ok=True)  # of what is about to be replaced
    save(folder, *args, **kwargs)
    if written := [path for path, found in weights().items() if before.get(path) != found]:
        follow_umask(written, Path(folder))


def new_weights(
    model: Any,
    source: str | os.PathLike,
    missing: Set[str],
    unexpected: Iterable[str],
    mismatched: Mapping[str, Sequence],
    new_head: bool,
) -> Set[str]:
    """The weights of a classifier that stay as they are, random, which is logged.

    Args:
        model: with its config; weights have transformers' names.
        source: how messages call where the weights come from.
        missing: names of weights that it lacks.
        unexpected: names of those that the model lacks.
        mismatched: the shapes found and expected, by name.
        new_head: whether the caller wants a new classifier.

    Raises:
        ValueError: other weights do not fit; lists all of them.
    """
    new: Set[str] = set()
    if new_head:  # what a model without a head was saved as has no LayerNorm for it, either
        new = (HEAD if missing >= CLASSIFIER else CLASSIFIER) & (missing | mismatched.keys())
    wrong = {weight: mismatched[weight] for weight in sorted(mismatched.keys() - new)}
    if faults := list_faults(sorted(missing - new), sorted(unexpected), wrong):
        raise ValueError(
            f"the weights of {source} do not fit {type(model).__name__} (num_labels would ask for "
            f"a new classifier):{faults}"
        )
    if new:
        logger.warning(
            f"New classifier of {model.config.num_labels} classes: {source} has none for them. It "
            "is random until trained."
        )
    return new


def list_faults(
    missing: Iterable[str], unexpected: Iterable[str], mismatched: Mapping[str, Sequence]
) -> str:
    """A line for each weight that does not fit; `mismatched` has the shapes found and expected."""
    faults = [f"missing {printable(name)}" for name in missing]
    faults += [f"unexpected {printable(name)}" for name in unexpected]
    for name, (found, expected) in mismatched.items():
        faults.append(f"{printable(name)} is {tuple(found)}, expected {tuple(expected)}")
    return "".join(f"\n  {fault}" for fault in faults)
