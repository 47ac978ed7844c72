"""Writing without losing anything: beside the target first, then moved into place."""

import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MIN_FREE_BYTES, MIN_FREE_INODES = 2**16, 16  # of a disk; with less, it is why a library fails on it
CHECKSUMS = "checksums.json"
ADAPTER = "adapter_config.json"  # which an adapter folder of PEFT has
TENSORFLOW = "tf_model.h5"  # the weights of transformers 4 in TensorFlow
# The files of a model whose sums are kept; a model card may be edited.
SUMMED = ("*.safetensors", "*.safetensors.index.json", "config.json", "preprocessor_config.json",
          "adapter_config.json")  # fmt: skip
# Suffixes that no new folder may have: who gives one expects a file.
FILE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".pdf", ".html"),
    *(".csv", ".json", ".jsonl", ".parquet", ".npy", ".npz", ".txt", ".md", ".yaml", ".yml"),
    *(".pth", ".pt", ".pt2", ".bin", ".ckpt", ".safetensors", ".h5", ".keras", ".pdparams"),
    *(".onnx", ".xml", ".tflite", ".tar", ".gz", ".zip"),
)


def check_path(path: str | os.PathLike, name: str) -> None:
    """Refuse an empty path, which would be the working folder.

    Raises:
        ValueError: it is empty; the error has `name`.
    """
    if not os.fspath(path):
        raise ValueError(f"{name} = '': an empty path names nothing; the working folder is '.'")


def check_folder_name(path: str | os.PathLike) -> None:
    """Refuse the name of a file for a new folder; a folder that is there may have any name.

    Raises:
        ValueError: the name ends as that of a file.
    """
    path = Path(path)
    if path.suffix.lower() in FILE_SUFFIXES and not path.is_dir():
        raise ValueError(
            f"{path} is the name of a file, but a folder is written: leave {path.suffix} out"
        )


def model_folder(folder: Path) -> Path:
    """The folder of a model: of a run, its `best`; else itself."""
    is_run = (folder / "args.yaml").is_file() and not (folder / "config.json").is_file()
    return folder / "best" if is_run else folder


def is_occupied(output: Path) -> bool:
    """Whether no new folder can be here: a file is, or a folder with files that are not hidden."""
    return output.is_file() or any(path.name[0] != "." for path in output.glob("*"))


@contextmanager
def staged(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A path beside `target` to write a file or folder to; it becomes `target` when all went well.

    An existing folder keeps its other files: only those written again are replaced. What is
    written gets the permissions of the umask, whatever library writes it.

    Raises:
        FileExistsError: `target` is there already and may not be overwritten; an empty folder may.
        OSError: the disk is full, or has no inodes left.
        ValueError: `target` is empty.
    """
    check_path(target, "output")
    asked, target = target, Path(target).resolve()  # so that "..", too, has a name of its own
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{asked} exists already; nothing was overwritten")
    if not target.name or any(parent.is_file() for parent in target.parents):
        raise NotADirectoryError(f"{asked} cannot be written: it has no folder to be in")
    with full_disk_named(asked, target.parent):
        place = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    with place as beside, full_disk_named(asked, target.parent):  # asked before it is emptied
        written = Path(beside, target.name)
        yield written
        if target.exists() and target.is_dir() != written.is_dir():
            kind = "folder" if target.is_dir() else "file"
            raise FileExistsError(f"{asked} is a {kind}; nothing was overwritten")
        follow_umask([written, *written.rglob("*")], Path(beside))
        sync(written)
        if target.is_dir():
            # Sums of what is replaced are gone before, and the new ones come after it.
            (target / CHECKSUMS).unlink(missing_ok=True)
            files = [path for path in written.rglob("*") if path.is_file()]
            for file in sorted(files, key=lambda path: (path.name == CHECKSUMS, path)):
                moved = target / file.relative_to(written)
                moved.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, moved)
        else:
            os.replace(written, target)


@contextmanager
def full_disk_named(target: str | Path, folder: Path) -> Iterator[None]:
    """Create a folder, and turn what a full disk there causes into one sentence about `target`.

    Libraries hide the cause: they raise errors of their own kinds for it.

    Raises:
        OSError: the disk is full, or has no inodes left.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except Exception as error:
        cause: BaseException | None = error
        reason = ""
        while cause and not (reason := full_disk_in(cause)):
            cause = cause.__cause__ or cause.__context__
        is_ours = isinstance(error, OSError | ValueError)
        if reason or (not is_ours and full_disk(folder)):
            raise OSError(f"{target} was not written: {full_disk(folder) or reason}") from error
        raise


def full_disk_in(error: BaseException) -> str:
    """The system's message of a full disk in an error of any kind; empty if there is none."""
    if isinstance(error, OSError) and error.errno in FULL:
        return os.strerror(error.errno)
    return next((text for text in map(os.strerror, FULL) if text in str(error)), "")


def full_disk(folder: Path) -> str:
    """A message that the disk of a folder is full; empty if it is not, or if that is unknown."""
    try:
        found = os.statvfs(folder)
    except (AttributeError, OSError):  # Windows; no folder
        return ""
    if found.f_files and found.f_favail < MIN_FREE_INODES:  # some are free again by now
        return f"its disk is full, with {found.f_favail} inodes left, of which each file needs one"
    free = found.f_bavail * found.f_frsize
    return f"its disk is full, with {free:,} bytes left" if free < MIN_FREE_BYTES else ""


def follow_umask(paths: Iterable[Path], folder: Path) -> None:
    """Add the permissions that new files and folders have by the umask, none is taken away.

    safetensors writes files that only their owner can read.

    Args:
        paths: files and folders; symbolic links are left alone.
        folder: where something can be created, to see which permissions it gets: reading the umask
            would change it for other threads.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".umask.") as probe:
        file, subfolder = Path(probe, "file"), Path(probe, "folder")
        file.touch()
        subfolder.mkdir()
        file_mode, folder_mode = (stat.S_IMODE(path.stat().st_mode) for path in (file, subfolder))
    for path in paths:
        if not path.is_symlink():
            mode = stat.S_IMODE(path.stat().st_mode)
            wanted = mode | (folder_mode if path.is_dir() else file_mode)
            if wanted != mode:
                path.chmod(wanted)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits; a file that stays as it is is read once."""
    found = path.stat()
    return _sha256(path.resolve(), found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(1024)
def _sha256(path: Path, *identity: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


Sums = dict[str, tuple[int, str]]  # name, relative to the folder → bytes, SHA-256


def sums_of(folder: Path, names: Iterable[str]) -> Sums:
    """Size and SHA-256 of files in a folder; a folder among them stands for all below it."""
    paths = [file for name in names for file in (folder / name, *(folder / name).rglob("*"))]
    files = sorted({file for file in paths if file.is_file()})
    return {
        file.relative_to(folder).as_posix(): (file.stat().st_size, sha256(file)) for file in files
    }


def damaged_file(folder: Path, sums: Sums) -> Path | None:
    """The first file that has the size that it had, and other bytes; None if all are whole.

    A file of another size was edited or written by other software: a damaged disk or line changes
    bytes, and what is cut off, every reader notices.
    """
    for name, (size, digest) in sums.items():
        path = folder / name
        if path.is_file() and path.stat().st_size == size and sha256(path) != digest:
            return path
    return None


def write_checksums(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write `checksums.json`: size and SHA-256 of files.

    Args:
        folder: where they are.
        names: of the files; by default the weights and the settings of a model.
    """
    if names is None:
        names = [path.name for form in SUMMED for path in folder.glob(form)]
    (folder / CHECKSUMS).write_text(checksums_text(sums_of(folder, names)), encoding="utf-8")


def checksums_text(sums: Sums) -> str:
    """The content of a `checksums.json`."""
    return json.dumps(sums, indent=2) + "\n"


def check_checksums(folder: str | os.PathLike) -> None:
    """Make sure that a model folder is as it was written, where it has a `checksums.json`.

    Raises:
        ValueError: a file is damaged, or checksums.json is.
    """
    path = Path(folder, CHECKSUMS)
    if not path.is_file():
        return
    try:
        sums = {
            str(name): (int(size), str(digest)) for name, (size, digest) in read_json(path).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged; delete it to do without it") from error
    if damaged := damaged_file(Path(folder), sums):
        raise ValueError(
            f"{damaged} is damaged: its SHA-256 is not the one in {CHECKSUMS}; if it was changed "
            f"on purpose, delete {CHECKSUMS}"
        )


def read_json(path: Path) -> Any:
    """What is in a JSON file.

    Raises:
        ValueError: it is no JSON, or nested too deep.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is nested too deep") from None


@contextmanager
def named_in_errors(path: str | os.PathLike) -> Iterator[None]:
    """Put the name of a file in front of what is wrong with its content.

    Raises:
        ValueError: something is.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def weight_files(
    folder: str | os.PathLike,
    subfolder: str = "",
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> list[Path]:
    """The files from which transformers reads the weights in a folder; none if it has none.

    Args:
        folder: of a model.
        subfolder: as in `PreTrainedModel.from_pretrained`.
        variant: likewise.
        use_safetensors: likewise.
    """
    infix = f".{variant}" if variant else ""
    safetensors = [f"model{infix}.safetensors", f"model.safetensors.index{infix}.json"]
    pickled = [f"pytorch_model{infix}.bin", f"pytorch_model.bin.index{infix}.json"]
    names = {None: safetensors + pickled, True: safetensors, False: pickled}[use_safetensors]
    paths = (Path(folder, subfolder or "", name) for name in names)
    path = next(filter(Path.is_file, paths), None)
    if path is None or path.suffix != ".json":
        return [path] if path else []
    try:
        shards = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):  # transformers' own error is clearer
        return [path]
    return [path, *(path.with_name(shard) for shard in shards)]


LFS = b"version https://git-lfs.github.com/spec/"  # how a pointer of git-lfs begins


def pointer_fault(path: Path) -> str:
    """Why a file holds no weights, if it is a pointer that git-lfs leaves in their place.

    Returns:
        A sentence with the fault and what to do; empty if it is no pointer, or no file at all.
    """
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        if file.read(len(LFS)) != LFS:
            return ""
    return f"{path} is a git-lfs pointer, not the weights: `git lfs pull` in its repository gets it"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder, until the end or this process's.

    Raises:
        FileExistsError: another process has the folder.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            # Unlike flock's, this lock is not shared by the workers that the process forks.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise FileExistsError(f"{folder} is in use by another process") from None
        except OSError:  # a file system without locks
            pass
        yield


def sync(path: Path) -> None:
    """Make sure that a file, or a folder with all in it, is on the disk and not only on its way."""
    for entry in [*path.rglob("*"), path] if path.is_dir() else [path]:
        if entry.is_file() or (entry.is_dir() and os.name == "posix"):
            descriptor = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
