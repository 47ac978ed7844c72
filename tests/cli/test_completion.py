"""Completion in the shell: click's protocol, as the scripts that are installed speak it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CVT = Path(sys.executable).with_name("cvt")


def run(*words, **variables):
    """What the command prints; the environment names no folders of the user but HOME."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XDG_CONFIG_HOME", "ZDOTDIR", "SHELL")
    }
    done = subprocess.run(
        [CVT, *words], env=environment | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def completed(shell, *words):
    """What a shell offers for the last of the words."""
    position = words[-1] if shell == "fish" else str(len(words) - 1)
    variables = {"COMP_WORDS": " ".join(words), "COMP_CWORD": position}
    return run(_CVT_COMPLETE=f"{shell}_complete", **variables)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("words", "offered", "others"),
    [
        (["cvt", "p"], ["predict", "push"], ["train", "--help"]),
        (["cvt", "push", "runs/demo", "someone/x", "--"], ["--private", "--dry-run"], ["--topk"]),
        (["cvt", "export", "m", "out", "--to", "o"], ["onnx", "openvino"], ["litert", "--to"]),
    ],
    ids=["verbs", "options", "choices"],
)
def test_a_tab_offers_what_may_come_next(shell, words, offered, others):
    answer = completed(shell, *words)
    assert all(word in answer for word in offered), answer
    assert not any(word in answer for word in others), answer


def test_bash_completes_by_the_installed_script(tmp_path):
    """The start file is read as bash does; then its function is called as for a TAB."""
    run("--install-completion", "bash", HOME=str(tmp_path))
    shell = """
source ~/.bashrc
COMP_WORDS=(cvt export m out --to o)
COMP_CWORD=5
_cvt_completion cvt
echo "${COMPREPLY[@]}"
complete -p cvt
"""
    path = f"{CVT.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", shell],
        env={**os.environ, "HOME": str(tmp_path), "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[0].split() == ["onnx", "openvino"], done.stderr
    assert "_cvt_completion cvt" in done.stdout.splitlines()[1]


@pytest.mark.parametrize(
    ("shell", "start_file", "script"),
    [
        ("bash", ".bashrc", ".bash_completions/cvt.sh"),
        ("zsh", ".zshrc", ".zfunc/_cvt"),
        ("fish", None, ".config/fish/completions/cvt.fish"),
    ],
)
def test_the_script_is_installed_once_and_the_start_file_is_kept(
    shell, start_file, script, tmp_path
):
    mine = b"alias a=b\nexport NAME=\xff"  # no UTF-8, and no line break at its end
    if start_file:
        (tmp_path / start_file).write_bytes(mine)
    printed = run("--install-completion", shell, HOME=str(tmp_path))
    assert f"{shell} completion installed in {tmp_path / script}" in printed
    assert f"_CVT_COMPLETE={shell}_complete" in (tmp_path / script).read_text()
    assert (tmp_path / script).read_text().strip() == run("--show-completion", shell).strip()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if start_file:
        assert files[tmp_path / start_file].startswith(mine + b"\n")
        assert len(files[tmp_path / start_file].splitlines()) == 3
    run("--install-completion", shell, HOME=str(tmp_path))
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_current_shell_is_found(tmp_path):
    printed = run("--show-completion", SHELL="/usr/bin/fish")
    assert "_CVT_COMPLETE=fish_complete" in printed


def test_an_unknown_shell_is_a_usage_error(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "SHELL": "/bin/dash"}
    done = subprocess.run([CVT, "--install-completion"], env=environment, capture_output=True)
    assert done.returncode == 2
    assert b"name one of bash, zsh, fish" in done.stderr
    assert not list(tmp_path.iterdir())
