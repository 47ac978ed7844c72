"""What happens when something is given or clicked: one method an event of the page.

Every handler can be called by anyone who reaches the page, with anything: gradio checks that files
lie in its own folder and that choices are among those of the page; the rest is checked here.
"""

import html
import logging
from pathlib import Path
from typing import Any

import gradio as gr

from cvt.app import limits
from cvt.app.examples import Example
from cvt.app.sessions import Picture, Session, Sessions
from cvt.app.texts import FORMATS, Texts
from cvt.app.viewer import Viewer, shown
from cvt.data.decoding import ImageError, OversizedError, Source, StoredImage
from cvt.text import printable

logger = logging.getLogger(__name__)
TOP = 5  # classes that are shown as bars
NAME_CHARACTERS = 60  # of a file's name in a message
Updates = tuple[Any, ...]  # of the components, in the order of `Page.outputs`


class Handlers:
    """The events of the page in one language.

    Args:
        viewer: the model.
        sessions: the pictures of the visitors.
        texts: the language.
        examples: the pictures to try.
    """

    def __init__(
        self, viewer: Viewer, sessions: Sessions, texts: Texts, examples: list[Example]
    ) -> None:
        self.viewer, self.sessions = viewer, sessions
        self.texts, self.examples = texts, examples

    def given(self, files: list[str] | None, request: gr.Request) -> Updates:
        """Pictures were uploaded: classify them; show the first."""
        files = files or []
        left = len(files) - limits.PICTURES
        if left > 0:
            self._note(self.texts.too_many, pictures=limits.PICTURES, count=left)
        pictures = []
        for path in map(Path, files[: limits.PICTURES]):
            name = short(path.name)
            if path.stat().st_size > limits.FILE_BYTES:
                size = limits.megabytes(limits.FILE_BYTES)
                self._note(self.texts.file_too_large, name=name, size=size)
            elif picture := self._look(name, StoredImage(name, path.read_bytes())):
                pictures.append(picture)
        return self._added(pictures, request)

    def example(self, event: gr.SelectData, request: gr.Request) -> Updates:
        """An example was clicked: classify and show it."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(self.examples):
            return unchanged()
        example = self.examples[event.index]
        picture = self._look(example.name, example.source)
        return self._added([picture] if picture else [], request)

    def picture(self, event: gr.SelectData, request: gr.Request) -> Updates:
        """A picture that was given earlier was clicked: show its classes."""
        session = self.sessions.get(request.session_hash or "")
        if session is None:
            return self._expired()
        if not isinstance(event.index, int) or not 0 <= event.index < len(session.pictures):
            return unchanged()
        session.current = event.index
        return self._answer(session, gallery=gr.skip())

    def bar(self, event: gr.SelectData, request: gr.Request) -> Updates:
        """The bar of a class was clicked: show the heat map of the class."""
        if event.value not in self.viewer.names:
            return unchanged()
        return self.choice(self.viewer.names.index(event.value), request)

    def choice(self, index: int | None, request: gr.Request) -> Updates:
        """A class was chosen: show its heat map."""
        session = self.sessions.get(request.session_hash or "")
        if session is None:
            return self._expired()
        if index is None:
            return unchanged()
        heat_map = self._heat_map(session.pictures[session.current], index)
        return gr.skip(), gr.skip(), heat_map, gr.skip(), index

    def left(self, request: gr.Request) -> None:
        """A visitor has closed the page: drop the pictures."""
        self.sessions.forget(request.session_hash or "")

    def _look(self, name: str, source: Source) -> Picture | None:
        """The picture with its answer; without one a note gives the reason."""
        try:
            return self.viewer.look(name, source)
        except OversizedError:
            self._note(self.texts.too_many_pixels, name=name, **self.texts.pixels())
        except ImageError as error:
            logger.info(str(error))
            self._note(self.texts.unreadable, name=name, formats=FORMATS)
        except ArithmeticError:
            self._note(self.texts.not_finite, name=name)
        return None

    def _added(self, pictures: list[Picture], request: gr.Request) -> Updates:
        if not pictures:
            return None, *unchanged()[1:]
        session = self.sessions.add(request.session_hash or "", pictures)
        return self._answer(session, gallery=self._gallery(session))

    def _answer(self, session: Session, gallery: Any) -> Updates:
        """Bars and heat map of the current picture."""
        picture = session.pictures[session.current]
        best = self.viewer.best(picture)[0]
        heat_map = self._heat_map(picture, best)
        choice = gr.Dropdown(value=best, visible=True)
        return None, gallery, heat_map, self.viewer.top(picture, TOP), choice

    def _gallery(self, session: Session) -> Any:
        items = []
        for picture in session.pictures:
            ((name, score),) = self.viewer.top(picture, 1).items()
            items.append((shown(picture), f"{short(name, 28)} {score:.0%}"))
        return gr.Gallery(items, visible=True, selected_index=0)

    def _heat_map(self, picture: Picture, index: int) -> Any:
        name = self.viewer.names[index]
        return gr.Image(
            self.viewer.heat_map(picture, index),
            label=self.texts.heat_map_of.format(name=short(name, 40)),
        )

    def _note(self, sentence: str, **words: Any) -> None:
        words = {name: html.escape(str(word)) for name, word in words.items()}
        gr.Warning(sentence.format(**words), title=self.texts.notice)

    def _expired(self) -> Updates:
        self._note(self.texts.expired)
        return unchanged()


def unchanged() -> Updates:
    """No change of any component."""
    return (gr.skip(),) * 5


def short(name: str, characters: int = NAME_CHARACTERS) -> str:
    """A name that fits into a line, safe to show."""
    name = printable(name)
    return name if len(name) <= characters else f"{name[: characters - 1]}…"
