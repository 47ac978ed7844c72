"""Optional libraries: each extra that an error recommends brings what is missing."""

import ast
import functools
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cvt
from cvt.export import BY_KERAS, LIBRARIES
from cvt.inference.embedding_file import EmbeddingFile
from cvt.inference.prediction_file import open_predictions
from cvt.train import tracking

DISTRIBUTIONS = packages_distributions()  # by the names that they are imported by


def required():
    """Library and extra of every call of `require`, and of the tables that some of them use."""
    for path in Path(cvt.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "require":
                continue
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            extra = given.get("extra", ast.Constant("export"))
            for library in call.args[1:]:
                if isinstance(library, ast.Constant) and isinstance(extra, ast.Constant):
                    yield library.value, extra.value
    for to, libraries in LIBRARIES.items():
        for library in libraries:
            yield library, "tensorflow" if to in BY_KERAS else "export"
    yield "nncf", "export"
    for libraries, extra in tracking.LIBRARIES.values():
        for library in libraries:
            yield library, extra


@functools.cache
def installed_by(extra):
    """The names of all packages that pip installs with an extra of this one."""
    found, todo = set(), [("cvt-vision", frozenset([extra]))]
    seen = set(todo)
    while todo:
        name, extras = todo.pop()
        found.add(canonicalize_name(name))
        try:
            needed = map(Requirement, requires(name) or [])
        except PackageNotFoundError:  # for another system
            continue
        for each in needed:
            wanted = each.marker is None or any(
                each.marker.evaluate({"extra": extra}) for extra in extras or {""}
            )
            if wanted and (more := (each.name, frozenset(each.extras))) not in seen:
                seen.add(more)
                todo.append(more)
    return found


@pytest.mark.parametrize(("library", "extra"), sorted(set(required())))
def test_the_extra_that_an_error_names_has_the_library(library, extra):
    packages = {canonicalize_name(name) for name in DISTRIBUTIONS[library]}
    assert packages & installed_by(extra)


@pytest.mark.parametrize("opened", [EmbeddingFile, open_predictions])
def test_a_table_needs_no_ray(monkeypatch, tmp_path, opened):
    monkeypatch.setattr("cvt.libraries.is_installed", lambda *libraries: libraries != ("pyarrow",))
    with pytest.raises(ImportError, match=r"a.parquet needs pyarrow: .*cvt-vision\[search\]"):
        opened(tmp_path / "a.parquet")
