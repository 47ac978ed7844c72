"""Build the sdist and the wheel, install the wheel outside the checkout, run the README's commands.

    python tests/wheel/check.py [FOLDER]

It needs an index of packages, and nothing else from the network: `cvt-13` is a model of random
weights in a cache of the hub. The commands and the Python are the README's own. What would take
long or needs other hardware is changed by `SHORTER`, what a clone alone can do is left out by
`SKIPPED`; an entry that the README does not have is an error. FOLDER, which must not exist, keeps
all files; else it is removed.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

# What an export runs on, beside its engine (docs/en/without_torch.md).
SMALL = "numpy pillow click"
SKIPPED = (
    "pip install --no-deps ",
    "make demo",
    "make test",
    "pip install '.[train,export]'",
    "pip wheel ",
    "cvt export cvt-13 site --to web",  # needs npm
    "cvt tune ",  # the extra for it is not installed
    "cvt search ",  # likewise
    "cvt serve ",  # likewise
)
# Pieces of the README's commands, and what is run in their place.
SHORTER = {
    "cvt demo": "cvt demo --epochs 2",
    "cvt check flowers/": "cvt check flowers/ --min-images 5",
    "--epochs 20": "--epochs 1",
    "--folds 5": "--folds 2 --epochs 1 --image-size 64",
    "--batch-sizes 1,32": "--batch-sizes 1,2 --seconds 0",
    "PHOTOS": "photos",
    "--config photos": "--config photos epochs=1 warmup_epochs=0",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "IMAGENET": "photos steps=1 warmup_epochs=0 min_lr=0 batch_size=2 workers=0",
}
# What the README's Python takes for granted.
PRELUDES = {
    "Keras": "import numpy as np\nimages, labels = np.zeros((2, 3, 224, 224)), np.array([0, 4])\n"
}
MYPY = """\
[mypy]
follow_imports = skip
ignore_missing_imports = True
warn_unused_ignores = True
[mypy-cvt.*]
follow_imports = silent
"""


class Environment:
    """A new virtual environment, and a folder to run commands in."""

    def __init__(self, folder: Path, work: Path, **variables: str) -> None:
        self.bin, self.work = folder / "bin", work
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
        path = f"{self.bin}{os.pathsep}{inherited['PATH']}"
        self.variables = inherited | {"PATH": path, "COLUMNS": "120"} | variables

    def run(self, command: str, *, code: int = 0, stdin: str | None = None) -> str:
        """What a command of the shell prints; its exit code must be `code`."""
        print(f"$ {command}", flush=True)
        start = time.perf_counter()
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.work,
            env=self.variables,
            input=stdin or "",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        if done.returncode != code:
            sys.exit(f"{done.stdout}\nexit code {done.returncode}, expected {code}: {command}")
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
        return done.stdout


def sections() -> list[tuple[str, list[str], str]]:
    """The README's headings, each with its commands, shortened, and its Python."""
    text = (ROOT / "README.md").read_text("utf-8")
    for piece in (*SKIPPED, *SHORTER, *(f"## {heading}\n" for heading in PRELUDES)):
        assert piece in text, f"README.md has no {piece!r} any more: change {__file__}"
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        shell, code = (
            "".join(re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
            for language in ("sh", "python")
        )
        lines = [line for line in shell.splitlines() if not line.startswith(SKIPPED)]
        for piece, shorter in SHORTER.items():
            lines = [line.replace(piece, shorter) for line in lines]
        found.append((section.partition("\n")[0], lines, code))
    return found


def build(folder: Path) -> Path:
    """The wheel, built from the sdist, in `folder/dist`; what both hold is checked."""
    builder = Environment(folder / "builder", folder)
    builder.run("pip install --quiet build twine")
    builder.run(f"python -m build --outdir dist {shlex.quote(str(ROOT))}")
    builder.run("twine check --strict dist/*")
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    source = {
        str(path.relative_to(ROOT / "src")): path
        for path in (ROOT / "src/cvt").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert source.keys() == {name for name in names if name.startswith("cvt/")}, names
    assert all(name.startswith(("cvt/", "cvt_vision-")) for name in names), names
    assert sdist.stat().st_size < 20e6, sdist.stat()
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    page = zipfile.ZipFile(wheel).read(metadata).decode()
    links = re.findall(r"\]\(([^)]*)\)|(?:src|href)=", page)
    assert links, page
    assert all(link.startswith("https://") for link in links), links
    return wheel


def check_without_torch(wheel: Path, user: Environment, engine: str, exported: str) -> None:
    """An export answers the same where PyTorch and transformers are not installed."""
    small = Environment(user.work / f"with-{engine}", user.work)
    install = f"pip install --no-deps dist/{wheel.name} {SMALL} "
    for page, folder in (
        ("README.md", "dist/"),
        ("README.zh-CN.md", "dist/"),
        ("docs/en/without_torch.md", ""),
        ("docs/zh/without_torch.md", ""),
    ):
        line = install.replace("dist/", folder)
        assert line in (ROOT / page).read_text("utf-8"), f"{page} has no {line!r}"
    small.run(f"{install}{engine}")
    command = f"cvt predict {exported} cat.jpg --json"
    assert small.run(command) == user.run(command)
    seconds = small.run(f"TIMEFORMAT='%U + %S'; time {command} > /dev/null 2>&1").strip()
    packages = small.bin.parent / "lib"
    size = sum(file.stat().st_size for file in packages.rglob("*") if file.is_file())
    print(f"  {engine}: {size / 1e6:.0f} MB, {seconds} s of CPU time", flush=True)


def main() -> None:
    """Do all of it; the exit code is 1 if something fails."""
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1]).resolve()
        folder.mkdir(parents=True)
        check(folder)
    else:
        with tempfile.TemporaryDirectory(prefix="cvt-wheel-") as name:
            check(Path(name))
    print("the README's commands run from the wheel")


def check(folder: Path) -> None:
    """Build, install and run in a folder."""
    start = time.perf_counter()
    wheel = build(folder)
    user = Environment(
        folder / "user", folder,
        HF_HOME=str(folder / "hub"), HF_HUB_OFFLINE="1", KERAS_HOME=str(folder / "keras"),
    )  # fmt: skip

    # Without extras: what inference needs, and errors that name a command that works.
    user.run(f"pip install --quiet {shlex.quote(str(wheel))}")
    user.run("python -", stdin=(HERE / "inputs.py").read_text("utf-8"))
    assert user.run("cvt --version").startswith("cvt-vision ")
    listed = user.run("cvt recipes")
    assert "photos " in listed, listed
    assert user.run("cvt recipes photos").endswith(
        (ROOT / "src/cvt/train/recipes/photos.yaml").read_text("utf-8")
    )
    user.run("cvt predict cvt-13 cat.jpg")
    refused = user.run("cvt demo", code=1)
    assert refused.endswith(": pip install 'cvt-vision[train]'\n"), refused

    # An extra of the installed package, whatever the index knows of its name.
    before = user.run("pip list --format freeze")
    install = "pip install --quiet --dry-run --report - 'cvt-vision[train]' 2>/dev/null"
    found = user.run(install)
    assert '"name": "timm"' in found, found
    assert '"name": "cvt-vision"' not in found, found
    assert user.run("pip list --format freeze") == before

    for heading, lines, code in sections():
        for line in lines:
            user.run(line)
        if code:
            user.run("python -", stdin=PRELUDES.get(heading, "") + code)

    for engine, to in (("onnxruntime", "onnx"), ("openvino", "openvino")):
        user.run(f"cvt export cvt-13 small-{to} --to {to}")
        check_without_torch(wheel, user, engine, f"small-{to}")

    user.run("pip install --quiet mypy")
    (folder / "mypy.ini").write_text(MYPY)
    types = ROOT / "tests/static/public_types.py"
    (folder / "public_types.py").write_text(types.read_text("utf-8"), "utf-8")
    user.run("mypy --config-file mypy.ini public_types.py")
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
