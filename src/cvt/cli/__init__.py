"""The command line: `cvt --help`."""

import io
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn

import click

from cvt import __version__
from cvt.text import printable

# Each is in the module of its name, which is imported when the command is asked for. So the first
# sentences of their docstrings are here, too, for `cvt --help`.
VERBS = {
    "predict": "Classify images; those that cannot be decoded are reported and skipped (exit "
    "code 3).",
    "search": "Find the images that look most alike to a model, among those that `cvt embed` "
    "embedded.",
    "check": "Find what is wrong with images before training on them (exit code 3 if anything is).",
    "probe": "Evaluate a model's features on your classes, without training: linear probe and "
    "neighbours.",
    "show": "Draw what `cvt train` would give the model: augmented views, and validation images.",
    "train": "Train or fine-tune a classifier; the best epoch is kept as a model folder, "
    "OUTPUT/best.",
    "tune": "Search for the best settings of a recipe, by Optuna; each trial is a run folder.",
    "evaluate": "Measure accuracy, per class too, and calibration; classes are matched by name.",
    "embed": "Write the features of images; those that cannot be decoded are skipped (exit code "
    "3).",
    "explain": "Draw where a model looks; images that cannot be decoded are skipped (exit code 3).",
    "app": "Serve a page for the browser: drop a picture, see its classes and their heat maps.",
    "serve": "Serve models over HTTP: POST images, get their classes; batched as they come.",
    "export": "Export a classifier to other software, and check the result against the torch "
    "model.",
    "benchmark": "Time a model over runtimes, precisions, batch and image sizes, from pixels to "
    "logits.",
    "convert": "Convert a checkpoint, and check the result by reading it back and comparing "
    "outputs.",
    "push": "Upload a model and its model card to the Hugging Face hub, in one commit.",
    "info": "Show a model's parameters, operations, stages and memory, without running it.",
    "cache": "List or clear the converted graphs that are kept, for a model to start sooner.",
    "recipes": "List the packaged recipes, which `cvt train --config NAME` takes, or print one.",
    "demo": "Train a small CvT on scikit-learn's handwritten digits, evaluate it, classify image "
    "files.",
}
SHELLS = ("bash", "zsh", "fish")  # that completion is for


class Verbs(click.Group):
    """The commands, imported one by one, so that none waits for what another needs."""

    def list_commands(self, ctx: click.Context | None) -> list[str]:
        """Their names, in the order of the help."""
        return list(VERBS)

    def get_command(self, ctx: click.Context | None, cmd_name: str) -> click.Command | None:
        """The command of this name; None if there is none."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = getattr(import_module(f"cvt.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the first sentence of each; click would import them, and cut it to one line."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


def install_completion(ctx: click.Context, parameter: click.Parameter, shell: str | None) -> None:
    """Install completion and stop."""
    if shell:
        from cvt.cli.completion import install

        shell, path = install(ctx.command, shell)
        click.secho(f"{shell} completion installed in {path}", fg="green")
        click.echo("Completion will take effect once you restart the terminal")
        ctx.exit()


def show_completion(ctx: click.Context, parameter: click.Parameter, shell: str | None) -> None:
    """Print the script that completes, and stop."""
    if shell:
        from cvt.cli.completion import script

        click.echo(script(ctx.command, shell))
        ctx.exit()


def completion_option(name: str, callback: Callable[..., None], help: str) -> Callable:
    """An option that may name a shell; the callback stops."""
    return click.option(
        name,
        type=click.Choice(("auto", *SHELLS)),
        is_flag=False,
        flag_value="auto",
        metavar="[SHELL]",
        callback=callback,
        expose_value=False,
        help=help,
    )


@click.group(
    cls=Verbs,
    no_args_is_help=True,
    context_settings={
        "help_option_names": ["--help", "-h"],
        "show_default": True,
        "max_content_width": 100,
    },
)
@click.version_option(__version__, message="cvt-vision %(version)s", help="Print the version.")
@click.option("--debug", is_flag=True, help="Show tracebacks; works anywhere.")
@completion_option(
    "--install-completion",
    install_completion,
    "Install completion for the current shell, or for bash, zsh or fish.",
)
@completion_option(
    "--show-completion",
    show_completion,
    "Show completion for the current shell, to copy it or customize the installation.",
)
def verbs(debug: bool) -> None:
    """CvT, the Convolutional vision Transformer: train, evaluate, predict, export, convert.

    A MODEL is a published name (cvt-13, cvt-13-384, ...), USER/NAME or USER/NAME@REVISION of the
    hub, a model folder, a run folder (its best model), a folder with a PEFT adapter, or a file of
    weights, as the authors' .pth.
    """


def main() -> None:
    """Run the command line. Exit codes: 0, 1 failure, 2 usage, 3 faulty images, 130 Ctrl-C.

    `cvt.__main__` turns a Ctrl-C outside a command into 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that cannot be printed stops nothing
            stream.reconfigure(errors="backslashreplace")
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    for before, argument in zip(["cvt", *arguments], arguments, strict=False):
        if not argument or (argument.startswith("-") and argument.endswith("=")):
            option = argument.rstrip("=") or before
            click.echo(f"Error: an empty word, after {option}, names nothing", err=True)
            sys.exit(2)
    try:
        sys.exit(verbs.main(arguments, standalone_mode=False))
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        click.echo(printable(text.getvalue(), keep="\n\t"), err=True, nl=False)
        sys.exit(error.exit_code)
    except click.Abort as abort:  # in the place of what click does not pass on
        if isinstance(abort.__cause__, KeyboardInterrupt):
            sys.exit(130)
        fail(abort.__cause__ or abort)
    except Exception as error:
        fail(error)


def fail(error: BaseException) -> NoReturn:
    """Print an error and exit with 1; with --debug, raise it."""
    if "--debug" in sys.argv:
        raise error
    if isinstance(error, ModuleNotFoundError):
        error = OSError(f"{error.name} is not installed: pip install 'cvt-vision[train]'")
    is_absent = isinstance(error, ImportError) and error.name is None  # raised by this package
    expected = is_absent or isinstance(error, ValueError | OSError | ArithmeticError)
    kind = "" if expected else f"{type(error).__name__}: "
    hint = "" if expected else "\nRun again with --debug for a traceback."
    click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
    click.echo(printable(f"{kind}{error}{hint}", keep="\n"), err=True)
    sys.exit(1)
