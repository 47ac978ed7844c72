"""`cvt app`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cvt.cli.options import Device, Threads


def app(
    model: Annotated[str, typer.Argument(help="MODEL to show.")],
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port; default: the first free one from 7860 on."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    lang: Annotated[
        Literal["en", "zh"] | None,
        typer.Option(help="Language of the page; default: the browser's."),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures to try; default: validation images of the run."),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Serve a page for the browser: drop a picture, see its classes and their heat maps."""
    from cvt.app.server import is_loopback, serve
    from cvt.cli.console import err, out, quiet_libraries

    def ready(address: str) -> None:
        out.print(f"The page is at {address}  (Ctrl-C stops it)")
        if not is_loopback(host):
            err.print(
                f"everyone who reaches {host} of this machine can use the page", style="yellow"
            )

    quiet_libraries()
    serve(model, host, port, lang, examples, device, threads, ready)
