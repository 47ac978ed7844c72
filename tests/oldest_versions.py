"""Print the oldest versions that pyproject.toml admits, as constraints for pip: `make test-oldest`.

Every lower bound names a release, so it can be installed and tested. The Python that runs this must
be the oldest one too.
"""

import re
import sys
import tomllib
from itertools import chain
from pathlib import Path

FILE = Path(__file__).parents[1] / "pyproject.toml"
PROJECT = tomllib.loads(FILE.read_text("utf-8"))["project"]
PYTHON = PROJECT["requires-python"].removeprefix(">=")


def requirements():
    """All that pyproject.toml requires, in every extra."""
    return list(chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()))


def oldest(requirements):
    """Each requirement pinned to its lower bound, sorted; extras of this package are left out.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    pins = set()
    for requirement in requirements:
        specifiers, *marker = requirement.split(";")
        name = re.match(r"[\w.-]+", specifiers)[0]
        if name == "cvt-vision":
            continue
        bound = re.search(r">=\s*([\w.]+)", specifiers)
        if bound is None:
            raise ValueError(f"{requirement!r} has no lower bound: write {name}>=VERSION")
        pins.add(";".join([f"{name}=={bound[1]}", *marker]))
    return sorted(pins)


if __name__ == "__main__":
    if "{}.{}".format(*sys.version_info) != PYTHON:
        sys.exit(f"the oldest versions are tested on Python {PYTHON}: pass PYTHON=python{PYTHON}")
    print(*oldest(requirements()), sep="\n")
