"""The map of embeddings: where points lie, and the page."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

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
    sheets = [
        Image.open(io.BytesIO(base64.b64decode(each)))
        for each in re.findall(r"data:image/webp;base64,([^\"]+)", page)
    ]
    assert [sheet.size for sheet in sheets] == [(1280, 1280), (1280, 192)]
    for i in (0, 7, 123, 401):
        sheet, at = sheets[i // 400], i % 400
        red, green, _ = sheet.getpixel((at % 20 * 64 + 32, at // 20 * 64 + 32))
        assert (red, green) == pytest.approx((230, 230) if i == 7 else (i % 256, 200), abs=25)
