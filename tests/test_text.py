import random

import pytest

from cvt.text import csv_cell, listed, printable

HARMFUL = {
    "\x1b[31mcat": r"\x1b[31mcat",
    "cat\u202egnp.exe": r"cat\u202egnp.exe",
    "two\nlines\r": r"two\x0alines\x0d",
    "\u2066a\u2069\u200f\x9b": r"\u2066a\u2069\u200f\x9b",
    "\udcff": r"\udcff",
}
HARMLESS = [
    "",
    "cat",
    "tabby, tabby cat",
    "café",
    "猫",
    "👩‍🔬",
    "C:\\new\\photos",
    "[red]",
    "<b>",
    "$x$",
]


@pytest.mark.parametrize(("text", "shown"), HARMFUL.items())
def test_what_a_terminal_obeys_is_shown_as_an_escape(text, shown):
    assert printable(text) == csv_cell(text) == shown


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_stays_as_it_is(text):
    assert printable(text) == csv_cell(text) == text


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "'=1", "''=1"])
def test_a_cell_is_no_formula(text):
    assert csv_cell(text) == f"'{text}"


def test_a_message_keeps_its_lines():
    assert printable("a\nb\x07\\x07", keep="\n") == "a\nb\\x07\\\\x07"


def test_different_texts_stay_different():
    generator = random.Random(0)
    pieces = ["\\", "\\x1b", "\x1b", "\\u202e", "\u202e", "'", "=", "a", "\\\\"]
    texts = {"".join(generator.choices(pieces, k=generator.randint(1, 5))) for _ in range(20_000)}
    assert len({printable(text) for text in texts}) == len(texts)
    assert len({csv_cell(text) for text in texts}) == len(texts)


def test_a_list_ends_with_the_number_of_those_that_it_leaves_out():
    assert listed(["a", "b"], most=2) == "a, b"
    assert listed(["a", "b", "c", "d"], most=2) == "a, b and 2 more"
