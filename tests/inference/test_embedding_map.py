"""The map of embeddings: where points lie, and the page."""

import base64
import io
import json
import re

import datasets
import numpy as np
import pytest
from PIL import Image

from cvt import CvtConfig, CvtForImageClassification, image_processor
from cvt.data import StoredImage
from cvt.inference.embedding_file import Embeddings
from cvt.inference.embedding_map import positions, write_map


def features(count=60, classes=3):
    """Features around as many directions at right angles."""
    noise = np.random.default_rng(0).normal(size=(count, 8))
    return np.eye(8)[np.arange(count) % classes] * 5 + 0.3 * noise


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_images_of_one_class_lie_together(method):
    places = positions(features(), method)
    assert places.shape == (60, 2)
    assert np.abs(places).max() == pytest.approx(1)
    classes = np.arange(60) % 3
    centres = np.stack([places[classes == k].mean(0) for k in range(3)])
    distances = np.linalg.norm(places[:, None] - centres, axis=2)
    assert (distances.argmin(1) == classes).all()
    again = positions(features() * 2.0 ** (np.arange(60) % 4)[:, None], method)
    np.testing.assert_allclose(again, places, atol=1e-2)  # lengths do not count


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="at least three images, and there are 2"):
        positions(np.eye(2))
    with pytest.raises(ValueError, match=r"method = 'umap': must be one of tsne, pca"):
        positions(np.eye(5), "umap")


def sheets_of(page):
    """The pictures of a page."""
    found = re.findall(r"data:image/webp;base64,([^\"]+)", page)
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in found]


def colour(sheets, i):
    """The colour in the middle of the picture of a row."""
    at = i % 400
    return sheets[i // 400].getpixel((at % 20 * 64 + 32, at // 20 * 64 + 32))


def test_the_page_has_every_point_and_its_picture(tmp_path):
    count = 450  # on two sheets
    labels = [f"</script>{i % 30}" if i % 9 else None for i in range(count)]
    paths = []
    for i in range(count):
        paths.append(str(tmp_path / f"{i}.png"))
        if i != 7:  # one is no file any more
            Image.new("RGB", (20, 20), (i % 256, 200, 0)).save(paths[-1])
    write_map(Embeddings(features(count), paths, labels), tmp_path / "map.html", "a map", "pca")
    page = (tmp_path / "map.html").read_text()
    assert "://" not in page
    assert page.count("</script>") == 1
    points = json.loads(re.search(r"points = (.+), sheets = ", page)[1])
    assert {key: len(values) for key, values in points.items()} == dict.fromkeys(points, count)
    assert points["text"][1] == f"</script>1\n{paths[1]}"
    assert points["label"][0] == -1
    assert sorted(set(points["label"])) == list(range(-1, 24))
    sheets = sheets_of(page)
    assert [sheet.size for sheet in sheets] == [(1280, 1280), (1280, 192)]
    for i in (0, 7, 123, 401):
        red, green, _ = colour(sheets, i)
        assert (red, green) == pytest.approx((230, 230) if i == 7 else (i % 256, 200), abs=25)


def test_pictures_that_are_no_files_come_from_their_source(tmp_path):
    names = [f"row {i}" for i in range(6)] + ["row 2"]
    images = [
        StoredImage(f"row {i}", Image.new("RGB", (8, 8), (40 * i, 200, 0))) for i in (3, 0, 2, 1, 9)
    ]
    images += [StoredImage("row 2", Image.new("RGB", (8, 8), (255, 200, 0)))]
    Image.new("RGB", (8, 8), (160, 200, 0)).save(tmp_path / "4.png")
    names[4] = str(tmp_path / "4.png")
    rows = Embeddings(features(7), names, [None] * 7)
    write_map(rows, tmp_path / "map.html", "a map", "pca", iter(images))
    sheets = sheets_of((tmp_path / "map.html").read_text())
    expected = [0, 40, 80, 120, 160, 230, 255]  # row 5 is nowhere, and grey
    assert [colour(sheets, i)[0] for i in range(7)] == pytest.approx(expected, abs=25)
    assert colour(sheets, 5) == pytest.approx((230, 230, 230), abs=25)


def test_the_map_of_a_data_set_shows_its_pictures(cvt, tmp_path):
    config = CvtConfig(embed_dim=[8, 8, 16], num_heads=[1, 1, 2], depth=[1, 1, 1])
    CvtForImageClassification(config).save_pretrained(tmp_path / "model")
    image_processor(config, image_size=16).save_pretrained(tmp_path / "model")
    rows = []
    for i in range(5):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (60 * i, 200, 0)).save(buffer, "PNG")
        content = buffer.getvalue() if i != 2 else b"broken"
        rows.append({"bytes": content, "path": f"{i}.png"})
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": rows, "label": [*"ababa"]}, columns)
    table.to_parquet(tmp_path / "train.parquet")
    page = tmp_path / "map.html"
    words = ("embed", tmp_path / "model", tmp_path / "train.parquet", "--runtime", "torch",
             "--output", tmp_path / "f.npz", "--workers", 0, "--threads", 1)  # fmt: skip
    for more, code, message in (
        (("--plot", tmp_path / "map.png"), 1, "map.png must end in .html"),
        (("--plot-method", "pca"), 2, "--plot-method needs a --plot"),
    ):
        found, _, err = cvt(*words, *more)
        assert (found, message in err) == (code, True)
        assert not (tmp_path / "f.npz").exists()
    assert cvt(*words, "--plot", page, "--plot-method", "pca")[0] == 3  # one is skipped
    sheets = sheets_of(page.read_text())
    assert [colour(sheets, i)[0] for i in range(4)] == pytest.approx([0, 60, 180, 240], abs=25)
