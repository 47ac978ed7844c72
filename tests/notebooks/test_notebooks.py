"""The notebooks run from a clean kernel, and their outputs belong to the code that is shown."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
sys.path.insert(0, str(FOLDER))
execute = importlib.import_module("execute")

ENGLISH = sorted(FOLDER.glob("*.ipynb"))
CHINESE = sorted(FOLDER.glob("zh/*.ipynb"))
NAMES = [path.stem for path in ENGLISH]
PICTURES = {"image/png", "image/jpeg"}
LARGEST = 300_000  # bytes


in_both_languages = pytest.mark.parametrize(
    "path",
    ENGLISH + CHINESE,
    ids=[f"en-{name}" for name in NAMES] + [f"zh-{name}" for name in NAMES],
)


def outputs(notebook):
    return [output for cell in execute.code_cells(notebook) for output in cell.outputs]


def kinds(cell):
    """The kinds of what a cell has printed and drawn."""
    return [sorted(output.get("data", {output.get("name"): ""})) for output in cell.outputs]


def comments(cell):
    """The comments of a cell that people read."""
    found = re.findall(r"(?:^|  )# (.*)$", cell.source, flags=re.MULTILINE)
    return [comment for comment in found if comment != "isort: skip"]


def test_every_notebook_is_there_in_both_languages():
    assert set(NAMES) == {
        "inference",
        "fine_tune_on_your_photos",
        "features_and_explanations",
        "segmentation_and_detection",
        "export_and_serve",
        "keras",
    }
    assert [path.stem for path in CHINESE] == NAMES


@in_both_languages
def test_a_notebook_explains_first_and_shows_pictures(path):
    notebook = execute.read(path)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# .+\n\n.{40,}", first.source)  # a title, and what is done and why
    assert [output for output in outputs(notebook) if PICTURES & set(output.get("data", ()))]
    counts = [cell.execution_count for cell in execute.code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))  # from a clean kernel, in order
    assert not any(output.output_type == "error" for output in outputs(notebook))


@in_both_languages
def test_a_notebook_is_small_and_keeps_no_trace_of_a_machine(path):
    text = path.read_text("utf-8")
    assert len(text.encode()) < LARGEST
    shown = json.dumps([cell.source for cell in execute.read(path).cells])
    for output in outputs(execute.read(path)):
        texts = [value for kind, value in output.get("data", {}).items() if kind not in PICTURES]
        shown += json.dumps([texts, output.get("text")])
    assert not re.search(r"/(tmp|home|root|work|Users|usr)\b", shown)
    assert not re.search(r"Warning| at 0x", shown)
    assert all(not cell.metadata for cell in execute.read(path).cells)  # no times of execution


@in_both_languages
def test_links_lead_to_files(path):
    for cell in execute.read(path).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", cell.source):
                assert link.startswith("https://") or (path.parent / link).exists(), link


@pytest.mark.parametrize("path", ENGLISH, ids=NAMES)
def test_both_languages_have_the_same_code_and_outputs(path):
    english, chinese = execute.read(path), execute.read(FOLDER / "zh" / path.name)
    assert [c.cell_type for c in english.cells] == [c.cell_type for c in chinese.cells]
    for one, other in zip(english.cells, chinese.cells, strict=True):
        if one.cell_type == "markdown":
            levels = [re.findall(r"^#+ ", cell.source, flags=re.MULTILINE) for cell in (one, other)]
            assert levels[0] == levels[1]
            assert re.search("[\u4e00-\u9fff]", other.source)
        else:
            assert execute.without_comments(one.source) == execute.without_comments(other.source)
            assert one.outputs == other.outputs
            assert all(re.search("[\u4e00-\u9fff]", comment) for comment in comments(other))


@in_both_languages
def test_the_outputs_are_those_of_the_code(path):
    """A cell that was edited afterwards needs `python notebooks/execute.py NAME`."""
    notebook = execute.read(path)
    assert notebook.metadata["executed_code"] == execute.digest(notebook)


def test_a_failing_cell_is_reported_and_nothing_is_stored(tmp_path):
    path = tmp_path / "broken.ipynb"
    path.write_text((FOLDER / "inference.ipynb").read_text("utf-8"), "utf-8")
    notebook = execute.read(path)
    notebook.cells = execute.code_cells(notebook)[:1]
    notebook.cells[0].source = "print('before')\n1 / 0"
    execute.nbformat.write(notebook, path)
    before = path.read_bytes()
    assert "ZeroDivisionError" in execute.process(path, check=False)
    assert path.read_bytes() == before


@pytest.mark.parametrize("path", ENGLISH, ids=NAMES)
def test_a_notebook_runs_from_a_clean_kernel(path):
    stored, executed = execute.read(path), execute.run(path)
    for old, new in zip(execute.code_cells(stored), execute.code_cells(executed), strict=True):
        assert kinds(new) == kinds(old), new.source
