"""Tables, and the console of progress bars: what rich draws. Imported where something is drawn."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cvt.text import printable


class SafeConsole(Console):
    """Prints names of files and classes without what a terminal obeys; never as markup."""

    def render_str(self, text: str, **options: Any) -> Text:
        """As in rich, of `cvt.text.printable`; cells of tables come here too."""
        return super().render_str(printable(text, keep="\n"), **options)


def console(stderr: bool = False) -> SafeConsole:
    """A console of the output stream or of the error stream."""
    return SafeConsole(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table to the output stream."""
    console().print(table)
