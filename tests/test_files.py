import os
import signal
import subprocess
import sys

import pytest

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
