"""The options that commands share."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from cvt.limits import BOUNDS

# How a model is run, in every command that runs one.
RuntimeName = Annotated[
    Literal[
        "auto", "torch", "fused", "compiled", "onnxruntime", "openvino", "tensorflow", "litert"
    ],
    typer.Option("--runtime", help="Runtime; auto is the fastest that is installed."),
]
Precision = Annotated[
    Literal["fp32", "bf16", "fp16", "int8"] | None,
    typer.Option(help="Precision of the arithmetic; default: fp32, or an export's own."),
]


def known_device(name: str) -> str:
    """The device; a usage error if there is none of that name."""
    if name in ("auto", "cpu"):  # there always; PyTorch is imported for the others alone
        return name
    from cvt.runtime.factory import check_device

    try:
        check_device(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return name


def count(name: str, help: str) -> Any:
    """An option for a whole number within `cvt.limits.BOUNDS`."""
    least, most = BOUNDS[name]
    return typer.Option(min=least, max=most, help=help)


Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1, ...; auto is CUDA where there is.", callback=known_device
    ),
]
Threads = Annotated[int | None, count("threads", "Threads that run the model on a CPU.")]
BatchSize = Annotated[int, count("batch_size", "Images at a time.")]
Workers = Annotated[int, count("workers", "Processes that decode images.")]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1, help="Pixels that an image may have; larger ones are skipped (default 178956970)."
    ),
]

NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify", help="Do not compare the files with the SHA-256 that were written with them."
    ),
]


def words(text: str | None) -> list[str] | None:
    """The words between the commas; None of None."""
    return None if text is None else [word.strip() for word in text.split(",")]


def numbers(text: str | None, option: str, largest: int | None = None) -> list[int] | None:
    """The whole numbers between the commas; None of None.

    Args:
        text: of an option.
        option: its name, for the error.
        largest: that a number may be.

    Raises:
        typer.BadParameter: one is no number, below 1 or too large.
    """
    found = words(text)
    if found is None:
        return None
    if not all(word.isdecimal() and int(word) for word in found):
        message = f"{text}: must be whole numbers of at least 1, with commas between"
        raise typer.BadParameter(message, param_hint=option)
    values = [int(word) for word in found]
    if largest is not None and max(values) > largest:
        raise typer.BadParameter(f"{text}: must be at most {largest}", param_hint=option)
    return values


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `**settings` an option for each setting of a recipe but `data`.

    typer reads options from a signature, and this one is computed from the table of settings.
    """
    from cvt.train.recipe import FIELDS, value_type

    own = inspect.signature(command)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    group = ""
    for name, spec in FIELDS.items():
        group = spec.metadata["group"] or group
        kind, _ = value_type(spec)
        number = f"{spec.default:g}" if kind is float and spec.default else spec.default
        default = "" if spec.default in (None, False) or kind is bool else f" (default {number})"
        option = typer.Option(
            help=spec.metadata["help"] + default,
            metavar="|".join(spec.metadata["choices"]) or None,
            rich_help_panel=group,
        )
        hint = Annotated[kind | None, option]  # type: ignore[valid-type]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, keyword, default=None, annotation=hint))
    parameters = [parameter for parameter in parameters if parameter.name != "data"]
    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command
