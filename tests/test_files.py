import os
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from small_models import make, tiny

from cvt import image_processor
from cvt.checkpoints import convert, transformers_to_authors
from cvt.configuration import VARIANTS
from cvt.files import locked, staged


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "outer/inner").mkdir(parents=True)
    (tmp_path / "outer/thesis.txt").write_text("outer")
    (tmp_path / "outer/inner/thesis.txt").write_text("inner")
    monkeypatch.chdir(tmp_path / "outer/inner")
    return tmp_path / "outer"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def write_file(target, overwrite=False):
    with staged(target, overwrite) as file:
        file.write_text("new")


def write_folder(target, overwrite=False):
    with staged(target, overwrite) as folder:
        folder.mkdir()
        (folder / "new.txt").write_text("new")


@pytest.mark.parametrize("target", ["..", "new/..", ".", "../inner"])
def test_a_folder_by_any_name_keeps_what_is_in_it(place, target):
    before = contents(place)
    with pytest.raises(FileExistsError):
        write_folder(target)
    assert contents(place) == before
    write_folder(target, overwrite=True)
    where = "new.txt" if target == ".." else "inner/new.txt"
    assert contents(place) == {**before, where: "new"}


def stopped_half_way(target):
    with staged(target) as file:
        file.write_text("half")
        raise KeyboardInterrupt


def test_a_stop_half_way_leaves_nothing(place):
    before = contents(place)
    with pytest.raises(KeyboardInterrupt):
        stopped_half_way("a.txt")
    assert contents(place) == before


def test_a_file_is_not_replaced_by_a_folder_nor_the_reverse(place):
    before = contents(place)
    with pytest.raises(FileExistsError, match=r"thesis\.txt is a file"):
        write_folder("thesis.txt", overwrite=True)
    with pytest.raises(FileExistsError, match="inner is a folder"):
        write_file("../inner", overwrite=True)
    assert contents(place) == before


def test_a_file_is_no_folder_to_be_in(place):
    with pytest.raises(NotADirectoryError, match=r"thesis\.txt/x cannot be written"):
        write_file("thesis.txt/x")


def test_a_locked_folder_is_refused_to_other_processes_until_its_own_ends(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path; from cvt.files import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    if not os.fork(): time.sleep(30)\n"  # as a worker, which outlives a kill
        "    print('locked', flush=True); time.sleep(30)"
    )
    command = [sys.executable, "-c", code, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(FileExistsError, match="in use by another process"), locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with locked(tmp_path):
            pass
        os.killpg(holder.pid, signal.SIGKILL)


# ------------------------------------------------------------------------------ permissions


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder):
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode)
        for path in folder.rglob("*")
    }


MASKS = [0o022, 0o027, 0o077]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", MASKS)
def test_what_is_written_has_the_permissions_of_the_umask(tmp_path, mask):
    with umask(mask):
        with staged(tmp_path / "new") as folder:
            (folder / "sub").mkdir(parents=True)
            save_file({"a": torch.zeros(2)}, folder / "sub/a.safetensors")
            (folder / "run.sh").touch(0o700)
            (folder / "link").symlink_to("/")
        with staged(tmp_path / "b.safetensors") as file:
            save_file({"a": torch.zeros(2)}, file)
    found = modes(tmp_path)
    assert found.pop("new/link") == stat.S_IMODE(os.stat("/").st_mode)
    assert found.pop("new/run.sh") == 0o700 | 0o666 & ~mask  # none is taken away
    assert found == {
        "new": 0o777 & ~mask,
        "new/sub": 0o777 & ~mask,
        "new/sub/a.safetensors": 0o666 & ~mask,
        "b.safetensors": 0o666 & ~mask,
    }


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", MASKS)
def test_models_are_readable_by_the_umask(tmp_path, mask, monkeypatch):
    model = make(tiny(hidden_act="quick_gelu"))
    fields = ("embed_dim", "num_heads", "depth", "mlp_ratio")
    own = {name: getattr(model.config, name) for name in fields}
    monkeypatch.setitem(VARIANTS, "cvt-own", own)
    torch.save(transformers_to_authors(model.state_dict()), tmp_path / "a.pth")
    folder = tmp_path / "saved"
    with umask(mask):
        folder.mkdir()
        save_file({"a": torch.zeros(2)}, folder / "private.safetensors")
        model.save_pretrained(folder)
        model.save_pretrained(folder / "sharded", max_shard_size="20KB")
        image_processor(model.config).save_pretrained(folder)
        convert(tmp_path / "a.pth", tmp_path / "converted", image_size=32)
        convert(folder, tmp_path / "b.pth", to="authors")
    found = modes(tmp_path)
    assert found.pop("saved/private.safetensors") == 0o600  # not ours
    del found["a.pth"]
    assert len([name for name in found if name.endswith(".safetensors")]) > 3
    folders = {"saved", "saved/sharded", "converted"}
    assert found == {name: (0o777 if name in folders else 0o666) & ~mask for name in found}
