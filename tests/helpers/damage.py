"""Damage to the files of an export."""

import pytest

from cvt.runtime import open_runtime
from cvt.runtime.manifest import Manifest


def assert_flips_are_refused(folder, places):
    """Assert that a flipped bit in so many places of every file is refused by the file's name."""
    manifest = Manifest.read(folder)
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert manifest.files.keys() == there - {"export.json"}
    for name in manifest.files:
        content = (folder / name).read_bytes()
        for place in range(0, len(content), max(1, len(content) // places)):
            flipped = bytearray(content)
            flipped[place] ^= 4
            (folder / name).write_bytes(flipped)
            with pytest.raises(ValueError, match=f"{name} is damaged or was changed"):
                manifest.verify(folder)
        with pytest.raises(ValueError, match=f"{name} is damaged or was changed.*--no-verify"):
            open_runtime(folder)
        (folder / name).write_bytes(content)
