"""What is wrong with the images of a data set, found before anyone trains on them."""

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from cvt.data.decoding import ImageError, OversizedError, Source, decode
from cvt.data.duplicates import digest, most_similar, near_groups
from cvt.data.labelled import TRAIN_NAMES, Images, LabelledImages
from cvt.data.workers import computed_ahead
from cvt.libraries import require
from cvt.limits import check_counts
from cvt.problem_type import REGRESSION
from cvt.text import csv_cell

# The kinds of findings, in the order in which they are listed.
KINDS = {
    "unreadable": "cannot be decoded",
    "oversized": "more pixels than max_pixels",
    "blank": "a single colour",
    "link": "a symbolic link",
    "two_labels": "the same picture has another label",
    "across_splits": "the same picture is in another split",
    "exact_duplicate": "another image has equal bytes",
    "near_duplicate": "another image looks alike",
    "similar": "another image looks alike to the model",
    "small_class": "too few different images",
}
HASH_SIDE = 16  # bits of a perceptual hash in height and width, 256 together
DISTANCE = 12  # of these bits
SIMILARITY = 0.95  # cosine of the features of images that look alike to a model
LEAST_IMAGES = 10  # of a class
BLANK_RANGE = 8  # of 255 levels, in each channel
LEAST_PIXELS = 8 * HASH_SIDE  # of the shorter side; the perceptual hash resizes to half of it
AT_ONCE = 16  # images that a worker takes


@dataclass(frozen=True)
class Finding:
    """One fault of an image or of a class.

    Attributes:
        kind: one of `KINDS`.
        path: of the image, or its name in a table; empty for a class.
        label: the name of the class.
        group: the number of the group of the same picture; None where the image is alone in it.
        detail: what was found.
        image: the position of the image in `Check.images`; None for a class.

    Example:
        >>> from cvt.data import Finding
        >>> Finding("blank", "photos/dog/1.png", "dog", None, "#ffffff").detail
        '#ffffff'
    """

    kind: str
    path: str
    label: str
    group: int | None
    detail: str
    image: int | None = None


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """What was found in one image.

    Attributes:
        split: the name of its split; empty where the data has none.
        index: its position in the split.
        label: the name of its class.
        path: of the file, or its name in a table.
        link: where the file leads to, if it is a symbolic link.
        fault: why it is not decoded; empty if it is.
        is_oversized: whether it has too many pixels to be decoded.
        colour: of a blank image, as #rrggbb; empty for others.
        digest: of its bytes; empty if it is not decoded.
        hash: of how it looks, 256 bits; empty if it is blank or not decoded.
    """

    split: str
    index: int
    label: str
    path: str
    link: str = ""
    fault: str = ""
    is_oversized: bool = False
    colour: str = ""
    digest: str = ""
    hash: bytes = b""


@dataclass(frozen=True)
class ClassCount:
    """The images of a class.

    Attributes:
        name: of the class.
        by_split: their number in each split.
        distinct: those to train on that can be decoded, equal ones counted once.
    """

    name: str
    by_split: Mapping[str, int]
    distinct: int

    @property
    def images(self) -> int:
        """Their number in all splits."""
        return sum(self.by_split.values())


@dataclass(frozen=True)
class Check:
    """What is in a data set, and what is wrong with it.

    Attributes:
        splits: the data set.
        images: all its images.
        groups: the number of the group of each image; images of one group are the same picture, or
            look alike to the model.
        classes: its classes, in their order; none where the images have values.
        findings: what is wrong, in the order of `KINDS`.

    Example:
        >>> from PIL import Image
        >>> from cvt.data import LabelledImages, StoredImage, check
        >>> white = StoredImage("white", Image.new("L", (8, 8), "white"))
        >>> found = check({"": LabelledImages([white], ["dog"])})
        >>> [(finding.path, finding.detail) for finding in found.of_kind("blank")]
        [('white', '#ffffff')]
    """

    splits: Mapping[str, Images]
    images: Sequence[CheckedImage]
    groups: Sequence[int]
    classes: Sequence[ClassCount]
    findings: Sequence[Finding]

    def of_kind(self, kind: str) -> list[Finding]:
        """The findings of one kind."""
        return [finding for finding in self.findings if finding.kind == kind]

    def source(self, finding: Finding) -> Source | None:
        """The image of a finding; None of a class, and where images cannot be looked up."""
        if finding.image is None:
            return None
        image = self.images[finding.image]
        images = self.splits[image.split]
        return images[image.index][0] if isinstance(images, LabelledImages) else None


def check(
    splits: Mapping[str, Images],
    *,
    distance: int = DISTANCE,
    features: Callable[[Iterable[Source]], np.ndarray] | None = None,
    similarity: float = SIMILARITY,
    min_images: int = LEAST_IMAGES,
    max_pixels: int | None = None,
    workers: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Check:
    """Look at every image of a data set, and report what is wrong before training.

    Nearly equal images are found by the perceptual hash `phash` of the library imagehash, blank
    ones left out. An image that differs little from two others puts all three into one group.

    Args:
        splits: the images, as `open_splits` returns them.
        distance: bits of 256 in which the hashes of nearly equal images may differ.
        features: returns a model's features of the images, (N, C), zeros for those that it cannot
            decode; with it, images that look alike to the model are found, too.
        similarity: the cosine of the features of such images, at least; above 0.
        min_images: different images that a class needs in the training split.
        max_pixels: the pixels that an image may have, as in `cvt.data.decode`.
        workers: processes that decode; with 0, this one does.
        step: called after each image.

    Raises:
        ValueError: a number is out of its bounds, or a stream has a label that is no class.
        OSError: a stream breaks off.
        ImportError: imagehash is not installed.

    Example:
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from cvt.data import check, open_splits
        >>> for path in Path("beach/sand/1.png"), Path("beach/sea/2.png"), Path("beach/sea/3.png"):
        ...     path.parent.mkdir(parents=True, exist_ok=True)
        ...     Image.radial_gradient("L").save(path)
        >>> found = check(open_splits("beach"), min_images=1)
        >>> [(finding.kind, finding.path) for finding in found.of_kind("two_labels")][0]
        ('two_labels', 'beach/sand/1.png')
    """
    require("checking data", "imagehash", extra="train")
    check_counts(workers=workers)
    if not 0 < similarity <= 1:
        raise ValueError(f"similarity = {similarity}: must be above 0 and at most 1")
    values = None
    if features:  # first, since a model may be missing
        values = features(source for each in splits.values() for source, _ in each)
    images = []
    for image in _looked_at(splits, max_pixels, workers):
        images.append(image)
        step()
    same = _groups(images, distance)
    groups, similar = same, dict[int, str]()
    if values is not None:
        groups, similar = _similar(images, same, values, similarity)
    classes = _classes(splits, images)
    found = [*_of_images(images, same, groups, similar), *_of_classes(classes, min_images)]
    order = {kind: i for i, kind in enumerate(KINDS)}
    found.sort(key=lambda finding: (order[finding.kind], finding.group or 0))
    return Check(splits, images, groups, classes, found)


# ------------------------------------------------------------------------------ every image

Entry = tuple[str, int, str, Source]  # split, position in it, label, image


def _looked_at(
    splits: Mapping[str, Images], max_pixels: int | None, workers: int
) -> Iterator[CheckedImage]:
    entries = (
        (name, i, label, source)
        for name, images in splits.items()
        for i, (source, label) in enumerate(images)
    )
    batches = iter(lambda: list(islice(entries, AT_ONCE)), [])
    look = partial(_look, max_pixels)
    found = computed_ahead(look, batches, workers) if workers else map(look, batches)
    for batch in found:
        yield from batch


def _look(max_pixels: int | None, entries: Iterable[Entry]) -> list[CheckedImage]:
    return [
        CheckedImage(split, index, label, str(source), **_seen(source, max_pixels))
        for split, index, label, source in entries
    ]


def _seen(source: Source, max_pixels: int | None) -> dict:
    """What is in an image, as attributes of `CheckedImage`."""
    import imagehash

    found: dict = {}
    if isinstance(source, Path) and source.is_symlink():
        found["link"] = os.readlink(source)
    try:
        image = decode(
            source, max_pixels=max_pixels, least=LEAST_PIXELS, least_of_large=LEAST_PIXELS
        )
    except ImageError as error:
        fault = str(error).removeprefix(f"{source}: ")
        return found | {"fault": fault, "is_oversized": isinstance(error, OversizedError)}
    found["digest"] = digest(source)
    low, high = np.array(image.getextrema()).T  # (3,) each
    if (high - low).max() <= BLANK_RANGE:
        found["colour"] = f"#{bytes(((low + high) // 2).tolist()).hex()}"
    else:
        found["hash"] = np.packbits(imagehash.phash(image, HASH_SIDE).hash).tobytes()
    return found


# ------------------------------------------------------------------------------ groups


def _groups(images: Sequence[CheckedImage], distance: int) -> list[int]:
    """The number of each image's group, from 1 on: one looks nearly like another, or is equal."""
    hashes = np.frombuffer(b"".join(image.hash for image in images), np.uint64)
    near = iter(near_groups(hashes.reshape(-1, HASH_SIDE**2 // 64), distance).tolist())
    numbers: dict[Hashable, int] = {}
    return [
        numbers.setdefault(next(near) if image.hash else image.digest or object(), len(numbers) + 1)
        for image in images
    ]


def _similar(
    images: Sequence[CheckedImage], groups: Sequence[int], values: np.ndarray, similarity: float
) -> tuple[list[int], dict[int, str]]:
    """The groups after those of images that look alike to a model were joined; details by image."""
    nearest, cosines, after = most_similar(values, np.array(groups), similarity)
    first: dict[int, int] = {}
    pairs = zip(after.tolist(), groups, strict=True)
    joined = [first.setdefault(group, number) for group, number in pairs]
    similar = {}
    for i in np.flatnonzero(nearest >= 0).tolist():
        other = images[nearest[i]]
        label = f", labelled {other.label}" if other.label != images[i].label else ""
        similar[i] = f"{cosines[i]:.3f} to {other.path}{label}"
    return joined, similar


def _of_images(
    images: Sequence[CheckedImage],
    same: Sequence[int],
    groups: Sequence[int],
    similar: Mapping[int, str],
) -> Iterator[Finding]:
    """What is wrong with images.

    Args:
        images: all of them.
        same: the number of each image's group of the same picture.
        groups: the number of its group in the findings.
        similar: details of those that look alike to the model.
    """
    members = defaultdict(list)
    for i, group in enumerate(same):
        members[group].append(i)
    sizes = Counter(groups)
    for positions in members.values():
        details = _in_group([images[i] for i in positions])
        for i, of_group in zip(positions, details, strict=True):
            image = images[i]
            number = groups[i] if sizes[groups[i]] > 1 else None
            found = {**_alone(image), **of_group, "similar": similar.get(i, "")}
            for kind, detail in found.items():
                if detail:
                    yield Finding(kind, image.path, image.label, number, detail, i)


def _alone(image: CheckedImage) -> dict[str, str]:
    """What is wrong with an image, whatever others there are: details by kind, or empty ones."""
    return {
        "oversized" if image.is_oversized else "unreadable": image.fault,
        "blank": image.colour,
        "link": image.link and f"leads to {image.link}",
    }


def _in_group(images: Sequence[CheckedImage]) -> list[dict[str, str]]:
    """What is wrong with each image of a group beside the others: details by kind."""
    details: list[dict[str, str]] = [{} for _ in images]
    for kind, attribute in (("two_labels", "label"), ("across_splits", "split")):
        own = [getattr(image, attribute) for image in images]
        every, of_equal = set(own), defaultdict(set)
        for image, value in zip(images, own, strict=True):
            of_equal[image.digest].add(value)
        for image, value, found in zip(images, own, details, strict=True):
            equal = of_equal[image.digest] - {value}
            alike = every - equal - {value}
            names = {"equal": equal, "alike": alike}
            if any(names.values()):
                found[kind] = "; ".join(
                    f"{how}: {', '.join(sorted(others))}" for how, others in names.items() if others
                )
    copies = Counter(image.digest for image in images)
    for image, found in zip(images, details, strict=True):
        if copies[image.digest] > 1:
            found["exact_duplicate"] = f"{copies[image.digest]} images of these bytes"
        if len(copies) > 1:
            found["near_duplicate"] = f"{len(images)} images that look alike"
    return details


def _classes(splits: Mapping[str, Images], images: Sequence[CheckedImage]) -> list[ClassCount]:
    trained = next((name for name in splits if name in TRAIN_NAMES), None)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    distinct: dict[str, set[str]] = defaultdict(set)
    for image in images:
        for name in splits[image.split].task.classes_of(image.label):
            counts[name][image.split] += 1
            if image.digest and trained in (None, image.split):
                distinct[name].add(image.digest)
    has_classes = (each for each in splits.values() if each.task.problem_type != REGRESSION)
    names = dict.fromkeys(name for each in has_classes for name in each.classes)
    return [
        ClassCount(name, {split: counts[name][split] for split in splits}, len(distinct[name]))
        for name in names
    ]


def _of_classes(classes: Iterable[ClassCount], min_images: int) -> Iterator[Finding]:
    for each in classes:
        if each.distinct < min_images:
            detail = f"{each.distinct} different images to train on, fewer than {min_images}"
            yield Finding("small_class", "", each.name, None, detail)


# ------------------------------------------------------------------------------ files


def write_findings(found: Check, path: Path) -> None:
    """Write the findings as a csv file, a row each."""
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("kind", "path", "label", "group", "detail"))
        for each in found.findings:
            texts = map(csv_cell, (each.kind, each.path, each.label))
            writer.writerow((*texts, each.group, csv_cell(each.detail)))


def write_groups(found: Check, path: Path, folder: Path) -> None:
    """Write the groups of all images as a csv file: path, label, group, and split where there are.

    Values have a column each, under their names, in place of the label.

    Args:
        found: what `check` returned.
        path: the csv file.
        folder: where it will be: paths are relative to it, so that the file is a data set, too.
            Images that are no files have their names.
    """
    has_splits = any(found.splits)
    (*_, of_data) = found.splits.values()
    has_values = of_data.task.problem_type == REGRESSION
    columns = of_data.classes if has_values else ["label"]
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", *columns, "group", *["split"] * has_splits))
        for image, group in zip(found.images, found.groups, strict=True):
            is_file = os.path.isfile(image.path)
            name = os.path.relpath(image.path, folder) if is_file else image.path
            labels = image.label.split(of_data.task.separator) if has_values else [image.label]
            writer.writerow((name, *labels, group, *[image.split] * has_splits))
