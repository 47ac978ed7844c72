"""The card of the model on the page: a table of facts, and the model card of its folder."""

import re

from cvt.app.texts import Texts
from cvt.app.viewer import Viewer, facts
from cvt.checkpoints import model_source
from cvt.text import printable

CARD_BYTES = 2**16  # of a model card that are shown
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
PICTURE = re.compile(r"!\[([^]]*)\]\([^)]*\)")  # the page loads nothing from elsewhere


def model_card(model: str, viewer: Viewer, texts: Texts) -> str:
    """The card of a model in Markdown.

    Args:
        model: its name, folder or file.
        viewer: the same, loaded.
        texts: the language of the table; a model card is in its own.
    """
    rows = zip(texts.facts, facts(viewer), strict=True)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    written = readme(model)
    return f"| {viewer.name} | |\n|---|---|\n{table}\n" + (f"\n---\n\n{written}" if written else "")


def readme(model: str) -> str:
    """The README.md of a model folder, without its front matter and pictures; empty if none."""
    path = model_source(model).path / "README.md"
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(CARD_BYTES)
    text = PICTURE.sub(r"\1", FRONT_MATTER.sub("", text))
    return printable(re.sub(r"^(?=#)", "##", text, flags=re.MULTILINE).strip(), keep="\n\t")
