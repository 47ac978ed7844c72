"""Run the notebooks in clean kernels, and store their outputs or check that no cell fails.

    python notebooks/execute.py                     # run all notebooks and store their outputs
    python notebooks/execute.py inference keras     # run these
    python notebooks/execute.py --check --jobs 2    # run all, store nothing; exit code 1 on failure

The outputs in the repository come from this script alone. The Chinese notebooks in `zh/` have the
code of the English ones, comments aside, so each receives the outputs of its English twin.
"""

import argparse
import hashlib
import os
import sys
import tokenize
from concurrent.futures import ProcessPoolExecutor
from io import StringIO
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
SECONDS = 600  # that a cell may take
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def notebooks(names: list[str] | None = None) -> list[Path]:
    """Return the English notebooks, or those of these names.

    Raises:
        FileNotFoundError: there is no notebook of a name.
    """
    found = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    for name in names or ():
        if name not in found:
            raise FileNotFoundError(f"there is no notebook {name}; there are {', '.join(found)}")
    return [found[name] for name in names or found]


def read(path: Path) -> NotebookNode:
    """Read a notebook and check it against the schema of its format."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the code cells of a notebook, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def without_comments(source: str) -> str:
    """Return the code of a cell without its comments and blank lines.

    A cell of another language, such as `%%sh`, is returned as it is.
    """
    if source.startswith("%%"):
        return source
    lines = source.splitlines(keepends=True)
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip() + "\n"
    return "".join(line for line in lines if line.strip())


def digest(notebook: NotebookNode) -> str:
    """Return the SHA-256 of the code: it shows whether the outputs belong to this code."""
    code = "\0".join(without_comments(cell.source) for cell in code_cells(notebook))
    return hashlib.sha256(code.encode()).hexdigest()


def run(path: Path) -> NotebookNode:
    """Execute a notebook in a clean kernel, in an empty folder, on one thread and offline.

    Raises:
        CellExecutionError: a cell fails; has its traceback.
    """
    notebook = read(path)
    with TemporaryDirectory() as folder:
        settings = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TMPDIR": folder,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONWARNINGS": "ignore:IProgress",  # tqdm's, where ipywidgets is not installed
        }
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env={**os.environ, **settings})
    return notebook


def store(path: Path, executed: NotebookNode) -> None:
    """Write the outputs of an executed notebook into its file and into its Chinese twin.

    Raises:
        ValueError: the two notebooks differ in more than their comments.
    """
    for target in (path, path.parent / "zh" / path.name):
        notebook = read(target)
        if digest(notebook) != digest(executed):
            raise ValueError(f"{target}: its code is not that of {path}")
        for cell, source in zip(code_cells(notebook), code_cells(executed), strict=True):
            cell.outputs, cell.execution_count = source.outputs, source.execution_count
            cell.metadata = {}
        notebook.metadata = METADATA | {"executed_code": digest(executed)}
        nbformat.write(notebook, target)


def process(path: Path, check: bool) -> str:
    """Run a notebook and store its outputs unless `check`; return what failed, or nothing."""
    try:
        executed = run(path)
    except CellExecutionError as error:
        return f"{path.name}: {error}"
    if not check:
        store(path, executed)
    return ""


def main() -> None:
    """Run the notebooks that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="Notebooks to run, all by default.")
    parser.add_argument("--check", action="store_true", help="Do not store the outputs.")
    parser.add_argument("--jobs", type=int, default=1, help="Notebooks to run at a time.")
    arguments = parser.parse_args()
    paths = notebooks(arguments.names)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        failures = 0
        for path, failure in zip(
            paths, pool.map(process, paths, repeat(arguments.check)), strict=True
        ):
            print(failure or f"{path.name}: every cell runs", flush=True)
            failures += bool(failure)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
