"""Completion in the shell: click's own scripts, where each shell looks for them."""

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from cvt.cli import SHELLS


def current_shell() -> str:
    """The shell that the command was started from, else the user's login shell.

    Raises:
        click.UsageError: neither is one that can complete.
    """
    parent = Path("/proc", str(os.getppid()), "comm")  # on Linux
    names = [parent.read_text().strip() if parent.is_file() else ""]
    names.append(Path(os.environ.get("SHELL", "")).name)
    for name in names:
        if name in SHELLS:
            return name
    raise click.UsageError(f"the shell is not known: name one of {', '.join(SHELLS)}")


def script(command: click.Command, shell: str) -> str:
    """The script that completes the words of `cvt` in a shell.

    Args:
        command: what the words belong to.
        shell: one of `SHELLS`, or auto for the current one.
    """
    kind = get_completion_class(current_shell() if shell == "auto" else shell)
    assert kind is not None
    return kind(command, {}, "cvt", "_CVT_COMPLETE").source()


def install(command: click.Command, shell: str) -> tuple[str, Path]:
    """Write the script to a file of its own, and let the shell's start file load it.

    Args:
        command: as for `script`.
        shell: likewise.

    Returns:
        The shell, and the file of the script.
    """
    shell = current_shell() if shell == "auto" else shell
    home = Path.home()
    if shell == "bash":
        path, start = home / ".bash_completions" / "cvt.sh", home / ".bashrc"
        line = "source '{}'".format(str(path).replace("'", r"'\''"))
    elif shell == "zsh":
        path = home / ".zfunc" / "_cvt"
        start = Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
        line = "fpath+=~/.zfunc; autoload -Uz compinit; compinit"
    else:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        path, start = folder / "fish" / "completions" / "cvt.fish", None  # fish reads the folder
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script(command, shell), encoding="utf-8")
    if start:
        add_line(start, line)
    return shell, path


def add_line(file: Path, line: str) -> None:
    """Append a line to a file, unless the file has it; the rest of the file stays as it is."""
    content = file.read_bytes() if file.exists() else b""
    if line.encode() not in content.splitlines():
        missing = b"" if not content or content.endswith(b"\n") else b"\n"
        with open(file, "ab") as end:
            end.write(missing + line.encode() + b"\n")
