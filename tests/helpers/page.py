"""`cvt app` in a process of its own, and visitors that speak to it as its page does."""

import contextlib
import functools
import json
import secrets

import httpx
from helpers.server import Server


class Page(Server):
    """The process.

    Attributes:
        folder: where it keeps files.
        left: a folder like that of a page that was killed, with a picture in it.
    """

    def __init__(self, model, place, *options, settings=None):
        self.left = place / "cvt-app-left"
        self.left.mkdir()
        (self.left / "photo.png").write_bytes(b"left")
        settings = {"TMPDIR": str(place)} | (settings or {})
        super().__init__("app", [model, *options], place / "log", settings)
        (self.folder,) = (path for path in place.glob("cvt-app-*") if path != self.left)

    def files(self):
        return {path for path in self.folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def served(model, place, *options, **how):
    place.mkdir(parents=True, exist_ok=True)
    with Page(model, place, *options, **how) as page:
        yield page


@functools.cache  # visitors of one page have the same
def configuration(address):
    """The components and events of a page."""
    return httpx.get(f"{address}/config", timeout=120).json()


class Visitor:
    """One visitor, who sends what the page in a browser sends.

    Attributes:
        web: a client of httpx.
    """

    def __init__(self, address, language="en"):
        self.address = f"{address}/{language}"
        self.web = httpx.Client(base_url=self.address, timeout=120)
        self.session = secrets.token_hex(8)

    def event(self, component, name):
        """The number of the handler of an event of a component, by its elem_id."""
        config = configuration(self.address)
        ids = {each["props"].get("elem_id"): each["id"] for each in config["components"]}
        target = [ids[component], name]
        (found,) = (d for d in config["dependencies"] if target in d["targets"])
        return found["id"]

    def upload(self, *pictures):
        """The answer to the upload of (name, bytes)."""
        return self.web.post("/gradio_api/upload", files=[("files", pair) for pair in pictures])

    def join(self, component, name, data, event_data=None):
        """The answer to an event: whether it is in the queue."""
        body = {
            "fn_index": self.event(component, name),
            "data": data,
            "event_data": event_data,
            "session_hash": self.session,
        }
        return self.web.post("/gradio_api/queue/join", json=body)

    def result(self):
        """What a handler returned, or `{"error": ...}`, and the notes on the way.

        Like a browser it reads to the end: of who leaves before, gradio keeps its heartbeat.
        """
        output, notes = None, []
        query = {"session_hash": self.session}
        with self.web.stream("GET", "/gradio_api/queue/data", params=query) as stream:
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data: ")) if line else {}
                if message.get("msg") == "log":
                    notes.append(message["log"])
                if message.get("msg") == "process_completed":
                    output = message["output"]
        assert output is not None, "the stream ended without an answer"
        return output, notes

    def give(self, *pictures):
        """Upload pictures; returns what the page then shows, and the notes."""
        paths = self.upload(*pictures).raise_for_status().json()
        files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]
        self.join("upload", "upload", [files]).raise_for_status()
        return self.result()


def classes_of(output):
    """The bars in what a handler returned: label and score."""
    value = output["data"][3]
    return [(each["label"], each["confidence"]) for each in value["confidences"]]
