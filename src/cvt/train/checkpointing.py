"""Checkpoints of a run that survive a kill, a full disk and a damaged file.

One is a folder, `step-00001234/`, of `state.pt` and `manifest.json` with the SHA-256 of it. It is
written beside, synced and renamed, and older ones are removed only afterwards; so whenever the
process ends, there is a whole one.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from cvt.checkpoints.reading import load_pickle
from cvt.files import pointer_fault, sync

logger = logging.getLogger(__name__)

STATE, MANIFEST = "state.pt", "manifest.json"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the state after `step` steps; then remove all but the newest `keep` checkpoints.

    Args:
        folder: where the run's checkpoints are.
        step: how many steps are done.
        state: tensors and plain values.
        keep: at least 1.

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
        manifest = {"step": step, "sha256": {STATE: sha256(beside / STATE)}}
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
        ValueError: none verifies; says why of each.
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{folder} has no checkpoint; there is no run to resume")
    faults = []
    for path in found:
        if fault := fault_of(path):
            logger.warning(f"{path} is passed over: {fault}")
            faults.append(f"{path.name}: {fault}")
        else:
            return path, load_pickle(path / STATE)
    raise ValueError(f"no checkpoint in {folder} is whole: {'; '.join(faults)}")


def fault_of(path: Path) -> str:
    """Why a checkpoint cannot be used; empty if it can."""
    try:
        if fault := pointer_fault(path / STATE):
            return fault
        manifest = json.loads((path / MANIFEST).read_text())
        if sha256(path / STATE) != manifest["sha256"][STATE]:
            return f"{STATE} is damaged: its SHA-256 is not the manifest's"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return ""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
