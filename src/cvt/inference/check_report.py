"""What is wrong with a data set, as one HTML page with the pictures and as a table."""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from cvt.data.findings import KINDS, Check, Finding, write_findings
from cvt.inference.page import embedded_thumbnail, render, write_page

GROUPS, IN_GROUP = 20, 8  # groups of a kind, and pictures of each, that the page shows
ROWS = 500  # of a list without pictures
LISTED = ("unreadable", "oversized", "link", "small_class")  # kinds that need no pictures


@dataclass
class Section:
    """The findings of one kind on the page.

    Attributes:
        kind: one of `KINDS`.
        total: how many there are.
        rows: those in a list.
        groups: those in rows of pictures, each with the number of those that are not shown.
    """

    kind: str
    total: int
    rows: list[Finding] = field(default_factory=list)
    groups: list[tuple[list[Finding], int]] = field(default_factory=list)

    @property
    def hidden(self) -> int:
        """How many findings are neither in the list nor in a row of pictures."""
        shown = sum(len(findings) + more for findings, more in self.groups)
        return self.total - len(self.rows) - shown


def write_check(found: Check, folder: Path, data: str) -> None:
    """Write `report.html`, which needs no other file, and `findings.csv`, a row for each finding.

    Args:
        found: what `cvt.data.check` returned.
        folder: where to; it is created.
        data: the name of the data set, the heading of the page; paths are shown without it.

    Raises:
        FileExistsError: the folder is there already.
    """

    @cache
    def picture(finding: Finding) -> str:
        source = found.source(finding)
        return embedded_thumbnail(source) if source else ""

    folder.mkdir()
    write_findings(found, folder / "findings.csv")
    page = render(
        "check.html.jinja",
        title=data,
        check=found,
        kinds=KINDS,
        sections=[_section(kind, of_kind) for kind in KINDS if (of_kind := found.of_kind(kind))],
        most=max((each.images for each in found.classes), default=1),
        picture=picture,
        short=lambda path: path.removeprefix(f"{data}/"),
    )
    write_page(folder / "report.html", page)


def _section(kind: str, findings: list[Finding]) -> Section:
    if kind in LISTED:
        return Section(kind, len(findings), rows=findings[:ROWS])
    by_group = defaultdict(list)
    for finding in findings:  # blank images, which may be in no group, are one
        by_group[finding.group if kind != "blank" else None].append(finding)
    largest = sorted(by_group.values(), key=len, reverse=True)[:GROUPS]
    shown = IN_GROUP if kind != "blank" else GROUPS
    groups = [(group[:shown], len(group[shown:])) for group in largest]
    return Section(kind, len(findings), groups=groups)
