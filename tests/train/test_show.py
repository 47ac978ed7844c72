import shutil

import numpy as np
import pytest
from PIL import Image

from cvt.data import open_training
from cvt.inference import report
from cvt.train import show as show_module
from cvt.train.show import show

PLAIN = {"crop_scale": 1.0, "crop_ratio": 1.0, "flip": 0, "crop_pct": 1.0, "label_smoothing": 0}


@pytest.fixture
def sheets(monkeypatch):
    """What is drawn on the sheets, by the names of their files."""
    drawn = {}

    def plot(cells, title, path):
        drawn[path.stem] = cells
        path.touch()

    monkeypatch.setattr(show_module, "plot_sheet", plot)
    return drawn


def pixels(cell):
    return np.asarray(cell.source.content).astype(int)


def test_the_sheets_show_what_the_model_gets(recipe, photos, tmp_path, sheets):
    squares = shutil.copytree(photos, tmp_path / "squares")
    for path in squares.rglob("*.png"):
        Image.open(path).resize((32, 32)).save(path)
    splits = open_training(squares)
    assert show(recipe(data=str(squares), **PLAIN), tmp_path / "views", images=12) == 0
    for name, images in (("training", splits.train), ("validation", splits.validation)):
        originals = [(np.asarray(Image.open(path)).astype(int), label) for path, label in images]
        assert len(sheets[name]) == min(12, len(images))
        for cell in sheets[name]:
            differences = [abs(original - pixels(cell)).max() for original, _ in originals]
            nearest = int(np.argmin(differences))
            assert differences[nearest] <= 1  # rounded
            assert cell.caption == originals[nearest][1]


def test_mixed_views_have_the_shares_of_their_classes(recipe, tmp_path, sheets):
    show(recipe(mixup=1.0, label_smoothing=0.1, batch_size=30), tmp_path / "views")
    captions = [cell.caption for cell in sheets["training"]]
    two = [caption.split("\n") for caption in captions if "\n" in caption]
    assert two  # the others are of one class, mixed with itself
    for first, second in two:
        shares = [int(line.partition(" %")[0]) for line in (first, second)]
        assert sum(shares) == pytest.approx(100, abs=1)
        assert shares[0] >= shares[1]
    assert {cell.caption for cell in sheets["validation"]} == {"blue", "green", "red"}


def test_what_cannot_be_read_is_left_out_and_counted(recipe, photos, tmp_path, sheets):
    damaged = shutil.copytree(photos, tmp_path / "damaged")
    for number, path in enumerate(sorted(damaged.rglob("*.png"))[::5]):
        path.write_bytes(f"no image {number}".encode())
    assert show(recipe(data=str(damaged), batch_size=30), tmp_path / "views", images=99) == 8
    assert sum(map(len, sheets.values())) == 36 - 8
    for path in damaged.rglob("*.png"):
        path.write_bytes(f"no image {path}".encode())
    with pytest.raises(ValueError, match="none of the images"):
        show(recipe(data=str(damaged)), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_command_draws_two_pictures(cvt, photos, tmp_path):
    output = tmp_path / "views"
    words = ("show", photos, "image_size=32", "mixup=0.5", "--images", "6", "--output", output)
    code, out, err = cvt(*words)
    assert code == 0, err
    assert f"written to {output / 'training.png'}" in out
    for name in ("training", "validation"):
        with Image.open(output / f"{name}.png") as picture:
            assert picture.width >= 4 * report.CELL[0]
    assert cvt(*words)[0] == 1
    assert cvt(*words, "--force")[0] == 0
    assert "what to show is missing" in cvt("show")[2]
