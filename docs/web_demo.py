"""The demo of `cvt export --to web` in the site: a small CvT that has learned handwritten digits.

    python docs/web_demo.py FOLDER

trains it, in a minute, where docs/_build/digits has none yet. Where the files of ONNX Runtime Web
cannot be had, FOLDER gets a page that says so.
"""

import shutil
import sys
from pathlib import Path

from cvt.cli.console import quiet_libraries
from cvt.data import write_digits
from cvt.export import export
from cvt.export.web import runtime_folder
from cvt.train import load_recipe, train

HERE = Path(__file__).parent
RUN, PICTURES = HERE / "_build" / "digits", HERE / "_build" / "digits-png"
WITHOUT = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="color-scheme" content="light dark">
<title>cvt-vision</title>
<p>The demo is not part of this build: the files of ONNX Runtime Web were not at hand.</p>
<p lang="zh-CN">这次构建没有包含演示：缺少 ONNX Runtime Web 的文件。</p>
</html>
"""


def main(folder: Path) -> None:
    """Write the demo into a folder."""
    quiet_libraries()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        runtime = runtime_folder()
    except OSError as error:
        print(f"no demo: {error}", file=sys.stderr)
        (folder / "index.html").write_text(WITHOUT, encoding="utf-8")
        return
    if not (RUN / "best").is_dir():
        shutil.rmtree(RUN, ignore_errors=True)
        train(load_recipe("digits", {"epochs": 8, "workers": 0}), RUN)
    export(RUN / "best", folder, "web", precision="fp16", runtime_files=runtime, overwrite=True)
    if not PICTURES.is_dir():
        write_digits(PICTURES)
    (folder / "examples").mkdir(exist_ok=True)
    for digit in range(10):
        picture = min((PICTURES / "test" / str(digit)).iterdir())
        shutil.copyfile(picture, folder / "examples" / f"{digit}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
