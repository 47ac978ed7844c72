"""The layout of the page in one language."""

import html
from importlib.resources import files
from typing import Any

import gradio as gr

from cvt.app.examples import Example
from cvt.app.handlers import Handlers
from cvt.app.limits import KEPT_SECONDS, SWEEP_SECONDS, VISITORS, WAITING
from cvt.app.texts import Texts
from cvt.app.viewer import enlarged
from cvt.data.decoding import decode

EXAMPLE_SIDE = 256  # pixels of the longer side of an example on the page
FORMAT = "jpeg"  # of what is shown; gradio's own, WebP, takes 25 times as long to write
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "PingFang SC",
         "Microsoft YaHei", "WenQuanYi Micro Hei", "sans-serif"]  # fmt: skip


def build_page(handlers: Handlers, card: str, texts: Texts) -> gr.Blocks:
    """The page with its events.

    Args:
        handlers: what happens when something is given or clicked.
        card: the card of the model, in Markdown.
        texts: the language.
    """
    name = handlers.viewer.name
    with gr.Blocks(
        title=f"{name} · CvT",
        analytics_enabled=False,
        delete_cache=(SWEEP_SECONDS, KEPT_SECONDS),
        fill_width=True,
    ) as page:
        gr.HTML(header(name, texts), elem_id="header")
        with gr.Row(elem_id="main"):
            with gr.Column(elem_id="input", min_width=280):
                upload = gr.File(
                    file_count="multiple",
                    file_types=["image"],
                    label=texts.upload,
                    height=150,
                    elem_id="upload",
                )
                pictures = gallery(label=texts.pictures, visible=False, elem_id="pictures")
                examples = example_gallery(handlers, texts)
                if credit := credits(handlers.examples):
                    gr.Markdown(credit, elem_id="credits")
            with gr.Column(elem_id="seen", min_width=280):
                heat_map = gr.Image(
                    label=texts.heat_map,
                    interactive=False,
                    format=FORMAT,
                    buttons=["download", "fullscreen"],
                    elem_id="heat_map",
                )
            with gr.Column(elem_id="answer", min_width=280):
                classes = gr.Label(label=texts.classes, elem_id="classes")
                choice = gr.Dropdown(
                    [(label, i) for i, label in enumerate(handlers.viewer.names)],
                    value=None,
                    label=texts.class_choice,
                    visible=False,
                    elem_id="choice",
                )
        with gr.Accordion(texts.card, open=False, elem_id="card"):
            gr.Markdown(card)
        gr.Markdown(texts.limits(), elem_id="limits")
        connect(page, handlers, (upload, pictures, heat_map, classes, choice), examples)
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    # As `launch(state_session_capacity=...)` does, which an application that is mounted lacks: what
    # gradio itself keeps of a visitor, 10,000 of them by default.
    page.state_session_capacity = VISITORS
    return page


def connect(
    page: gr.Blocks,
    handlers: Handlers,
    outputs: tuple[Any, ...],
    examples: gr.Gallery | None,
) -> None:
    """Let every event of the page call its handler."""
    upload, pictures, heat_map, classes, choice = outputs
    how: Any = {
        "outputs": list(outputs),
        "show_progress": "minimal",
        "show_progress_on": [heat_map],
        "concurrency_id": "model",
        "api_visibility": "private",
    }
    upload.upload(handlers.given, [upload], **how)
    pictures.select(handlers.picture, None, **how)
    classes.select(handlers.bar, None, **how)
    choice.input(handlers.choice, [choice], **how)
    if examples is not None:
        examples.select(handlers.example, None, **how)
    page.unload(handlers.left)


def gallery(**how: Any) -> gr.Gallery:
    """A gallery whose pictures are clicked, not enlarged."""
    return gr.Gallery(
        interactive=False,
        allow_preview=False,
        object_fit="cover",
        height="auto",
        buttons=[],
        format=FORMAT,
        fit_columns=False,
        **how,
    )


def example_gallery(handlers: Handlers, texts: Texts) -> gr.Gallery | None:
    """The examples, small; None where there are none."""
    if not handlers.examples:
        return None
    items = []
    for example in handlers.examples:
        image = decode(example.source)
        image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
        items.append((enlarged(image), example.name))
    return gallery(value=items, label=texts.examples, elem_id="examples")


def credits(examples: list[Example]) -> str:
    """Who took the examples, where their licence asks for it."""
    return " · ".join(f"{each.name}: {each.credit}" for each in examples if each.credit)


def header(name: str, texts: Texts) -> str:
    """The top of the page: a title, a sentence, a link to the other language."""
    path, language = texts.other
    lead = html.escape(texts.lead).format(name=f"<strong>{html.escape(name)}</strong>")
    return (
        f'<a id="language" href="../{path}/" hreflang="{path}">{language}</a>'
        f"<h1>{html.escape(texts.heading)}</h1><p>{lead}</p>"
    )


def appearance(texts: Texts) -> dict[str, Any]:
    """How the page looks: what `gradio.mount_gradio_app` takes."""
    style = files("cvt.app").joinpath("page.css").read_text("utf-8")
    return {
        # Not as `css`, which gradio rewrites: rules for what is outside its pages are lost.
        "head": f"<style>{style}</style>",
        "i18n": gr.I18n(**{texts.locale: texts.gradio}),
        "theme": gr.themes.Default(
            primary_hue="blue",
            neutral_hue="slate",
            font=FONTS,
            font_mono=["ui-monospace", "monospace"],
        ),
    }
