"""The figures of the pages: what is committed is what the script draws."""

import importlib
import re
from pathlib import Path

import pytest

from cvt import CvtConfig

ROOT = Path(__file__).parents[1]
LANGUAGES = ("en", "zh")


@pytest.fixture
def draw(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs/figures")
    return importlib.import_module("draw")


@pytest.mark.parametrize("language", LANGUAGES)
def test_committed_figures_are_those_that_the_script_draws(draw, language):
    for name, figure in draw.FIGURES.items():
        drawn = figure(language)
        assert drawn == (ROOT / f"docs/images/{language}/{name}.svg").read_text("utf-8")
        assert len(drawn.encode()) < 100_000
        assert bool(re.search("[\u4e00-\u9fff]", drawn)) == (language == "zh")


def test_a_figure_follows_the_configuration(draw, monkeypatch):
    _, costs = draw.cvt_13()
    config = CvtConfig.from_variant("cvt-13", kernel_qkv=[5, 5, 5])
    monkeypatch.setattr(draw, "cvt_13", lambda: (config, costs))
    assert "5 × 5, stride 2" in draw.block("en")
    assert "3 × 3, stride 2" not in draw.block("en")
