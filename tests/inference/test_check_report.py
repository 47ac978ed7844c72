import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from cvt.data import LabelledImages, Task, check
from cvt.data.decoding import StoredImage
from cvt.inference import check_report
from cvt.inference.check_report import write_check

HTML = "<script>alert('é')</script> & $x$"


def pictures(count, copies=1):
    """Stored images, each so many times."""
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = generator.integers(0, 255, (8, 8, 3), dtype="uint8")
        image = Image.fromarray(pixels).resize((48, 64), Image.Resampling.BICUBIC)
        for copy in range(copies):
            yield StoredImage(f"{i}-{copy}.png", image)


@pytest.fixture
def page(tmp_path):
    def written(images, **options):
        write_check(check({"": images}, **options), tmp_path / "out", f"a {HTML}")
        return (tmp_path / "out/report.html").read_text(encoding="utf-8")

    return written


def test_the_page_shows_every_kind_and_names_as_they_are(page, tmp_path):
    sources = [*pictures(2, copies=2), StoredImage("cut.png", b"cut")]
    white = StoredImage("white.png", Image.new("L", (8, 8), "white"))
    text = page(LabelledImages([*sources, white], [HTML, "b", "b", "b", "b", "b"]))
    headings = re.findall(r"<h2>(\w+): (\d+)</h2>", text)
    assert dict(headings) == {
        "unreadable": "1",
        "blank": "1",
        "two_labels": "2",
        "exact_duplicate": "4",
        "small_class": "2",
    }
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(found) == 1 + 2 + 4
    assert {Image.open(io.BytesIO(base64.b64decode(each))).size for each in found} == {(128, 128)}
    assert "<script" not in text
    assert "://" not in text
    assert (tmp_path / "out/findings.csv").read_text().count("\n") == 1 + 10


def test_the_page_of_clean_data_says_so(page):
    images = LabelledImages(list(pictures(4)), ["a", "a", "b", "b"])
    text = page(images, min_images=2)
    assert "Nothing was found" in text
    assert "<img" not in text


def test_the_page_of_images_with_values_has_no_classes(page):
    task = Task("regression")
    text = page(LabelledImages(list(pictures(2, copies=2)), ["1.0", "2.0"] * 2, ["age"], task))
    assert "two_labels" in text
    assert "Classes" not in text


def test_of_many_findings_the_page_shows_the_largest_groups(page, monkeypatch):
    monkeypatch.setattr(check_report, "GROUPS", 2)
    monkeypatch.setattr(check_report, "IN_GROUP", 2)
    monkeypatch.setattr(check_report, "ROWS", 1)
    sources = [*pictures(5, copies=3), *(StoredImage(f"cut{i}", b"cut") for i in range(4))]
    text = page(LabelledImages(sources, ["a"] * len(sources)))
    assert text.count("<img") == 4
    assert text.count("and 1 more of the group") == 2
    assert "and 9 more, in findings.csv" in text
    assert "and 3 more, in findings.csv" in text
