import io

import numpy as np
import pytest
import torch
from helpers.pictures import encoded, photo
from helpers.small_models import make, tiny
from PIL import Image

import cvt
from cvt.app import viewer as module
from cvt.app.card import model_card, readme
from cvt.app.texts import EN, ZH
from cvt.app.viewer import Viewer, enlarged, shown
from cvt.data import ImageError, StoredImage
from cvt.data.decoding import OversizedError
from cvt.inference.page import page_name


@pytest.fixture(scope="module")
def viewer(model_folder):
    return Viewer(str(model_folder))


def stored(height=90, width=60, **how):
    return StoredImage("a.png", encoded(photo(height, width, **how)))


def test_the_scores_are_those_of_the_classifier(viewer, model_folder):
    picture = viewer.look("a.png", stored())
    expected = cvt.Classifier(model_folder, "fused")(stored(), top_k=3)
    assert list(viewer.top(picture, 2)) == [each["label"] for each in expected[:2]]
    for record in expected:
        assert picture.scores[viewer.names.index(record["label"])] == pytest.approx(record["score"])
    assert [viewer.names[i] for i in viewer.best(picture)] == [each["label"] for each in expected]


def test_the_heat_map_is_that_of_the_explainer_for_every_class(viewer, model_folder):
    picture = viewer.look("a.png", stored(600, 500))
    explainer = cvt.Explainer(model_folder)
    maps = [viewer.heat_map(picture, i) for i in range(3)]
    for i, found in enumerate(maps):
        assert found.size == (500, 600)
        expected = explainer(shown(picture), class_name=i).overlay()
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert any(np.asarray(maps[0] != np.asarray(other)).any() for other in maps[1:])


def test_the_heat_map_of_a_tiny_picture_is_large(viewer):
    assert viewer.heat_map(viewer.look("a.png", stored(8, 6)), 0).size == (576, 768)


def test_what_is_kept_is_small_upright_and_without_metadata(viewer):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret"
    content = encoded(photo(1500, 2000), "JPEG", exif=exif)
    picture = viewer.look("a.jpg", StoredImage("a.jpg", content))
    kept = Image.open(io.BytesIO(picture.content))
    assert kept.size == (576, 768)
    assert b"secret" not in picture.content
    assert not kept.getexif()


@pytest.mark.parametrize(
    "content", [b"", b"text", encoded(photo())[:200], b"<svg xmlns='http://www.w3.org/2000/svg'/>"]
)
def test_what_is_no_picture_is_an_image_error(viewer, content):
    with pytest.raises(ImageError) as raised:
        viewer.look("max_pixels.png", StoredImage("max_pixels.png", content))
    assert not isinstance(raised.value, OversizedError)


def test_too_many_pixels_are_an_error_of_their_own(viewer, monkeypatch):
    monkeypatch.setattr(module, "PIXELS", 5000)
    with pytest.raises(OversizedError):
        viewer.look("a.png", stored())
    viewer.look("a.png", stored(50, 50))


def test_scores_that_are_not_finite_are_an_arithmetic_error(viewer, monkeypatch):
    broken = make(tiny(num_labels=3))
    broken.classifier.bias.data[:] = float("nan")
    processor = cvt.image_processor(broken.config, image_size=32)
    monkeypatch.setattr(viewer, "classifier", cvt.Classifier(broken, "torch", processor=processor))
    with pytest.raises(ArithmeticError, match="not finite"):
        viewer.look("a.png", stored())


def test_small_pictures_are_enlarged_by_whole_factors():
    small = Image.fromarray(photo(8, 8))
    large = enlarged(small)
    assert large.size == (448, 448)
    np.testing.assert_array_equal(np.asarray(large)[::56, ::56], np.asarray(small))
    wide = Image.new("RGB", (300, 20))
    assert enlarged(wide) is wide


def test_names_of_classes_are_safe_to_show(tmp_path):
    model = make(tiny())
    model.config.class_names = ["a\u202eb", "<b>", "c", "d", "e"]
    model.save_pretrained(tmp_path)
    cvt.image_processor(model.config, image_size=32).save_pretrained(tmp_path)
    viewer = Viewer(str(tmp_path))
    assert viewer.names[0] == r"a\u202eb"
    assert sum(viewer.top(viewer.look("a.png", stored()), 5).values()) == pytest.approx(1)


def test_two_classes_of_one_name_stay_two(tmp_path):
    model = make(tiny(num_labels=3))
    model.config.class_names = ["crane", "cat", "crane"]
    model.classifier.weight.data[:] = 0
    model.classifier.bias.data[:] = torch.tensor([3.0, 0.0, -3.0])
    model.save_pretrained(tmp_path)
    cvt.image_processor(model.config, image_size=32).save_pretrained(tmp_path)
    viewer = Viewer(str(tmp_path))
    picture = viewer.look("a.png", stored())
    expected = torch.tensor([3.0, 0.0, -3.0]).softmax(0).tolist()
    assert picture.scores == pytest.approx(expected)
    assert viewer.best(picture) == [0, 1, 2]
    assert list(viewer.top(picture, 5)) == viewer.names == ["crane (0)", "cat", "crane (2)"]


def test_a_regression_is_refused(tmp_path):
    model = make(tiny(problem_type="regression"))
    model.save_pretrained(tmp_path)
    cvt.image_processor(model.config, image_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a regression: the page shows classes"):
        Viewer(str(tmp_path))


def test_the_name_has_no_folders_of_the_machine(model_folder, tmp_path, monkeypatch):
    for path in ("runs/photos/best", "runs/photos/last", "my-cvt"):
        (tmp_path / path).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs/photos")
    assert page_name("best") == page_name(str(tmp_path / "runs/photos/best")) == "photos/best"
    assert page_name(str(tmp_path / "runs/photos/last")) == "photos/last"
    assert page_name(str(tmp_path / "my-cvt")) == "my-cvt"
    assert page_name("cvt-13") == "cvt-13"


@pytest.mark.parametrize("texts", [EN, ZH])
def test_the_card_has_facts_and_the_models_own_words(viewer, model_folder, tmp_path, texts):
    card = model_card(str(model_folder), viewer, texts)
    assert f"| {texts.facts[0]} | 3 |" in card
    assert f"| {texts.facts[3]} | 32 × 32 |" in card
    assert str(model_folder.parent) not in card
    text = "---\nlicense: x\n---\n\n# Mine\n\n![a](http://elsewhere/a.png)\n## More\x1b[2J\n"
    (tmp_path / "README.md").write_text(text)
    assert readme(str(tmp_path)) == "### Mine\n\na\n#### More\\x1b[2J"
    assert readme("cvt-13") == readme(str(model_folder)) == ""
