import errno
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from helpers.small_models import make, tiny
from safetensors.torch import save_file

from cvt import image_processor
from cvt.architecture import VARIANTS
from cvt.checkpoints import convert, load_classifier, load_config, transformers_to_authors
from cvt.data import open_labelled, open_training
from cvt.export import export
from cvt.files import check_checksums, locked, staged, write_checksums
from cvt.inference.predict import find_images
from cvt.runtime import open_runtime
from cvt.train import load_recipe, resume, train


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


def test_an_interrupted_export_leaves_nothing(place):
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


# ------------------------------------------------------------------------------ a full disk


class LibraryError(Exception):
    pass


@pytest.mark.parametrize("hidden", [False, True])
def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, hidden):
    full = OSError(errno.ENOSPC, "No space left on device")
    error = LibraryError("I/O error") if hidden else full
    error.__cause__ = full if hidden else None

    def write():
        with staged(tmp_path / "a") as file:
            file.write_text("half")
            raise error

    with pytest.raises(OSError, match=r"a was not written: No space left on device$"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "inodes", "why"), [(1, 99, "full, with 1 b"), (9**9, 3, "3 inodes")]
)
def test_what_a_library_hides_the_disk_reports(tmp_path, monkeypatch, free, inodes, why):
    disk = SimpleNamespace(f_files=99, f_favail=inodes, f_bavail=free, f_frsize=1)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    with (
        pytest.raises(OSError, match=rf"a was not written: its disk .*{why}"),
        staged(tmp_path / "a"),
    ):
        raise LibraryError("Serialisation failed")
    with pytest.raises(ValueError, match="ours"), staged(tmp_path / "a"):
        raise ValueError("ours")


# ------------------------------------------------------------------------------ an empty path


EMPTY = {
    "staged": lambda: staged("").__enter__(),
    "load_classifier": lambda: load_classifier(""),
    "load_config": lambda: load_config(""),
    "open_runtime": lambda: open_runtime(""),
    "find_images": lambda: find_images([""]),
    "open_labelled": lambda: open_labelled(""),
    "open_training": lambda: open_training(""),
    "export": lambda: export("", "out", "onnx"),
    "export to": lambda: export("cvt-13", "", "onnx"),
    "convert": lambda: convert("", "out"),
    "convert to": lambda: convert("a.pth", ""),
    "train": lambda: train(load_recipe(), ""),
    "resume": lambda: resume(""),
    "image_processor": lambda: image_processor(""),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_path_is_not_the_working_folder(name, summed, monkeypatch):
    monkeypatch.chdir(summed)
    before = sorted(summed.rglob("*"))
    with pytest.raises((ValueError, OSError), match=r"an empty path|^: is neither"):
        EMPTY[name]()
    assert sorted(summed.rglob("*")) == before


# ------------------------------------------------------------------------------ checksums


@pytest.fixture
def summed(tmp_path):
    folder = tmp_path / "model"
    model = make(tiny(depth=[1, 1, 1]))
    model.save_pretrained(folder)
    image_processor(model.config).save_pretrained(folder)
    (folder / "README.md").write_text("a card")
    write_checksums(folder)
    return folder


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "preprocessor_config.json", "checksums.json"]
)
def test_a_flipped_bit_in_a_model_folder_is_refused_by_the_files_name(summed, name):
    content = (summed / name).read_bytes()
    places = range(0, len(content), max(1, len(content) // 12))
    silent = []
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1
        (summed / name).write_bytes(flipped)
        try:
            check_checksums(summed)
        except ValueError as error:
            assert name in str(error)  # noqa: PT017
            assert "delete" in str(error)  # noqa: PT017
        else:
            silent.append(place)
    # In the sums themselves, a flip in a name only takes the check of that file away.
    assert not silent or name == "checksums.json"
    (summed / name).write_bytes(content)
    check_checksums(summed)


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "{}", "{}-out"),
        ("export", "{}", "{}-out", "--to", "torch-export", "--image-size", "32"),
        ("benchmark", "{}", "--runtimes", "torch", "--seconds", "0", "--image-sizes", "32"),
    ],
    ids=lambda command: command[0],
)
def test_the_commands_open_a_damaged_model_only_without_verification(cvt, summed, command):
    command = [word.format(summed) for word in command]
    flip(summed / "model.safetensors")
    code, _, errors = cvt(*command)
    assert code == 1
    assert "model.safetensors is damaged" in errors
    code, _, errors = cvt(*command, "--no-verify")
    assert code == 0, errors


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 8
    path.write_bytes(content)


def test_a_damaged_model_opens_only_without_verification(summed):
    flip(summed / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_classifier(summed)
    load_classifier(summed, verify=False)
    (summed / "checksums.json").unlink()
    load_classifier(summed)


def test_a_model_saved_over_another_is_not_refused(summed):
    (summed / "README.md").write_text("edited")
    config = (summed / "config.json").read_text()
    (summed / "config.json").write_text(config.replace("LABEL_0", "tabby cat"))
    model = load_classifier(summed)
    assert model.config.class_names[0] == "tabby cat"
    with torch.no_grad():
        model.classifier.bias.add_(1)
    model.save_pretrained(summed)  # of the same size
    assert torch.equal(load_classifier(summed).classifier.bias, model.classifier.bias)
    write_checksums(summed)
    other = summed.with_name("other")
    convert(summed, other)
    shutil.rmtree(summed)
    convert(other, summed)
    assert (summed / "checksums.json").is_file()
    load_classifier(summed)


def test_sums_of_what_is_replaced_go_with_it(summed):
    with staged(summed, overwrite=True) as folder:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"other")
    assert not (summed / "checksums.json").exists()


def test_a_full_disk_ends_no_process(tmp_path):
    """Given a path, PyTorch's writer throws in a destructor when the disk is full."""
    make(tiny(depth=[1, 1, 1], hidden_act="quick_gelu")).save_pretrained(tmp_path / "model")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.pth was not written: .*[Ff]ile too large"):
            convert(tmp_path / "model", tmp_path / "a.pth", to="authors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
