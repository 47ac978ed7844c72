"""Checkpoints of a run that survive a kill, a full disk and a damaged file.

One is a folder, `step-00001234/`, of `state.pt` and `manifest.json` with the SHA-256 of it. It is
written beside, synced and renamed, and older ones are removed only afterwards; so whenever the
process ends, there is a whole one.
"""

import json
import logging
import reprlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvt.checkpoints.reading import describe, load_pickle
from cvt.files import pointer_fault, sha256, sync

logger = logging.getLogger(__name__)

STATE, MANIFEST = "state.pt", "manifest.json"


def save_checkpoint(
    folder: Path, step: int, state: dict[str, Any], keep: int, seconds: float = 0.0
) -> Path:
    """Write the state after `step` steps; then remove all but the newest `keep` checkpoints.

    Args:
        folder: where the run's checkpoints are.
        step: how many steps are done.
        state: tensors and plain values.
        keep: at least 1.
        seconds: that the run took so far. The manifest has them, as no state depends on them.

    Raises:
        OSError: it cannot be written; the checkpoints before are untouched.
    """
    target = folder / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):  # of a process that was killed
        _remove(leftover)
    beside = folder / f".{target.name}.new"
    try:
        beside.mkdir()
        with open(beside / STATE, "wb") as file:
            torch.save(state, file)
        sums = {STATE: sha256(beside / STATE)}
        manifest = {"step": step, "seconds": seconds, "sha256": sums}
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        sync(beside)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch hides it
        if isinstance(cause, OSError):
            raise OSError(f"{target} cannot be written: {cause.strerror}") from error
        raise
    while target.exists():  # the same step before its epoch's end, or a damaged one
        target = target.with_name(f"{target.name}+")
    beside.rename(target)
    sync(folder)
    kept = 0
    for path in checkpoints(folder):
        if path <= target and kept < keep and (path == target or not fault_of(path)):
            kept += 1
        else:
            _remove(path.rename(path.with_name(f".{path.name}.gone")))
    return target


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first, whole or not."""
    return sorted(folder.glob("step-*"), reverse=True)


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that verifies, and its state; damaged ones are warned of by name.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: none verifies; names the reason for each.
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{folder} has no checkpoint; there is no run to resume")
    faults = []
    for path in found:
        if fault := fault_of(path):
            logger.warning(f"{path} is skipped: {fault}")
            faults.append(f"{path.name}: {fault}")
        else:
            return path, load_pickle(path / STATE)
    raise ValueError(f"no checkpoint in {folder} is whole: {'; '.join(faults)}")


def seconds_of(path: Path) -> float:
    """The seconds that a run took up to a checkpoint that verifies; old ones do not have them."""
    return float(json.loads((path / MANIFEST).read_text()).get("seconds", 0.0))


def check_state(state: Any, path: Path) -> None:
    """Make sure that a state has what a run is resumed from, whoever wrote it.

    Args:
        state: of a checkpoint.
        path: how the error calls it.

    Raises:
        ValueError: a key is missing or its value is illegal; names the key.
    """
    if not isinstance(state, dict):
        raise ValueError(f"{path / STATE} holds no state of a run, but {describe(state)}")
    for key, (fits, wanted) in KEYS.items():
        if key not in state:
            raise ValueError(f"{path / STATE} has no {key}")
        try:
            legal = fits(state[key])
        except (TypeError, LookupError, AttributeError):  # of another type somewhere inside
            legal = False
        if not legal:
            shown = reprlib.repr(state[key])
            raise ValueError(f"{path / STATE}: {key} = {shown}: must be {wanted}")
    if fault := _moments_fault(state):
        raise ValueError(f"{path / STATE}: optimizer does not fit model: {fault}")


def check_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], key: str) -> None:
    """Make sure that weights of a state are those of the model that its config describes.

    Raises:
        ValueError: names differ, or shapes; names the first.
    """
    if fault := _weights_fault(found, expected):
        raise ValueError(f"{STATE}: {key} does not fit config: {fault}")


def _is_count(value: Any, ge: int, le: int) -> bool:
    return type(value) is int and ge <= value <= le


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_row(row: Any) -> bool:
    return {"epoch", "val_loss"} <= row.keys() and all(
        value is None or isinstance(value, int | float) for value in row.values()
    )


def _are_tensors(value: Any) -> bool:
    return bool(value) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "recipe": (_is_map, "settings"),
    "config": (_is_map, "fields"),
    "processor": (_is_map, "settings"),
    "images": (lambda v: isinstance(v, str), "text"),
    "batches_per_step": (lambda v: _is_count(v, 1, 2**20), f"an integer from 1 to {2**20}"),
    "step": (lambda v: _is_count(v, 0, 2**62), f"an integer from 0 to {2**62}"),
    "history": (lambda v: isinstance(v, list) and all(map(_is_row, v)), "a list of epochs"),
    "losses": (
        lambda v: isinstance(v, list) and all(isinstance(loss, int | float) for loss in v),
        "a list of numbers",
    ),
    "corrupt": (
        lambda v: all(isinstance(text, str) for item in v.items() for text in item),
        "a map from names to errors",
    ),
    "model": (_are_tensors, "a map from names to tensors"),
    "optimizer": (
        lambda v: (
            v is None or (isinstance(v["state"], dict) and isinstance(v["param_groups"], list))
        ),
        "a state of an optimizer, or None",
    ),
    "scaler": (
        lambda v: all(isinstance(number, int | float) for number in v.values()),
        "a map from names to numbers",
    ),
    "ema": (lambda v: v is None or _are_tensors(v), "a map from names to tensors, or None"),
}


def _weights_fault(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first weight that is missing, unexpected or of another shape; empty if there is none."""
    if differing := sorted(found.keys() ^ expected.keys()):
        return f"{'unexpected' if differing[0] in found else 'missing'} {differing[0]}"
    wrong = (name for name, weight in expected.items() if found[name].shape != weight.shape)
    if name := next(wrong, None):
        return f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
    return ""


def _moments_fault(state: Mapping[str, Any]) -> str:
    """What of an optimizer's state is not of the model's weights; empty if all is."""
    for name, moments in (state["optimizer"] or {"state": {}})["state"].items():
        if name not in state["model"]:
            return f"unexpected {name}"
        shapes = ((), (1,), tuple(state["model"][name].shape))
        for moment, value in moments.items() if isinstance(moments, dict) else [("", None)]:
            if value is None or (isinstance(value, Tensor) and tuple(value.shape) not in shapes):
                return f"{name} has {moment or 'no moments'} of another shape"
    return ""


def fault_of(path: Path) -> str:
    """Why a checkpoint cannot be used; empty if it can."""
    try:
        if fault := pointer_fault(path / STATE):
            return fault
        manifest = json.loads((path / MANIFEST).read_text())
        if sha256(path / STATE) != manifest["sha256"][STATE]:
            return f"{STATE} is damaged: its SHA-256 is not the manifest's"
        float(manifest.get("seconds", 0.0))
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return ""
