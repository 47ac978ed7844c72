"""Takes the pictures of `cvt app` and of an export's web page, and composes the README's first.

    make browser && PYTHONPATH=src python docs/figures/screenshots.py

writes docs/images/en and zh, app.png and face.png, and docs/images/app-phone.png. The model is
trained in a few minutes where docs/_build/photos-cvt has none yet: a small CvT that knows seven
things, cut out of photographs that come with scikit-image and scikit-learn and laid on parts of
photographs without them. Whole photographs it has not seen.
"""

import base64
import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageDraw, ImageFilter
from playwright import sync_api as playwright
from sklearn.datasets import load_sample_images

import cvt
from cvt.export import export
from cvt.export.web import runtime_folder

DOCS = Path(__file__).parents[1]
MODEL = DOCS / "_build" / "photos-cvt"
CHROMIUM = "/usr/bin/chromium"
LOCALES = {"en": "en-US", "zh": "zh-CN"}
BYTES = 800_000  # of a picture

# ------------------------------------------------------------------------------ pictures

SIDE = 64  # pixels of a training image
CHINA, FLOWER = map(Image.fromarray, load_sample_images().images)
ASTRONAUT, CAT, COFFEE, ROCKET, *TEXTURES = (
    Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    for name in ("astronaut", "chelsea", "coffee", "rocket", "brick", "grass", "gravel")
)
THINGS = {  # a photograph, and the box of a thing in it: left, top, right, bottom
    "face": (ASTRONAUT, (153, 13, 303, 190)),
    "helmet": (ASTRONAUT, (278, 345, 511, 512)),
    "space shuttle": (ASTRONAUT, (354, 0, 473, 285)),
    "cat": (CAT, (35, 20, 375, 290)),
    "cup": (COFFEE, (172, 16, 411, 281)),
    "pagoda": (CHINA, (64, 30, 369, 420)),
    "flower": (FLOWER, (170, 85, 446, 360)),
}
NAMES = list(THINGS)
BACKGROUNDS = [  # without any of them
    (CHINA, (380, 0, 640, 420)),
    (FLOWER, (0, 0, 165, 427)),
    (FLOWER, (450, 0, 640, 330)),
    (ROCKET, (0, 0, 290, 427)),
    (ROCKET, (355, 0, 640, 427)),
    (COFFEE, (0, 290, 600, 400)),
    (ASTRONAUT, (25, 210, 270, 500)),
    (ASTRONAUT, (90, 0, 150, 160)),
    (CAT, (380, 100, 451, 300)),
    *((texture, (0, 0, 512, 512)) for texture in TEXTURES),
]


def lit(image: Image.Image, factor: float) -> Image.Image:
    """An image that is brighter or darker by a factor."""
    return image.point(lambda value: min(255, int(value * factor)))


def background(generator: np.random.Generator) -> Image.Image:
    """A square part of one of the backgrounds."""
    image, (left, top, right, bottom) = BACKGROUNDS[generator.integers(len(BACKGROUNDS))]
    side = int(min(right - left, bottom - top) * generator.uniform(0.5, 1))
    x = generator.integers(left, right - side + 1)
    y = generator.integers(top, bottom - side + 1)
    part = image.crop((x, y, x + side, y + side)).resize((SIDE, SIDE))
    if generator.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return lit(part, generator.uniform(0.6, 1.1))


def scene(generator: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """One or two things on a background, and which they are, (K,), as 0 and 1."""
    image, present = background(generator), np.zeros(len(NAMES), np.float32)
    for index in generator.choice(len(NAMES), generator.integers(1, 3), replace=False):
        photograph, box = THINGS[NAMES[index]]
        edges = np.array(box) + generator.integers(-12, 13, 4)
        left, top, right, bottom = edges.clip(0, [*photograph.size, *photograph.size]).tolist()
        scale = generator.uniform(0.35, 0.85) * SIDE / max(right - left, bottom - top)
        size = max(4, int((right - left) * scale)), max(4, int((bottom - top) * scale))
        thing = photograph.crop((left, top, right, bottom)).resize(size)
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle((1, 1, size[0] - 2, size[1] - 2), fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(generator.uniform(0, 3)))
        thing = lit(thing, generator.uniform(0.7, 1.15))
        x, y = (int(generator.integers(-edge // 6, SIDE - edge * 5 // 6)) for edge in size)
        image.paste(thing, (x, y), mask)
        present[index] = 1
    return image, present


# ------------------------------------------------------------------------------ model


def train(folder: Path, images: int = 2300, steps: int = 1500, batch: int = 32) -> None:
    """Train a small CvT on scenes, and write it with its preprocessing."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    config = cvt.CvtConfig(
        embed_dim=[24, 48, 96],
        num_heads=[1, 2, 4],
        depth=[1, 1, 2],
        patch_stride=[4, 2, 1],  # a heat map has a value for every eight pixels
        drop_path_rate=[0, 0, 0],
        cls_token=[False] * 3,
        problem_type="multi_label_classification",
    )
    config.class_names = NAMES
    model = cvt.CvtForImageClassification(config).train().to(memory_format=torch.channels_last)
    processor = cvt.image_processor(config, SIDE, crop_pct=1.0)
    scenes, present = zip(*(scene(generator) for _ in range(images)), strict=True)
    pixels = processor(list(scenes), return_tensors="pt")["pixel_values"]
    targets = torch.from_numpy(np.stack(present))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(0, images, (batch,))
        views = pixels[rows].flip(3) if step % 2 else pixels[rows]
        views = views.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        model(views, labels=targets[rows]).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)


# ------------------------------------------------------------------------------ pages


@contextlib.contextmanager
def app(examples: Path) -> Iterator[str]:
    """The address of `cvt app`."""
    command = (sys.executable, "-m", "cvt", "app", MODEL, "--port", "0", "--examples", examples)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            yield next(
                found[1]
                for line in process.stdout
                if (found := re.search(r"(http://[^/\s]+)", line))
            )
        finally:
            process.terminate()


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder, without a log."""

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""


@contextlib.contextmanager
def site(folder: Path) -> Iterator[str]:
    """The address of an export's web page."""
    export(MODEL, folder, "web", runtime_files=runtime_folder())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def picture_of_app(tab: playwright.Page, address: str, files: list[Path]) -> bytes:
    """The page of `cvt app` with its answer to some pictures."""
    tab.goto(address)
    tab.set_input_files("#upload input[type=file]", files)
    tab.wait_for_selector("#classes [data-testid=label-output-value]")
    tab.wait_for_selector("#heat_map img")
    tab.wait_for_timeout(2500)  # of animations
    return tab.screenshot(full_page=(tab.viewport_size or {})["width"] < 500)


def picture_of_site(tab: playwright.Page, address: str, files: list[Path]) -> bytes:
    """The web page of an export with its answers to some pictures."""
    tab.goto(address)
    tab.wait_for_selector("#state.ready")
    for file in files:
        tab.set_input_files("#files", file)
        tab.locator("#results > li:first-child .classes li").first.wait_for()
        tab.wait_for_timeout(500)
    return tab.screenshot()


# ------------------------------------------------------------------------------ the first picture

PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; padding: 28px; width: 1572px; background: #fff; display: flex; gap: 28px; }}
img {{ display: block; border-radius: 8px; box-shadow: 0 1px 10px #0003; }}
.photo {{ width: 386px; }} .app {{ width: 866px; }} .site {{ height: 514px; }}
div {{ display: flex; flex-direction: column; gap: 14px; justify-content: space-between; }}
</style>
<div><img class="photo" src="{photo}"><img class="photo" src="{heat_map}"></div>
<img class="app" src="{app}"><img class="site" src="{site}">"""


def url(content: bytes) -> str:
    """The address of a PNG file that an HTML page contains."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save(content: bytes, path: Path) -> None:
    """Write a picture, with fewer colours where it would be a large file."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    image.save(path, optimize=True)
    if path.stat().st_size > BYTES:
        image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path.relative_to(DOCS), path.stat().st_size)


def main() -> None:
    """Write all of them."""
    if not MODEL.is_dir():
        train(MODEL)
    photographs = {
        "cat": CAT, "cup": COFFEE, "flower": FLOWER, "pagoda": CHINA, "helmet": ASTRONAUT,
    }  # fmt: skip
    heat_map = cvt.Explainer(MODEL)(CAT, class_name="cat").overlay()
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(playwright.sync_playwright())
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        work = Path(stack.enter_context(TemporaryDirectory()))
        (work / "photographs").mkdir()
        for name, image in photographs.items():
            image.save(work / "photographs" / f"{name}.png")
        files = sorted((work / "photographs").iterdir())
        app_address = stack.enter_context(app(work / "photographs"))
        site_address = stack.enter_context(site(work / "site"))

        def tab(width: int, height: int, **how: object) -> playwright.Page:
            opened = browser.new_page(viewport={"width": width, "height": height}, **how)
            opened.set_default_timeout(60_000)
            return opened

        for language, locale in LOCALES.items():
            folder = DOCS / "images" / language
            cups = [file for file in files if file.stem in ("cup", "flower", "helmet")]
            page = picture_of_app(tab(1280, 760, locale=locale), app_address, cups)
            save(page, folder / "app.png")
            narrow = tab(390, 760, locale=locale, device_scale_factor=1.5)
            shown = {
                "photo": png(CAT),
                "heat_map": png(heat_map),
                "app": page,
                "site": picture_of_site(narrow, f"{site_address}/?lang={language}", cups[:2]),
            }
            face = tab(1628, 570)
            face.set_content(PAGE.format(**{name: url(content) for name, content in shown.items()}))
            face.wait_for_timeout(500)
            save(face.screenshot(), folder / "face.png")
        phone = tab(390, 844, device_scale_factor=1.5, is_mobile=True)
        save(picture_of_app(phone, app_address, files[:3]), DOCS / "images" / "app-phone.png")
        browser.close()


if __name__ == "__main__":
    main()
