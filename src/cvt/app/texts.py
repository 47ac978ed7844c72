"""All texts of the page, in English and Chinese."""

from dataclasses import dataclass

from cvt.app import limits
from cvt.app.limits import megabytes

# Of the formats that `cvt.data.decode` reads, those that people know by name.
FORMATS = "JPEG, PNG, WebP, AVIF, GIF, BMP, TIFF"


@dataclass(frozen=True)
class Texts:
    """The texts of the page in one language; names in braces are filled in.

    Attributes:
        locale: the language, as browsers call it.
        other: the path of the page in the other language, and what it is called there.
        gradio: texts of gradio's own components, by its keys.
    """

    locale: str
    other: tuple[str, str]
    gradio: dict[str, str]
    heading: str
    lead: str
    upload: str
    pictures: str
    examples: str
    heat_map: str
    heat_map_of: str
    classes: str
    class_choice: str
    card: str
    facts: tuple[str, ...]
    privacy: str
    busy: str
    full: str
    request_too_large: str
    file_too_large: str
    too_many_pixels: str
    unreadable: str
    too_many: str
    not_finite: str
    expired: str
    notice: str

    @staticmethod
    def pixels() -> dict[str, int]:
        """The limit of pixels, as English counts them and as Chinese does."""
        return {
            "millions": limits.PIXELS // 1_000_000,
            "ten_thousands": limits.PIXELS // 10_000,
        }

    def limits(self) -> str:
        """The sentence about limits and privacy below the page."""
        return self.privacy.format(
            pictures=limits.PICTURES,
            size=megabytes(limits.FILE_BYTES),
            **self.pixels(),
            minutes=limits.KEPT_SECONDS // 60,
        )


EN = Texts(
    locale="en",
    other=("zh", "中文"),
    gradio={
        "upload_text.drop_file": "Drop pictures here",
        "upload_text.click_to_upload": "Click to choose them",
    },
    heading="What does the model see?",
    lead="Give {name} a picture: it names the classes, and the heat map shows which parts of the "
    "picture speak for a class.",
    upload="Your pictures",
    pictures="Click a picture to see its classes",
    examples="Or take an example",
    heat_map="Heat map",
    heat_map_of="Heat map: {name}",
    classes="Classes: click one to see its heat map",
    class_choice="Heat map of another class",
    card="About this model",
    facts=("classes", "parameters", "multiply-adds per picture", "pixels the model sees",
           "activation", "runs as"),
    privacy="Up to {pictures} pictures at a time, each of at most {size} and {millions} million "
    "pixels. They stay on the machine that runs this page, which deletes them {minutes} minutes "
    "after you last used them, and when it stops.",
    busy="Too many people are waiting at the moment. Please try again in a few seconds.",
    full="The page holds too many pictures at the moment. Please try again in a few minutes.",
    request_too_large="These files are too large: at most {size} can be given at once.",
    file_too_large="{name} is too large: a picture may have at most {size}.",
    too_many_pixels="{name} has too many pixels: a picture may have at most {millions} million.",
    unreadable="{name} cannot be read: it is damaged, or not a picture in one of the formats "
    "{formats}.",
    too_many="At most {pictures} pictures fit at a time: {count} of them were left out.",
    not_finite="The model has no finite scores for {name}.",
    expired="This picture has been deleted in the meantime. Please give it again.",
    notice="Note",
)  # fmt: skip

ZH = Texts(
    locale="zh-CN",
    other=("en", "English"),
    gradio={
        "upload_text.drop_file": "把图片拖到这里",
        "upload_text.click_to_upload": "点击选择图片",
    },
    heading="模型看到了什么？",
    lead="给 {name} 一张图片：它会给出类别，热力图则显示图片的哪些部分支持这个类别。",
    upload="你的图片",
    pictures="点击图片查看它的类别",
    examples="或者选一个示例",
    heat_map="热力图",
    heat_map_of="热力图：{name}",
    classes="类别：点击查看它的热力图",
    class_choice="查看其他类别的热力图",
    card="关于这个模型",
    facts=("类别数", "参数量", "每张图片的乘加运算数", "模型的输入像素", "激活函数", "运行方式"),
    privacy="一次最多 {pictures} 张图片，每张不超过 {size}、{ten_thousands} 万像素。"
    "图片只保存在运行本页面的机器上，你最后一次使用 {minutes} 分钟后删除，页面停止时也会删除。",
    busy="现在排队的人太多，请过几秒再试。",
    full="页面上暂存的图片太多，请过几分钟再试。",
    request_too_large="文件太大：一次最多上传 {size}。",
    file_too_large="{name} 太大：每张图片不能超过 {size}。",
    too_many_pixels="{name} 的像素太多：每张图片不能超过 {ten_thousands} 万像素。",
    unreadable="无法读取 {name}：文件已损坏，或者不是 {formats} 格式的图片。",
    too_many="一次最多放 {pictures} 张图片，多出的 {count} 张没有处理。",
    not_finite="模型对 {name} 给出的分数不是有限数。",
    expired="这张图片已经删除，请重新上传。",
    notice="提示",
)  # fmt: skip

TEXTS = {"en": EN, "zh": ZH}


def preferred(accepted: str) -> str:
    """The language for a browser: Chinese where it comes before English, English otherwise.

    Args:
        accepted: its header Accept-Language.
    """
    wanted = []
    for part in accepted.split(","):
        name, _, weight = part.strip().partition(";q=")
        try:
            wanted.append((-float(weight or 1), name.lower()[:2]))
        except ValueError:
            continue
    known = [name for _, name in sorted(wanted, key=lambda pair: pair[0]) if name in TEXTS]
    return known[0] if known else "en"
