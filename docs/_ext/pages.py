"""What a page of the site has that its file has not: other links, and generated parts."""

import inspect
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from commands import reference
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
# On GitHub, the second line of a page; the site has a switch in its bar.
SWITCH = re.compile(r"^(?:\*\*English\*\* \| .*|.* \| \*\*中文\*\*)\n\n", re.MULTILINE)
COMMANDS = "<!-- commands -->"
DEMO = "<!-- demo -->"
# A browser shows the end of a line as a space, which Chinese does not have.
JOINED = re.compile(
    r"(?<=[\u3000-\u9fff\uff00-\uffef])\n *(?=[\u3000-\u9fff\uff00-\uffef])"
    r"|(?<=[，。；：、）])\n *(?=[\w`])"
)


def copy_notebooks(app: Sphinx) -> None:
    """Copy the notebooks of the language beside its pages, where Sphinx finds them."""
    folder = ROOT / "notebooks" / ("zh" if app.config.language == "zh_CN" else "")
    copies = Path(app.srcdir, "notebooks")
    shutil.rmtree(copies, ignore_errors=True)
    for notebook in sorted(folder.glob("*.ipynb")):
        copies.mkdir(exist_ok=True)
        shutil.copy2(notebook, copies)


def adapt(app: Sphinx, docname: str, content: list[str]) -> None:
    """Adapt a page to the site: no switch, links that lead to its pages, the commands."""
    chinese = app.config.language == "zh_CN"
    pages = Path(app.srcdir)
    folder = pages.joinpath(docname).parent
    if folder.name == "notebooks":
        folder = ROOT / "notebooks" / ("zh" if chinese else "")

    def link(match: re.Match) -> str:
        text, path, anchor = match[1], folder.joinpath(match[2]).resolve(), match[3] or ""
        if path.is_relative_to(pages):
            return f"[{text}](/{path.relative_to(pages)}{anchor})"
        if path.is_relative_to(ROOT / "notebooks"):
            return f"[{text}](/notebooks/{path.name}{anchor})"
        if path.name in ("README.md", "README.zh-CN.md") and path.parent == ROOT:
            return f"[{text}](/index.md)"
        return text if "`" in text else f"`{text}`"  # a contributors' page is none of the site

    text = SWITCH.sub("", content[0], count=1)
    text = re.sub(r"\[([^]\n]+)\]\(([\w./-]+\.(?:md|ipynb))(#[\w-]+)?\)", link, text)
    text = text.replace(COMMANDS, reference(chinese) if COMMANDS in text else "")
    text = text.replace(DEMO, demo(chinese))
    if chinese and not content[0].startswith("{"):  # not in a notebook, which is JSON
        text = "".join(
            piece if piece.startswith("```") else JOINED.sub("", piece)
            for piece in re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
        )
    content[0] = text


def demo(chinese: bool) -> str:
    """The page that docs/web_demo.py writes, in a frame."""
    language, title = ("zh", "演示") if chinese else ("en", "Demo")
    address = f"../demo/index.html?lang={language}&image=examples/7.png&image=examples/3.png"
    frame = f'<iframe class="demo" src="{address}" title="{title}" loading="lazy"></iframe>'
    return f"```{{raw}} html\n{frame}\n```"


def shorten(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Leave of a long signature the fields and their defaults; nothing where a table has them."""
    if name == "cvt.train.Recipe":
        return "(**settings)", ""
    if name == "cvt.CvtConfig":
        fields = inspect.signature(thing).parameters.values()
        own = (field for field in fields if field.kind is field.KEYWORD_ONLY)
        return f"(*, {', '.join(f'{field.name}={field.default!r}' for field in own)}, **kwargs)", ""
    return None


def mark_code(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Mark an indented block behind a paragraph as code, as Markdown takes it."""
    marked: list[str] = []
    for line in lines:
        before = next((each for each in reversed(marked) if each), "")
        is_block = line.startswith("    ") and marked and not marked[-1]
        if is_block and before and not before.startswith((" ", ".. ")) and before[-2:] != "::":
            marked += ["::", ""]
        marked.append(line)
    lines[:] = marked


def drop_contents_entry(app: Sphinx, domain: str, objtype: str, content: nodes.Node) -> None:
    """Leave a class out of the contents of the page of CvT, where it has a heading of its name."""
    if app.env.current_document.docname == "reference/cvt":
        for signature in content.parent[:-1]:
            signature["_toc_name"] = ""


class ModuleDoc(SphinxDirective):
    """The docstring of a module, which is Markdown."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the docstring where the directive stands."""
        text = inspect.getdoc(import_module(self.arguments[0])) or ""
        container = nodes.container()
        lines = StringList(text.splitlines(), source=self.arguments[0])
        self.state.nested_parse(lines, 0, container)
        return container.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to the events of a build."""
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", adapt)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-process-docstring", mark_code, priority=400)  # before napoleon
    app.connect("object-description-transform", drop_contents_entry)
    app.add_directive("module-doc", ModuleDoc)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
