import json
import logging
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.training_runs import Process, equal, kill_during_saves, kill_until_done, settings

from cvt.train.checkpointing import (
    check_state,
    check_weights,
    newest_checkpoint,
    save_checkpoint,
    seconds_of,
)


def state_at(step):
    return {"step": step, "weights": torch.full((2000,), step)}


@pytest.fixture
def folder(tmp_path):
    """Checkpoints after the steps 10 and 20."""
    for step in (10, 20):
        save_checkpoint(tmp_path / "checkpoints", step, state_at(step), keep=2)
    return tmp_path / "checkpoints"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def largest_file(size):
    """As on a disk that is full: no file may have more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ------------------------------------------------------------------------------------- saving


def test_a_checkpoint_comes_back_as_it_was_saved(folder):
    path, state = newest_checkpoint(folder)
    assert path.name == "step-00000020"
    equal(state, state_at(20))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_checkpoints_are_kept(tmp_path, keep):
    for step in range(5):
        save_checkpoint(tmp_path, step, state_at(step), keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in range(5 - keep, 5)]


def test_all_is_synced_before_the_rename_and_removed_after_it(folder, monkeypatch):
    calls = []

    def noting(what, function):
        def noted(first, *rest, **options):
            path = os.readlink(f"/proc/self/fd/{first}") if what == "sync" else os.fspath(first)
            calls.append((what, Path(path).name))
            return function(first, *rest, **options)

        return noted

    monkeypatch.setattr(os, "fsync", noting("sync", os.fsync))
    monkeypatch.setattr(os, "rename", noting("rename", os.rename))
    monkeypatch.setattr(shutil, "rmtree", noting("remove", shutil.rmtree))
    save_checkpoint(folder, 30, state_at(30), keep=2)
    renamed = calls.index(("rename", ".step-00000030.new"))
    synced = {name for what, name in calls[:renamed] if what == "sync"}
    assert {"state.pt", "manifest.json", ".step-00000030.new"} <= synced
    assert calls[renamed + 1 :].index(("sync", "checkpoints")) < next(
        i for i, (what, _) in enumerate(calls[renamed + 1 :]) if what == "remove"
    )
    assert "remove" not in {what for what, _ in calls[:renamed]}
    assert names(folder) == ["step-00000020", "step-00000030"]


# ------------------------------------------------------------------------------------- damage


def truncate(checkpoint):
    os.truncate(checkpoint / "state.pt", 1000)


def flip_a_bit(checkpoint):
    content = bytearray((checkpoint / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "state.pt").write_bytes(content)


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def replace_by_a_file(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.write_text("?")


DAMAGES = {
    "truncated": (truncate, "state.pt is damaged"),
    "a bit": (flip_a_bit, "state.pt is damaged"),
    "no state": (lambda path: (path / "state.pt").unlink(), "state.pt cannot be read"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 20), "manifest.json is"),
    "a manifest of nothing": (lambda path: (path / "manifest.json").write_text("{}"), "manifest"),
    "empty": (empty, "manifest.json cannot be read"),
    "a file": (replace_by_a_file, "cannot be read: Not a directory"),
}
damages = pytest.mark.parametrize(("damage", "why"), DAMAGES.values(), ids=DAMAGES)


@damages
def test_a_damaged_checkpoint_is_skipped_and_named(folder, caplog, damage, why):
    damage(folder / "step-00000020")
    with caplog.at_level(logging.WARNING):
        path, state = newest_checkpoint(folder)
    assert path.name == "step-00000010"
    equal(state, state_at(10))
    (warning,) = caplog.messages
    assert "step-00000020 is skipped" in warning
    assert why in warning


@damages
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("step", [15, 20, 30])
def test_a_damaged_checkpoint_never_outlives_a_whole_one(folder, damage, why, keep, step):
    damage(folder / "step-00000020")
    save_checkpoint(folder, step, state_at(step), keep)
    equal(newest_checkpoint(folder)[1], state_at(step))
    shutil.rmtree(newest_checkpoint(folder)[0])
    if keep == 2:
        equal(newest_checkpoint(folder)[1], state_at(10))


def test_where_none_is_complete_the_fault_of_each_is_reported(folder):
    truncate(folder / "step-00000010")
    empty(folder / "step-00000020")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole") as raised:
        newest_checkpoint(folder)
    assert "step-00000010: state.pt is damaged" in str(raised.value)
    assert "step-00000020: manifest.json cannot be read" in str(raised.value)


def test_the_time_of_a_run_is_in_the_manifest(tmp_path):
    path = save_checkpoint(tmp_path, 10, state_at(10), 2, seconds=7.5)
    assert seconds_of(path) == 7.5
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"seconds": "late"}))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        newest_checkpoint(tmp_path)
    del manifest["seconds"]  # as before there was it
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert seconds_of(newest_checkpoint(tmp_path)[0]) == 0


def test_where_there_is_none_it_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        newest_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------- harm


def whole_state():
    weight = torch.zeros(2, 3)
    return {
        "recipe": {"epochs": 2}, "config": {"depth": [1]}, "processor": {"size": 32},
        "images": "0a", "batches_per_step": 1, "step": 3,
        "history": [{"epoch": 1, "val_top1": None, "val_loss": None}], "losses": [0.5],
        "corrupt": {}, "model": {"w": weight}, "scaler": {}, "ema": None,
        "optimizer": {
            "state": {"w": {"step": torch.tensor(3.0), "exp_avg": weight}}, "param_groups": [],
        },
    }  # fmt: skip


HARMFUL = {
    "recipe": [None, [], {1: 2}],
    "config": ["cvt-13"],
    "processor": [None, "cvt-13"],
    "images": [None],
    "batches_per_step": [0, 10**9, 1.0, True, "2"],
    "step": [-1, 10**30, 2.5, None, torch.tensor(3)],
    "history": [None, [{}], [1], [{"epoch": "1", "val_top1": None, "val_loss": None}], {}],
    "losses": [None, ["0.5"], 3],
    "corrupt": [None, {"a": 1}, []],
    "model": [None, {}, {"w": 1}, [torch.zeros(1)], {3: torch.zeros(1)}],
    "optimizer": [
        {}, [], {"state": {"v": {}}, "param_groups": []}, {"state": {"w": 1}, "param_groups": []},
        {"state": {"w": {"exp_avg": torch.zeros(3, 2)}}, "param_groups": []},
    ],
    "scaler": [None, {"scale": "x"}],
    "ema": [{}, {"w": None}, 1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in HARMFUL.items() for value in values]
)
def test_a_state_of_wrong_types_is_refused_by_the_name_of_the_key(key, value):
    check_state(whole_state(), Path("step-3"))
    with pytest.raises(ValueError, match=rf"^step-3.state\.pt: {key} ") as raised:
        check_state(whole_state() | {key: value}, Path("step-3"))
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("key", whole_state())
def test_a_state_without_a_key_is_refused_by_its_name(key):
    state = whole_state()
    del state[key]
    with pytest.raises(ValueError, match=rf"state\.pt has no {key}$"):
        check_state(state, Path("step-3"))
    with pytest.raises(ValueError, match=r"holds no state of a run, but list"):
        check_state([], Path("step-3"))


def test_weights_that_are_not_the_models_are_named():
    one, other = torch.zeros(2), torch.zeros(3)
    check_weights({"a": one}, {"a": one}, "model")
    for found, fault in (
        ({"b": one}, "missing a"), ({"a": one, "b": one}, "unexpected b"),
        ({"a": other}, r"a is \(3,\), expected \(2,\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"model does not fit config: {fault}"):
            check_weights(found, {"a": one}, "model")


# ------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("size", [0, 1000])
def test_a_full_disk_leaves_the_checkpoints_before(folder, size):
    with (
        largest_file(size),
        pytest.raises(OSError, match=r"step-00000030 cannot be written: .*[Ff]ile too large"),
    ):
        save_checkpoint(folder, 30, state_at(30), keep=1)
    assert names(folder) == ["step-00000010", "step-00000020"]
    equal(newest_checkpoint(folder)[1], state_at(20))


# ------------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("keep", [1, 2])
def test_no_kill_loses_a_finished_save(tmp_path, keep):
    how = {"kills": 10, "keep": keep, "seed": keep, "torn_at_least": 2}
    torn, saves = kill_during_saves(tmp_path / "checkpoints", **how)
    assert torn >= 2
    assert saves >= 10


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path):
    words = settings(tmp_path / "data", save_steps=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert Process([*words, "--output", str(whole)], tmp_path / "log").exit_code() == 0
    steps, _ = kill_until_done(words, killed, kills=3, seed=0, at_most=0.5)
    assert steps >= 2
    equal(*(newest_checkpoint(run / "checkpoints")[1] for run in (whole, killed)))
    for name in ("results.csv", "best/model.safetensors", "best/README.md", "last/config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
