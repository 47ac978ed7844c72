"""Decoded images, kept for the next epochs: `cache`.

A training image is kept with as many pixels as its smallest crop needs, 1.5 times those of the
view along its short side, as 8-bit RGB. Crops are taken from what is kept, from the first epoch on:
so they differ a little from those of whole images, and are the same whether an image was kept or
not. A validation image is kept as it is resized and cropped for the model, so nothing differs.

All processes of a loader share one file without a name, in memory or in the run folder. It ends
with the process that opened it, however that ends.
"""

import logging
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import IO, Any

from PIL import Image

from cvt.files import FULL
from cvt.train.memory import free_disk, free_memory

logger = logging.getLogger(__name__)
WIDEST = 16 / 9  # times as long as wide; what is longer is decoded in every epoch
SIZE = struct.Struct("<II")  # width and height, in front of the pixels


class ImageCache:
    """A file with a place for every image; threads may share it.

    Args:
        kind: "ram" or "disk".
        folder: for the file, if it is on the disk.
        images: their number.
        least: pixels of the short side of an image that is kept.
        processes: of the run, each of which has a file of its own.

    Attributes:
        largest: bytes that the file may grow to.

    Raises:
        ValueError: that is more than half of what is free, or there are no files in memory here.
    """

    def __init__(self, kind: str, folder: Path, images: int, least: int, processes: int) -> None:
        self.least = least
        self.place = SIZE.size + 3 * least * int(least * WIDEST)
        self.largest = images * self.place
        free = free_memory() if kind == "ram" else free_disk(folder)
        if (needed := processes * self.largest) > free // 2:
            other = "disk" if kind == "ram" else "none"
            raise ValueError(
                f"cache = {kind}: {images:,} images of {least} x {int(least * WIDEST)} pixels take "
                f"up to {needed / 2**30:.1f} GiB, and may take half of the {free / 2**30:.1f} GiB "
                f"that are free; try cache={other}, or a smaller image_size"
            )
        if kind == "ram":
            if not hasattr(os, "memfd_create"):
                raise ValueError("cache = ram: there are no files in memory here; try cache=disk")
            self.file: IO[bytes] | None = os.fdopen(os.memfd_create("cvt-cache"), "r+b", 0)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            named = sys.platform != "linux"
            opened: Any = tempfile.NamedTemporaryFile if named else tempfile.TemporaryFile
            self.file = opened(dir=folder, prefix=".cache-", buffering=0)
        is_linux = sys.platform == "linux"
        own = f"/proc/{os.getpid()}/fd/{self.file.fileno()}"
        self.path = own if is_linux else self.file.name
        self.reader: tuple[int, IO[bytes]] | None = None
        self.lock = Lock()  # of the place in the file
        self.is_full = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"file": None, "reader": None, "lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"lock": Lock()}

    def get(self, index: int, decode: Callable[[], Image.Image], *, first: int = 0) -> Image.Image:
        """An image as it is kept; it is decoded if it is not there yet.

        Args:
            index: of the image.
            decode: called for the image; what it raises is not kept.
            first: what the index counts from.
        """
        start = (first + index) * self.place
        with self.lock:
            file = self._opened()
            file.seek(start)
            size = SIZE.unpack(file.read(SIZE.size) or bytes(SIZE.size))
            if all(size):
                return Image.frombytes("RGB", size, file.read(3 * size[0] * size[1]))
        image = self._reduced(decode())
        if SIZE.size + len(pixels := image.tobytes()) <= self.place:
            try:
                with self.lock:
                    file.seek(start + SIZE.size)
                    while pixels:  # what is written of them is all, but on a full disk
                        pixels = pixels[file.write(pixels) :]
                    file.seek(start)  # last: other processes read what has a size
                    file.write(SIZE.pack(*image.size))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                if not self.is_full:
                    logger.warning(f"cache: {error.strerror}; other images are decoded every time")
                self.is_full = True
        return image

    def _reduced(self, image: Image.Image) -> Image.Image:
        shorter = min(image.size)
        if shorter <= self.least:
            return image
        width, height = (round(side * self.least / shorter) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def _opened(self) -> IO[bytes]:
        """The file, opened by this process: a fork would share its place with the others."""
        if self.reader is None or self.reader[0] != os.getpid():
            self.reader = os.getpid(), open(self.path, "r+b", buffering=0)  # noqa: SIM115
        return self.reader[1]
