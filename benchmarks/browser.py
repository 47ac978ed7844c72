"""How soon does a model answer in a browser, and how fast is it then?

    python benchmarks/browser.py
    python benchmarks/browser.py --transformers-js DIR
    python benchmarks/browser.py --quick    # a tiny model, one turn

cvt-13 at 224 with random weights in the page of `cvt export --to web`, in fp32, fp16 and int8, in
headless Chromium, with one thread and with those of the processor, for which the server sends
headers. DIR has transformers.js (transformers.min.js of its npm package) and the files of
onnxruntime-web that this loads (ort-wasm-simd-threaded.asyncify.*); it runs the same fp32 file, as
a model of the type convnext, which it knows.

They take turns, each in a new browser with an empty cache. Figures are medians of the turns:
seconds from the opening of the page to the classes of the first picture, a JPEG of 640 x 427; then
milliseconds a picture, the median of five; and the ratio of these to the page's in fp32 with the
same threads, turn by turn. Prints a table and writes
`results/browser-<processor>-torch<version>-<date>.csv`.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

from common import Row, command_line, count, result_file, show, write_pictures, write_rows
from peers import shape

import cvt
from cvt.export import export
from cvt.export.web import PACKAGE
from cvt.inference.benchmark import versions

PRECISIONS = ("fp32", "fp16", "int8")
PEER = "transformers.js"
PICTURES = 5
CHROMIUM = "/usr/bin/chromium"
OURS = """async ([picture, pictures]) => {
  const { open } = await import(new URL("classify.js", location));
  const model = await open("wasm", () => {});
  const file = await (await fetch(picture)).blob();
  await model.classify(file);
  const times = [performance.now()];
  for (let i = 0; i < pictures; i++) {
    await model.classify(file);
    times.push(performance.now());
  }
  return [times, model.threads];
}"""
THEIRS = """async ([picture, pictures]) => {
  const { pipeline, env } = await import(new URL("/library/transformers.min.js", location));
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = "/";
  const binary = new URL("/library/ort-wasm-simd-threaded.asyncify", location).href;
  const wasm = env.backends.onnx.wasm;
  wasm.wasmPaths = { mjs: `${binary}.mjs`, wasm: `${binary}.wasm` };
  wasm.proxy = false;
  wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, 8) : 1;
  const how = { dtype: "fp32", device: "wasm" };
  const classify = await pipeline("image-classification", "peer", how);
  const url = new URL(picture, location).href;
  await classify(url, { top_k: 5 });
  const times = [performance.now()];
  for (let i = 0; i < pictures; i++) {
    await classify(url, { top_k: 5 });
    times.push(performance.now());
  }
  return [times, wasm.numThreads];
}"""


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, where the server says so with the headers that allow threads."""

    extensions_map = {".js": "text/javascript", ".mjs": "text/javascript"} | {
        ".wasm": "application/wasm", ".html": "text/html",
    }  # fmt: skip

    def end_headers(self) -> None:
        """The last headers."""
        if self.server.isolated:  # type: ignore[attr-defined]
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""


@contextmanager
def served(folder: Path, isolated: bool) -> Iterator[str]:
    """The address of a server of a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        server.isolated = isolated  # type: ignore[attr-defined]
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def prepare(folder: Path, variant: str, size: int, library: Path | None) -> list[str]:
    """Write the pages and what the peer needs; returns what there is to measure."""
    pictures = write_pictures(folder / "pictures", 8, 640, 427, 90)
    shutil.copyfile(pictures[0], folder / "picture.jpg")
    config = shape(variant)
    cvt.CvtForImageClassification(config).save_pretrained(folder / "model")
    cvt.image_processor(config, size).save_pretrained(folder / "model")
    for precision in PRECISIONS:
        how = {"calibration": folder / "pictures", "min_agreement": 0.0}  # of random weights
        how = how if precision == "int8" else {}
        export(folder / "model", folder / precision, "web", precision=precision, **how)
    if library is None:
        return list(PRECISIONS)
    shutil.copytree(library, folder / "library")
    peer = folder / "peer"
    (peer / "onnx").mkdir(parents=True)
    shutil.copyfile(folder / "fp32/model.onnx", peer / "onnx/model.onnx")
    shutil.copyfile(folder / "fp32/preprocessor_config.json", peer / "preprocessor_config.json")
    labels = {name: getattr(config, name) for name in ("id2label", "label2id")}
    (peer / "config.json").write_text(json.dumps({"model_type": "convnext", **labels}))
    (peer / "index.html").write_text("<!doctype html>")
    return [*PRECISIONS, PEER]


@contextmanager
def launched() -> Iterator[Any]:
    """A new browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def timed(browser: Any, address: str, name: str) -> tuple[float, float, int]:
    """Seconds to the first answer, milliseconds a picture from then on, and threads."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(300_000)
    # The page of a model starts it, too; what is measured is the script's own.
    page.route("**/page.js", lambda route: route.fulfill(body="", content_type="text/javascript"))
    page.goto(f"{address}/{'peer' if name == PEER else name}/index.html")
    script = THEIRS if name == PEER else OURS
    times, threads = page.evaluate(script, ["/picture.jpg", PICTURES])
    context.close()
    steady = median(after - before for before, after in pairwise(times))
    return times[0] / 1000, steady, threads


def measure(folder: Path, names: list[str], turns: int) -> list[Row]:
    """A row for each model and number of threads."""
    found: dict[tuple[str, bool], list[tuple[float, float, int]]] = {}
    with served(folder, False) as plain, served(folder, True) as wide:
        for _ in range(turns):
            for isolated, address in ((False, plain), (True, wide)):
                for name in names:
                    with launched() as browser:
                        found.setdefault((name, isolated), []).append(timed(browser, address, name))
    rows: list[Row] = []
    for (name, isolated), each in found.items():
        reference = found["fp32", isolated]
        pairs = zip(each, reference, strict=True)
        page = name != PEER
        rows.append(
            {
                "what": "cvt export --to web" if page else PEER,
                "precision": name if page else "fp32",
                "threads": each[0][2],
                "first_answer_seconds": f"{median(one[0] for one in each):.2f}",
                "ms_per_picture": f"{median(one[1] for one in each):.0f}",
                "times_fp32": f"{median(own[1] / other[1] for own, other in pairs):.2f}",
            }
        )
    return rows


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--turns", type=count, default=3, help="of each model")
    parser.add_argument("--transformers-js", type=Path, help="folder with the peer's files")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one turn")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    name = "browser-quick" if options.quick else "browser"
    path = result_file(options.results, name, "cpu", options.overwrite)
    variant, size, turns = ("tiny", 64, 1) if options.quick else ("cvt-13", 224, options.turns)
    with tempfile.TemporaryDirectory() as place:
        names = prepare(Path(place), variant, size, options.transformers_js)
        rows = measure(Path(place), names, turns)
    show(rows)
    about = versions(("torch", "onnxruntime", "cvt"))
    rows = [row | {"runtime": PACKAGE} | about for row in rows]
    write_rows(path, rows, "w" if options.overwrite else "x")


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
