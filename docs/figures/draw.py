"""Draws the figures of the pages on the model and on its activation, in English and in Chinese.

    PYTHONPATH=src python docs/figures/draw.py    # writes docs/images/en and zh

Every number is read from `CvtConfig` and `cvt.profile`. The files are plain SVG, with the reader's
fonts, so that their bytes depend on nothing but this script.
"""

import math
from functools import cache
from pathlib import Path
from xml.sax.saxutils import escape

from cvt.architecture import StageConfig
from cvt.configuration import CvtConfig
from cvt.profile import Profile, profile

IMAGES = Path(__file__).parents[1] / "images"
LANGUAGES = ("en", "zh")
FONT = "Helvetica, Arial, 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"

INK, FAINT = "#1f2933", "#66727f"
STAGES = ("#2f6fb0", "#1d8a72", "#c2571a")  # one colour per stage
TINTS = ("#e8f0f9", "#e4f4ef", "#fcefe6")
SIZE = 224  # pixels
PAPER, CLASS_TOKEN = "#ffffff", "#a12a5e"

CHINESE = {
    "image": "图像",
    "Stage": "阶段",
    "Convolutional": "卷积",
    "token embedding": "token 嵌入",
    "convolution": "卷积",
    "stride": "步长",
    "Transformer block": "Transformer 块",
    "head": "个头",
    "heads": "个头",
    "keys and values": "键和值",
    "tokens of": "个 token，宽度",
    "class token": "类别 token",
    "class token only": "只取类别 token",
    "Classifier": "分类头",
    "classes": "个类别",
    "(a) Block": "(a) 块",
    "(b) Convolutional projection and attention": "(b) 卷积投影与注意力",
    "tokens": "token",
    "Attention": "注意力",
    "Attention, see (b)": "注意力，见 (b)",
    "as an image": "看作图像",
    "back in front": "放回最前",
    "depthwise": "逐通道卷积",
    "query": "查询",
    "key": "键",
    "value": "值",
    "scale = 1 / √C, of the whole width C": "缩放因子 = 1 / √C，C 为整个宽度",
    "at most": "最大",
}


class Drawing:
    """An SVG picture: shapes and words, added one after the other.

    Args:
        width: in units of the picture.
        height: the same.
        language: of the words, `en` or `zh`.
    """

    def __init__(self, width: int, height: int, language: str) -> None:
        self.chinese = language == "zh"
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        self.parts = [f'{head} font-family="{FONT}" font-size="14" fill="{INK}">']
        for color in (INK, FAINT, CLASS_TOKEN):
            self.parts.append(
                f'<marker id="tip{color[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
                f'markerHeight="7" orient="auto"><path d="M0 0.5 8 4 0 7.5z" fill="{color}"/>'
                "</marker>"
            )
        self.box(0, 0, width, height, PAPER, radius=0)

    def say(self, word: str) -> str:
        """A word of the picture in its language."""
        return CHINESE[word] if self.chinese else word

    def add(self, name: str, text: str = "", **attributes: object) -> None:
        """An element; `_` in the name of an attribute stands for `-`."""
        given = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
        self.parts.append(
            f"<{name}{given}>{escape(text)}</{name}>" if text else f"<{name}{given}/>"
        )

    def box(
        self, x: float, y: float, w: float, h: float, fill: str, line: str = "", radius: float = 6
    ) -> None:
        """A rectangle."""
        stroke: dict[str, object] = {"stroke": line, "stroke_width": 1.5} if line else {}
        self.add(
            "rect", x=number(x), y=number(y), width=w, height=h, rx=radius, fill=fill, **stroke
        )

    def text(self, x: float, y: float, text: str, **style: object) -> None:
        """A line of text around `x`, unless `text_anchor` says otherwise."""
        self.add(
            "text", text, **({"x": number(x), "y": number(y), "text_anchor": "middle"} | style)
        )

    def lines(self, x: float, y: float, lines: list[str], **style: object) -> None:
        """Lines of text, the first in bold."""
        for i, line in enumerate(lines):
            weight: dict[str, object] = {"font_weight": "bold"} if i == 0 else {"font_size": 12.5}
            self.text(x, y + 18 * i, line, **(weight | style))

    def arrow(self, *points: tuple[float, float], line: str = INK, tip: bool = True) -> None:
        """A line through points, with a tip at its end."""
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        end: dict[str, object] = {"marker_end": f"url(#tip{line[1:]})"} if tip else {}
        self.add("polyline", points=path, fill="none", stroke=line, stroke_width=1.5, **end)

    def slab(self, x: float, y: float, side: float, depth: float, color: str, tint: str) -> None:
        """Feature maps as a block, whose lower left front corner is at (x, y)."""
        shift, style = depth / 2, {"stroke": color, "stroke_width": 1.2, "stroke_linejoin": "round"}
        left, top, right = x, y - side, x + side
        lid = [(left, top), (left + shift, top - shift), (right + shift, top - shift), (right, top)]
        flank = [(right, top), (right + shift, top - shift), (right + shift, y - shift), (right, y)]
        for face, opacity in ((lid, 0.35), (flank, 0.55)):
            points = " ".join(f"{number(a)},{number(b)}" for a, b in face)
            self.add("polygon", points=points, fill=color, fill_opacity=opacity, **style)
        self.add(
            "rect", x=number(x), y=number(top), width=number(side), height=number(side), fill=tint,
            **style,
        )  # fmt: skip

    def finish(self) -> str:
        """The file."""
        return "\n".join([*self.parts, "</svg>", ""])


def number(value: float) -> str:
    """A coordinate, without digits that nobody sees."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def keys_of(stage: StageConfig, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the keys and values of a stage with a grid of tokens."""
    margin = 2 * stage.padding_kv - stage.kernel_qkv
    height, width = ((size + margin) // stage.stride_kv + 1 for size in grid)
    return height, width


@cache
def cvt_13() -> tuple[CvtConfig, Profile]:
    """The model of the figures, and what it costs at its own resolution."""
    config = CvtConfig.from_variant("cvt-13")
    return config, profile(config, SIZE)


def draw_embedding(picture: Drawing, x: float, stage: StageConfig, color: str) -> None:
    """The box of the convolutional token embedding."""
    say, middle = picture.say, x + 105
    kernel = f"{stage.patch_sizes} × {stage.patch_sizes} {say('convolution')}"
    picture.box(x + 10, 50, 190, 84, PAPER, color)
    picture.text(middle, 71, say("Convolutional"), font_weight="bold")
    picture.text(middle, 88, say("token embedding"), font_weight="bold")
    picture.text(middle, 107, f"{kernel}, {say('stride')} {stage.patch_stride}", font_size=12.5)
    picture.text(middle, 124, f"LayerNorm, {stage.in_channels} → {stage.embed_dim}", font_size=12.5)


def draw_stage(picture: Drawing, x: float, i: int) -> float:
    """The column of stage `i`: embedding, blocks, feature maps; returns where these end."""
    config, costs = cvt_13()
    say, stage, (H, W) = picture.say, config.stages[i], costs.stages[i].grid
    color, tint, middle, width = STAGES[i], TINTS[i], x + 105, stage.embed_dim
    picture.box(x, 14, 210, 284, tint, radius=10)
    picture.text(
        middle, 38, f"{say('Stage')} {i + 1}", font_size=16, font_weight="bold", fill=color
    )
    draw_embedding(picture, x, stage, color)
    picture.arrow((x + 80, 134), (x + 80, 170))

    for shift in (8, 4, 0) if stage.depth > 1 else (0,):
        picture.box(x + 10 + shift, 172 + shift, 182, 108, PAPER, color)
    height, length = keys_of(stage, (H, W))
    heads = say("head" if stage.num_heads == 1 else "heads")
    x -= 4  # the middle of the box in front
    picture.text(middle - 4, 193, say("Convolutional"), font_weight="bold")
    picture.text(middle - 4, 210, say("Transformer block"), font_weight="bold")
    lines = [
        f"{stage.num_heads} {heads}, d = {width // stage.num_heads}",
        f"{say('keys and values')} {height} × {length}",
        f"MLP {width} → {int(width * stage.mlp_ratio)} → {width}",
    ]
    for line, text in enumerate(lines):
        picture.text(middle - 4, 231 + 19 * line, text, font_size=12.5)
    picture.box(x + 160, 161, 46, 22, color, radius=11)
    picture.text(x + 183, 177, f"× {stage.depth}", font_weight="bold", fill=PAPER)

    side, depth = 64 * H / costs.stages[0].grid[0], 5 * (width / 64) ** 0.75
    left, bottom = middle - (side + depth / 2) / 2, 392 - (64 - side) / 2
    picture.arrow((middle, 298), (middle, bottom - side - depth / 2 - 5))
    picture.slab(left, bottom, side, depth, color, tint)
    picture.text(middle, 420, f"{width} × {H} × {W}", font_weight="bold", fill=color)
    words = f"{H * W:,} {say('tokens of')} {width}"
    picture.text(middle, 438, words, font_size=12.5, fill=FAINT)
    return left + side + depth / 2


def stages(language: str) -> str:
    """The three stages of cvt-13 at 224 pixels."""
    config, _ = cvt_13()
    picture = Drawing(1000, 454, language)
    say = picture.say
    picture.slab(26, 128, 72, 8, FAINT, "#eef1f4")
    picture.text(64, 152, say("image"), font_weight="bold")
    picture.text(64, 170, f"{config.num_channels} × {SIZE} × {SIZE}", font_size=12.5, fill=FAINT)
    columns = [136 + 240 * i for i in range(len(config.stages))]
    ends = [draw_stage(picture, x, i) for i, x in enumerate(columns)]
    picture.arrow((106, 92), (columns[0] + 8, 92))
    for end, x in zip(ends, columns[1:], strict=False):
        picture.arrow((end + 6, 362), (x - 15, 362), (x - 15, 92), (x + 8, 92))

    x = columns[-1]
    picture.box(x + 100, 140, 92, 20, PAPER, CLASS_TOKEN, radius=10)
    picture.text(x + 146, 154.5, say("class token"), font_size=12, fill=CLASS_TOKEN)
    picture.arrow((x + 120, 160), (x + 120, 171), line=CLASS_TOKEN)
    picture.arrow((x + 202, 236), (866, 236), line=CLASS_TOKEN)
    picture.text(925, 180, say("class token only"), font_size=12, fill=CLASS_TOKEN)
    picture.box(868, 190, 116, 92, "#f3f4f6", INK)
    picture.text(926, 214, say("Classifier"), font_weight="bold")
    picture.text(926, 236, "LayerNorm", font_size=12.5)
    picture.text(926, 255, "Linear", font_size=12.5)
    picture.text(926, 273, f"{config.embed_dim[-1]} → {config.num_labels}", font_size=12.5)
    picture.arrow((926, 282), (926, 312))
    picture.text(926, 332, f"{config.num_labels} {say('classes')}", font_weight="bold")
    return picture.finish()


def draw_block(picture: Drawing, stage: StageConfig, tokens: int, x: float) -> None:
    """The block, from top to bottom, with its two residual connections."""
    say, color, tint = picture.say, STAGES[2], TINTS[2]
    width, hidden = stage.embed_dim, int(stage.embed_dim * stage.mlp_ratio)
    picture.text(x, 30, say("(a) Block"), font_size=16, font_weight="bold")
    picture.text(x, 58, f"{tokens} × {width}", font_weight="bold", fill=color)
    boxes = [
        (84, 30, ["LayerNorm"]),
        (134, 30, [say("Attention, see (b)")]),
        (184, 30, [f"Linear {width} → {width}"]),
        (276, 30, ["LayerNorm"]),
        (326, 66, [f"Linear {width} → {hidden}", "QuickGELU", f"Linear {hidden} → {width}"]),
    ]
    above = 64.0
    for top, height, lines in boxes:
        picture.arrow((x, above), (x, top - 1))
        picture.box(
            x - 84, top, 168, height, tint if len(lines) > 1 or top == 134 else PAPER, color
        )
        for i, line in enumerate(lines):
            picture.text(x, top + 20 + 18 * i, line, font_size=13)
        above = top + height
        if top in (184, 326):  # the sum that follows
            y = above + 26
            picture.arrow((x, above), (x, y - 10))
            picture.add("circle", cx=x, cy=y, r=9, fill=PAPER, stroke=INK, stroke_width=1.5)
            picture.text(x, y + 5, "+", font_size=16)
            start = 72 if top == 184 else 262
            picture.arrow((x, start), (x - 106, start), (x - 106, y), (x - 10, y), line=FAINT)
            above = y + 9
    picture.arrow((x, above), (x, above + 22))
    picture.text(x, above + 38, f"{tokens} × {width}", font_weight="bold", fill=color)


def draw_branch(
    picture: Drawing, stage: StageConfig, grid: tuple[int, int], name: str, y: float
) -> None:
    """The way from the tokens, as an image, to queries, keys or values."""
    say, color, width = picture.say, STAGES[2], stage.embed_dim
    is_query = name == "query"
    stride = stage.stride_q if is_query else stage.stride_kv
    height, length = grid if is_query else keys_of(stage, grid)
    picture.arrow((456, 240), (472, 240), (472, y), (486, y))
    picture.box(488, y - 36, 122, 72, TINTS[2], color)
    kernel = f"{stage.kernel_qkv} × {stage.kernel_qkv}, {say('stride')} {stride}"
    picture.text(549, y - 14, say("depthwise"), font_size=13, font_weight="bold")
    picture.text(549, y + 5, kernel, font_size=12.5)
    picture.text(549, y + 24, "BatchNorm", font_size=12.5)
    picture.arrow((610, y), (708, y))
    picture.text(646, y - 8, f"{height} × {length}", font_size=12, fill=FAINT)
    picture.add("circle", cx=684, cy=y, r=4.5, fill=CLASS_TOKEN)
    picture.box(710, y - 18, 64, 36, PAPER, color)
    picture.text(742, y + 5, "Linear", font_size=13)
    picture.arrow((774, y), (798, y))
    picture.box(800, y - 26, 84, 52, PAPER, color)
    words, count = f"{name[0].upper()}  {say(name)}", height * length + stage.cls_token
    picture.text(842, y - 5, words, font_size=13, font_weight="bold", fill=color)
    picture.text(842, y + 15, f"{count} × {width}", font_size=12.5)
    picture.arrow((884, y), (898, y), (898, 240), (912, 240))


def draw_projection(picture: Drawing, stage: StageConfig, grid: tuple[int, int]) -> None:
    """Tokens to queries, keys and values, and attention between them."""
    say, color, width, (H, W) = picture.say, STAGES[2], stage.embed_dim, grid
    tokens = H * W + stage.cls_token
    title = say("(b) Convolutional projection and attention")
    picture.text(634, 30, title, font_size=16, font_weight="bold")
    picture.text(306, 236, say("tokens"), font_weight="bold")
    picture.text(306, 254, f"{tokens} × {width}", font_size=12.5, fill=FAINT)
    picture.arrow((342, 240), (380, 240))
    picture.slab(384, 268, 54, 18, color, TINTS[2])
    picture.text(416, 292, f"{H} × {W} × {width}", font_size=12.5, fill=FAINT)
    picture.text(416, 310, say("as an image"), font_size=12.5, fill=FAINT)

    picture.arrow((306, 218), (306, 58), (684, 58), (684, 364), line=CLASS_TOKEN, tip=False)
    picture.box(396, 46, 152, 24, PAPER, CLASS_TOKEN, radius=12)
    words = f"{say('class token')} 1 × {width}"
    picture.text(472, 62.5, words, font_size=12, fill=CLASS_TOKEN)
    picture.text(694, 62, say("back in front"), font_size=12, text_anchor="start", fill=CLASS_TOKEN)
    for name, y in (("query", 116), ("key", 240), ("value", 364)):
        draw_branch(picture, stage, grid, name, y)

    picture.box(914, 204, 94, 72, TINTS[2], color)
    picture.text(961, 227, say("Attention"), font_size=13, font_weight="bold")
    picture.text(961, 246, f"{stage.num_heads} {say('heads')}", font_size=12.5)
    picture.text(961, 265, f"d = {width // stage.num_heads}", font_size=12.5)
    picture.arrow((961, 276), (961, 316))
    picture.text(961, 336, f"{tokens} × {width}", font_weight="bold", fill=color)
    picture.text(634, 438, f"softmax(Q Kᵀ / √{width}) V", font_size=15, font_weight="bold")
    words = say("scale = 1 / √C, of the whole width C")
    picture.text(634, 460, words, font_size=12.5, fill=FAINT)


def block(language: str) -> str:
    """A block of the last stage of cvt-13 at 224 pixels, and its convolutional projection."""
    config, costs = cvt_13()
    cost, stage = costs.stages[-1], config.stages[-1]
    picture = Drawing(1024, 482, language)
    draw_block(picture, stage, cost.tokens, 132)
    picture.arrow((256, 14), (256, 468), line="#d5dae0", tip=False)
    draw_projection(picture, stage, cost.grid)
    return picture.finish()


def gelu(x: float) -> float:
    """The activation that transformers computes."""
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def quick_gelu(x: float) -> float:
    """The activation of the published weights."""
    return x / (1 + math.exp(-1.702 * x))


def draw_axes(
    picture: Drawing, left: float, origin: float, ticks: list[float], unit: float
) -> None:
    """Axes of a panel: x from -4 to 4, `unit` of the picture for 1 on the y axis."""
    for x in range(-4, 5, 2):
        place = left + 180 + 42 * x
        picture.arrow((place, 16), (place, 286), line="#e5e8ec", tip=False)
        picture.text(place, 306, f"{x}".replace("-", "−"), font_size=12.5, fill=FAINT)
    for y in ticks:
        place = origin - unit * y
        line = FAINT if y == 0 else "#e5e8ec"
        picture.arrow((left + 12, place), (left + 348, place), line=line, tip=False)
        label = f"{y:g}".replace("-", "−")
        style = {"text_anchor": "end", "font_size": 12.5, "fill": FAINT}
        picture.text(left + 4, place + 4, label, **style)


def draw_curve(
    picture: Drawing, points: list[tuple[float, float]], color: str, dash: str, legend: tuple
) -> None:
    """A curve, and its line in the legend: a name and where it is."""
    name, x, y = legend
    style = {"fill": "none", "stroke": color, "stroke_width": 2.4}
    if dash:
        style["stroke_dasharray"] = dash
    for line in (points, [(x, y), (x + 32, y)]):
        places = " ".join(f"{number(a)},{number(b)}" for a, b in line)
        picture.add("polyline", points=places, **style)
    picture.text(x + 42, y + 5, name, text_anchor="start", font_weight="bold", fill=color)


def activation(language: str) -> str:
    """GELU and QuickGELU, and their difference."""
    picture = Drawing(840, 320, language)
    xs = [step / 50 for step in range(-200, 201)]

    def difference(x: float) -> float:
        return quick_gelu(x) - gelu(x)

    left, origin, unit = 40, 232.0, 52.0
    draw_axes(picture, left, origin, [-1, 0, 1, 2, 3, 4], unit)
    for i, (name, curve) in enumerate((("GELU", gelu), ("QuickGELU", quick_gelu))):
        points = [(left + 180 + 42 * x, origin - unit * curve(x)) for x in xs]
        legend = name, left + 28, 40 + 24 * i
        draw_curve(picture, points, STAGES[2 * i], "7 5" if i else "", legend)

    left, origin, unit = 470, 150.0, 5600.0
    draw_axes(picture, left, origin, [-0.02, -0.01, 0, 0.01, 0.02], unit)
    points = [(left + 180 + 42 * x, origin - unit * difference(x)) for x in xs]
    draw_curve(picture, points, CLASS_TOKEN, "", ("QuickGELU − GELU", left + 28, 54))
    words = f"{picture.say('at most')} {max(abs(difference(x)) for x in xs):.4f}"
    picture.text(left + 70, 78, words, text_anchor="start", font_size=12.5, fill=FAINT)
    return picture.finish()


FIGURES = {"model-stages": stages, "model-block": block, "gelu": activation}


def main() -> None:
    """Writes every figure in both languages."""
    for name, draw in FIGURES.items():
        for language in LANGUAGES:
            path = IMAGES / language / f"{name}.svg"
            path.parent.mkdir(exist_ok=True)
            path.write_text(draw(language), encoding="utf-8")
            print(language, path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
