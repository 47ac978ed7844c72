"""`cvt push`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cvt.train.push import Upload


def push(
    folder: Annotated[
        Path, typer.Argument(help="Model folder, run folder (its best/), adapter or export.")
    ],
    name: Annotated[str, typer.Argument(help="USER/NAME on the hub, or USER/NAME@BRANCH.")],
    private: Annotated[
        bool, typer.Option("--private", help="Create a repository that only its owner sees.")
    ] = False,
    license: Annotated[
        str | None, typer.Option(help="Licence of the model, as the hub names it: apache-2.0, ...")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be uploaded; upload nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option(help="Upload to a repository that another program wrote.")
    ] = False,
) -> None:
    """Upload a model and its model card to the Hugging Face hub, in one commit.

    The account is that of `hf auth login`.
    """
    from cvt.cli.console import out, quiet_libraries
    from cvt.train.push import push as upload

    quiet_libraries()
    how = {"private": private, "overwrite": force, "dry_run": dry_run}
    done = upload(folder, name, licence=license, **how)
    if dry_run:
        print_files(done)
        out.print("Nothing was uploaded.")
        return
    for verb, files in (("replaced", done.replaced), ("deleted", done.deleted)):
        if files:
            out.print(f"{verb} in {done.repository.hub_id}: {', '.join(files)}")
    out.print(f"{done.folder}: {len(done.files)} files uploaded, {done.url}")


def print_files(upload: "Upload") -> None:
    """Print the files, their sizes and the head of the model card."""
    from rich.table import Table

    from cvt.cli.console import out

    table = Table("file", "bytes")
    table.columns[1].justify = "right"
    for file, size in upload.files.items():
        table.add_row(file, f"{size:,}")
    out.print(f"{upload.folder} to {upload.repository.hub_id}", style="bold")
    out.print(table)
    out.print(upload.card.partition("\n## ")[0].rstrip())
