"""The pictures that visitors have given, in memory: few, small, and for a short time."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from cvt.app.limits import KEPT_SECONDS, PICTURES, STORE_BYTES, VISITORS


@dataclass(frozen=True)
class Picture:
    """A picture with its answer.

    Attributes:
        name: of its file.
        content: the bytes of a PNG of it, small enough to be shown.
        scores: of all classes, in the order of the model's outputs.
    """

    name: str
    content: bytes
    scores: list[float]


@dataclass
class Session:
    """What one visitor has on the page.

    Attributes:
        pictures: in the order in which they are shown.
        current: the position of the one whose classes are shown.
        used: when it was last used, in seconds of a monotonic clock.
    """

    pictures: list[Picture] = field(default_factory=list)
    current: int = 0
    used: float = 0.0

    @property
    def size(self) -> int:
        """Its bytes."""
        return sum(len(picture.content) for picture in self.pictures)


class Sessions:
    """The pictures of all visitors; the ones used least recently go first.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, visitor: str, pictures: list[Picture]) -> Session:
        """Put pictures before those that a visitor has; the oldest beyond the limit are dropped.

        Args:
            visitor: who gives them.
            pictures: at least one; the first becomes the current one.
        """
        with self._lock:
            earlier = self._sessions.pop(visitor, Session())
            names = {(picture.name, picture.content) for picture in pictures}
            kept = [each for each in earlier.pictures if (each.name, each.content) not in names]
            session = Session([*pictures, *kept][:PICTURES], used=self._clock())
            self._sessions[visitor] = session
            self._drop()
            return session

    def get(self, visitor: str) -> Session | None:
        """What a visitor has; None if that is gone, or was never there."""
        with self._lock:
            self._drop()
            if session := self._sessions.get(visitor):
                session.used = self._clock()
                self._sessions.move_to_end(visitor)
            return session

    def forget(self, visitor: str) -> None:
        """Drop what a visitor has."""
        with self._lock:
            self._sessions.pop(visitor, None)

    def drop_expired(self) -> None:
        """Drop what was not used for `KEPT_SECONDS`."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        now = self._clock()
        size = sum(session.size for session in self._sessions.values())
        while self._sessions:
            visitor, oldest = next(iter(self._sessions.items()))
            too_many = len(self._sessions) > VISITORS or size > STORE_BYTES
            if not too_many and now - oldest.used <= KEPT_SECONDS:
                return
            size -= self._sessions.pop(visitor).size
