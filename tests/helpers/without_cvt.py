"""Runs a program by a Python in which this package cannot be imported."""

import os
import subprocess
import sys

HIDE = """
import runpy, sys

class Hidden:  # where it is installed, too
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "cvt":
            raise ModuleNotFoundError("No module named 'cvt'", name="cvt")

sys.meta_path.insert(0, Hidden())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without_cvt(program, *arguments, home, python=sys.executable, **variables):
    """Run a file; `home` is for the hub library, which is offline unless `variables` say otherwise.

    Returns:
        What it prints.
    """
    command = [python, "-c", HIDE, str(program), *map(str, arguments)]
    return run_by_itself(command, home, **variables)


def run_by_itself(command, home, **variables):
    """Run a command with no setting of the hub library but these."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
