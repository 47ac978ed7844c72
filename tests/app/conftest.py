import pytest
from helpers.page import served


@pytest.fixture(scope="module")
def page(model_folder, photos, tmp_path_factory):
    """`cvt app` with the small model of the three colours, and pictures of one as examples."""
    place = tmp_path_factory.mktemp("page")
    with served(model_folder, place, "--examples", photos / "green") as running:
        yield running
