"""The site in a browser: `make docs` builds it; without that, or without Chromium, no test runs."""

import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import sync_playwright

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
BUILT = all((SITE / language / "search.html").is_file() for language in ("en", "zh"))
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed"),
    pytest.mark.skipif(not BUILT, reason="the site is not built: make docs"),
]
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 800}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """A page whose every request goes to the site itself."""
    page = browser.new_page(viewport=DESKTOP)
    elsewhere = []
    page.on("request", lambda request: elsewhere.append(request.url))
    yield page
    page.close()
    assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.parametrize(
    ("language", "words", "found"),
    [
        ("en", "warmup", "training.html"),
        ("en", "apply_triton", "reference/kernels.html"),
        ("zh", "断点续训", "training.html"),
        ("zh", "退出码", "guide.html"),
        ("zh", "quick_gelu", "guide.html"),
    ],
)
def test_a_search_finds_the_page(page, address, language, words, found):
    page.goto(f"{address}/{language}/search.html?q={words}")
    page.locator(f"#search-results a[href*='{found}']").first.wait_for(timeout=30_000)


def test_a_search_for_words_of_no_page_finds_nothing(page, address):
    page.goto(f"{address}/zh/search.html?q=葡萄牙语")
    page.locator("#search-results .search-summary", has_text="没有").wait_for(timeout=30_000)
    assert page.locator("#search-results ul.search li").count() == 0


@pytest.mark.parametrize("name", ["index.html", "training.html", "reference/cvt.html"])
def test_the_switch_leads_to_the_same_page_and_back(page, address, name):
    page.goto(f"{address}/en/{name}")
    english = page.locator("h1").inner_text()
    page.locator("a.language:visible").click()
    assert page.url == f"{address}/zh/{name}"
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    page.locator("a.language:visible").click()
    assert page.url == f"{address}/en/{name}"
    assert page.locator("h1").inner_text() == english


def test_the_switch_is_in_the_menu_of_a_phone(page, address):
    page.set_viewport_size(PHONE)
    page.goto(f"{address}/en/inference.html")
    page.locator("button.primary-toggle").click()
    page.locator("dialog a.language:visible").click()
    assert page.url == f"{address}/zh/inference.html"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_page_is_wider_than_a_phone(page, address, language):
    page.set_viewport_size(PHONE)
    too_wide = {}
    for path in sorted((SITE / language).rglob("*.html")):
        name = path.relative_to(SITE).as_posix()
        if "/_modules/" in name:
            continue
        page.goto(f"{address}/{name}")
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > PHONE["width"]:
            too_wide[name] = width
    assert too_wide == {}


def test_the_demo_reads_a_digit(page, address):
    if not (SITE / "demo" / "page.json").is_file():
        pytest.skip("the demo was built without ONNX Runtime Web")
    page.goto(f"{address}/en/howto_web.html")
    page.locator("iframe.demo").scroll_into_view_if_needed()
    card = page.frame_locator("iframe.demo").locator("#results > li", has_text="3.png")
    best = card.locator(".classes li").first
    best.wait_for(timeout=60_000)
    assert best.locator("span").first.inner_text() == "3"


def test_every_page_has_its_translation():
    english, chinese = (
        {path.relative_to(SITE / language) for path in (SITE / language).rglob("*.html")}
        for language in ("en", "zh")
    )
    assert english == chinese
