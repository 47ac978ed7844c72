"""`cvt cache`."""

import click

from cvt.cli.options import argument, command


@command
@argument("action", type=click.Choice(["list", "clear"]), metavar="ACTION", help="list or clear.")
def cache(action: str) -> None:
    """List or clear the converted graphs that are kept, for a model to start sooner.

    They come from --runtime openvino, and from auto for many images. The oldest go by themselves.
    """
    from datetime import datetime

    from cvt.cli.console import out
    from cvt.runtime.cache import cache_folder, clear, entries

    if action == "clear":
        count, size = clear()
        out.print(f"{count} graphs deleted, {size / 1e6:,.1f} MB")
        return
    found = entries()
    for entry in found:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        about = entry.about or {"model": "damaged"}
        described = "  ".join(about[key] for key in ("model", "image_size") if key in about)
        out.print(f"{used}  {entry.size / 1e6:8,.1f} MB  {described}")
    total = sum(entry.size for entry in found)
    out.print(f"{len(found)} graphs, {total / 1e6:,.1f} MB, in {cache_folder()}")
