"""The page of `cvt export --to web` in headless Chromium, as a visitor sees it."""

import base64
import io
import os
import re
from itertools import cycle

import numpy as np
import pytest
from helpers.pictures import encoded, photo
from helpers.web_page import CHROMIUM, RUNTIME, needs_browser, served
from PIL import Image, ImageCms
from playwright import sync_api as playwright

import cvt
from cvt import CvtConfig, CvtForImageClassification, image_processor
from cvt.data import decode
from cvt.data.preprocessing import preprocessing_of
from cvt.export import export

pytestmark = needs_browser
WAIT = 120_000  # milliseconds, on a busy machine
FLAGS = (
    "--no-sandbox",
    *("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
)
# The logits of picture files, by the modules of the page.
LOGITS = """async ([folder, engine, files]) => {
  const { open } = await import(folder + "classify.js");
  globalThis.models ??= {};
  const model = globalThis.models[engine] ??= await open(engine, () => {});
  const answers = [];
  for (const file of files) {
    const bytes = Uint8Array.from(atob(file), (each) => each.charCodeAt(0));
    answers.push(await model.logits(new Blob([bytes])).then(
      ({ logits }) => Array.from(logits), (error) => error.reason ?? String(error)));
  }
  return [model.engine, model.threads, answers];
}"""


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(model_folder, tmp_path_factory):
    """The address of a server, and the folder that it serves: one page a model."""
    root = tmp_path_factory.mktemp("site")
    export(model_folder, root / "colours", "web", runtime_files=RUNTIME)
    with served(root) as address:
        yield address, root


class Tab:
    """A tab that records every request; those of its workers, too."""

    def __init__(self, chromium, address, size=(1280, 900), **how):
        self.context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]}, permissions=["camera"], **how
        )
        self.requests = []
        self.context.on("request", lambda request: self.requests.append(request))
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(WAIT)
        self.address = address
        self.tab.goto(address)

    def ready(self):
        self.tab.wait_for_selector("#state.ready, #state.failed")
        assert "failed" not in self.tab.locator("#state").get_attribute("class")
        return self.tab.locator("#state").inner_text()

    def give(self, name, content, kind="image/png"):
        """Choose a file; the text of its card, when it has its answer."""
        file = {"name": name, "mimeType": kind, "buffer": content}
        self.tab.set_input_files("#files", [file])
        return self.answer()

    def answer(self):
        card = "#results > li:first-child"
        self.tab.locator(f"{card} .classes li, {card}.failed .note").first.wait_for()
        return self.tab.locator(card).inner_text()

    def logits(self, engine, *files):
        folder = self.address.partition("?")[0]
        encoded = [base64.b64encode(file).decode() for file in files]
        return self.tab.evaluate(LOGITS, [folder, engine, encoded])


@pytest.fixture
def tab(chromium, site):
    tabs = []

    def opened(path, **how):
        tabs.append(Tab(chromium, f"{site[0]}/{path}", **how))
        return tabs[-1]

    yield opened
    for each in tabs:
        # Nothing but files of the site was asked for, and nothing was sent.
        assert {re.match(r"(blob:)?https?://[^/]*", r.url)[0] for r in each.requests} <= {
            site[0],
            f"blob:{site[0]}",
        }
        assert {(r.method, r.post_data) for r in each.requests} == {("GET", None)}
        each.context.close()


def exif(orientation):
    found = Image.Exif()
    found[274] = orientation
    return {"exif": found.tobytes()}


def swapped_profile():
    """A colour profile that exchanges red and green."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"tttt"), (b"gXYZ", b"rXYZ"), (b"tttt", b"gXYZ")):
        profile = profile.replace(old, new)
    return {"icc_profile": profile}


def pictures():
    """Picture files of every orientation and mode, by a name."""
    sizes = cycle([(40, 57), (61, 45), (200, 133), (31, 90), (480, 641)])
    found = {}

    def add(name, form, mode="RGB", **options):
        height, width = next(sizes)
        image = Image.fromarray(photo(height, width, seed=len(found)))
        if "A" in mode:
            image.putalpha(Image.fromarray(photo(height, width, seed=99)[..., 0]))
        if mode == "I;16":
            grey = 257 * np.asarray(image.convert("L")).astype(np.uint16) + 100
            image = Image.fromarray(grey)
        found[name] = encoded(image if image.mode == mode else image.convert(mode), form, **options)

    for orientation in range(1, 9):
        for form in ("JPEG", "WEBP", "PNG"):
            add(f"{form} {orientation}", form, **exif(orientation))
    add("AVIF 6", "AVIF", **exif(6))
    for form in ("JPEG", "WEBP", "PNG", "AVIF"):
        add(f"{form} with a profile", form, **swapped_profile())
    for mode in ("1", "L", "P", "RGB", "LA", "RGBA", "I;16"):
        add(f"PNG {mode}", "PNG", mode)
    add("PNG I;16 turned", "PNG", "I;16", **exif(8))
    add("PNG with a transparent colour", "PNG", transparency=(30, 40, 50))
    for mode in ("L", "RGB", "CMYK"):
        add(f"JPEG {mode}", "JPEG", mode)
    add("JPEG progressive", "JPEG", progressive=True)
    add("JPEG 4:4:4", "JPEG", subsampling=0, quality=95)
    for mode in ("1", "L", "P", "RGB"):
        add(f"BMP {mode}", "BMP", mode)
    add("GIF", "GIF", "P")
    add("GIF with transparency", "GIF", "RGBA")
    add("WebP lossless", "WEBP", lossless=True)
    add("WebP with alpha", "WEBP", "RGBA")
    return found


def test_logits_are_those_of_python(tab, model_folder):
    given = pictures()
    assert len(given) >= 50
    page = tab("colours/")
    engine, threads, answers = page.logits("wasm", *given.values())
    assert (engine, threads) == ("wasm", 1)
    model = CvtForImageClassification.from_pretrained(model_folder).eval()
    preprocess = preprocessing_of(image_processor(model_folder))
    far = {}
    for (name, content), logits in zip(given.items(), answers, strict=True):
        pixels = cvt.runtime.open_runtime(model, "torch")(preprocess([decode(content)]))
        difference = np.abs(pixels[0] - np.array(logits)).max() if logits != str(logits) else logits
        if not (isinstance(difference, float) and difference <= 1e-4):
            far[name] = difference
    assert far == {}


def test_a_picture_stays_in_the_page(tab):
    """The policy of the page holds in its worker, too."""
    page = tab("colours/")
    page.ready()
    page.give("a.png", encoded(photo()))
    (worker,) = page.tab.workers
    for place in (page.tab, worker):
        refused = place.evaluate(
            "fetch('http://localhost:9/', {method: 'POST', mode: 'no-cors', body: 'x'})"
            ".then(() => 'sent', (error) => String(error))"
        )
        assert refused.startswith("TypeError: Failed to fetch"), refused
    page.requests[:] = [each for each in page.requests if "localhost:9" not in each.url]


def test_the_classes_are_those_of_the_classifier(tab, model_folder):
    content = encoded(photo(60, 80), "JPEG")
    classifier = cvt.Classifier(model_folder, "torch")
    page = tab("colours/?lang=zh", locale="zh-CN")
    assert "已就绪" in page.ready()
    card = page.give("照片 <b>.jpg", content)
    assert card.startswith("照片 <b>.jpg")
    expected = [f"{each['label']} {each['score']:.1%}" for each in classifier(content)]
    assert re.findall(r"^(\w+)\s+([\d.]+%)", card, re.M) == [tuple(e.split()) for e in expected]
    page.tab.click("#language")
    assert page.tab.locator("html").get_attribute("lang") == "en"
    assert re.search(r"[\d.]+ s: [\d.]+ s to read", page.answer())


def test_pictures_are_dropped_pasted_and_taken(tab):
    page = tab("colours/")
    page.ready()
    for event, field in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.tab.evaluate(
            """async ([event, field, picture]) => {
                const bytes = Uint8Array.from(atob(picture), (each) => each.charCodeAt(0));
                const data = new DataTransfer();
                data.items.add(new File([bytes], event + ".png", { type: "image/png" }));
                const made = event === "drop" ? DragEvent : ClipboardEvent;
                document.body.dispatchEvent(
                  new made(event, { [field]: data, bubbles: true, cancelable: true }));
            }""",
            [event, field, base64.b64encode(encoded(photo())).decode()],
        )
        assert page.answer().startswith(f"{event}.png")
    page.tab.get_by_role("button", name="Camera").click()
    page.tab.get_by_role("button", name="Take picture").click()
    page.tab.locator("h3", has_text="camera 1").wait_for()
    page.answer()
    assert page.tab.evaluate("document.getElementById('video').srcObject") is None


@pytest.mark.parametrize("engine", ["wasm", "webgpu"])
def test_pictures_given_at_once_are_all_answered(tab, model_folder, engine):
    contents = {f"{i}.png": encoded(photo(60, 80, seed=i)) for i in range(4)}
    contents["no.png"] = b"no picture"
    page = tab(f"colours/?engine={engine}")
    page.ready()
    page.tab.set_input_files(
        "#files",
        [{"name": n, "mimeType": "image/png", "buffer": c} for n, c in contents.items()],
    )
    answered = "#results > li:has(.classes li), #results > li.failed:has(.note)"
    page.tab.locator(answered).nth(4).wait_for()
    cards = page.tab.locator("#results > li").all_inner_texts()
    assert "not a picture" in cards.pop(0)  # the last one given
    classifier = cvt.Classifier(model_folder, "torch")
    for card, (name, content) in zip(reversed(cards), contents.items(), strict=False):
        assert card.startswith(name)
        expected = [f"{each['label']} {each['score']:.1%}" for each in classifier(content)]
        found = re.findall(r"^(\w+)\s+([\d.]+%)", card, re.M)
        assert found == [tuple(e.split()) for e in expected]


def test_addresses_of_pictures_are_all_shown_and_a_bad_one_gets_a_sentence(tab, site):
    (site[1] / "colours" / "a.png").write_bytes(encoded(photo()))
    page = tab("colours/?image=missing.png&image=http://[&image=a.png")
    page.ready()
    assert page.answer().startswith("a.png")
    cards = page.tab.locator("#results > li").all_inner_texts()
    assert [card.split("\n")[0] for card in cards] == ["a.png", "[", "missing.png"]
    assert "missing.png: 404" in cards[2]
    assert "http://[: " in cards[1]


def test_what_cannot_be_read_gets_a_sentence(tab):
    image, page = Image.fromarray(photo()), tab("colours/")
    for name, content, sentence in (
        ("a.tif", encoded(image, "TIFF"), "This TIFF cannot be decoded: it is damaged, or this"),
        ("a.jpg", encoded(image, "JPEG")[:900], "This JPEG cannot be decoded"),
        ("a.png", encoded(image.convert("I;16"))[:900], "This PNG cannot be decoded"),
        ("a.txt", b"no picture", "This is not a picture in one of the formats JPEG, PNG"),
        ("b.txt", b"", "The file is empty"),
        ("long.png", encoded(Image.new("L", (2002, 2))), "too long for its width"),
    ):
        assert sentence in page.give(name, content)


def test_threads_and_webgpu_give_the_same_logits(tab):
    """WebGPU is imitated by the processor here."""
    page, content = tab("isolated/colours/"), encoded(photo())
    answers = [page.logits(engine, content) for engine in ("wasm", "webgpu")]
    assert answers[0][:2] == ["wasm", min(os.cpu_count(), 8)]
    assert answers[1][0] == "webgpu"
    np.testing.assert_allclose(answers[0][2], answers[1][2], atol=1e-3)


def test_a_gpu_with_other_numbers_is_not_used(tab, site):
    _, root = site
    page = root / "colours" / "page.json"
    text = page.read_text("utf-8")
    try:
        page.write_text(re.sub(r'"example": \[\s*', '"example": [\n99, ', text), "utf-8")
        assert tab("colours/").logits("webgpu", encoded(photo()))[0] == "wasm"
    finally:
        page.write_text(text, "utf-8")


@pytest.mark.parametrize(
    ("name", "fields", "shown"),
    [
        ("values", {"problem_type": "regression"}, r"\nyellow\n-?[\d.]+\n"),
        (
            "several",
            {"problem_type": "multi_label_classification", "thresholds": [1.0, 0.0, 1.0]},
            r"\n<i>black</i>present\n[\d.]+%\n",
        ),
    ],
)
def test_values_and_several_classes(tab, site, name, fields, shown):
    _, root = site
    config = CvtConfig(embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 1, 1], num_labels=3)
    config.class_names = ["yellow", "<i>black</i>", "white"]
    for field, value in fields.items():
        setattr(config, field, value)
    model = root.parent / f"{root.name}-{name}"
    CvtForImageClassification(config).save_pretrained(model)
    image_processor(config, image_size=32).save_pretrained(model)
    export(model, root / name, "web", precision="fp16", runtime_files=RUNTIME)
    card = tab(f"{name}/").give("a.png", encoded(photo()))
    assert re.search(shown, card), card
    assert ("present" in card) == (name == "several")


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window_and_is_dark_where_that_is_wanted(tab, size, scheme):
    page = tab("colours/", size=size, color_scheme=scheme)
    page.ready()
    page.give("meadow.jpg", encoded(photo(480, 640), "JPEG"))
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= size[0]
    picture = Image.open(io.BytesIO(page.tab.screenshot())).convert("L")
    assert (np.median(picture) < 100) == (scheme == "dark")
