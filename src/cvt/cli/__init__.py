"""The command line: `cvt --help`."""

import io
import sys

import typer

from cvt import __version__
from cvt.cli.app import app as app_command
from cvt.cli.benchmark import benchmark
from cvt.cli.convert import convert
from cvt.cli.demo import demo
from cvt.cli.evaluate import evaluate
from cvt.cli.explain import explain
from cvt.cli.export import export
from cvt.cli.info import info
from cvt.cli.predict import predict
from cvt.cli.push import push
from cvt.cli.recipes import recipes
from cvt.cli.train import train
from cvt.text import printable

app = typer.Typer(
    name="cvt",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        typer.echo(f"cvt-vision {__version__}")
        raise typer.Exit


@app.callback()
def cvt(
    version: bool = typer.Option(
        False, "--version", callback=show_version, is_eager=True, help="Print the version."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks; works anywhere."),
) -> None:
    """CvT, the Convolutional vision Transformer: train, evaluate, predict, export, convert.

    A MODEL is a published name (cvt-13, cvt-13-384, ...), USER/NAME or USER/NAME@REVISION of the
    hub, a model folder, a folder with a PEFT adapter, or a file of weights, as the authors' .pth.
    """


VERBS = (
    *(predict, train, evaluate, explain, app_command, export, benchmark, convert, push, info),
    *(recipes, demo),
)
for command in VERBS:
    app.command()(command)


def main() -> None:
    """Run the command line. Exit codes: 0, 1 failure, 2 usage, 3 images skipped, 130 Ctrl-C.

    typer turns a Ctrl-C inside a command into 130, `cvt.__main__` one outside.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that cannot be printed stops nothing
            stream.reconfigure(errors="backslashreplace")
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    for before, argument in zip(["cvt", *arguments], arguments, strict=False):
        if not argument or (argument.startswith("-") and argument.endswith("=")):
            option = argument.rstrip("=") or before
            typer.echo(f"Error: an empty word, after {option}, names nothing", err=True)
            sys.exit(2)
    try:
        app(arguments)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, ModuleNotFoundError):
            error = OSError(f"{error.name} is not installed: pip install 'cvt-vision[train]'")
        is_absent = isinstance(error, ImportError) and error.name is None  # raised by this package
        expected = is_absent or isinstance(error, ValueError | OSError | ArithmeticError)
        kind = "" if expected else f"{type(error).__name__}: "
        hint = "" if expected else "\nRun again with --debug for a traceback."
        typer.secho("Error: ", fg="red", bold=True, nl=False, err=True)
        typer.echo(printable(f"{kind}{error}{hint}", keep="\n"), err=True)
        sys.exit(1)
