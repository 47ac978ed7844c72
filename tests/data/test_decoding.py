"""Decoding of every kind of image, and refusal of the rest."""

import io
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
import zlib

import numpy as np
import PIL
import pytest
import torch
from helpers.pictures import encoded, photo
from PIL import EpsImagePlugin, GifImagePlugin, Image, ImageCms, ImageFile, ImageOps, PngImagePlugin
from sklearn.datasets import load_sample_image
from transformers import (
    ViTImageProcessor,
)

from cvt.data import decoding, preprocessing
from cvt.data.decoding import IMAGE_FORMATS, IMAGE_SUFFIXES, ImageError, StoredImage, decode
from cvt.data.image_processor import image_processor
from cvt.data.preprocessing import preprocessing_of

ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC, EXTRA_SAMPLES = 274, 258, 262, 338
LOSSLESS = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "TIFF, LZW": {"compression": "tiff_lzw"},
    "TIFF, deflate": {"compression": "tiff_deflate"},
    "PPM": {},
    "WEBP": {"lossless": True},
}


def pixels(source):
    image = decode(source)
    assert type(image) is Image.Image
    assert image.mode == "RGB"
    assert image.info == {}
    return np.asarray(image)


def png(width, height, depth, colour_type, raw, *chunks):
    """A PNG written by hand: `raw` rows of samples, without filter bytes."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    rows = b"".join(b"\0" + row for row in raw)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)),
            *(chunk(*each) for each in chunks),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        )
    )


def tiff(width, height, data, **tags):
    """A little-endian TIFF written by hand: one uncompressed strip."""
    entries = {
        256: width,
        257: height,
        BITS_PER_SAMPLE: 8,
        259: 1,
        PHOTOMETRIC: 1,
        273: 0,
        277: 1,
        278: height,
        279: len(data),
        **{int(tag[1:]): value for tag, value in tags.items()},
    }
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    directory = b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items())
    )
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    return head + directory + struct.pack("<I", 0) + data


def over_white(colour, alpha):
    """The definition, in exact arithmetic: rounded to nearest, of which 255 leaves no ties."""
    colour, alpha = np.asarray(colour, dtype=int), np.asarray(alpha, dtype=int)
    return (2 * (colour * alpha + 255 * (255 - alpha)) + 255) // 510


def every_colour_and_alpha():
    """Two (256, 256) planes that hold every pair."""
    return np.mgrid[0:256, 0:256].astype(np.uint8)


# ------------------------------------------------------------------------------ what is decoded


def test_a_stored_image_is_decoded_and_named_in_errors():
    file = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(file, "PNG")
    for content in (file.getvalue(), Image.new("L", (4, 3))):
        assert decode(StoredImage("shard.tar/7", content)).size == (4, 3)
    with pytest.raises(ImageError, match=r"shard\.tar/7"):
        decode(StoredImage("shard.tar/7", file.getvalue()[:30]))


@pytest.mark.parametrize("image_format", LOSSLESS)
def test_lossless_formats_give_the_pixels_back(image_format):
    image = photo()
    assert np.array_equal(pixels(encoded(image, image_format, **LOSSLESS[image_format])), image)


@pytest.mark.parametrize("image_format", ["JPEG", "MPO", "WEBP", "AVIF"])
def test_lossy_formats_give_what_pillow_decodes(image_format):
    data = encoded(photo(), image_format, quality=90)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(pixels(data), expected)
    assert abs(pixels(data).astype(int) - photo()).mean() < 12


def test_path_string_bytes_buffer_file_and_stream_are_the_same_image(tmp_path):
    data, path = encoded(photo()), tmp_path / "photo.png"
    path.write_bytes(data)
    at_the_end = io.BytesIO(data)
    at_the_end.seek(0, io.SEEK_END)
    sources = [
        path,
        str(path),
        data,
        bytearray(data),
        memoryview(data),
        io.BytesIO(data),
        at_the_end,
    ]
    for source in sources:
        assert np.array_equal(pixels(source), photo())
    with path.open("rb") as file:
        assert np.array_equal(pixels(file), photo())
        assert not file.closed
    with subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.stdout.buffer.write({data!r})"],
        stdout=subprocess.PIPE,
    ) as process:
        assert np.array_equal(pixels(process.stdout), photo())  # a pipe: cannot seek


def test_the_content_tells_the_format_and_not_the_suffix(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(photo(), "PNG"))
    assert np.array_equal(pixels(path), photo())


def test_every_suffix_is_pillows_for_a_format_that_is_decoded():
    Image.init()
    known = Image.registered_extensions()
    assert {known[suffix] for suffix in IMAGE_SUFFIXES} == set(IMAGE_FORMATS)
    assert all(suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)


# How the image that is displayed lies in the file, by the EXIF standard's table.
STORED = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("image_format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 100, "subsampling": 0}, 4),
        ("MPO", {"quality": 100, "subsampling": 0}, 4),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 4),
    ],
)
def test_exif_orientation_is_applied_once(image_format, options, tolerance, orientation):
    upright = photo(2, 3, seed=7).repeat(16, axis=0).repeat(16, axis=1)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(stored, image_format, exif=exif, **options)
    assert pixels(data).shape == upright.shape
    assert abs(pixels(data).astype(int) - upright).max() <= tolerance
    assert ImageOps.exif_transpose(decode(data)).tobytes() == decode(data).tobytes()
    assert decode(decode(data)).tobytes() == decode(data).tobytes()
    assert decode(Image.open(io.BytesIO(data))).tobytes() == decode(data).tobytes()


def test_orientation_is_read_from_xmp_and_from_a_late_exif_chunk():
    upright = photo()
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright)))
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    assert np.array_equal(pixels(encoded(stored, pnginfo=text)), upright)

    exif = Image.Exif()
    exif[ORIENTATION] = 6
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block
    chunk += struct.pack(">I", zlib.crc32(b"eXIf" + block))
    data = encoded(stored)
    end = data.rindex(b"IEND") - 4
    assert np.array_equal(pixels(data[:end] + chunk + data[end:]), upright)


@pytest.mark.parametrize(
    "exif",
    [b"", b"nonsense", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff"],
    ids=["empty", "no TIFF", "directory out of reach", "directory cut off"],
)
def test_unreadable_exif_is_ignored(exif):
    assert np.array_equal(pixels(encoded(photo(), exif=b"Exif\0\0" + exif)), photo())


@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_orientation_that_does_not_exist_is_ignored(value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    assert np.array_equal(pixels(encoded(photo(), exif=exif)), photo())


# ------------------------------------------------------------------------------ grey and 16 bits


def test_greyscale_and_one_bit_fill_the_three_channels():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    three = ramp[..., None].repeat(3, axis=2)
    for image_format in ("PNG", "BMP", "GIF", "TIFF", "PPM"):
        assert np.array_equal(pixels(encoded(ramp, image_format)), three)
    one_bit = Image.fromarray(ramp).convert("1", dither=Image.Dither.NONE)
    for image_format in ("PNG", "BMP", "GIF", "TIFF", "PPM"):
        expected = np.where(three >= 128, 255, 0)
        assert np.array_equal(pixels(encoded(one_bit, image_format)), expected)


RAMP_16 = np.arange(65536).reshape(256, 256)
RAMP_8 = np.rint(RAMP_16 / 257).astype(np.uint8)[..., None].repeat(3, axis=2)


def ramps_of_16_bits():
    """(kind, source) of images that hold `RAMP_16`."""
    little = Image.fromarray(RAMP_16.astype("<u2"))
    big = Image.fromarray(RAMP_16.astype(">u2"))
    wide = Image.fromarray(RAMP_16.astype(np.int32))
    assert [little.mode, big.mode, wide.mode] == ["I;16", "I;16B", "I"]
    yield "PNG", encoded(little)
    yield "TIFF, little-endian", encoded(little, "TIFF")
    yield "TIFF, LZW", encoded(little, "TIFF", compression="tiff_lzw")
    yield "TIFF, big-endian", encoded(big, "TIFF", big_endian=True)
    yield "TIFF, 32 bits", encoded(wide, "TIFF")
    yield "PGM", b"P5 256 256 65535\n" + RAMP_16.astype(">u2").tobytes()
    yield "plain PGM", b"P2 256 256 65535\n" + " ".join(map(str, RAMP_16.flat)).encode()
    yield (
        "TIFF, white is zero",
        tiff(256, 256, (65535 - RAMP_16).astype("<u2").tobytes(), _258=16, _262=0),
    )
    yield "I;16 in memory", little
    yield "I;16B in memory", big
    yield "I;16L in memory", Image.frombytes("I;16L", (256, 256), RAMP_16.astype("<u2").tobytes())
    yield "I in memory", wide


PILLOW = int(PIL.__version__.partition(".")[0])
RAMPS = dict(ramps_of_16_bits())


@pytest.mark.parametrize("kind", RAMPS)
def test_16_bit_greyscale_is_scaled_and_not_clipped(kind):
    assert np.array_equal(pixels(RAMPS[kind]), RAMP_8)


def test_12_bit_tiff_is_scaled_from_its_own_range():
    values = np.arange(4096).reshape(64, 64)
    first, second = values[:, ::2], values[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2)
    data = tiff(64, 64, packed.astype(np.uint8).tobytes(), _258=12)
    assert Image.open(io.BytesIO(data)).mode == "I;16"
    expected = np.rint(values * (255 / 4095))[..., None].repeat(3, axis=2)
    assert np.array_equal(pixels(data), expected)


def test_16_bit_greyscale_with_a_transparent_value_lies_over_white():
    rows = [row.astype(">u2").tobytes() for row in RAMP_16]
    data = png(256, 256, 16, 0, rows, (b"tRNS", struct.pack(">H", 770)))
    expected = RAMP_8.copy()
    expected[RAMP_16 == 770] = 255
    assert np.array_equal(pixels(data), expected)
    assert expected[3, 3].tolist() == [3, 3, 3]  # 771 is as dark, and opaque


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_grey_of_few_bits_with_a_transparent_value_lies_over_white(depth):
    values = np.arange(2**depth)
    bits = (values[:, None] >> np.arange(depth)[::-1]) & 1
    row = np.packbits(bits.astype(np.uint8).ravel()).tobytes()
    data = png(len(values), 1, depth, 0, [row], (b"tRNS", struct.pack(">H", 1)))
    expected = values * 255 // (2**depth - 1)
    expected[1] = 255
    assert pixels(data)[0, :, 0].tolist() == expected.tolist()
    # An open image is converted likewise, and is not changed.
    with Image.open(io.BytesIO(data)) as image:
        before = image.info["transparency"]
        assert pixels(image)[0, :, 0].tolist() == expected.tolist()
        assert image.info["transparency"] == before


def test_16_bit_colour_with_a_transparent_one_is_compared_by_the_high_bytes():
    rgb = np.array([[[0x0102, 0x0304, 0x0506], [0x0100, 0x0300, 0x0500], [0x0102, 0x0304, 0]]])
    rows = [row.astype(">u2").tobytes() for row in rgb]
    data = png(3, 1, 16, 2, rows, (b"tRNS", struct.pack(">HHH", 0x0102, 0x0304, 0x0506)))
    assert pixels(data).tolist() == [[[255] * 3, [255] * 3, [1, 3, 0]]]


def test_16_bit_colour_keeps_the_high_byte():
    generator = np.random.default_rng(0)
    rgb = generator.integers(0, 65536, (5, 7, 3))
    rows = [row.astype(">u2").tobytes() for row in rgb]
    assert np.array_equal(pixels(png(7, 5, 16, 2, rows)), rgb >> 8)
    la = generator.integers(0, 65536, (5, 7, 2))
    rows = [row.astype(">u2").tobytes() for row in la]
    expected = over_white(la[..., :1] >> 8, la[..., 1:] >> 8).repeat(3, axis=2)
    assert np.array_equal(pixels(png(7, 5, 16, 4, rows)), expected)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "floating-point"),
        (b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.5, 0.5), "floating-point"),
        (Image.new("F", (4, 4)), "floating-point"),
        (encoded(Image.new("I", (4, 4), 65536), "TIFF"), "from 65536 to 65536"),
        (encoded(Image.new("I", (4, 4), -1), "TIFF"), "from -1 to -1"),
        (Image.new("I", (4, 4), 2**31 - 1), "2147483647"),
        (tiff(2, 1, struct.pack("<2h", 7, -7), _258=16, _339=2), "from -7 to 7"),
    ],
)
def test_pixels_without_a_known_white_are_refused(source, reason):
    with pytest.raises(ImageError, match=reason):
        decode(source)


# ------------------------------------------------------------------------------ transparency


def test_rgba_lies_over_white_exactly_for_every_colour_and_alpha():
    colour, alpha = every_colour_and_alpha()
    rgba = np.stack([colour, 255 - colour, colour, alpha], axis=2)
    expected = over_white(rgba[..., :3], alpha[..., None])
    for image_format in ("PNG", "TIFF"):
        assert np.array_equal(pixels(encoded(rgba, image_format)), expected)
    data = encoded(rgba, "WEBP", lossless=True, exact=True)
    assert np.array_equal(pixels(data), expected)


def test_grey_with_alpha_lies_over_white_exactly():
    colour, alpha = every_colour_and_alpha()
    la = Image.merge("LA", [Image.fromarray(colour), Image.fromarray(alpha)])
    expected = over_white(colour, alpha)[..., None].repeat(3, axis=2)
    for source in (la, encoded(la), encoded(la, "TIFF")):
        assert np.array_equal(pixels(source), expected)


def palette_image():
    """A palette image of 256 colours, and the colours (256, 3) of its pixels (16, 16)."""
    colours = np.random.default_rng(3).permutation(256 * 3).reshape(256, 3).astype(np.uint8)
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("L")
    image = Image.frombytes("P", (16, 16), image.tobytes())
    image.putpalette(colours.tobytes())
    return image, colours


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "BMP", "TIFF", "memory"])
def test_a_palette_gives_its_colours(image_format):
    image, colours = palette_image()
    source = image if image_format == "memory" else encoded(image, image_format)
    assert np.array_equal(pixels(source), colours.reshape(16, 16, 3))


@pytest.mark.parametrize("image_format", ["PNG", "GIF", "memory"])
def test_one_transparent_palette_entry_is_white(image_format):
    image, colours = palette_image()
    image.info["transparency"] = 37
    source = image if image_format == "memory" else encoded(image, image_format, transparency=37)
    expected = colours.copy()
    expected[37] = 255
    assert np.array_equal(pixels(source), expected.reshape(16, 16, 3))


@pytest.mark.parametrize("as_file", [True, False])
def test_palette_alphas_lie_over_white(as_file):
    image, colours = palette_image()
    alphas = np.random.default_rng(4).permutation(256).astype(np.uint8)
    image.info["transparency"] = alphas.tobytes()
    source = encoded(image, transparency=alphas.tobytes()) if as_file else image
    expected = over_white(colours, alphas[:, None]).reshape(16, 16, 3)
    assert np.array_equal(pixels(source), expected)


def test_palette_with_an_alpha_channel_or_an_alpha_palette_lies_over_white():
    image, colours = palette_image()
    alphas = np.random.default_rng(5).permutation(256).astype(np.uint8)
    expected = over_white(colours, alphas[:, None]).reshape(16, 16, 3)
    pa = image.convert("PA")
    pa.putalpha(Image.fromarray(alphas.reshape(16, 16)))
    assert pa.mode == "PA"
    assert np.array_equal(pixels(pa), expected)
    image.putpalette(np.hstack([colours, alphas[:, None]]).tobytes(), "RGBA")
    assert np.array_equal(pixels(image), expected)


def test_one_transparent_colour_of_rgb_and_grey_is_white():
    rgb = photo()
    rgb[3:7, 5:9] = 10, 20, 30
    expected = rgb.copy()
    expected[3:7, 5:9] = 255
    data = encoded(rgb, transparency=(10, 20, 30))
    assert Image.open(io.BytesIO(data)).info["transparency"] == (10, 20, 30)
    assert np.array_equal(pixels(data), expected)
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.where(ramp == 9, 255, ramp)[..., None].repeat(3, axis=2)
    assert np.array_equal(pixels(encoded(ramp, transparency=9)), expected)


def test_premultiplied_alpha_lies_over_white():
    colour, alpha = every_colour_and_alpha()
    multiplied = np.rint(colour * (alpha / 255)).astype(np.uint8)
    expected = multiplied.astype(int) + 255 - alpha
    rgba = np.stack([multiplied, multiplied, multiplied, alpha], axis=2)
    rgb_in_memory = Image.frombytes("RGBa", (256, 256), rgba.tobytes())
    grey_in_memory = Image.frombytes("La", (256, 256), rgba[..., 2:].tobytes())
    plain, associated = (struct.pack("<HHIH", EXTRA_SAMPLES, 3, 1, kind) for kind in (2, 1))
    as_tiff = encoded(rgba, "TIFF").replace(plain, associated)
    assert Image.open(io.BytesIO(as_tiff)).tag_v2[EXTRA_SAMPLES] == (1,)
    for source in (rgb_in_memory, grey_in_memory, as_tiff):
        assert abs(pixels(source).astype(int) - expected[..., None]).max() <= 1


def test_tiff_samples_that_mean_nothing_are_left_out():
    rgbx = np.dstack([photo(), np.zeros((40, 56, 1), dtype=np.uint8)])
    alpha, unspecified = (struct.pack("<HHIH", EXTRA_SAMPLES, 3, 1, kind) for kind in (2, 0))
    data = encoded(rgbx, "TIFF").replace(alpha, unspecified)
    assert np.array_equal(pixels(data), photo())


# ------------------------------------------------------------------------------ colour spaces

INKS = {
    (0, 0, 0, 0): (255, 255, 255),
    (255, 0, 0, 0): (0, 255, 255),
    (0, 255, 0, 0): (255, 0, 255),
    (0, 0, 255, 0): (255, 255, 0),
    (0, 0, 0, 255): (0, 0, 0),
    (0, 0, 0, 100): (155, 155, 155),
}


@pytest.mark.parametrize("image_format", ["JPEG", "TIFF", "memory"])
@pytest.mark.parametrize("ink", INKS)
def test_cmyk_inks_have_their_colours(ink, image_format):
    image = Image.new("CMYK", (16, 16), ink)
    options = {"quality": 100} if image_format == "JPEG" else {}
    source = image if image_format == "memory" else encoded(image, image_format, **options)
    assert abs(pixels(source).astype(int) - INKS[ink]).max() <= 1


def test_ycck_jpeg():
    colour = (200, 120, 40)
    inverted = Image.new("RGB", (16, 16), tuple(255 - value for value in colour))
    stored = [255 - value for value in inverted.convert("YCbCr").getpixel((0, 0))]
    data = encoded(Image.new("CMYK", (16, 16), (*stored, 0)), "JPEG", quality=100, subsampling=0)
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0  # CMYK; 2 means YCCK
    data = data[:transform] + b"\2" + data[transform + 1 :]
    assert abs(pixels(data).astype(int) - colour).max() <= 2


def test_lab_ycbcr_and_hsv_are_the_colours_they_came_from():
    rgb = Image.fromarray(photo())
    lab = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
    ).apply(rgb)
    ycbcr = rgb.convert("YCbCr")
    hsv = rgb.convert("HSV")
    assert lab.mode == "LAB"
    files = [encoded(image, "TIFF") for image in ([lab, ycbcr] if PILLOW >= 13 else [lab])]
    for source in (lab, ycbcr, hsv, *files):  # Pillow 12 cannot read the YCbCr that it writes
        assert abs(pixels(source).astype(int) - photo()).mean() < 3


def test_colour_profile_and_gamma_are_ignored():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert np.array_equal(pixels(encoded(photo(), icc_profile=profile)), photo())
    rows = [row.tobytes() for row in photo()]
    assert np.array_equal(
        pixels(png(56, 40, 8, 2, rows, (b"gAMA", struct.pack(">I", 10_000)))), photo()
    )


# ------------------------------------------------------------------------------ frames


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("GIF", {}),
        ("PNG", {}),
        ("TIFF", {}),
        ("WEBP", {"lossless": True}),
        ("AVIF", {"quality": 100}),
        ("MPO", {"quality": 100}),
    ],
)
def test_the_first_frame_is_decoded(image_format, options):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
        assert abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 2
        image.seek(2)
        assert abs(pixels(image).astype(int) - (0, 0, 255)).max() <= 2
        assert image.tell() == 2


def test_a_png_shows_its_default_image_and_not_the_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], save_all=True, append_images=frames[1:], default_image=True)
    assert (pixels(data) == (255, 0, 0)).all()


def test_a_transparent_gif_frame_smaller_than_its_screen_lies_over_white():
    frame = np.zeros((4, 4), dtype=np.uint8)
    frame[3, 3] = 77
    data = bytearray(encoded(frame, "GIF", transparency=77))
    data[6:10] = struct.pack("<HH", 8, 6)
    expected = np.full((6, 8, 3), 255)
    expected[:4, :4] = np.where(frame == 77, 255, 0)[..., None]
    assert np.array_equal(pixels(bytes(data)), expected)


# ------------------------------------------------------------------------------ PIL images

MODES = (
    *("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"),
    *("CMYK", "YCbCr", "LAB", "HSV", "I", "I;16"),
)


@pytest.mark.parametrize("mode", MODES)
def test_a_pil_image_is_left_alone(mode):
    image = palette_image()[0] if mode == "P" else Image.new(mode, (5, 3))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image.info = {"exif": exif.tobytes(), "mark": 1}
    if mode in ("1", "L", "P", "I", "I;16", "RGB"):
        image.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0

    def state():
        palette = image.getpalette("RGBA") if mode in ("P", "PA") else None
        return image.mode, image.size, dict(image.info), image.tobytes(), palette

    before = state()
    result = decode(image)
    assert result.size == image.size[::-1]
    result.paste((1, 2, 3), (0, 0, *result.size))
    assert state() == before


def test_a_pil_image_of_a_refused_format_is_not_even_loaded(monkeypatch):
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: ran.append(args))
    image = Image.open(io.BytesIO(data))
    assert image.format == "EPS"
    with pytest.raises(ImageError, match="EPS"):
        decode(image)
    assert not ran


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ImageError, match="0 x 5"):
        decode(Image.new("RGB", (0, 5)))


# ------------------------------------------------------------------------------ bombs


def bombs():
    """Headers that announce some 60000 x 60000 pixels, whose formats allow."""
    yield "PNG", png(60000, 60000, 8, 2, [])
    yield "BMP", encoded(photo(), "BMP")[:18] + struct.pack("<ii", 60000, 60000) + bytes(100)
    yield "GIF", b"GIF89a" + struct.pack("<HH", 60000, 60000) + encoded(photo(), "GIF")[10:]
    yield "PPM", b"P6 60000 60000 255\n"
    yield "plain PPM", b"P3 60000 60000 255\n"
    yield "TIFF", tiff(60000, 60000, b"")
    yield "TIFF, deflate", tiff(60000, 60000, b"", _259=8)
    jpeg = bytearray(encoded(photo(), "JPEG"))
    start = jpeg.index(b"\xff\xc0") + 5
    jpeg[start : start + 4] = struct.pack(">HH", 60000, 60000)
    yield "JPEG", bytes(jpeg)
    extended = b"VP8X" + struct.pack("<IB3x", 10, 0) + b"\xff\x3f\0\xff\x3f\0"
    frame = encoded(photo(), "WEBP")[12:]
    body = b"WEBP" + extended + frame
    yield "WEBP", b"RIFF" + struct.pack("<I", len(body)) + body


BOMBS = dict(bombs())


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("pillows_limit", [None, 10, Image.MAX_IMAGE_PIXELS])
def test_a_bomb_is_refused_before_decoding(kind, pillows_limit, monkeypatch):
    def load(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ImageError, match="decode") as caught:
        decode(BOMBS[kind])
    assert not isinstance(caught.value.__cause__, AssertionError)
    if kind == "PNG":
        assert str(caught.value).startswith("<bytes>: is 60000 x 60000 pixels; at most 178956970")


@pytest.mark.parametrize("as_file", [True, False])
def test_the_limit_is_ours_and_not_pillows(monkeypatch, as_file):
    source = encoded(photo()) if as_file else Image.fromarray(photo())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 56)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert np.array_equal(pixels(source), photo())
    assert not caught
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 56 - 1)
    with pytest.raises(ImageError, match="56 x 40 pixels; at most 2239"):
        decode(source)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_the_limit_can_be_raised_above_pillows(monkeypatch, kind):
    data = encoded(photo(), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="200"):
            decode(data)
        assert decode(data, max_pixels=56 * 40).size == (56, 40)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_the_default_limit_is_that_of_pillows_error():
    assert decoding.MAX_PIXELS == 2 * (1024**3 // 4 // 3)  # Image.MAX_IMAGE_PIXELS as installed


def test_files_of_too_many_pixels_are_found_by_their_headers(tmp_path, monkeypatch):
    for kind in ("PNG", "JPEG"):
        (tmp_path / kind).write_bytes(encoded(photo(), kind)[:-20])  # no whole image
    (tmp_path / "WEBP").write_bytes(encoded(photo(), "WEBP"))  # Pillow 12 opens no other
    (tmp_path / "text").write_text("no image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for kind in ("PNG", "JPEG"):
        fault = f"{tmp_path / kind}: is 56 x 40 pixels; at most 2239 are decoded (max_pixels)"
        assert decoding.oversize(tmp_path / kind, 2239) == fault
        assert decoding.oversize(tmp_path / kind, 2240) is None
    assert decoding.oversize(tmp_path / "WEBP", 2238).startswith(f"{tmp_path / 'WEBP'}: ")
    assert decoding.oversize(tmp_path / "text", 1) is None
    assert decoding.oversize(tmp_path / "nowhere", 1) is None


@pytest.mark.parametrize(("kind", "size"), [("JPEG", (7, 5)), ("PNG", (9, 6)), ("WEBP", (9, 6))])
def test_large_images_are_decoded_smaller_and_others_whole(monkeypatch, kind, size):
    data = encoded(photo(), kind)
    assert decode(data, least_of_large=5).size == (56, 40)
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 56 * 40 - 1)
    assert decode(data).size == (56, 40)
    small = decode(data, least_of_large=5 if kind == "JPEG" else 6)
    assert small.size == (size if kind == "JPEG" else (10, 7))
    assert np.abs(pixels(data).mean((0, 1)) - np.asarray(small).mean((0, 1))).max() < 4


HEIC = "pillow-heif is not installed (the extra heif)"


@pytest.mark.skipif(not decoding.HAS_HEIF, reason=HEIC)
def test_heic_is_decoded_upright(tmp_path):
    import pillow_heif

    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(photo(64, 96)).save(tmp_path / "a.heic", exif=exif.tobytes(), quality=100)
    image = decode(tmp_path / "a.heic")
    assert image.size == (64, 96)
    expected = photo(64, 96).astype(int)[::-1].transpose(1, 0, 2)
    assert np.abs(np.asarray(image) - expected).mean() < 6
    assert ".heic" in IMAGE_SUFFIXES
    with pytest.raises(ImageError, match="at most 6143"):
        decode(tmp_path / "a.heic", max_pixels=6143)


@pytest.mark.parametrize("size", [(2001, 2), (2, 2001)])
def test_an_image_that_would_explode_when_resized_is_refused(size):
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]} pixels; at most 1000 times"):
        decode(encoded(Image.new("1", size)))
    longest = tuple(min(side, 2000) for side in size)
    assert decode(encoded(Image.new("1", longest))).size == longest


@pytest.mark.parametrize("chunk", [b"zTXt", b"iCCP"])
def test_a_compressed_text_bomb_in_a_png_takes_no_memory(chunk):
    rows = [row.tobytes() for row in photo()]
    data = png(56, 40, 8, 2, rows, (chunk, b"name\0\0" + zlib.compress(bytes(2**26))))
    tracemalloc.start()
    decodes(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


def with_scans(count):
    """A progressive JPEG whose last scan is repeated until there are `count`."""
    data = encoded(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    scans = data.count(b"\xff\xda")
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - scans) + data[-2:]


def test_a_jpeg_of_too_many_scans_is_refused():
    assert decodes(with_scans(100))
    with pytest.raises(ImageError, match="more than 100 scans"):
        decode(with_scans(101))
    hidden = with_scans(200).replace(b"\xff\xda", b"\xff\x01\xff\xff\xff\xda")
    with pytest.raises(ImageError, match="more than 100 scans"):
        decode(hidden)


def test_what_only_looks_like_scans_is_not_counted():
    data = encoded(photo(), "JPEG", comment=b"\xff\xda" * 200) + b"\xff\xda" * 200
    assert np.array_equal(pixels(data), pixels(encoded(photo(), "JPEG")))


def test_a_png_of_many_text_chunks_is_decoded():
    rows = [row.tobytes() for row in photo()]
    chunks = [(b"tEXt", b"key%d\0" % i + b"value" * 200) for i in range(2000)]
    assert np.array_equal(pixels(png(56, 40, 8, 2, rows, *chunks)), photo())


# ------------------------------------------------------------------------------ refusals


OTHER_FORMATS = ("ICO", "ICNS", "TGA", "JPEG2000", "PCX", "EPS", "PDF", "DDS", "SGI")


@pytest.mark.parametrize(
    ("image_format", "data"),
    [
        *((name, encoded(photo(), name)) for name in OTHER_FORMATS),
        ("PSD", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(100)),
        ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>'),
        ("text", b"not an image at all"),
        ("zeros", bytes(1000)),
        ("one byte", b"\x89"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_formats_are_refused_and_nothing_is_run(image_format, data, tmp_path, monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", run)
    monkeypatch.setattr(os, "system", run)
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=re.escape(str(path)) + ".*known format.*JPEG.*PNG"):
        decode(path)


def test_a_format_that_pillow_was_built_without_is_not_listed_in_the_error():
    code = """
from PIL import features
known, features.check = features.check, lambda name: name != "webp" and known(name)
from cvt.data import decode
decode(open(0, "rb").read())
"""
    result = subprocess.run(
        [sys.executable, "-c", code], input=encoded(photo(), "WEBP"), capture_output=True
    )
    assert b"ImageError: <bytes>: is not an image of a known format (JPEG, MPO" in result.stderr
    assert b"WEBP" not in result.stderr


@pytest.mark.timeout(60)  # reading a pipe does not end
def test_missing_folder_pipe_empty_and_text_are_refused_by_name(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    reasons = {
        "missing.jpg": "No such file",
        "folder.jpg": "is a folder",
        "pipe.jpg": "not a regular file",
        "empty.jpg": "is empty",
        "nul\0.jpg": "null",
    }
    for name, reason in reasons.items():
        for path in (tmp_path / name, str(tmp_path / name)):
            with pytest.raises(ImageError, match=reason) as caught:
                decode(path)
            assert name in str(caught.value)
    with pytest.raises(ImageError, match="<bytes>: is empty"):
        decode(b"")
    with pytest.raises(ImageError, match="binary"):
        decode(io.StringIO("text"))
    closed = io.BytesIO(encoded(photo()))
    closed.close()
    with pytest.raises(ImageError, match="closed file"):
        decode(closed)


def test_a_damaged_file_object_is_named_by_its_path(tmp_path):
    path = tmp_path / "damaged.png"
    path.write_bytes(encoded(photo())[:60])
    for source in (path, path.open("rb")):
        with pytest.raises(ImageError, match=re.escape(f"{path}: cannot be decoded: ")) as caught:
            decode(source)
        assert caught.value.__cause__ is not None
    source.close()


@pytest.mark.parametrize("source", [None, 0, 1.5, photo(), torch.zeros(3, 4, 4), ["a.png"]])
def test_what_is_no_image_at_all_is_a_type_error(source):
    kinds = "a path, bytes, a binary file object, a PIL image or a StoredImage"
    with pytest.raises(TypeError, match=kinds):
        decode(source)


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageError("a.png: is empty")))
    assert isinstance(error, ImageError)
    assert isinstance(error, ValueError)
    assert str(error) == "a.png: is empty"


def test_memory_that_runs_out_is_an_image_error(monkeypatch):
    def load(*args):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ImageError, match="<bytes>: cannot be decoded: MemoryError"):
        decode(encoded(photo()))


# ------------------------------------------------------------------------------ damage

SECOND = [Image.fromarray(photo(seed=1))]
TURNED = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"  # orientation 6
PALETTE = palette_image()[0]
DAMAGED = {
    "JPEG": encoded(photo(), "JPEG"),
    "JPEG, progressive": encoded(photo(), "JPEG", progressive=True, exif=TURNED),
    "MPO": encoded(photo(), "MPO", save_all=True, append_images=SECOND),
    "PNG": encoded(photo(), exif=TURNED),
    "PNG, palette": encoded(PALETTE, transparency=bytes(range(256))),
    "PNG, animated": encoded(photo(), save_all=True, append_images=SECOND),
    "GIF": encoded(photo(), "GIF", save_all=True, append_images=SECOND),
    "TIFF": encoded(photo(), "TIFF"),
    "TIFF, LZW": encoded(photo(), "TIFF", compression="tiff_lzw"),
    "TIFF, JPEG": encoded(photo(), "TIFF", compression="jpeg"),
    "WEBP": encoded(photo(), "WEBP", exif=TURNED),
    "WEBP, lossless": encoded(photo(), "WEBP", lossless=True),
    "BMP": encoded(photo(), "BMP"),
    "BMP, palette": encoded(PALETTE, "BMP"),
    "PPM": encoded(photo(), "PPM"),
    "AVIF": encoded(photo(), "AVIF"),
}


def decodes(data):
    """Whether `data` is decoded; anything but success and ImageError escapes, as do warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mode = decode(data).mode
        except ImageError as error:
            mode = None
            message = str(error)
    assert not caught
    assert mode == "RGB" or message.startswith("<bytes>: ")
    return mode is not None


@pytest.mark.parametrize("kind", DAMAGED)
def test_truncated_at_many_offsets(kind):
    data = DAMAGED[kind]
    assert decodes(data)
    offsets = {*range(min(len(data), 64)), *np.linspace(0, len(data) - 1, 100, dtype=int)}
    outcomes = {offset: decodes(data[:offset]) for offset in offsets}
    assert not any(decoded for offset, decoded in outcomes.items() if offset < len(data) // 3)


@pytest.mark.parametrize("kind", DAMAGED)
def test_random_bytes_flipped(kind):
    generator = np.random.default_rng(20210329)
    decoded = 0
    for round_ in range(200):
        data = np.frombuffer(DAMAGED[kind], dtype=np.uint8).copy()
        # every other file is hit in its header, where the parsers are
        reach = len(data) if round_ % 2 else min(len(data), 200)
        where = generator.integers(0, reach, generator.integers(1, 12))
        data[where] = generator.integers(0, 256, len(where))
        decoded += decodes(data.tobytes())
    assert decoded < 200


def test_damage_opens_no_file_for_good(tmp_path):
    def next_descriptor():
        descriptor = os.open(os.devnull, os.O_RDONLY)
        os.close(descriptor)
        return descriptor

    path = tmp_path / "damaged"
    before = next_descriptor()
    for data in DAMAGED.values():
        for end in (len(data), len(data) * 2 // 3, 100):
            path.write_bytes(data[:end])
            try:
                decode(path)
            except ImageError:
                continue
    assert next_descriptor() == before


def tiff_with_a_tag_beyond_its_end():
    data = bytearray(tiff(4, 4, bytes(16), _270=0))
    where = data.index(struct.pack("<HHII", 270, 4, 1, 0))
    data[where : where + 12] = struct.pack("<HHII", 270, 2, 900, 5000)  # 900 letters at 5000
    return bytes(data)


# Files that are decoded, though Pillow warns of them.
NOISY = {
    "TIFF": (tiff_with_a_tag_beyond_its_end(), "Skipping tag 270"),
    "MPO": (DAMAGED["MPO"].replace(b"\x01\xb0", b"\x01\xb9", 1), "malformed MPO"),
    "PNG": (
        png(1, 1, 8, 0, [b"\7"], (b"acTL", struct.pack(">II", 0, 0))),
        "Invalid APNG",
    ),
}
if PILLOW < 13:
    del NOISY["TIFF"]  # which it refuses


@pytest.mark.parametrize("kind", NOISY)
def test_pillows_warnings_do_not_escape(kind):
    data, message = NOISY[kind]
    with pytest.warns(UserWarning, match=message):
        Image.open(io.BytesIO(data)).load()
    for action in ("always", "error"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter(action)
            decode(data)
        assert not caught


def test_threads_leave_the_warning_filters_alone():
    results = []

    def work():
        for _ in range(20):
            results.extend(decode(data).size for data, _ in NOISY.values())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == filters
    assert len(results) == 8 * 20 * len(NOISY)
    assert not caught


def test_a_child_forked_while_another_thread_decodes_is_not_stuck():
    data = encoded(photo())
    with decoding._filters_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends it, if it hangs
            os._exit(0 if decode(data).size == (56, 40) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_pillows_settings_are_left_alone(monkeypatch):
    def settings():
        return (
            Image.MAX_IMAGE_PIXELS,
            ImageFile.LOAD_TRUNCATED_IMAGES,
            ImageFile.MAXBLOCK,
            GifImagePlugin.LOADING_STRATEGY,
            PngImagePlugin.MAX_TEXT_CHUNK,
            Image.WARN_POSSIBLE_FORMATS,
            list(warnings.filters),
            dict(Image.OPEN),
        )

    Image.init()
    before = settings()
    for data in DAMAGED.values():
        decodes(data)
        decodes(data[:100])
    assert settings() == before


def test_importing_the_module_loads_neither_torch_nor_transformers():
    code = (
        "import sys, cvt.data.decoding; "
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


# ------------------------------------------------------------------------------ reduced decoding


def enlarged(name, width, height, **options):
    """One of scikit-learn's photos as a JPEG; mirrored side by side it keeps its full sharpness."""
    photograph = load_sample_image(name)
    mirrored = np.concatenate([photograph, photograph[:, ::-1]], axis=1)
    tiled = np.concatenate([mirrored, mirrored[::-1]], axis=0)
    return encoded(Image.fromarray(tiled).crop((0, 0, width, height)), "JPEG", **options)


def preprocessed(processor, image):
    """What the processor returns for an image, in steps of 1/255."""
    pixel_values = processor([image], return_tensors="np")["pixel_values"][0]
    return pixel_values * np.array(preprocessing.IMAGE_STD)[:, None, None] * 255


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize(
    ("model", "size", "scale"),
    [
        ("cvt-13", (1024, 768), 2),  # the smallest that is decoded at a half: 1.5 times 256
        ("cvt-13", (1152, 784), 2),
        ("cvt-13-384", (1200, 1152), 2),  # 1.5 times 384
    ],
)
def test_a_large_jpeg_is_decoded_smaller_within_the_tolerance(
    model, size, scale, subsampling, name
):
    processor = image_processor(model)
    data = enlarged(name, *size, quality=85, subsampling=subsampling)
    whole, reduced = decode(data), decode(data, preprocessing_of(processor).pixels_needed)
    assert (whole.size, reduced.size) == (size, (size[0] // scale, size[1] // scale))
    difference = abs(preprocessed(processor, whole) - preprocessed(processor, reduced))
    assert difference.mean() < 2
    assert difference.max() < 32


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 768), (512, 384)),
        ((1024, 767), (1024, 767)),  # half of it would end within a pixel
        ((1022, 768), (511, 384)),
        ((766, 1024), (766, 1024)),  # too small
        ((1536, 1536), (384, 384)),
        ((1540, 1540), (385, 385)),
        ((1542, 1542), (771, 771)),
        ((3072, 4096), (384, 512)),
    ],
)
def test_the_scale_divides_both_sides_and_keeps_enough_pixels(size, expected):
    data = encoded(Image.new("RGB", size, "teal"), "JPEG")
    assert decode(data, 384).size == expected


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"format": "MPO"}])
def test_reduced_decoding_keeps_colours_and_orientation(mode, orientation, options):
    options = dict(options)
    image_format = options.pop("format", "JPEG")
    if image_format == "MPO":
        options |= {"save_all": True, "append_images": [Image.new(mode, (64, 48))]}
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    smooth = Image.fromarray(photo(6, 8)).resize((256, 192), Image.Resampling.BICUBIC)
    data = encoded(smooth.convert(mode), image_format, quality=95, exif=exif, **options)
    whole, reduced = decode(data), decode(data, 96)
    assert reduced.size == (whole.width // 2, whole.height // 2)
    averaged = whole.resize(reduced.size, Image.Resampling.BOX)
    assert abs(np.asarray(averaged).astype(int) - np.asarray(reduced)).max() <= 4


def test_a_damaged_jpeg_is_refused_at_any_scale():
    data = enlarged("china.jpg", 1024, 768)
    with pytest.raises(ImageError, match="truncated"):
        decode(data[: len(data) // 2], 384)


def test_other_formats_and_the_callers_image_are_decoded_whole():
    large = Image.new("RGB", (64, 64), "teal")
    assert decode(encoded(large, "PNG"), 8).size == (64, 64)
    opened = Image.open(io.BytesIO(encoded(large, "JPEG")))
    assert decode(opened, 8).size == opened.size == (64, 64)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 384),
        ({"image_size": 384}, 576),
        ({"image_size": 100, "crop_pct": 0.9}, 167),  # 1.5 times 111
        ({"do_resize": False}, None),
        ({"resample": Image.Resampling.BILINEAR}, None),
    ],
)
@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_the_pixels_that_a_processor_needs(settings, expected, backend):
    processor = image_processor("cvt-13", backend=backend, **settings)
    assert preprocessing_of(processor).pixels_needed == expected


def test_for_another_kind_of_processor_images_are_decoded_whole():
    assert preprocessing_of(ViTImageProcessor()).pixels_needed is None


def test_a_stored_image_may_be_created_when_it_is_decoded():
    data = encoded(photo())
    assert (pixels(StoredImage("late", lambda: data)) == photo()).all()
    with pytest.raises(ImageError, match="late: cannot be decoded: division by zero"):
        decode(StoredImage("late", lambda: 1 / 0))
