"""`cvt train`."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            help="Image folder: train/ and val/ with a folder per class each, or just a folder per "
            "class; or the word digits."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Run folder to make.")] = Path("runs/train"),
    model: Annotated[
        str, typer.Option(help="MODEL to start from, a variant, or a folder with a config.json.")
    ] = "cvt-13",
    from_scratch: Annotated[bool, typer.Option(help="Start from random weights.")] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the images.")] = 30,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 64,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate.  [default: 0.002 x batch / 2048]")
    ] = None,
    image_size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 224,
    crop_pct: Annotated[float, typer.Option(help="Centre crop of evaluation, below 384.")] = 0.875,
    crop_scale: Annotated[float, typer.Option(help="Smallest area of a training crop.")] = 0.35,
    flip: Annotated[
        bool | None, typer.Option(help="Mirror half of the images.  [default: not for digits]")
    ] = None,
    rotate: Annotated[float, typer.Option(help="Largest rotation of an image, degrees.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of weights, order, augmentation and split.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the output folder.")] = False,
) -> None:
    """Train or fine-tune a classifier; the best epoch is kept as a model folder, OUTPUT/best."""
    from cvt.cli.console import TrainingBars, out, quiet_libraries
    from cvt.train import Recipe
    from cvt.train import train as train_classifier

    quiet_libraries()
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in ("data", "output", "resume")
        and str(context.get_parameter_source(parameter.name or "")).endswith("COMMANDLINE")
    ]
    if resume and given:
        raise typer.BadParameter("a resumed run keeps its own settings", param_hint=given)
    try:
        recipe = Recipe(
            model=model,
            from_scratch=from_scratch,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            image_size=image_size,
            crop_pct=crop_pct,
            crop_scale=crop_scale,
            flip=data != "digits" if flip is None else flip,
            rotate=rotate,
            seed=seed,
            workers=workers,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with TrainingBars() as progress:
        best = train_classifier(data, output, recipe, resume, progress)
    out.print(f"best top-1 {100 * best.top1:.2f} %; the model is {output / 'best'}")
    out.print(f"next: cvt predict {output / 'best'} IMAGES...")
