"""What commands are built from: their class, their arguments, and the options that they share."""

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from cvt.files import check_folder_name
from cvt.limits import BOUNDS
from cvt.problem_type import PROBLEMS
from cvt.runtime import OF_EXPORTS, PRECISIONS, RUNTIMES

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Function], Function]

LONGEST_CHOICES = 28  # characters; of a setting with more, an error lists them


class FiniteRange(click.FloatRange):
    """A range of numbers, of which inf and nan are none."""

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> Any:
        """The number; a usage error if it is none, or out of the range."""
        number = super().convert(value, parameter, context)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", parameter, context)
        return number


class Folder(click.Path):
    """The path of a folder to write, which is not the name of a file."""

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> Any:
        """The path; a usage error if it ends as that of a file."""
        path: Any = super().convert(value, parameter, context)
        try:
            check_folder_name(path)
        except ValueError as error:
            self.fail(str(error), parameter, context)
        return path


FILE = click.Path(path_type=Path)  # or a folder; whether it is there, the command checks
FOLDER = Folder(path_type=Path)  # to write


def check_model(name: str) -> None:
    """Raise a FileNotFoundError if a name means no model; none is opened."""
    from cvt.checkpoints.source import check_exists

    check_exists(name)


def check_data(name: str) -> None:
    """Raise a FileNotFoundError if a name means no data; none is read."""
    from cvt.data.factory import check_exists

    check_exists(name)


def check_folder(folder: Path) -> None:
    """Raise a FileNotFoundError if there is no such folder of a model or of a run."""
    from cvt.checkpoints.source import check_folder

    check_folder(folder)


CHECKS: dict[str, Callable[[Any], None]] = {  # by argument
    "model": check_model,
    "source": check_model,
    "data": check_data,
    "folder": check_folder,
}


class Argument(click.Argument):
    """An argument with a help text, which click's own has only since 8.5."""

    def __init__(self, *declarations: Any, help: str, **settings: Any) -> None:
        super().__init__(*declarations, **settings)
        self.help: str = help

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """The row of the help."""
        return self.make_metavar(ctx), f"{self.help}  [required]" if self.required else self.help


class Setting(click.Option):
    """An option for a setting of a recipe: the help shows it in a group, or its name at the end."""

    def __init__(self, *declarations: Any, group: str, advanced: bool, **settings: Any) -> None:
        super().__init__(*declarations, **settings)
        self.group = group
        self.advanced = advanced

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The row of the help; `--[no-]flag` in one word."""
        if (row := super().get_help_record(ctx)) and self.secondary_opts:
            return "--[no-]" + self.opts[0].removeprefix("--"), row[1]
        return row


class Command(click.Command):
    """A command whose help has a section of arguments, and one for each group of options."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; what names no model, data or folder fails before PyTorch is imported."""
        for parameter in self.params:
            check = CHECKS.get(str(parameter.name))
            value = ctx.params.get(str(parameter.name))
            if check and isinstance(parameter, Argument) and isinstance(value, str | Path):
                check(value)
        return super().invoke(ctx)

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write nothing, as click did before 8.5: `format_options` writes the arguments."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        sections: dict[str, list[tuple[str, str]]] = {}
        advanced = []
        for parameter in self.get_params(ctx):
            is_argument = isinstance(parameter, click.Argument)
            section = "Arguments" if is_argument else getattr(parameter, "group", "Options")
            if getattr(parameter, "advanced", False):
                advanced.append(parameter.opts[0])
            elif row := parameter.get_help_record(ctx):
                sections.setdefault(section, []).append(row)
        if advanced:
            width = max(formatter.width - 2, 20)
            names = textwrap.wrap(", ".join(advanced), width, break_on_hyphens=False)
            sections["Advanced, described by cvt train --schema"] = [(line, "") for line in names]
        for section, rows in sections.items():
            with formatter.section(section):
                formatter.write_dl(rows)


def command(function: Callable[..., None]) -> Command:
    """The command of a function, of its name and its docstring."""
    return click.command(cls=Command)(function)


def argument(name: str, help: str, **settings: Any) -> Decorator:
    """An argument; `settings` are those of `click.Argument`."""
    return click.argument(name, cls=Argument, help=help, **settings)


def count_option(name: str, help: str, default: int | None = None) -> Decorator:
    """An option for a whole number within `cvt.limits.BOUNDS`."""
    least, most = BOUNDS[name]
    kind = click.IntRange(min=least, max=most)
    return click.option(f"--{name.replace('_', '-')}", type=kind, default=default, help=help)


def batch_size_option(default: int = 32, help: str = "Images at a time.") -> Decorator:
    """`--batch-size`."""
    return count_option("batch_size", help, default)


def workers_option(default: int) -> Decorator:
    """`--workers`."""
    return count_option("workers", "Processes that decode images.", default)


def threads_option(help: str = "Threads that run the model on a CPU.") -> Decorator:
    """`--threads`."""
    return count_option("threads", help)


def force_option(help: str) -> Decorator:
    """`--force`."""
    return click.option("--force/--no-force", default=False, help=help)


def known_device(ctx: click.Context, parameter: click.Parameter, name: str) -> str:
    """The device; a usage error if there is none of that name."""
    if name in ("auto", "cpu"):  # there always; PyTorch is imported for the others alone
        return name
    from cvt.runtime.factory import check_device

    try:
        check_device(name)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return name


runtime_option = click.option(
    "--runtime",
    type=click.Choice(("auto", *RUNTIMES, *OF_EXPORTS)),
    default="auto",
    help="Runtime; auto takes the one expected to finish first.",
)
precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Precision of the arithmetic; default: fp32, or an export's own.",
)
verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="Print which runtime auto takes, and the reason."
)
device_option = click.option(
    "--device",
    default="auto",
    callback=known_device,
    help="cpu, cuda, cuda:1, ...; auto uses CUDA if there is a GPU, else the CPU.",
)
max_pixels_option = click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    help="Pixels that an image may have; larger ones are skipped (default 178956970).",
)
exact_decoding_option = click.option(
    "--exact-decoding", is_flag=True, help="Decode large JPEGs whole, which is slower."
)
tta_option = click.option(
    "--tta",
    type=click.Choice(["flip", "five-crop"]),
    help="Mean score of an image and its mirror image, or of its centre and corners.",
)
no_verify_option = click.option(
    "--no-verify",
    is_flag=True,
    help="Do not compare the files with the SHA-256 that were written with them.",
)


def with_options(options: Sequence[Decorator]) -> Decorator:
    """All of these options, in this order."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


# How labelled data is read, in every command that opens some without a recipe; it hands them on.
data_options = with_options(
    [
        click.option(
            "--classes", type=FILE, help="Names of the classes of the data, one per line."
        ),
        click.option("--image-column", help="Column of a table's images."),
        click.option("--label-column", help="Column of a table's labels, or several: A,B,C."),
        click.option("--label-separator", help="Separator between the classes of a label."),
        click.option(
            "--problem-type",
            type=click.Choice(PROBLEMS),
            help="What the labels are: one class, several, or values.",
        ),
    ]
)


# The recipe of a command that takes one as `cvt train` does.
recipe_options = with_options(
    [
        argument(
            "words",
            nargs=-1,
            metavar="[DATA] [KEY=VALUE]...",
            help="Training data and settings, as `cvt train` takes them.",
        ),
        click.option("--config", type=FILE, help="Recipe, as `cvt train` takes it."),
    ]
)


def run_options(workers: int) -> Decorator:
    """How a model is run, in every command that runs one: `--batch-size` to `--threads`."""
    of_model = (runtime_option, precision_option, device_option, threads_option())
    return with_options([batch_size_option(), workers_option(workers), *of_model])


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
        click.BadParameter: one is no number, below 1 or too large.
    """
    found = words(text)
    if found is None:
        return None
    if not all(word.isdecimal() and int(word) for word in found):
        message = f"{text}: must be whole numbers of at least 1, with commas between"
        raise click.BadParameter(message, param_hint=option)
    values = [int(word) for word in found]
    if largest is not None and max(values) > largest:
        raise click.BadParameter(f"{text}: must be at most {largest}", param_hint=option)
    return values


def with_settings(function: Function) -> Function:
    """Give a command that takes `**settings` an option for each setting of a recipe but `data`."""
    from cvt.train.recipe import FIELDS, value_type

    options, group = [], ""
    for name, spec in FIELDS.items():
        group = spec.metadata["group"] or group
        kind, alternatives, _ = value_type(spec)
        shown = (kind.__name__.upper(), *alternatives) if alternatives else ()
        choices = "|".join(spec.metadata["choices"] or shown)
        flag = name.replace("_", "-")
        number = f"{spec.default:g}" if kind is float and spec.default else spec.default
        default = "" if spec.default in (None, False) or kind is bool else f" (default {number})"
        option = click.option(
            f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",
            name,
            cls=Setting,
            group=group,
            type=str if alternatives else kind,  # which the recipe checks
            default=None,
            help=spec.metadata["help"] + default,
            advanced=spec.metadata["advanced"],
            metavar=(choices if len(choices) <= LONGEST_CHOICES else "NAME") or None,
        )
        if name != "data":
            options.append(option)
    return with_options(options)(function)
