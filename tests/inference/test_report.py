import base64
import io
import warnings
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from helpers.small_models import make, tiny
from PIL import Image

from cvt.data.decoding import StoredImage
from cvt.data.image_processor import image_processor
from cvt.inference import report
from cvt.inference.explain import Explainer
from cvt.inference.metrics import COUNTED, Evaluation, Failure, Mistake
from cvt.inference.predict import Prediction
from cvt.inference.report import (
    plot_confusion,
    plot_curves,
    plot_mistakes,
    plot_predictions,
    plot_reliability,
    write_report,
)

HTML = "<script>alert('é')</script> & $x$"


def evaluation_of(classes, images=300, wrong=0.3, failures=()):
    """An evaluation of that many classes, the second of which is called `HTML`."""
    generator = np.random.default_rng(0)
    labels = ["first", HTML, *(f"class {i}" for i in range(2, classes))][:classes]
    rows, mistakes = [], []
    for i in range(images):
        true = int(generator.integers(classes))
        best = int(generator.integers(classes)) if generator.uniform() < wrong else true
        score = float(generator.uniform(0.3, 1))
        rows.append((i, f"{i}.png", true, best, score, True, 0.5, np.nan))
        if true != best:
            pixels = generator.integers(0, 255, (8 if i % 2 else 200, 300, 3), dtype="uint8")
            source = StoredImage(f"{i}.png", Image.fromarray(pixels))
            mistakes.append(Mistake(score, i, source, labels[true], labels[best]))
    counted = np.array(rows, COUNTED)
    return Evaluation(labels, counted, sorted(mistakes, reverse=True)[:60], list(failures))


def row(epoch, value, averaged=None):
    names = ("train_loss", "val_loss", "val_top1", "ema_loss", "ema_top1")
    values = (2 - value, None if value > 0.6 else 2.2 - value, value, averaged, averaged)
    return {"epoch": epoch, **dict(zip(names, values, strict=True))}


CURVES = {
    "plain": [{"epoch": 1, "train_loss": 2.0, "val_loss": 2.1, "val_top1": 0.2}],
    "averaged": [row(i + 1, i / 20, i / 19) for i in range(20)],
    "metric": [row(1, 0.3) | {"val_f1_macro": 0.2}],
    "untested": [row(1, 0.1) | {"val_loss": None, "val_top1": None}],
}
PICTURES = {
    **{
        f"curves-{name}": lambda path, history=history, name=name: plot_curves(
            history, path, "f1_macro" if name == "metric" else "top1"
        )
        for name, history in CURVES.items()
    },
    **{
        f"confusion-{classes}": lambda path, classes=classes: plot_confusion(
            evaluation_of(classes), path
        )
        for classes in (1, 3, 12, 22_000)
    },
    "mistakes": lambda path: plot_mistakes(evaluation_of(6), path),
    "no-mistakes": lambda path: plot_mistakes(evaluation_of(6, wrong=0), path),
    "reliability": lambda path: plot_reliability(evaluation_of(6), path),
    "reliability-1": lambda path: plot_reliability(evaluation_of(2, images=1), path),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_drawn(name, tmp_path):
    before = dict(matplotlib.rcParams)
    PICTURES[name](tmp_path / f"{name}.png")
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert picture.format == "PNG"
        values = np.asarray(picture.convert("L"))
    assert values.min() < 100  # there is ink
    assert values[0].min() > 250  # and paper
    assert dict(matplotlib.rcParams) == before


def test_of_many_classes_those_most_often_confused_are_drawn(monkeypatch, tmp_path):
    drawn = {}
    draw = matplotlib.axes.Axes.set_xticks

    def listen(axes, ticks, labels=None, **kwargs):
        drawn["labels"] = labels
        return draw(axes, ticks, labels, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "set_xticks", listen)
    pairs = [(7, 2), (7, 2), (2, 9), (4, 4), (4, 4), (1, 3)]
    rows = [(i, "", true, best, 0.5, True, 0.0, 0.0) for i, (true, best) in enumerate(pairs)]
    labels = [str(i) for i in range(10)]
    plot_confusion(Evaluation(labels, np.array(rows, COUNTED), [], []), tmp_path / "p.png", most=3)
    assert drawn["labels"] == ["2", "7", "9"]


def test_a_sheet_shows_wrong_predictions_first(photos, tmp_path):
    paths = [photos / "red" / f"{i:02d}.png" for i in range(12)]
    predictions = [Prediction(path, ["red", "blue"], [0.9, 0.1]) for path in paths]
    plot_predictions(predictions, ["red"] * 11 + ["blue"], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    frame = (abs(pixels - (0xC5, 0x1B, 0x29)).max(-1) < 8).sum(0)  # the colour of what is wrong
    assert frame.argmax() < pixels.shape[1] / 10  # in the first of ten columns


# ------------------------------------------------------------------------------ the page


class Page(HTMLParser):
    """What is in a page: its words, the sources of its pictures, its tags."""

    def __init__(self, path):
        super().__init__()
        self.words, self.pictures, self.tags = [], [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.pictures += [value for name, value in attributes if name == "src"]

    def handle_data(self, data):
        self.words += [data.strip()] if data.strip() else []


@pytest.fixture
def page(tmp_path):
    def written(evaluation, title="a title"):
        write_report(evaluation, tmp_path / "page.html", title, overwrite=True)
        return Page(tmp_path / "page.html")

    return written


def test_the_page_has_the_figures_and_the_pictures(page):
    evaluation = evaluation_of(6, failures=[Failure(9, "bad.png", "bad.png: is empty")])
    found = page(evaluation)
    for figure in (
        *(evaluation.top1, evaluation.balanced_accuracy, evaluation.f1_macro),
        evaluation.calibration_error,
    ):
        assert f"{100 * figure:.2f} %" in found.words
    assert "bad.png: is empty" in found.words
    assert len(found.pictures) == 2 + len(evaluation.mistakes)
    for picture in found.pictures:
        head, data = picture.split(",")
        assert head == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    classes = sorted(evaluation.per_class.values(), key=lambda each: each.recall)
    rates = [rate for each in classes for rate in (each.precision, each.f1, each.recall)]
    shown = [float(word[:-2]) for word in found.words if word.endswith(" %") and word[-4] == "."]
    assert shown[-len(rates) :] == [float(f"{100 * rate:.1f}") for rate in rates]


def test_the_page_needs_nothing_else(page):
    found = page(evaluation_of(6))
    assert not {"script", "link", "iframe", "object"} & set(found.tags)
    assert "://" not in found.text
    assert "url(" not in found.text


def test_names_are_shown_as_they_are(page):
    found = page(evaluation_of(4), title=HTML)
    assert found.words.count(HTML) >= 3  # title, heading, table
    assert "<script" not in found.text


def test_mistakes_are_explained_beside_their_names(tmp_path):
    model = make(tiny())
    explainer = Explainer(model, processor=image_processor(model.config, 64))
    evaluation = evaluation_of(5)
    write_report(evaluation, tmp_path / "page.html", "a title", explainer=explainer)
    found = Page(tmp_path / "page.html")
    assert len(found.pictures) == 2 + 2 * len(evaluation.mistakes)
    worst = evaluation.mistakes[0]
    image, overlay = (
        Image.open(io.BytesIO(base64.b64decode(each.split(",")[1]))) for each in found.pictures[2:4]
    )
    expected = explainer(worst.source, evaluation.labels.index(worst.predicted)).resized(256)
    assert overlay.tobytes() == expected.overlay().tobytes()
    assert image.tobytes() == expected.image.tobytes()
    assert all(str(mistake.source) in found.words for mistake in evaluation.mistakes)


def test_a_page_without_mistakes_has_no_mosaic(page):
    found = page(evaluation_of(2, wrong=0))
    assert "The most confident mistakes" not in found.words
    assert len(found.pictures) == 2


def test_of_very_many_classes_the_page_shows_the_worst(page):
    evaluation = evaluation_of(22_000, images=1500, wrong=0.01)
    found = page(evaluation)
    hidden = len(evaluation.per_class) - 1000
    assert f"and {hidden} more classes" in found.words


def test_a_page_is_not_overwritten(tmp_path):
    (tmp_path / "page.html").write_text("mine")
    with pytest.raises(FileExistsError):
        write_report(evaluation_of(2), tmp_path / "page.html", "title")


CHINESE = ["猫", "狗"]


def of_chinese():
    evaluation = evaluation_of(2)
    return Evaluation(CHINESE, evaluation.counted, [], [])


def test_names_without_a_font_are_reported_once_and_not_by_matplotlib(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(report, "WIDE_FONTS", ("No Such Font", "Nor This"))
    report._warn_of_glyphs.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("a.png", "b.png"):
            plot_confusion(of_chinese(), tmp_path / name)
        plot_mistakes(evaluation_of(2), tmp_path / "c.png")
    (message,) = caplog.messages
    assert message.endswith("Install one, such as No Such Font or Nor This")


def test_a_font_that_has_the_characters_is_found(monkeypatch, caplog):
    monkeypatch.setattr(report, "WIDE_FONTS", ("No Such Font", "DejaVu Sans Mono", "DejaVu Sans"))
    report._warn_of_glyphs.cache_clear()
    with matplotlib.rc_context({"font.family": ["cmr10"]}):
        for names, fonts in ((["beetle"], []), (["Жук"], ["DejaVu Sans Mono"])):
            with report._style(names):
                assert matplotlib.rcParams["font.family"] == ["cmr10", *fonts]
    assert not caplog.messages


def test_malicious_names_reach_the_page_as_text(tmp_path):
    evaluation = evaluation_of(3)
    evaluation.labels[0], evaluation.labels[2] = "cat\u202egnp", "\x1b[31m"
    write_report(evaluation, tmp_path / "a.html", "a\u202eb")
    page = (tmp_path / "a.html").read_text("utf-8")
    assert not set("\x1b\u202e") & set(page)
    assert "<script" not in page
    assert r"cat\u202egnp" in page
