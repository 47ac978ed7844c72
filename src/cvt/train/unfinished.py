"""Views that workers leave to the training device: all that is random is drawn, little is done.

A worker decodes and crops, or only reads a JPEG; `cvt.train.finishing` does the rest. What that is,
timm draws as ever: its transforms change a `Sketch`, which notes what an image would go through. So
a view has the same random numbers, drawn in the same order, wherever it is finished.
"""

import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from cvt.images import LARGE_PIXELS, MAX_ASPECT, MAX_PIXELS, MAX_SCANS, Source, StoredImage, decode
from cvt.train.augmentation import operations
from cvt.train.recipe import Recipe

# timm's functions: those that change each value by itself, those that depend on the whole image,
# and those that move pixels.
BY_VALUE = ("brightness", "invert", "posterize", "solarize", "solarize_add")
BY_IMAGE = ("auto_contrast", "color", "contrast", "equalize", "sharpness")
BY_PLACE = ("rotate", "shear_x", "shear_y", "translate_x_rel", "translate_y_rel")
NUMBERS = 256  # the most that an operation has
EVERY_VALUE = Image.frombytes("RGB", (256, 1), bytes(i for i in range(256) for _ in "RGB"))


# ------------------------------------------------------------------------------ what is left to do


class Operation(NamedTuple):
    """One of `cvt.train.finishing.OPERATIONS` by its name, and its numbers."""

    name: str
    numbers: Sequence[float] = ()


class Jpeg(NamedTuple):
    """A JPEG that the device decodes, and what of it becomes the view.

    Attributes:
        name: how errors call it.
        length: of the file, in bytes.
        pixels: of the whole image.
        box: of the crop: top, left, height, width.
        interpolation: torchvision's, by which the crop becomes a square.
    """

    name: str
    length: int
    pixels: int
    box: tuple[int, int, int, int]
    interpolation: Any


class View(NamedTuple):
    """A view of one image.

    Attributes:
        pixels: of the crop, (3, image_size, image_size) in uint8; of a JPEG, its file (length,).
        jpeg: of a JPEG, what to make of it.
        operations: to be done one after the other.
        erased: of the finished view: top, bottom, left, right.
    """

    pixels: Tensor
    jpeg: Jpeg | None
    operations: list[Operation]
    erased: tuple[int, int, int, int]


class Unfinished(NamedTuple):
    """What is left to do for a batch of B views: JPEGs to decode, and N operations.

    Attributes:
        jpegs: for each view that is a JPEG what to make of it, else None.
        files: the JPEGs, one behind the other, in uint8.
        groups: an operation, and to how many of `members` it is done at once; to be done in order.
        members: the views of the first group, then those of the second, and so on, (N,).
        numbers: of the operations, (N, NUMBERS) in float64.
        erased: top, bottom, left, right of each view, (B, 4).
    """

    jpegs: list[Jpeg | None]
    files: Tensor
    groups: list[tuple[str, int]]
    members: Tensor
    numbers: Tensor
    erased: Tensor


def together(views: Sequence[View]) -> tuple[Tensor, Unfinished]:
    """The crops of a batch, without those that are still in a JPEG, and what is left to do."""
    crops = [view.pixels for view in views if not view.jpeg]
    files = [view.pixels for view in views if view.jpeg]
    groups: list[tuple[str, int]] = []
    chosen: list[tuple[int, Operation]] = []
    for of_round in zip_longest(*(view.operations for view in views)):
        alike = defaultdict(list)
        for member, operation in enumerate(of_round):
            if operation:
                alike[operation.name].append((member, operation))
        groups += [(name, len(found)) for name, found in alike.items()]
        chosen += chain.from_iterable(alike.values())
    numbers = torch.zeros(len(chosen), NUMBERS, dtype=torch.float64)
    for row, (_, operation) in zip(numbers, chosen, strict=True):
        row[: len(operation.numbers)] = torch.tensor([*operation.numbers], dtype=torch.float64)
    return torch.stack(crops) if crops else torch.empty(0), Unfinished(
        jpegs=[view.jpeg for view in views],
        files=torch.cat(files) if files else torch.empty(0),
        groups=groups,
        members=torch.tensor([member for member, _ in chosen], dtype=torch.int64),
        numbers=numbers,
        erased=torch.tensor([view.erased for view in views]),
    )


# ------------------------------------------------------------------------------ JPEGs


class Undecoded(NamedTuple):
    """A JPEG as a file: how errors call it, its bytes, and what Pillow makes of its header."""

    name: str
    file: bytes
    header: Image.Image


def undecoded(
    source: Source, *, max_pixels: int | None = None, **limits: Any
) -> Image.Image | Undecoded:
    """A JPEG as a file, if every decoder sees the same in it; any other image decoded.

    Args:
        source: the image.
        max_pixels: as in `cvt.images.decode`.
        limits: other settings of `cvt.images.decode`.

    Raises:
        ImageError: as `cvt.images.decode`.
    """
    with suppress(Exception):  # whatever is wrong, `decode` will say it
        content: Any = source.content if isinstance(source, StoredImage) else source
        if isinstance(content, Path) and content.is_file():
            content = content.read_bytes()
        elif callable(content):
            content = content()
        source = StoredImage(str(source), content)
        if isinstance(content, bytes) and (header := plain(content, max_pixels or MAX_PIXELS)):
            return Undecoded(str(source), content, header)
    return decode(source, max_pixels=max_pixels, **limits)


def plain(file: bytes, max_pixels: int) -> JpegImageFile | None:
    """The header of a JPEG with an end, of YCbCr, upright and within the limits of `decode`.

    Raises:
        Exception: it is none, or damaged; Pillow raises nearly everything.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = JpegImageFile(BytesIO(file))
        orientation = header.getexif().get(ExifTags.Base.Orientation, 1)
    width, height = header.size
    fits = (
        file.endswith(b"\xff\xd9")
        and file.count(b"\xff\xda") <= MAX_SCANS
        and 0 < width * height <= min(max_pixels, LARGE_PIXELS)
        and max(width, height) <= MAX_ASPECT * min(width, height)
        and [component for component, *_ in header.layer] == [1, 2, 3]
        and header.info.get("adobe_transform", 1) == 1
        and "mp" not in header.info  # several views in one file
        and orientation == 1
    )
    return header if fits else None


# ------------------------------------------------------------------------------ drawing it


class Sketch:
    """Stands in for a view of an image; notes what would be done to it."""

    def __init__(self, side: int) -> None:
        self.size = self.width, self.height = side, side
        self.operations: list[Operation] = []
        self.erased = (0, 0, 0, 0)

    def note(self, name: str, numbers: Sequence[float] = ()) -> "Sketch":
        """One more operation."""
        self.operations.append(Operation(name, numbers))
        return self

    def transform(
        self, size: Any, method: Any, matrix: Any, resample: int, fillcolor: Any
    ) -> "Sketch":
        """As Pillow's, by a matrix; apart where it moves pixels along x or y alone."""
        name = Image.Resampling(resample).name.lower()
        if tuple(matrix[3:]) == (0, 1, 0):
            name += "_x"
        elif tuple(matrix[:3]) == (1, 0, 0):
            name += "_y"
        return self.note(name, (*matrix, *fillcolor))

    def rotate(self, degrees: float, **settings: Any) -> "Sketch":
        """As Pillow's, which finds the matrix; told the centre, it takes no short cut."""
        pillow: Any = Image.Image.rotate
        return pillow(self, degrees, center=(self.width / 2, self.height / 2), **settings)


class Frame:
    """Stands in for the tensor of a view; keeps which part of it would be erased."""

    dtype = torch.float32

    def __init__(self, side: int) -> None:
        self.side, self.erased = side, (0, 0, 0, 0)

    def size(self) -> tuple[int, int, int]:
        """As a tensor's."""
        return 3, self.side, self.side

    def __setitem__(self, place: tuple[slice, slice, slice], pixels: Tensor) -> None:
        _, rows, columns = place
        self.erased = rows.start, rows.stop, columns.start, columns.stop


def noted(name: str, sketch: Sketch, *numbers: float, **settings: Any) -> Sketch:
    """In the place of timm's function of this name, which depends on the whole image."""
    return sketch.note(name, numbers)


def tabled(change: Callable, sketch: Sketch, *arguments: Any, **settings: Any) -> Sketch:
    """In the place of a function that changes each value by itself: what it makes of every one."""
    return sketch.note("table", change(EVERY_VALUE, *arguments, **settings).tobytes()[::3])


def sketching(operation: Any) -> bool:
    """Turn one of timm's operations into one on sketches; tells whether the device has it."""
    name = operation.aug_fn.__name__
    if name in BY_VALUE:
        operation.aug_fn = partial(tabled, operation.aug_fn)
    elif name in BY_IMAGE:
        operation.aug_fn = partial(noted, name)
    return name in BY_VALUE + BY_IMAGE + BY_PLACE


def flipped(name: str, flip: Any, sketch: Sketch) -> None:
    """As torchvision's random flips."""
    if torch.rand(1) < flip.p:
        sketch.note(name)


def jittered(jitter: Any, sketch: Sketch) -> None:
    """As torchvision's ColorJitter without hue."""
    from torchvision.transforms.functional import adjust_brightness

    order, brightness, contrast, saturation, _ = jitter.get_params(
        jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    )
    for which in order.tolist():
        if which == 0 and brightness is not None:
            tabled(adjust_brightness, sketch, brightness)
        elif which == 1 and contrast is not None:
            sketch.note("contrast", [contrast])
        elif which == 2 and saturation is not None:
            sketch.note("color", [saturation])


def erased(eraser: Any, sketch: Sketch) -> None:
    """As timm's RandomErasing."""
    frame = Frame(sketch.width)
    eraser(frame)
    sketch.erased = frame.erased


class Drawing:
    """Crops an image at random, and draws whatever else is random in its view.

    It draws from the generators, and in the order, of `cvt.train.augmentation.augmentation`.

    Args:
        augment: what that gives; it is changed, and of no other use afterwards.
        recipe: its recipe.

    Raises:
        ValueError: the policy `auto_augment` has an operation that the device has not.
    """

    def __init__(self, augment: Any, recipe: Recipe) -> None:
        self.side = recipe.image_size
        self.crop, *transforms = augment.transforms
        self.steps: list[Callable[[Sketch], Any]] = []
        unknown = []
        for transform in transforms:
            match type(transform).__name__:
                case "RandomHorizontalFlip":
                    self.steps.append(partial(flipped, "mirror", transform))
                case "RandomVerticalFlip":
                    self.steps.append(partial(flipped, "upside_down", transform))
                case "RandAugment" | "AutoAugment":
                    self.steps.append(transform)
                case "ColorJitter":
                    self.steps.append(partial(jittered, transform))
                case "RandomErasing":
                    transform.per_pixel = False  # the device makes the noise
                    self.steps.append(partial(erased, transform))
                case "MaybeToTensor" | "Normalize":
                    pass  # nothing random
                case name:
                    unknown.append(name)
            unknown += [each.name for each in operations(transform) if not sketching(each)]
        if unknown:
            names = ", ".join(sorted(set(unknown)))
            raise ValueError(
                f"auto_augment = {recipe.auto_augment}: the device has no {names}; "
                "drop augment_on_device"
            )

    def __call__(self, image: Image.Image | Undecoded) -> View:
        """The view of an image, or of a JPEG that the device will decode."""
        pixels, jpeg = self.cropped(image)
        sketch = Sketch(self.side)
        for step in self.steps:
            step(sketch)
        return View(pixels, jpeg, sketch.operations, sketch.erased)

    def cropped(self, image: Image.Image | Undecoded) -> tuple[Tensor, Jpeg | None]:
        """The pixels of a view, or a file and what to make of it."""
        from torchvision.transforms.functional import pil_to_tensor, resized_crop

        header = image.header if isinstance(image, Undecoded) else image
        box = self.crop.get_params(header, self.crop.scale, self.crop.ratio)
        interpolation = self.crop.interpolation
        if isinstance(interpolation, tuple):  # one of them at random
            interpolation = random.choice(interpolation)
        if isinstance(image, Undecoded):
            file = torch.frombuffer(bytearray(image.file), dtype=torch.uint8)
            pixels = header.width * header.height
            return file, Jpeg(image.name, len(file), pixels, box, interpolation)
        return pil_to_tensor(resized_crop(image, *box, self.crop.size, interpolation)), None
