"""Image files, decoded with Pillow, safely.

`decode` converts an image file to 8-bit RGB. What it does with each kind:

| kind | what becomes of it |
|---|---|
| JPEG, MPO, PNG, WebP, BMP, GIF, TIFF, PPM, AVIF | decoded; recognised by content, not by suffix; AVIF and WebP where Pillow was built with them |
| HEIC and HEIF | likewise, where `pillow-heif` is installed (the extra `heif`) |
| JPEG, where the caller gives the pixels that are enough | at 1/2, 1/4 or 1/8 of its size, where that divides both sides: else every pixel would be displaced |
| any other format (EPS, PDF, PSD, ICO, SVG, ...) | refused unread, so that nothing is ever executed for it |
| EXIF orientation | applied (XMP's where there is no EXIF); unreadable EXIF is ignored, as viewers do |
| greyscale, 1 bit | the same value in R, G and B |
| 16-bit greyscale (modes I;16, I;16B, ..., and I) | divided by 257 and rounded, so 65535 becomes 255; 12-bit TIFF from its own range; white-is-zero TIFF inverted |
| 32-bit integers beyond 0 to 65535, floating point | refused: what is white in them is not known |
| 16-bit RGB, and 16-bit greyscale with alpha | the high byte: Pillow reads no more of them |
| palette | its colours |
| transparency: RGBA, LA, PA, palette, one transparent colour | laid over white; of 16-bit RGB the colour is compared by its high bytes |
| CMYK, YCCK, YCbCr, LAB, HSV | converted to RGB by Pillow's formulas |
| embedded colour profile, gamma | ignored, as in the authors' evaluation |
| animated GIF, WebP, PNG, AVIF; TIFF pages; MPO views | the first, for PNG the default image |
| JPEG of more than `LARGE_PIXELS` pixels in training | likewise, whatever divides its sides, while the smallest crop keeps 1.5 times the pixels of the view |
| more than `max_pixels` pixels by its header, by default Pillow's limit, 178,956,970 | refused before a pixel is decoded |
| more than `MAX_ASPECT` times as long as wide | refused likewise: it would grow so much when resized |
| a JPEG of more than `MAX_SCANS` scans | refused likewise: a small file could take hours |
| truncated, damaged, empty, missing, a folder, a pipe | refused |
| PIL image | converted like a file, at the frame where it stands; neither changed nor given back itself |

"Refused" is an `ImageError` that names the file. Pillow's warnings are kept from the user, its settings are left alone;
a limit below ours that was set in Pillow still holds for TIFF and WebP, and libtiff's messages still go to stderr.
"""  # noqa: E501

import contextlib
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, inf
from pathlib import Path
from typing import IO, Any

from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, UnidentifiedImageError, features

from cvt.libraries import is_installed

HAS_HEIF = is_installed("pillow_heif")
# Pillow's names of the formats that are decoded; it opens MPO, as phones write it, as a JPEG.
IMAGE_FORMATS = (
    *("JPEG", "MPO", "PNG", "BMP", "GIF", "TIFF", "PPM"),
    *(kind for kind in ("WEBP", "AVIF") if features.check(kind.lower())),
    *(("HEIF",) if HAS_HEIF else ()),
)
# The suffixes, in lower case, of the files that a folder is searched for.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm", ".avif"),
    *((".heic", ".heif", ".hif") if HAS_HEIF else ()),
)
MAX_PIXELS = 178_956_970  # as Pillow's `DecompressionBombError`: twice its MAX_IMAGE_PIXELS
LARGE_PIXELS = 2**25  # 100 MB as RGB
MAX_ASPECT = 1000  # resizing the short side to 256 pixels would take gigabytes for the long one
MAX_SCANS = 100  # of a JPEG, as in libtiff; encoders write about ten
JPEG_SCALES = (8, 4, 2)  # by which a JPEG can be decoded smaller

LONGEST_PATH = 4096
# A JPEG, PNG, GIF or WebP in base64 begins so; a hundred characters of it may be anything.
BASE64 = re.compile(
    r"((/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/_\s-]{24,}|[A-Za-z0-9+/_\s-]{200,})=*\s*"
)

# The next marker that a segment follows; within pixel data 0xff is followed by 0 or a restart.
_JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xff\xd0-\xd7])")


class ImageError(ValueError):
    """An image that cannot be used; the message names the file.

    Example:
        >>> from cvt.data import decode
        >>> decode(b"not an image")
        Traceback (most recent call last):
            ...
        cvt.data.decoding.ImageError: <bytes>: is not an image of a known format (...
    """


class OversizedError(ImageError):
    """An image that has more pixels than are decoded."""


class ElongatedError(ImageError):
    """An image that is too long for its width to be decoded."""


@dataclass(frozen=True)
class StoredImage:
    """An image that is no file of its own, but part of one: a row of a table, a member of a shard.

    Attributes:
        name: how messages and results call it.
        content: the bytes of an image file, decoded pixels, or what gives them when it is called.

    Example:
        >>> from PIL import Image
        >>> from cvt.data import StoredImage, decode
        >>> decode(StoredImage("row 7", Image.new("L", (4, 2)))).mode
        'RGB'
    """

    name: str
    content: bytes | Image.Image | Callable[[], bytes | Image.Image]

    def __str__(self) -> str:
        return self.name


Source = Path | StoredImage


_filters_lock = threading.Lock()


def _renew_lock() -> None:
    global _filters_lock
    _filters_lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # another thread may have held it, and is not in the child
    os.register_at_fork(after_in_child=_renew_lock)


@contextlib.contextmanager
def _quiet_pillow(max_pixels: float | None = None) -> Iterator[None]:
    """Suppress Pillow's warnings; one thread at a time, as `catch_warnings` demands.

    Args:
        max_pixels: Pillow's limit meanwhile, `inf` for none; it raises an error above twice its
            setting. By default its setting stays.
    """
    with _filters_lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        limit = Image.MAX_IMAGE_PIXELS
        if max_pixels is not None:
            Image.MAX_IMAGE_PIXELS = None if max_pixels == inf else ceil(max_pixels / 2)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def is_content(text: str) -> bool:
    """Whether a string is no path but an image itself, as a data URL or in base64."""
    if text[:5].lower() == "data:" or len(text) > LONGEST_PATH:
        return True
    return bool(BASE64.fullmatch(text)) and not os.path.exists(text)


def decode(
    source: str | os.PathLike | bytes | IO[bytes] | Image.Image | StoredImage,
    least: int | None = None,
    *,
    max_pixels: int | None = None,
    least_of_large: int | None = None,
) -> Image.Image:
    """An image as 8-bit RGB, upright; the table above lists what becomes of each kind.

    Args:
        source: a path, the bytes of a file, a binary file object (read from its start), a PIL
            image, or a `StoredImage`.
        least: the pixels that a JPEG's short side must keep; it may be decoded at 1/2, 1/4 or 1/8
            of its size, which takes a third of the time. `pixels_needed` returns how many an image
            processor needs. By default images are decoded whole.
        max_pixels: the pixels that an image may have; `MAX_PIXELS` by default.
        least_of_large: the pixels that the short side of an image of more than `LARGE_PIXELS` must
            keep: it is reduced, by a whole factor, so that it takes little memory.

    Returns:
        A new PIL image of mode RGB, without metadata.

    Raises:
        ImageError: the image cannot be read or is refused; names the file.
        TypeError: `source` is none of these.

    Example:
        >>> from PIL import Image
        >>> from cvt.data import decode
        >>> Image.new("CMYK", (64, 48)).save("photo.jpg")
        >>> image = decode("photo.jpg")
        >>> image.mode, image.size
        ('RGB', (64, 48))
    """
    if isinstance(source, str) and is_content(source):  # which no message repeats
        raise ImageError(
            f"a string of {len(source)} characters is no path; of a data URL or of base64, give "
            'the bytes: base64.b64decode(text.split(",")[-1])'
        )
    name, limit = _name(source), MAX_PIXELS if max_pixels is None else max_pixels
    content = source.content if isinstance(source, StoredImage) else source
    try:
        if callable(content):
            content = content()
        if isinstance(content, Image.Image):
            return _upright_rgb(content, name, limit)
        with _file(content, name) as file:
            if _scans(file) > MAX_SCANS:
                raise ImageError(
                    f"{name}: has more than {MAX_SCANS} scans, which would take very long"
                )
            file.seek(0)
            image = _opened(file, name)
            return _upright_rgb(image, name, limit, least, least_of_large)
    except ImageError:
        raise
    except Exception as error:  # Pillow raises nearly everything on damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{name}: cannot be decoded: {reason}") from error


def _name(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return "<bytes>"
    if isinstance(source, StoredImage):
        return source.name
    if isinstance(source, Image.Image):
        return os.fsdecode(getattr(source, "filename", "") or "<PIL image>")
    if hasattr(source, "read"):
        return str(getattr(source, "name", "<file object>"))
    raise TypeError(
        "an image is a path, bytes, a binary file object, a PIL image or a StoredImage, "
        f"not {type(source).__module__}.{type(source).__qualname__}"
    )


def _file(source: Any, name: str) -> IO[bytes]:
    if isinstance(source, str | os.PathLike):
        mode = os.stat(source).st_mode
        if not stat.S_ISREG(mode):  # reading a pipe or a device might never end
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise ImageError(f"{name}: is {kind}, not an image file")
        return open(source, "rb")
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    with contextlib.suppress(AttributeError, OSError):  # a stream is read from where it is
        source.seek(0)
    data = source.read()
    if not isinstance(data, bytes):
        raise ImageError(f"{name}: is not open in binary mode")
    return io.BytesIO(data)


def _opened(file: IO[bytes], name: str) -> Image.Image:
    """The image, its header read, whatever its size."""
    start = file.read(12)
    if not start:
        raise ImageError(f"{name}: is empty")
    openers = [kind for kind in IMAGE_FORMATS if kind not in ("MPO", "HEIF")]  # a JPEG's opens MPO
    if HAS_HEIF and start[4:8] == b"ftyp":  # as HEIF and AVIF begin; importing it takes a while
        import pillow_heif

        pillow_heif.register_heif_opener()
        openers.append("HEIF")
    try:
        with _quiet_pillow(inf):
            return Image.open(file, formats=openers)  # which seeks the start
    except UnidentifiedImageError:
        raise ImageError(
            f"{name}: is not an image of a known format ({', '.join(IMAGE_FORMATS)}), or its "
            "header is damaged"
        ) from None


def is_image(source: str | os.PathLike | bytes) -> bool:
    """Whether a file, or its bytes, are an image of a known format, by the header."""
    try:
        with _file(source, "") as file:
            return bool(_opened(file, ""))
    except Exception:  # Pillow raises nearly everything on damaged files
        return False


def oversize(path: Path, max_pixels: int | None = None) -> str | None:
    """Why a file that is an image has too many pixels to be decoded, by its header.

    Args:
        path: the file.
        max_pixels: the pixels that an image may have; `MAX_PIXELS` by default.

    Returns:
        A sentence that names the file; None for other files, whatever else is wrong with them.
    """
    name, limit = str(path), MAX_PIXELS if max_pixels is None else max_pixels
    try:
        with _file(path, name) as file:
            image = _opened(file, name)
    except Exception:  # `decode` will raise the error
        return None
    return _too_many_pixels(image.size, name, limit)


def _too_many_pixels(size: tuple[int, int], name: str, max_pixels: int) -> str | None:
    width, height = size
    if 0 < width * height <= max_pixels:
        return None
    return f"{name}: is {width} x {height} pixels; at most {max_pixels} are decoded (max_pixels)"


def _scans(file: IO[bytes]) -> int:
    """The scans of a JPEG, 0 of others: 200 bytes of one can cost a pass over all its pixels."""
    start = file.read(3)
    if start != b"\xff\xd8\xff":
        return 0
    data = start + file.read()
    scans, position = data.count(b"\xff\xda"), 2
    if scans <= MAX_SCANS:  # at most as many; not each of them need be a marker
        return scans
    scans = 0
    while (marker := _JPEG_MARKER.search(data, position)) and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


def _upright_rgb(
    image: Image.Image,
    name: str,
    max_pixels: int,
    least: int | None = None,
    least_of_large: int | None = None,
) -> Image.Image:
    if image.format and image.format not in IMAGE_FORMATS:
        raise ImageError(
            f"{name}: is {image.format}, which is not decoded; "
            f"the formats are {', '.join(IMAGE_FORMATS)}"
        )
    if fault := _too_many_pixels(image.size, name, max_pixels):
        raise OversizedError(fault)
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ElongatedError(
            f"{name}: is {width} x {height} pixels; at most {MAX_ASPECT} times as long as wide "
            "is decoded"
        )
    large = least_of_large if width * height > LARGE_PIXELS else None
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        for scale in JPEG_SCALES:
            divides = width % scale == height % scale == 0
            keeps = large or (divides and least)
            if keeps and min(width, height) >= scale * keeps:
                image.draft(None, (width // scale, height // scale))
                break
    transparency = _transparency(image)
    with _quiet_pillow(max_pixels) if image.format == "TIFF" else contextlib.nullcontext():
        image.load()
    if transparency is not None:
        image = image.copy()
        image.info["transparency"] = transparency
    orientation = 1
    with _quiet_pillow(), contextlib.suppress(Exception):  # unreadable EXIF
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    rgb = _rgb(image, name)
    if large and (factor := min(rgb.size) // large) > 1:
        rgb = rgb.reduce(factor)
    rgb.info = {}  # the orientation in it would be applied again by whoever reads it next
    rgb.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _transparency(image: Image.Image) -> int | tuple[int, ...] | None:
    """The transparent colour of a PNG whose samples Pillow scales, in its scale; else None."""
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None or not (tiles := getattr(image, "tile", [])):
        return None
    scale = {"L;2": 85, "L;4": 17}.get(tiles[0].args)
    if scale and isinstance(colour, int):
        return colour * scale
    if tiles[0].args == "RGB;16B":
        return tuple(value >> 8 for value in colour)
    return None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{name}: has floating-point pixels; convert them to 8 or 16 bits first")
    if image.mode.startswith("I"):
        image = _grey(image, name)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # Pillow knows no direct way
        image = image.convert("LA")
    rgba = image.copy().convert("RGBA")  # converting writes into the palette
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _grey(image: Image.Image, name: str) -> Image.Image:
    """Mode L of 16-bit greyscale."""
    import numpy as np

    values = np.asarray(image).astype(np.int32)  # (H, W)
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    white = 4095 if tags.get(ExifTags.Base.BitsPerSample) == (12,) else 65535
    if values.min() < 0 or values.max() > white:
        raise ImageError(
            f"{name}: has integer pixels from {values.min()} to {values.max()}; "
            f"0 to {white} can be decoded"
        )
    grey = (values * 255 + white // 2) // white
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero
        grey = 255 - grey
    if "transparency" in image.info:  # one transparent value
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8))
