"""What a service accepts, and how it batches."""

from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
KEY_CHARACTERS = 16  # at least, of a key for the API


@dataclass(frozen=True)
class Settings:
    """The settings of a service.

    Attributes:
        max_batch: images that are run through a model at a time.
        batch_wait_ms: milliseconds that an image waits for others.
        max_queue: images that are read, decoded or computed at a time; a request may have as many.
        max_bytes: of a request.
        max_pixels: of an image, by its header.
        timeout: seconds from the first byte of a request to its answer.
        api_key: what requests must have; None for no key.
        loopback: whether requests must call the server by a name of this machine. Otherwise a page
            elsewhere could reach it through a name of its own that leads here.
    """

    max_batch: int = 32
    batch_wait_ms: float = 5.0
    max_queue: int = 256
    max_bytes: int = 32 * MIB
    max_pixels: int = 50_000_000
    timeout: float = 30.0
    api_key: str | None = None
    loopback: bool = True

    @property
    def max_bytes_of_all(self) -> int:
        """The bytes of all requests that are in memory at a time."""
        return 8 * self.max_bytes


def read_key(path: Path) -> str:
    """The key in a file, without what is around it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no key; names the file.
    """
    key = path.read_text("utf-8", errors="replace").strip()
    if len(key) < KEY_CHARACTERS or not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(
            f"{path}: must hold one key of at least {KEY_CHARACTERS} ASCII characters, without "
            "spaces, such as `openssl rand -hex 32` prints"
        )
    return key
