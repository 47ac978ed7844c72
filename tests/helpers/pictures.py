"""Random pictures, and their files."""

import io

import numpy as np
from PIL import Image


def photo(height=40, width=56, seed=0):
    """A random image with the smoothness of a photo, (height, width, 3)."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth.astype(int) + generator.integers(-8, 9, smooth.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def encoded(image, image_format="PNG", **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, image_format.split(",")[0], **options)
    return buffer.getvalue()
