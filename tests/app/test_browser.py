"""The page in headless Chromium, as people see it."""

from pathlib import Path

import pytest
from helpers.pictures import encoded, photo
from playwright import sync_api as playwright

from cvt.app.texts import EN, FORMATS, ZH

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(
    not CHROMIUM.is_file(), reason=f"no Chromium at {CHROMIUM}: `make browser` installs it"
)
WAIT = 60_000  # milliseconds, on a busy machine
RED, GREEN = (encoded(photo(60, 80, seed=seed)) for seed in (1, 2))


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A tab with the page.

    Attributes:
        tab: of playwright.
        elsewhere: addresses on other machines that it asked for.
        failures: addresses that were answered with an error.
    """

    def __init__(self, chromium, address, locale="en-US", size=(1280, 900), **how):
        width, height = size
        self.tab = chromium.new_page(
            locale=locale, viewport={"width": width, "height": height}, **how
        )
        self.tab.set_default_timeout(WAIT)
        self.elsewhere, self.failures = [], []
        self.tab.on("request", self._asked)
        self.tab.on("response", self._answered)
        self.address = address
        self.tab.goto(address)
        self.tab.wait_for_selector("#upload input[type=file]", state="attached")

    def _asked(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)

    def _answered(self, response):
        if response.status >= 400:
            self.failures.append((response.status, response.url))

    def give(self, *pictures):
        files = [{"name": n, "mimeType": "image/png", "buffer": data} for n, data in pictures]
        self.tab.set_input_files("#upload input[type=file]", files)

    def wait_for_answer(self, image=None):
        """Until bars and a heat map are there; returns the address of the heat map.

        Args:
            image: the address of the heat map before, which must be replaced.
        """
        self.tab.wait_for_selector("#classes [data-testid=label-output-value]")
        self.tab.wait_for_function(
            """before => {
                const image = document.querySelector("#heat_map img");
                return image && image.src !== before && image.complete && image.naturalWidth;
            }""",
            arg=image,
        )
        return self.tab.get_attribute("#heat_map img", "src")

    def note(self):
        """The sentence of the last note."""
        return self.tab.wait_for_selector("[data-testid=toast-body]").inner_text()

    def bars(self):
        return [each.inner_text() for each in self.tab.query_selector_all("#classes dt")]

    def fits(self):
        """Whether nothing is wider than the window."""
        return self.tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.fixture
def open_tab(chromium, page):
    tabs = []

    def opened(**how):
        tabs.append(Tab(chromium, page.address + "/", **how))
        return tabs[-1]

    yield opened
    for tab in tabs:
        tab.tab.close()
        assert tab.elsewhere == []  # offline, and nothing is reported to anybody


def test_a_picture_its_classes_its_heat_map_and_another_class(open_tab):
    tab = open_tab()
    assert tab.tab.inner_text("h1") == EN.heading
    assert EN.gradio["upload_text.drop_file"] in tab.tab.inner_text("#upload")
    tab.give(("red.png", RED))
    first = tab.wait_for_answer()
    best, other, _ = tab.bars()
    assert tab.tab.inner_text("#classes [data-testid=label-output-value]") == best
    assert EN.heat_map_of.format(name=best) in tab.tab.inner_text("#heat_map")
    tab.tab.click(f"#classes [data-testid='{other}-confidence-set']")
    second = tab.wait_for_answer(first)
    assert EN.heat_map_of.format(name=other) in tab.tab.inner_text("#heat_map")
    assert tab.tab.input_value("#choice input") == other
    assert tab.bars()[0] == best
    tab.tab.click("#choice input")
    tab.tab.click(f"#choice [role=option]:has-text('{best}')")
    tab.wait_for_answer(second)
    assert EN.heat_map_of.format(name=best) in tab.tab.inner_text("#heat_map")
    assert tab.failures == []


def test_several_pictures_an_example_and_the_card(open_tab):
    tab = open_tab()
    tab.give(("red.png", RED), ("green.png", GREEN))
    first = tab.wait_for_answer()
    assert len(tab.tab.query_selector_all("#pictures button img")) == 2
    tab.tab.click("#pictures button:has(img) >> nth=1")
    second = tab.wait_for_answer(first)
    tab.tab.click("#examples button:has(img) >> nth=0")
    tab.wait_for_answer(second)
    tab.tab.wait_for_function("document.querySelectorAll('#pictures button img').length === 3")
    card = tab.tab.locator("#card")
    card.locator("button").first.click()
    playwright.expect(card.get_by_text(EN.facts[1])).to_be_visible()
    assert "fused fp32" in card.inner_text()
    assert tab.failures == []


def test_a_corrupt_file_and_one_that_is_too_large(open_tab, tmp_path):
    tab = open_tab()
    tab.give(("broken.png", RED[:100]))
    assert EN.unreadable.format(name="broken.png", formats=FORMATS) in tab.note()
    assert not tab.tab.query_selector("#heat_map img")
    tab.tab.click("[data-testid=toast-close]")
    (tmp_path / "large.png").write_bytes(RED + b"\0" * (20 * 2**20))
    tab.tab.set_input_files("#upload input[type=file]", tmp_path / "large.png")
    tab.tab.wait_for_selector("[data-testid=toast-body]:has-text('large.png')")
    assert EN.file_too_large.format(name="large.png", size="20 MB") in tab.note()
    tab.give(("red.png", RED))  # and it works on
    tab.wait_for_answer()


def test_chinese_by_the_browser_and_by_a_click(open_tab):
    tab = open_tab(locale="zh-CN")
    assert tab.tab.inner_text("h1") == ZH.heading
    assert tab.tab.get_attribute("html", "lang") == "zh-CN"
    assert ZH.gradio["upload_text.drop_file"] in tab.tab.inner_text("#upload")
    tab.give(("坏.png", RED[:100]))
    assert ZH.unreadable.format(name="坏.png", formats=FORMATS) in tab.note()
    tab.give(("红.png", RED))
    tab.wait_for_answer()
    assert ZH.heat_map_of.format(name=tab.bars()[0]) in tab.tab.inner_text("#heat_map")
    tab.tab.click("#language")
    tab.tab.wait_for_selector(f"h1:has-text('{EN.heading}')")
    # Its own words are English too, in a Chinese browser.
    assert EN.gradio["upload_text.drop_file"] in tab.tab.inner_text("#upload")


def test_it_is_readable_at_a_phones_width(open_tab):
    tab = open_tab(size=(390, 844), is_mobile=True, has_touch=True)
    assert tab.fits()
    tab.give(*((f"{i}.png", encoded(photo(seed=i))) for i in range(5)))
    tab.wait_for_answer()
    assert tab.fits()
    for part in ("#upload", "#heat_map img", "#classes", "#choice", "#examples"):
        box = tab.tab.locator(part).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    assert tab.tab.locator("#heat_map img").bounding_box()["width"] > 330
    sizes = "p, dt, dd, label, h1, #language"
    smallest = tab.tab.evaluate(
        "query => Math.min(...[...document.querySelectorAll(query)].filter(e => e.offsetParent)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))",
        sizes,
    )
    assert smallest >= 12
