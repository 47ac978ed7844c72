import pytest
import yaml
from helpers.training_runs import write_pictures
from PIL import Image

from cvt.app.examples import MAX_EXAMPLES, find_examples
from cvt.data import decode, open_labelled, write_split
from cvt.data.labelled import split


@pytest.fixture
def run(tmp_path):
    """A run folder with nothing but its settings, on pictures of three classes."""
    folder = tmp_path / "run"
    (folder / "best").mkdir(parents=True)
    return folder


def settings(run, **recipe):
    (run / "args.yaml").write_text(yaml.safe_dump(recipe))


def test_a_folder_of_examples(photos):
    found = find_examples("cvt-13", photos / "blue", private=False)
    assert [each.name for each in found] == [f"{i:02d}.png" for i in range(12)]
    assert len(find_examples("cvt-13", photos, private=False)) == MAX_EXAMPLES


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no images in it"):
        find_examples("cvt-13", tmp_path, private=True)
    with pytest.raises(FileNotFoundError, match="is no folder of examples"):
        find_examples("cvt-13", tmp_path / "none", private=True)


def test_of_a_run_the_first_validation_image_of_each_class(run, tmp_path):
    pictures = write_pictures(tmp_path / "pictures", train=4, val=2)
    settings(run, data=str(pictures), val_data=None)
    found = find_examples(str(run / "best"), None, private=True)
    assert [each.name for each in found] == ["blue", "green", "red"]
    assert all("val" in each.source.parts for each in found)


def test_of_a_run_that_drew_its_validation_images_none_that_it_was_trained_on(run, photos):
    images = open_labelled(str(photos))
    train, validation = split(images, 3)
    write_split(run / "split.csv", train, validation)
    settings(run, data=str(photos))
    (run / "best/adapter").mkdir()
    (run / "best/adapter/adapter_config.json").write_text("{}")
    for folder in ("best", "best/adapter", "."):
        found = find_examples(str(run / folder), None, private=True)
        assert [each.name for each in found] == ["blue", "green", "red"]
        assert {each.source for each in found} <= set(validation.sources)


def test_digits_are_examples_too(run):
    settings(run, data="digits")
    found = find_examples(str(run / "best"), None, private=True)
    assert [each.name for each in found] == list("0123456789")
    assert isinstance(decode(found[0].source), Image.Image)


def test_others_see_no_pictures_of_the_run(run):
    settings(run, data="digits")
    found = find_examples(str(run / "best"), None, private=False)
    assert [each.name for each in found] == ["china.jpg", "flower.jpg"]
    assert all("CC BY 2.0" in each.credit for each in found)
    assert decode(found[0].source).size == (640, 427)


@pytest.mark.parametrize("data", ["hub:owner/name", "stream:hub:owner/name", "gone", ""])
def test_data_that_is_not_here_gives_the_general_examples(run, data, caplog):
    settings(run, data=data)
    found = find_examples(str(run / "best"), None, private=True)
    assert [each.name for each in found] == ["china.jpg", "flower.jpg"]
    assert bool(caplog.records) == (data == "gone")
