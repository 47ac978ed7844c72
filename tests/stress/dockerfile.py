"""Build and run the Dockerfile without Docker, as root: python dockerfile.py FOLDER.

Debian comes from debootstrap; `RUN` lines run in a chroot, as the user they would have. Then the
entry point serves a tiny model, answers one picture, and ends by SIGTERM. FOLDER is the root file
system, which stays. Settings of pip and of proxies in the environment are passed on.
"""

import argparse
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
PASSED = re.compile(r"PIP_\w+|https?_proxy|no_proxy|SSL_CERT_FILE", re.IGNORECASE)
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """The instructions of a Dockerfile and what follows them."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            yield name, rest.strip()


class Image:
    """The file system of an image, and the state that its instructions set."""

    def __init__(self, root: Path, arguments: dict[str, str]) -> None:
        self.root, self.arguments = root, arguments
        self.environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        self.environment |= {k: v for k, v in os.environ.items() if PASSED.fullmatch(k)}
        self.folder, self.user = "/", "root"
        self.entry: list[str] = []

    def build(self, text: str) -> None:
        """Carry out all instructions."""
        for name, rest in instructions(text):
            print(name, rest, flush=True)
            getattr(self, f"do_{name.lower()}")(rest)

    def do_from(self, image: str) -> None:
        """Install Debian."""
        suite = re.fullmatch(r"debian:(\w+)-slim", image)[1]
        if not (self.root / "etc/debian_version").exists():
            subprocess.run(["debootstrap", "--variant=minbase", suite, self.root], check=True)
        shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")

    def do_arg(self, rest: str) -> None:
        """Set an argument, or its default."""
        name, _, default = rest.partition("=")
        self.environment[name] = self.arguments.get(name, *shlex.split(default))

    def do_env(self, rest: str) -> None:
        """Set variables."""
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            self.environment[name] = value.replace(f"${name}", self.environment.get(name, ""))

    def do_copy(self, rest: str) -> None:
        """Copy the checkout, without what .dockerignore leaves out."""
        source, target = rest.split()
        assert source == "."
        keep = [x[1:] for x in (CHECKOUT / ".dockerignore").read_text().split() if x[0] == "!"]
        folder = self.root / target.lstrip("/")
        shutil.rmtree(folder, ignore_errors=True)
        for name in keep:
            path = CHECKOUT / name
            copy = shutil.copytree if path.is_dir() else shutil.copy
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy(path, folder / name)

    def do_run(self, rest: str) -> None:
        """Run a line of the shell."""
        # Once ca-certificates is installed, its file takes the place of this machine's.
        (self.root / CERTIFICATES).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f"/{CERTIFICATES}", self.root / CERTIFICATES)
        with self.mounted():
            subprocess.run(self.command(["sh", "-c", rest]), env=self.environment, check=True)

    def do_user(self, rest: str) -> None:
        """Who runs what follows."""
        self.user = rest

    def do_workdir(self, rest: str) -> None:
        """Where that runs."""
        self.folder = rest

    def do_entrypoint(self, rest: str) -> None:
        """What runs in the end."""
        self.entry = json.loads(rest)

    def do_expose(self, rest: str) -> None:
        """Documentation."""

    do_healthcheck = do_cmd = do_expose

    def command(self, words: list[str]) -> list[str]:
        """A command in the file system."""
        inside = f"cd {self.folder} && exec " + shlex.join(words)
        return ["/usr/sbin/chroot", f"--userspec={self.user}", str(self.root), "sh", "-c", inside]

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """With what the kernel shows as files."""
        targets = []
        try:
            for source in ("/proc", "/sys", "/dev"):
                target = self.root / source.lstrip("/")
                target.mkdir(parents=True, exist_ok=True)
                subprocess.run(["mount", "--bind", source, target], check=True)
                targets.append(target)
            yield
        finally:
            for target in reversed(targets):
                subprocess.run(["umount", "--lazy", target], check=True)


def serve(image: Image) -> None:
    """Serve a tiny model, ask, end."""
    import PIL.Image

    import cvt

    config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
    cvt.CvtForImageClassification(config).save_pretrained(image.root / "model")
    cvt.image_processor(config, 32).save_pretrained(image.root / "model")
    picture = io.BytesIO()
    PIL.Image.new("RGB", (40, 40), "red").save(picture, "PNG")
    with image.mounted():
        words = [*image.entry, "/model"]
        server = subprocess.Popen(
            image.command(words), env=image.environment | {"HOME": "/home/cvt"}
        )
        try:
            address = "http://127.0.0.1:8000"
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"{address}/readyz", timeout=5).read()
                    break
                except OSError:  # of a connection, of the wait for an answer, or a status of 503
                    time.sleep(1)
            request = urllib.request.Request(f"{address}/v1/predict?top_k=1", picture.getvalue())
            print(urllib.request.urlopen(request, timeout=60).read().decode())
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0, server.returncode
        finally:
            server.kill()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arg", action="append", default=[], help="NAME=VALUE, as docker's")
    options = parser.parse_args()
    if os.geteuid():
        sys.exit("debootstrap, chroot and mount need root")
    arguments = dict(pair.split("=", 1) for pair in options.arg)
    image = Image(options.folder.resolve(), arguments)
    image.build((CHECKOUT / "Dockerfile").read_text())
    serve(image)


if __name__ == "__main__":
    main()
