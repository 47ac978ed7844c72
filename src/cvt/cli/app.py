"""`cvt app`."""

from pathlib import Path
from typing import Literal

import click

from cvt.cli.options import FILE, argument, command, device_option, threads_option


@command
@argument("model", help="MODEL to show.")
@click.option(
    "--port",
    type=click.IntRange(min=0, max=65535),
    help="Port; default: the first free one from 7860 on.",
)
@click.option(
    "--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 lets other machines in."
)
@click.option(
    "--lang",
    type=click.Choice(("en", "zh")),
    help="Language of the page; default: the browser's.",
)
@click.option(
    "--examples",
    type=FILE,
    help="Folder of pictures to try; default: validation images of the run.",
)
@device_option
@threads_option()
def app(
    model: str,
    port: int | None,
    host: str,
    lang: Literal["en", "zh"] | None,
    examples: Path | None,
    device: str,
    threads: int | None,
) -> None:
    """Serve a page for the browser: drop a picture, see its classes and their heat maps."""
    from cvt.app.server import serve
    from cvt.cli.console import err, out, quiet_libraries
    from cvt.http_server import is_loopback

    def ready(address: str) -> None:
        out.print(f"The page is at {address}  (Ctrl-C stops it)")
        if not is_loopback(host):
            err.print(f"everyone who reaches {host} of this machine can use the page", fg="yellow")

    quiet_libraries()
    serve(model, host, port, lang, examples, device, threads, ready)
