"""Documentation pages: every name, path and command in them exists.

The pages name the Keras models, so the tests need TensorFlow.
"""

import ast
import inspect
import re
import shlex
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from helpers.small_models import make, tiny

from cvt import PixelError
from cvt.cli import verbs
from cvt.runtime import RUNTIMES, factory
from cvt.runtime.torch_runtime import TorchRuntime
from cvt.train import Callback
from cvt.train.recipe import FIELDS, METRICS_OF, load_recipe, packaged_recipes

ROOT = Path(__file__).parents[2]
# By name in either tree, so that a page without its translation fails.
NAMES = {
    path.relative_to(ROOT / "docs" / language).as_posix()
    for language in ("en", "zh")
    for path in ROOT.glob(f"docs/{language}/**/*.md")
}
TRANSLATED = {
    "README.md": "README.zh-CN.md",
    **{f"docs/en/{name}": f"docs/zh/{name}" for name in sorted(NAMES)},
}
PAGES = [*TRANSLATED, *TRANSLATED.values(), "docs/architecture.md"]
ALL_PAGES = [*PAGES, "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"]
COMMENT = re.compile(r"(?:^|(?<=\s))# (.*)$", re.MULTILINE)  # in sh and Python blocks
COMMANDS = {name: verbs.get_command(None, name) for name in verbs.list_commands(None)}
# Words with an underscore that the training page names and that are no settings.
NO_SETTINGS = {
    *("from_pretrained", "save_to_disk", "learning_rate", "images_per_second"),
    *(name for name in vars(Callback) if name.startswith("on_")),
    *(
        f"{prefix}{name}"
        for names in METRICS_OF.values()
        for name in names
        for prefix in ("", "val_")
    ),
}


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def without_code(page):
    return re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)


def code_blocks(page):
    return re.findall(r"```.*?```", read(page), flags=re.DOTALL)


def without_comments(block):
    return COMMENT.sub("#", block) if block.startswith(("```sh", "```python")) else block


def parts(page):
    """Headings by level, code without comments, table shapes, links: equal in both languages."""
    prose = without_code(page)
    links = set(re.findall(r"\]\(([^)]+)\)", prose))
    return {
        "headings": [len(level) for level in re.findall(r"^(#+) ", prose, flags=re.MULTILINE)],
        "code": [without_comments(block) for block in code_blocks(page)],
        "tables": [line.count("|") for line in prose.splitlines() if line.startswith("|")],
        "links": sorted({re.sub(r"(?<=README)\.zh-CN|\b(?:en|zh)/", "", link) for link in links}),
        "names": sorted({s for s in re.findall(r"`([^`]+)`", prose) if not re.search(r"\s", s)}),
    }


@pytest.mark.parametrize("part", ["headings", "code", "tables", "links", "names"])
@pytest.mark.parametrize("page", TRANSLATED)
def test_a_page_is_the_same_in_both_languages(page, part):
    english, chinese = parts(page)[part], parts(TRANSLATED[page])[part]
    assert english or part != "headings"
    assert english == chinese


@pytest.mark.parametrize("page", TRANSLATED)
def test_comments_in_code_are_translated(page):
    english, chinese = (
        [comment for block in code_blocks(name) for comment in COMMENT.findall(block)]
        for name in (page, TRANSLATED[page])
    )
    for original, comment in zip(english, chinese, strict=True):
        if comment != original:
            assert re.search("[\u4e00-\u9fff]", comment), comment
        else:  # output or a shape
            assert not re.match(r"[a-z]+ [a-z]+\b", comment), comment


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", read(page)):
        assert link.startswith("https://") or (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("page", ALL_PAGES)
def test_paths_of_the_repository_exist(page):
    for path in re.findall(r"\b(?:src|docs|tests|benchmarks)/[\w./-]*\w", read(page)):
        assert (ROOT / path).exists(), path


def commands():
    """The `cvt` commands of pages and recipes: where each is, and its words behind `cvt`."""
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE):
            lines = COMMENT.sub("", block).replace("\\\n", " ").splitlines()
            yield from ((page, line.rstrip()) for line in lines)
    for name, path in packaged_recipes().items():
        for line in re.findall(r"^# command +(.*)", path.read_text("utf-8"), re.MULTILINE):
            yield f"recipes/{name}.yaml", line


@pytest.mark.parametrize(("page", "line"), sorted({(p, c) for p, c in commands() if "cvt " in c}))
def test_every_command_is_understood(page, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(factory, "check_device", lambda device: None)  # some are for a GPU
    Path("mine.yaml").write_text("epochs: 1\n")
    words = shlex.split(line.partition(" > ")[0], comments=True)
    if "cvt" not in words:  # a command of others
        return
    name, *words = words[words.index("cvt") + 1 :]
    given = COMMANDS[name].make_context(name, words).params
    if name == "train":
        changes = dict(word.split("=", 1) for word in given["words"] if "=" in word)
        for unknown in changes.keys() - FIELDS:
            assert f"there is no setting {unknown}" in read(page)
            del changes[unknown]
        options = {k: v for k, v in given.items() if k in FIELDS and v is not None}
        load_recipe(given["config"], changes | options)


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_is_named_exists(page):
    options = {
        option
        for command in [verbs, *COMMANDS.values()]
        for parameter in command.params
        for option in [*parameter.opts, *parameter.secondary_opts]
    }
    assert set(re.findall(r"`(--[a-z-]+)", without_code(page))) <= options | {"--no-deps"}  # of pip


def test_every_setting_that_the_training_page_names_exists():
    prose = without_code("docs/en/training.md")
    for name, value in re.findall(r"`([a-z_]+)=([^`]+)`", prose):
        load_recipe(None, {name: value})
    assert set(re.findall(r"`([a-z]+_[a-z_]+)`", prose)) <= FIELDS.keys() | NO_SETTINGS


def python_blocks():
    for page in PAGES:
        for code in re.findall(r"^```python\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE):
            yield page, code


@pytest.mark.parametrize(("page", "code"), sorted(set(python_blocks())))
def test_python_names_only_what_is_there(page, code):
    tree = list(ast.walk(ast.parse(code)))
    homes = {"cvt": "cvt"}
    for node in tree:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("cvt"):
            homes |= {alias.name: f"{node.module}:{alias.name}" for alias in node.names}
    for node in tree:
        name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
        first, dot, rest = name.partition(".")
        if not (isinstance(node, ast.Call | ast.Attribute | ast.Name) and first in homes):
            continue
        if not re.fullmatch(r"[\w.]+", name):  # of what a call gives
            continue
        thing = resolve_name(homes[first] + dot + rest)
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: None for keyword in node.keywords}
            inspect.signature(thing).bind_partial(*node.args, **keywords)


@pytest.mark.parametrize("page", ALL_PAGES)
def test_every_name_in_cvt_exists(page):
    for name in re.findall(r"`(cvt(?:\.\w+)+)[`(]", without_code(page)):
        resolve_name(name)


def test_the_inference_page_lists_every_runtime():
    rows = re.findall(r"^\| `(\w+)` .*PyTorch|^\| `(\w+)` \| O", read("docs/en/inference.md"), re.M)
    assert tuple(filter(None, (name for row in rows for name in row))) == RUNTIMES


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 4, 32, 32),
        torch.zeros(3, 32, 32),
        torch.zeros(0, 3, 32, 32),
        torch.zeros(1, 3, 2, 2),
        torch.zeros(1, 3, 64, 64),
        torch.full((1, 3, 32, 32), torch.nan),
        torch.linspace(0, 255, 3 * 32 * 32).view(1, 3, 32, 32),
    ],
    ids=["uint8", "channels", "rank", "empty", "small", "export", "nan", "range"],
)
def test_the_inference_page_has_the_words_of_every_pixel_error(pixels):
    runtime = TorchRuntime(make(tiny()))
    runtime.image_size = (32, 32) if pixels.shape[-1] == 64 else None  # as of an export
    with pytest.raises(PixelError) as raised:
        runtime(pixels)
    assert f" | {raised.value} |" in read("docs/en/inference.md")


PUBLIC = ("cvt", "checkpoints", "data", "export", "kernels", "keras", "runtime", "train")


def public_names():
    """The public classes and functions: where each is, and the object."""
    for package in PUBLIC:
        module = import_module("cvt" if package == "cvt" else f"cvt.{package}")
        listed = {"export": ["export"], "runtime": ["available", "open_runtime"]}
        for name in listed.get(package, getattr(module, "__all__", ())):
            thing = getattr(module, name)
            if not isinstance(thing, str) and not inspect.ismodule(thing):
                yield f"{module.__name__}.{name}", thing


@pytest.mark.parametrize(
    ("name", "thing"), [pytest.param(*each, id=each[0]) for each in public_names()]
)
def test_a_public_name_is_in_the_reference_with_an_example(name, thing):
    pages = "".join(read(path.relative_to(ROOT)) for path in ROOT.glob("docs/en/reference/*.md"))
    assert re.search(
        rf"^\.\. [\w:]+:: (?:[\w.]+\.)?{name.rpartition('.')[2]}\b", pages, re.MULTILINE
    )
    is_union = name == "cvt.data.Images"  # of two classes, which have examples
    assert is_union or ">>> " in inspect.getdoc(thing)


def test_architecture_names_every_module():
    tree = read("docs/architecture.md").split("```")[1]
    for path in [*ROOT.glob("src/cvt/*"), *ROOT.glob("src/cvt/*/[!_]*.py")]:
        name = f"{path.name}/" if path.is_dir() else path.name
        if path.suffix == ".py" or any(path.glob("*.py")):
            assert re.search(rf" {re.escape(name)}( |$)", tree, flags=re.MULTILINE), name
