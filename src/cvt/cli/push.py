"""`cvt push`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cvt.cli.options import FILE, argument, command, force_option

if TYPE_CHECKING:
    from cvt.train.push import Upload


@command
@argument("folder", type=FILE, help="Model folder, run folder (its best/), adapter or export.")
@argument("name", help="USER/NAME on the hub, or USER/NAME@BRANCH.")
@click.option("--private", is_flag=True, help="Create a repository that only its owner sees.")
@click.option("--license", help="Licence of the model, as the hub names it: apache-2.0, ...")
@click.option("--with-code", is_flag=True, help="Upload the code too, for stock transformers.")
@click.option("--dry-run", is_flag=True, help="Show what would be uploaded; upload nothing.")
@force_option("Upload to a repository that another program wrote.")
def push(
    folder: Path,
    name: str,
    private: bool,
    license: str | None,
    with_code: bool,
    dry_run: bool,
    force: bool,
) -> None:
    """Upload a model and its model card to the Hugging Face hub, in one commit.

    The account is that of `hf auth login`.
    """
    from cvt.cli.console import out, quiet_libraries
    from cvt.text import listed
    from cvt.train.push import push as upload

    quiet_libraries()
    how = {"private": private, "overwrite": force, "with_code": with_code, "dry_run": dry_run}
    done = upload(folder, name, licence=license, **how)
    if done.left_out:
        out.print(f"not files of the model, not uploaded: {listed(done.left_out)}")
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
    from cvt.cli.rich_console import print_table

    table = Table("file", "bytes")
    table.columns[1].justify = "right"
    for file, size in upload.files.items():
        table.add_row(file, f"{size:,}")
    out.print(f"{upload.folder} to {upload.repository.hub_id}", bold=True)
    print_table(table)
    out.print(upload.card.partition("\n## ")[0].rstrip())
