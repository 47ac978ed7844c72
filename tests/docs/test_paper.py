"""The pages on the paper: the figures of the models, and the names and commands in their tables."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.small_models import randomise
from PIL import Image

from cvt import CvtConfig, CvtForImageClassification, image_processor
from cvt.architecture import FIELDS as ARCHITECTURE
from cvt.cli import verbs
from cvt.data.class_names import imagenet_classes
from cvt.hub import PUBLISHED
from cvt.train.recipe import FIELDS as SETTINGS
from cvt.train.recipe import load_recipe, packaged_recipes

ROOT = Path(__file__).parents[2]
PAPER = ("docs/en/paper.md", "docs/zh/paper.md")
COMMANDS = {name: verbs.get_command(None, name) for name in verbs.list_commands(None)}
TABLE = "| model | pixels | parameters | multiply-adds, G |\n|---|---|---|---|\n"
ROW = "| `cvt-13` | 224 | 19,997,480 | 4.57 |\n"


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("paper_check")


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def table_rows(text):
    """The cells of each row of each table."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_figures_of_every_model_are_those_that_are_counted(check, capsys):
    assert check.main() == 0, capsys.readouterr().out
    found = {page: len(list(check.rows(read(page)))) for page in check.PAGES}
    assert found["README.md"] == found["README.zh-CN.md"] == len(PUBLISHED)
    assert found[PAPER[0]] == found[PAPER[1]] > 15


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("19,997,480", "19,997,481", "has 19,997,480 parameters and 4.57 G multiply-adds, not"),
        ("| 4.57 |", "| 4.53 |", "not 19,997,480 and 4.53"),
        ("| `cvt-13` |", "| CvT-13 |", "CvT-13 is no model"),
        ("| `cvt-13` |", "| `cvt-13-384` |", "cvt-13-384 is published for 384 pixels"),
        ("| `cvt-13` |", "| `cvt-13 stride_kv=1,1` |", "stride_kv"),
        ("| `cvt-13` |", "| `cvt-13 stride=1,1,1` |", "has no field stride"),
        ("| 224 |", "| all |", "invalid literal"),
    ],
)
def test_a_wrong_row_is_found(check, old, new, message):
    (good,) = check.rows(TABLE + ROW)
    assert check.fault(good) == ""
    (bad,) = check.rows(TABLE + ROW.replace(old, new))
    assert check.fault(bad).startswith("line 3: ")
    assert message in check.fault(bad)


def test_a_page_with_a_wrong_row_or_without_models_fails(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "PAGES", ("page.md",))
    page = tmp_path / "page.md"
    for text, code in [(TABLE + ROW, 0), (TABLE + ROW.replace("4.57", "4.58"), 1), ("", 1)]:
        page.write_text(text)
        assert check.main() == code
    assert "page.md: 1 models, 1 differ" in capsys.readouterr().out


def test_a_table_of_multiply_adds_has_pixels_and_parameters(check):
    message = "line 3: a table of multiply-adds, G needs a column pixels"
    with pytest.raises(ValueError, match=message):
        list(check.rows((TABLE + ROW).replace("pixels", "size")))


def test_a_row_with_the_recipe_of_an_ablation_has_its_changes():
    ablations = {name for name in packaged_recipes() if name.startswith("ablations/")}
    found = set()
    for model, *cells in table_rows(read(PAPER[0])):
        for name in {cell.strip("`") for cell in cells} & ablations:
            recipe = load_recipe(name)
            assert model == f"`{recipe.model} {recipe.architecture}`"
            found.add(name)
    assert found == ablations


@pytest.mark.parametrize("page", PAPER)
def test_the_papers_accuracies_are_those_of_the_published_models(page):
    accuracies = {
        cells[0].strip("`"): cells[3]
        for cells in table_rows(read(page))
        if cells[0].strip("`") in PUBLISHED and cells[1].startswith("ImageNet-")
    }
    assert accuracies == {name: str(each.top1) for name, each in PUBLISHED.items()}


def test_every_command_in_a_table_is_understood():
    found = 0
    for cells in table_rows(read(PAPER[0])):
        for code in re.findall(r"`((?:torchrun [^`]*-m )?cvt [a-z][^`]*)`", " ".join(cells)):
            words = shlex.split(code)
            name, *words = words[words.index("cvt") + 1 :]
            command = COMMANDS[name]
            if words:  # else the cell names the command alone
                given = command.make_context(name, words).params
                pairs = [word.split("=", 1) for word in given.get("words", ()) if "=" in word]
                load_recipe(given.get("config"), dict(pairs))
                found += 1
    assert found > 5


def test_every_name_of_ours_beside_a_key_exists():
    (keys,) = re.findall(r"^### Keys$(.*?)^## ", read(PAPER[0]), re.DOTALL | re.MULTILINE)
    options = {option for c in COMMANDS.values() for p in c.params for option in p.opts}
    known = {*ARCHITECTURE, *SETTINGS, *options, "train/", "val/"}
    (_, _, *rows) = table_rows(keys)
    assert len(rows) > 60
    for *_, ours in rows:
        named = {name.partition("=")[0] for name in re.findall(r"`([^` ]+)`", ours)}
        assert named <= known, ours


@pytest.mark.skipif(not shutil.which("awk"), reason="awk is not installed")
def test_the_folders_of_imagenet_v2_are_matched_by_the_commands_of_the_page(cvt, tmp_path):
    (line,) = re.findall("^awk.*", read(PAPER[0]), re.MULTILINE)
    command, _, name = line.partition(" > ")
    (tmp_path / name).write_bytes(subprocess.check_output(shlex.split(command), cwd=ROOT))

    config = CvtConfig(embed_dim=[8, 8, 16], num_heads=[1, 1, 2], depth=[1, 1, 1])
    config.class_names = list(imagenet_classes().values())
    model, processor = CvtForImageClassification(config).eval(), image_processor(config, 32)
    randomise(model, 0)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    answers = {}  # class to picture
    generator = np.random.default_rng(0)
    for side in (1, 2, 4, 8, 16, 32):
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST)
        logits = model(**processor(picture, return_tensors="pt")).logits
        answers[logits.argmax().item()] = picture
    first, other = list(answers)[:2]
    for i in range(1000):  # the two classes alone have pictures that the model knows
        folder = tmp_path / "v2" / str(i)
        folder.mkdir(parents=True)
        answers[first if i == first else other].save(folder / "a.png")

    options = ("--class-map", tmp_path / name, "--output", tmp_path / "out", "--runtime", "torch")
    code, _, errors = cvt("evaluate", tmp_path / "model", tmp_path / "v2", *options)
    assert code == 0, errors
    assert json.loads((tmp_path / "out/metrics.json").read_text())["top1"] == 2 / 1000
