import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def parts(page):
    """Headings by level, code blocks, table shapes, links: what both languages must share."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```.*?```", text, flags=re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    links = set(re.findall(r"\]\(([^)]+)\)", prose)) - {"README.md", "README.zh-CN.md"}
    return {
        "headings": [len(level) for level in re.findall(r"^(#+) ", prose, flags=re.MULTILINE)],
        "code": blocks,
        "tables": [line.count("|") for line in prose.splitlines() if line.startswith("|")],
        "links": sorted(links),
        "names": sorted(set(re.findall(r"`([^`\s]+)`", prose))),
    }


@pytest.mark.parametrize("part", ["headings", "code", "tables", "links", "names"])
def test_the_readme_is_the_same_in_both_languages(part):
    english, chinese = parts("README.md")[part], parts("README.zh-CN.md")[part]
    assert english
    assert english == chinese


@pytest.mark.parametrize(
    "page", ["README.md", "README.zh-CN.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_links_to_files_lead_somewhere(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert link.startswith("https://") or (folder / link).exists(), link


def test_architecture_names_every_module():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "src/cvt").iterdir():
        name = f"{path.name}/" if path.is_dir() else path.name
        if path.suffix == ".py" or (path.is_dir() and name != "__pycache__/"):
            assert re.search(rf"^  {re.escape(name)} ", text, flags=re.MULTILINE), name
