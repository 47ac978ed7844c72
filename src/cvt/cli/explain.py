"""`cvt explain`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cvt.cli.options import (
    FOLDER,
    argument,
    command,
    device_option,
    force_option,
    max_pixels_option,
    no_verify_option,
    threads_option,
)

if TYPE_CHECKING:
    from cvt.inference.explanation import Explanation


@command
@argument("model", help="MODEL that classifies; no export.")
@argument(
    "images",
    nargs=-1,
    required=True,
    help="Image files, folders, glob patterns, csv files of paths.",
)
@click.option("--class", "class_name", help="Class to explain; default: the best of each image.")
@click.option(
    "--method",
    type=click.Choice(("gradcam", "attention", "rollout")),
    default="gradcam",
    help="Grad-CAM of any stage, or the class token's attention in the stage that has one: "
    "of each head and block, or followed through the blocks (rollout).",
)
@click.option(
    "--stage",
    type=click.IntRange(min=1),
    help="Stage, counted from 1; default: the last with a map.",
)
@click.option(
    "--output",
    type=FOLDER,
    default=Path("explanations"),
    help="New folder for a .png and an .npz per image and sheet.png.",
)
@device_option
@threads_option()
@max_pixels_option
@no_verify_option
@force_option("Overwrite existing files in the folder.")
def explain(
    model: str,
    images: tuple[str, ...],
    class_name: str | None,
    method: Literal["gradcam", "attention", "rollout"],
    stage: int | None,
    output: Path,
    device: str,
    threads: int | None,
    max_pixels: int | None,
    no_verify: bool,
    force: bool,
) -> None:
    """Draw where a model looks; images that cannot be decoded are skipped (exit code 3)."""
    from cvt.inference.predict import find_images

    paths = find_images(list(images))
    from cvt.cli.console import err, out, quiet_libraries
    from cvt.cli.progress import bar
    from cvt.data.decoding import ImageError
    from cvt.files import staged
    from cvt.inference.explain import Explainer, write_explanations

    quiet_libraries()
    skipped = done = 0
    with staged(output, force) as folder:
        explainer = Explainer(model, device, threads, max_pixels=max_pixels, verify=not no_verify)
        written = write_explanations(explainer, paths, folder, class_name, method, stage)
        with bar("explain", None) as step:
            for result in written:
                step()
                if isinstance(result, ImageError):
                    skipped += 1
                    err.print(f"skipped {result}", fg="yellow")
                else:
                    done += 1
                    out.print(f"{result.name}: {result.caption}{cold(result)}")
        if not done:
            raise ValueError(f"none of the {skipped} images could be decoded; nothing was written")
    out.print(f"written to {output}")
    if skipped:
        err.print(f"{skipped} of {done + skipped} images skipped")
        raise click.exceptions.Exit(3)


def cold(explanation: "Explanation") -> str:
    """A remark on a map of zeros; empty for others."""
    if explanation.grid.any():
        return ""
    return f"  (no place raises this class in stage {explanation.stage})"
