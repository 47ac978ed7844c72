"""Writing without losing anything: beside the target first, then moved into place."""

import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def check_path(path: str | os.PathLike, name: str) -> None:
    """Refuse an empty path, which would be the working folder.

    Raises:
        ValueError: it is empty; `name` says which it is.
    """
    if not os.fspath(path):
        raise ValueError(f"{name} = '': an empty path names nothing; the working folder is '.'")


@contextmanager
def staged(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A path beside `target` to write a file or folder to; it becomes `target` when all went well.

    An existing folder keeps its other files: only those written again are replaced. What is
    written gets the permissions of the umask, whatever library writes it.

    Raises:
        FileExistsError: `target` is there already and may not be overwritten; an empty folder may.
        ValueError: `target` is empty.
    """
    check_path(target, "output")
    asked, target = target, Path(target).resolve()  # so that "..", too, has a name of its own
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{asked} exists already; nothing was overwritten")
    if not target.name or any(parent.is_file() for parent in target.parents):
        raise NotADirectoryError(f"{asked} cannot be written: it has no folder to be in")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        written = Path(beside, target.name)
        yield written
        if target.exists() and target.is_dir() != written.is_dir():
            kind = "folder" if target.is_dir() else "file"
            raise FileExistsError(f"{asked} is a {kind}; nothing was overwritten")
        follow_umask([written, *written.rglob("*")], Path(beside))
        sync(written)
        if target.is_dir():
            for file in sorted(path for path in written.rglob("*") if path.is_file()):
                moved = target / file.relative_to(written)
                moved.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, moved)
        else:
            os.replace(written, target)


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
        of_file, of_folder = (stat.S_IMODE(path.stat().st_mode) for path in (file, subfolder))
    for path in paths:
        if not path.is_symlink():
            mode = stat.S_IMODE(path.stat().st_mode)
            wanted = mode | (of_folder if path.is_dir() else of_file)
            if wanted != mode:
                path.chmod(wanted)


LFS = b"version https://git-lfs.github.com/spec/"  # how a pointer of git-lfs begins


def pointer_fault(path: Path) -> str:
    """Why a file holds no weights, if it is a pointer that git-lfs leaves in their place.

    Returns:
        A sentence that says so and what to do; empty if it is no pointer, or no file at all.
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
