"""Completion in the shell: typer's protocol, as the script that it installs speaks it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CVT = Path(sys.executable).with_name("cvt")


def completed(shell, *words):
    """What a shell offers for the last of the words."""
    variables = {
        "bash": {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": " ".join(words)},
        "fish": {
            "_TYPER_COMPLETE_ARGS": " ".join(words),
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        },
    }
    done = subprocess.run(
        [CVT],
        env={**os.environ, "_CVT_COMPLETE": f"complete_{shell}", **variables[shell]},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    return done.stdout


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


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_installed_for_the_command(shell, tmp_path):
    """`--install-completion` writes below HOME, which is a temporary folder here."""
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }
    done = subprocess.run(
        [CVT, "--install-completion", shell],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "_CVT_COMPLETE=complete_" in written
