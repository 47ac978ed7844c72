"""The code of a model, which a folder carries for transformers without this package."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .files import read_json, sha256

# In the config.json of a folder that carries this code: which class transformers takes from where.
# transformers copies each module that is named here to a place of its own, with those that it
# imports: so the configuration's class is named where the model finds it.
AUTO_MAP = {
    "AutoConfig": "modeling.CvtConfig",
    "AutoModel": "modeling.CvtModel",
    "AutoModelForImageClassification": "modeling.CvtForImageClassification",
}


def code_files() -> dict[str, Path]:
    """The modules by which transformers computes a model without this package, by their names."""
    model = Path(__file__).with_name("modeling.py")
    return {path.name: path for path in [model, *map(Path, get_relative_import_files(model))]}


def carries_code(folder: Path) -> bool:
    """Whether the config.json of a folder takes the classes from this package's code beside it."""
    with suppress(OSError, ValueError, AttributeError):
        named = read_json(folder / "config.json").get("auto_map")
        return isinstance(named, dict) and any(named.get(n) == c for n, c in AUTO_MAP.items())
    return False


def other_code(folder: Path) -> list[str]:
    """The files of a folder that have the name of a module, and other content."""
    return [
        name
        for name, module in sorted(code_files().items())
        if (folder / name).exists() and sha256(folder / name) != sha256(module)
    ]


def write_code(folder: Path) -> None:
    """Copy the modules into a model folder; those of another version of this package are replaced.

    Raises:
        FileExistsError: a file there has the name of one, and is not this package's.
    """
    if (others := other_code(folder)) and not carries_code(folder):
        raise FileExistsError(
            f"{folder} has files of other content, {', '.join(others)}; nothing was overwritten"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in code_files().items():
        shutil.copyfile(module, folder / name)


@contextmanager
def code_carried(config: Any, folder: str | os.PathLike | None) -> Iterator[None]:
    """Write the code into a folder, and let the file of a configuration name its classes.

    Args:
        config: of a model that is saved in the `with` block.
        folder: of the model; None where another process writes the files.

    Raises:
        FileExistsError: as in `write_code`.
    """
    if folder is not None:
        write_code(Path(folder))
    before = getattr(config, "auto_map", None)
    config.auto_map = dict(AUTO_MAP)
    try:
        yield
    finally:
        if before is None:
            del config.auto_map
        else:
            config.auto_map = before
