"""Names from files: escaped for a terminal, a page and a spreadsheet, and listed."""

import re
from collections.abc import Sequence

# Control characters, what reorders text, line separators, and single surrogates of UTF-16.
_UNSAFE = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
UNSAFE = re.compile(f"[{_UNSAFE}]")
_ESCAPED = re.compile(r"\\x[0-9a-f]{2}|\\u[0-9a-f]{4}")
_FORMULA = re.compile(r"'*[=+\-@]")
CLASSES = 20  # that a message names


def printable(text: str, keep: str = "") -> str:
    r"""The text with `\x1b`, `\u202e` and the like in the place of what is unsafe to print.

    Different texts stay different: where a text has such escapes already, its backslashes are
    doubled.

    Args:
        text: from anywhere.
        keep: characters that stay as they are, such as the line breaks of a message.
    """
    unsafe = {character for character in UNSAFE.findall(text) if character not in keep}
    if unsafe or (not keep and _ESCAPED.search(text)):
        text = text.replace("\\", "\\\\")
    for character in unsafe:
        code = ord(character)
        text = text.replace(character, f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
    return text


def utf8(text: str) -> str:
    r"""The text with escapes, as `\udcff`, in the place of what UTF-8 cannot encode."""
    return text.encode("utf-8", "backslashreplace").decode()


def csv_cell(text: str) -> str:
    """The text for a cell of a csv file: a spreadsheet runs nothing of it as a formula.

    As OWASP advises, a single quote is put in front of `=`, `+`, `-` and `@`; in front of such a
    quote, too, so that different texts stay different.
    """
    text = printable(text)
    return f"'{text}" if _FORMULA.match(text) else text


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
