"""The page of the command line, written from the commands themselves."""

import inspect
from collections.abc import Iterable

import click

from cvt.cli import verbs

PANELS = {  # of options, in Chinese
    "Options": "选项",
    "Data": "数据",
    "Model": "模型",
    "Images": "图片",
    "Optimisation": "优化",
    "Machine": "机器",
    "Run": "运行",
}


def reference(in_chinese: bool) -> str:
    """Markdown of every command: a heading, its help, its usage, and tables of its options."""
    panels = PANELS if in_chinese else {}
    context = verbs.make_context("cvt", [], resilient_parsing=True)
    pieces = []
    for name in verbs.list_commands(context):
        command = verbs.get_command(context, name)
        with click.Context(command, info_name=name, parent=context) as own:
            pieces.append(_command(name, command, own, panels))
    return "\n\n".join(pieces)


def _command(name: str, command, context: click.Context, names: dict[str, str]) -> str:
    parameters = command.get_params(context)
    usage = " ".join(command.collect_usage_pieces(context))
    text = _prose(inspect.cleandoc(command.help))
    pieces = [f"## cvt {name}", text, f"```sh\ncvt {name} {usage}\n```"]
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    if arguments:
        pieces.append(_list(p.get_help_record(context) for p in arguments))
    panels: dict[str, list] = {}
    for option in parameters:
        if option not in arguments:
            panel = getattr(option, "group", "Options")
            panels.setdefault(panel, []).append(option.get_help_record(context))
    for panel, rows in panels.items():
        if len(panels) > 1:
            pieces.append(f"### {names.get(panel, panel)}")
        pieces.append(_list(rows))
    return "\n\n".join(pieces)


def _list(rows: Iterable[tuple[str, str]]) -> str:
    """A definition list: a choice of eight runtimes would leave a table no room for the text."""
    return "\n\n".join(f"`{name}`\n: {_prose(text)}" for name, text in rows)


def _prose(text: str) -> str:
    """Plain text as Markdown: nothing in it is markup but `code`."""
    for character in "\\*_<>[]":
        text = text.replace(character, f"\\{character}")
    return text.replace("\b\n", "").strip()
