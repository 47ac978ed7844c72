"""How much a service holds at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

from cvt.serving.settings import Settings


class FullError(Exception):
    """There is no room for a request now."""


class Room:
    """Counts the images and the bytes of the requests that are being answered.

    Args:
        settings: have the limits.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.images = self.bytes = 0

    @contextmanager
    def taken(self, images: int, size: int = 0) -> Iterator[None]:
        """Take room for images and bytes, and leave it at the end.

        Raises:
            FullError: there is too little.
        """
        settings = self.settings
        too_many = self.images + images > settings.max_queue
        if too_many or self.bytes + size > settings.max_bytes_of_all:
            raise FullError
        self.images += images
        self.bytes += size
        try:
            yield
        finally:
            self.images -= images
            self.bytes -= size

    @property
    def is_full(self) -> bool:
        """Whether there is none for a request of one image."""
        return (
            self.images >= self.settings.max_queue
            or self.bytes + self.settings.max_bytes > self.settings.max_bytes_of_all
        )
