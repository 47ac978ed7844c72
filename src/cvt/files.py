"""Writing without losing anything: beside the target first, then moved into place."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A path beside `target` to write a file or folder to; it becomes `target` when all went well.

    An existing folder keeps its other files: only those written again are replaced.

    Raises:
        FileExistsError: `target` is there already and may not be overwritten; an empty folder may.
    """
    target = Path(target)
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists already; nothing was overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        written = Path(beside, target.name)
        yield written
        if written.is_dir() and target.is_dir():
            for file in sorted(path for path in written.rglob("*") if path.is_file()):
                moved = target / file.relative_to(written)
                moved.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, moved)
        elif target.is_dir() and any(target.iterdir()):
            raise FileExistsError(f"{target} is a folder; nothing was overwritten")
        else:
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(written, target)
