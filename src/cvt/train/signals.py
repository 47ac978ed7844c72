"""SIGTERM and Ctrl-C, noted for a run to stop after its step."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class StopSignal:
    """The signal that asked a run to stop.

    Attributes:
        number: of the signal; 0 while there is none.
    """

    def __init__(self) -> None:
        self.number = 0

    def received(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self.number > 0

    @contextlib.contextmanager
    def handled(self, processes: int) -> Iterator[None]:
        """Note SIGTERM and Ctrl-C; a second Ctrl-C ends the process at once.

        In one of several processes it does not: their launcher repeats the signals it receives.

        Args:
            processes: of the run.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: object) -> None:
            self.number = number
            if number == signal.SIGINT and processes == 1:
                signal.signal(number, before[number])

        before: dict[int, Any] = {
            number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
