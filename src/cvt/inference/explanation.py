"""What explains one answer, and its pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cvt.files import staged
from cvt.text import printable

# From cold to hot, at even steps: dark blue, violet, red, orange, pale yellow.
COLOURS = np.array([(20, 14, 80), (120, 28, 109), (214, 58, 60), (248, 149, 33), (252, 250, 180)])
OPACITY = (0.25, 0.7)  # of the coldest and of the hottest place
SHADE = 0.35  # of its light, what the model did not see keeps
THUMBNAIL, MARGIN, LINE = 224, 10, 20  # of a sheet, in pixels
# Files of fonts with the characters of Chinese, Japanese and Korean, as systems install them.
WIDE_FONTS = (
    *("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "NotoSansSC-Regular.otf"),
    *("DroidSansFallbackFull.ttf", "PingFang.ttc", "msyh.ttc", "simhei.ttf", "Arial Unicode.ttf"),
)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Where a classifier looked for one class in one image.

    Attributes:
        name: of the image.
        method: `gradcam`, `attention` or `rollout`.
        stage: of the model, counted from 1.
        class_name: the class that is explained.
        class_id: its index.
        score: what the model gives it, as `cvt predict` prints it.
        is_value: whether the score is a value of a regression.
        image: the upright image, RGB, at full size.
        box: left, top, right and bottom of what the model saw, in pixels of `image`.
        grid: the map (h, w), of values of at least 0: one for each token of the stage; of
            `attention` one for each key, the mean of the blocks and heads.
        rows: centres of these tokens or keys, (h,), in pixels from the top of `image`.
        columns: likewise from its left, (w,).
        attention: of the method `attention`, the attention of the class token to the keys,
            (blocks, heads, h, w). Of every head it sums to 1 with `class_token`.
        class_token: likewise, its attention to itself, (blocks, heads).

    Example:
        >>> import cvt, numpy
        >>> config = cvt.CvtConfig.from_variant("cvt-digits", num_labels=10)
        >>> model = cvt.CvtForImageClassification(config)
        >>> processor = cvt.image_processor(config, image_size=32)
        >>> photo = numpy.random.default_rng(0).random((48, 64, 3))
        >>> explanation = cvt.explain(model, photo, method="rollout", processor=processor)
        >>> heat = explanation.heat_map()  # over the whole photo
        >>> heat.shape, float(heat.max())
        ((48, 64), 1.0)
        >>> explanation.save("photo.png")  # or photo.npz, the arrays
    """

    name: str
    method: str
    stage: int
    class_name: str
    class_id: int
    score: float
    is_value: bool
    image: Image.Image = field(repr=False)
    box: tuple[float, float, float, float]
    grid: np.ndarray = field(repr=False)
    rows: np.ndarray = field(repr=False)
    columns: np.ndarray = field(repr=False)
    attention: np.ndarray | None = field(default=None, repr=False)
    class_token: np.ndarray | None = field(default=None, repr=False)

    @property
    def caption(self) -> str:
        """Class and score as a text."""
        score = f"{self.score:g}" if self.is_value else f"{100 * self.score:.1f} %"
        return printable(f"{self.class_name}  {score}")

    def heat_map(self, grid: np.ndarray | None = None) -> np.ndarray:
        """The map over the whole image, (H, W) in float32 from 0 to 1, the hottest place 1.

        It is interpolated linearly between the centres of tokens; outside of `box` it is 0.

        Args:
            grid: another map (h, w) of the same stage, as of one head.
        """
        left, top, right, bottom = self.box
        x, y = (np.arange(side) + 0.5 for side in self.image.size)
        map_ = np.asarray(self.grid if grid is None else grid, np.float32)
        heat = interpolation(self.rows, y) @ map_ @ interpolation(self.columns, x).T  # (H, W)
        heat[(y < top) | (y > bottom)] = 0
        heat[:, (x < left) | (x > right)] = 0
        highest = heat.max()
        return heat / highest if highest > 0 else heat

    def overlay(self, grid: np.ndarray | None = None) -> Image.Image:
        """The heat map, laid over the image at full size; what the model did not see is dark.

        Args:
            grid: as in `heat_map`.
        """
        return _overlay(self.image, self.heat_map(grid), self.box)

    def heads(self) -> Image.Image:
        """The attention of every head: a row for each block, from the first at the top.

        Raises:
            ValueError: the method is another than `attention`.
        """
        if self.attention is None:
            raise ValueError(f"method = {self.method}: only attention has maps of heads")
        small = self.resized(THUMBNAIL // 2)
        blocks, heads = self.attention.shape[:2]
        width, height = (side + MARGIN // 2 for side in small.image.size)
        sheet = Image.new("RGB", (heads * width, blocks * height), "white")
        for block, maps in enumerate(self.attention):
            for head, grid in enumerate(maps):
                sheet.paste(small.overlay(grid), (head * width, block * height))
        return sheet

    def resized(self, side: int) -> "Explanation":
        """The same, of an image whose long side has at most so many pixels.

        A tiny image is enlarged by a whole factor, so that its pixels stay sharp.
        """
        image = self.image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image = enlarged(image, side)
        x, y = (new / old for new, old in zip(image.size, self.image.size, strict=True))
        left, top, right, bottom = self.box
        moved = {"box": (left * x, top * y, right * x, bottom * y)}
        places = {"rows": self.rows * y, "columns": self.columns * x}
        return Explanation(**{**self.__dict__, "image": image, **moved, **places})

    def arrays(self) -> dict[str, Any]:
        """The maps and their geometry, as `save` writes them to an .npz."""
        maps = {"attention": self.attention, "class_token": self.class_token}
        return {
            "grid": self.grid,
            "rows": self.rows,
            "columns": self.columns,
            "box": np.array(self.box),
            "size": np.array(self.image.size),
            "class_id": np.array(self.class_id),
            "score": np.array(self.score),
            "stage": np.array(self.stage),
            "class_name": np.array(self.class_name),
            "method": np.array(self.method),
            **{name: each for name, each in maps.items() if each is not None},
        }

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the overlay as .png or .jpg, or the arrays as .npz.

        Raises:
            FileExistsError: the file exists and may not be overwritten.
            ValueError: it has another suffix.
        """
        suffix = Path(path).suffix.lower()
        if suffix not in (".png", ".jpg", ".jpeg", ".npz"):
            raise ValueError(f"{path}: must end in .png, .jpg or .npz")
        with staged(path, overwrite) as written:
            if suffix == ".npz":
                with open(written, "wb") as file:
                    np.savez_compressed(file, **self.arrays())
            else:
                kind = "PNG" if suffix == ".png" else "JPEG"
                self.overlay().save(written, kind)


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """An image by the whole factor that leaves its long side at most `side`, its pixels sharp."""
    factor = side // max(image.size)
    if factor < 2:
        return image
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def interpolation(centres: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The matrix (points, centres) that interpolates linearly; beyond the ends it is constant."""
    identity = np.eye(len(centres))
    weights = [np.interp(points, centres, one) for one in identity]
    return np.stack(weights, axis=1).astype(np.float32)


def _overlay(
    image: Image.Image, heat: np.ndarray, box: tuple[float, float, float, float]
) -> Image.Image:
    left, top, right, bottom = box
    x, y = (np.arange(side) + 0.5 for side in image.size)
    seen = ((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right))  # (H, W)
    # Colour and opacity are looked up, so that a large picture takes little memory.
    levels = np.linspace(0, 1, 256)
    colours = np.stack([np.interp(levels, np.linspace(0, 1, len(COLOURS)), c) for c in COLOURS.T])
    index = (255 * heat).astype(np.uint8)
    hot = Image.fromarray(colours.T.astype(np.uint8)[index])
    opacity = np.interp(levels, (0, 1), OPACITY)
    mask = Image.fromarray(np.where(seen, (255 * opacity).astype(np.uint8)[index], 0).astype("u1"))
    grey = ImageOps.grayscale(image).point(lambda value: int(SHADE * value)).convert("RGB")
    laid = Image.composite(hot, image, mask)
    return Image.composite(laid, grey, Image.fromarray(np.where(seen, 255, 0).astype("u1")))


def sheet(explanations: Sequence[Explanation], columns: int = 4) -> Image.Image:
    """One picture of several: each image beside its overlay, above class and score.

    Args:
        explanations: at least one.
        columns: pairs in a row.
    """
    if not explanations:
        raise ValueError("explanations: must be at least one")
    small = [each.resized(THUMBNAIL) for each in explanations]
    width = 2 * THUMBNAIL + 3 * MARGIN
    lines = [small[start : start + columns] for start in range(0, len(small), columns)]
    heights = [max(each.image.height for each in line) + 2 * LINE + 2 * MARGIN for line in lines]
    picture = Image.new("RGB", (len(lines[0]) * width, sum(heights)), "white")
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        bottom = sum(heights[: row + 1]) - 2 * LINE - MARGIN  # of the images
        for column, each in enumerate(line):
            x = column * width + MARGIN
            for k, shown in enumerate((each.image, each.overlay())):
                at = x + k * (THUMBNAIL + MARGIN) + (THUMBNAIL - shown.width) // 2
                picture.paste(shown, (at, bottom - shown.height))
            for k, text in enumerate((each.caption, Path(each.name).name)):
                _write(draw, (x, bottom + k * LINE + 2), printable(text), width - 2 * MARGIN)
    return picture


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, width: int) -> None:
    """Write a line of text, cut where it is wider."""
    font = _font(text)
    while draw.textlength(text, font) > width and len(text) > 1:
        text = text[:-2] + "…"
    draw.text(at, text, "#222222", font)


def _font(text: str) -> Any:
    """Pillow's font, or one of this machine where the text has characters beyond Latin."""
    if any(ord(character) > 0x24F for character in text):
        for name in WIDE_FONTS:
            try:
                return ImageFont.truetype(name, 14)
            except OSError:
                continue
    return ImageFont.load_default(14)
