"""`cvt explain`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cvt.cli.options import Device, MaxPixels, NoVerify, Threads

if TYPE_CHECKING:
    from cvt.inference.explanation import Explanation


def explain(
    model: Annotated[str, typer.Argument(help="MODEL that classifies; no export.")],
    images: Annotated[list[str], typer.Argument(help="Image files, folders, glob patterns.")],
    class_name: Annotated[
        str | None,
        typer.Option("--class", help="Class to explain; default: the best of each image."),
    ] = None,
    method: Annotated[
        Literal["gradcam", "attention", "rollout"],
        typer.Option(
            help="Grad-CAM of any stage, or the class token's attention in the stage that has one: "
            "of each head and block, or followed through the blocks (rollout)."
        ),
    ] = "gradcam",
    stage: Annotated[
        int | None, typer.Option(min=1, help="Stage, counted from 1; default: the last possible.")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="New folder for a .png and an .npz per image and sheet.png.")
    ] = Path("explanations"),
    device: Device = "auto",
    threads: Threads = None,
    max_pixels: MaxPixels = None,
    no_verify: NoVerify = False,
    force: Annotated[bool, typer.Option(help="Overwrite existing files in the folder.")] = False,
) -> None:
    """Draw where a model looks; images that cannot be decoded are skipped (exit code 3)."""
    from cvt.cli.console import bar, err, out, quiet_libraries
    from cvt.data.decoding import ImageError
    from cvt.files import staged
    from cvt.inference.explain import Explainer, write_explanations
    from cvt.inference.predict import find_images

    quiet_libraries()
    paths = find_images(images)
    skipped = done = 0
    with staged(output, force) as folder:
        explainer = Explainer(model, device, threads, max_pixels=max_pixels, verify=not no_verify)
        written = write_explanations(explainer, paths, folder, class_name, method, stage)
        with bar("explain", None) as step:
            for result in written:
                step()
                if isinstance(result, ImageError):
                    skipped += 1
                    err.print(f"skipped {result}", style="yellow")
                else:
                    done += 1
                    out.print(f"{result.name}: {result.caption}{cold(result)}")
        if not done:
            raise ValueError(f"none of the {skipped} images could be decoded; nothing was written")
    out.print(f"written to {output}")
    if skipped:
        err.print(f"{skipped} of {done + skipped} images skipped")
        raise typer.Exit(3)


def cold(explanation: "Explanation") -> str:
    """A remark on a map of zeros; empty for others."""
    if explanation.grid.any():
        return ""
    return f"  (no place raises this class in stage {explanation.stage}: try another --stage)"
