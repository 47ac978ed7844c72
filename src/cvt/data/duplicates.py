"""Images that are equal, by their bytes, and alike, by hashes of how they look or by features."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from cvt.data.decoding import Source, StoredImage, is_image
from cvt.files import sha256

END = 4096  # bytes; images of one size mostly differ there
AT_ONCE = 1000  # images that a thread looks at
COMPARED = 200  # images whose features are compared with all others


def equal_groups(sources: Sequence[Source]) -> list[list[int]]:
    """The images that have an equal one, in groups: equal bytes, or, of decoded ones, pixels.

    Few files are read: only those of one size, and whole only those that end alike. A link counts
    as the file it leads to. What cannot be read, or is no image by its header, is equal to nothing.

    Args:
        sources: the images; one with a method `sizes` gives all their bytes, or None, at once.

    Returns:
        Indices of images, sorted in each group, the groups by their first.
    """
    sizes = getattr(sources, "sizes", lambda: [None] * len(sources))()
    keys: tuple[Callable[[int], Hashable], ...] = (
        lambda i: _readable(_size, sources[i]) if sizes[i] is None else sizes[i],
        lambda i: _readable(_end, sources[i]),
        lambda i: _readable(digest, sources[i]),
    )
    groups = [list(range(len(sources)))]
    with ThreadPoolExecutor() as pool:
        for key in keys:
            parts = [
                (number, group[i : i + AT_ONCE])
                for number, group in enumerate(groups)
                for i in range(0, len(group), AT_ONCE)
            ]
            found = pool.map(lambda part, key=key: [key(i) for i in part[1]], parts)
            equal = defaultdict(list)
            for (number, part), values in zip(parts, found, strict=True):
                for i, value in zip(part, values, strict=True):
                    equal[number, value].append(i)
            groups = [group for group in equal.values() if len(group) > 1]
    return sorted(group for group in groups if _is_image(sources[group[0]]))


def _readable(key: Callable[[Source], Hashable], source: Source) -> Hashable:
    """The key of an image; of one that cannot be read, one that no other has."""
    try:
        return key(source)
    except Exception:  # a damaged image raises nearly everything
        return object()


def _is_image(source: Source) -> bool:
    content = source if isinstance(source, Path) else _content(source)
    return isinstance(content, Image.Image) or is_image(content)


def _size(source: Source) -> int:
    """The bytes of an image, or its pixels."""
    if isinstance(source, Path):
        return os.stat(source).st_size
    content = _content(source)
    return len(content) if isinstance(content, bytes) else content.width * content.height


def _end(source: Source) -> bytes | None:
    """The last bytes of a file; None of an image that is in memory anyway."""
    if not isinstance(source, Path):
        return None
    with open(source, "rb", buffering=0) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - END))
        return file.read(END)


def digest(source: Source) -> str:
    """A hash of the bytes of an image, or, where it is decoded already, of its pixels.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(source, Path):
        return sha256(source)
    content = _content(source)
    if isinstance(content, Image.Image):
        form = content.mode, content.size, content.getpalette()
        content = repr(form).encode() + content.tobytes()
    return hashlib.sha256(content).hexdigest()


def _content(source: StoredImage) -> bytes | Image.Image:
    return source.content() if callable(source.content) else source.content


def near_groups(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Groups of hashes, each of which differs little from another one of its group.

    Two hashes that differ in at most `distance` bits agree in one of `distance` + 1 parts. So only
    those are compared that agree in a part, which takes seconds for 100,000 of photographs.

    Args:
        hashes: (N, W) in uint64, 64 bits in each.
        distance: bits in which two that belong together may differ, fewer than a hash has.

    Returns:
        (N,): the number of the group of each.
    """
    unique, position = np.unique(hashes, axis=0, return_inverse=True)
    groups = np.arange(len(unique))
    bits = np.unpackbits(unique.view(np.uint8), axis=1)
    for some in np.array_split(bits, distance + 1, axis=1):
        _, parts = np.unique(np.packbits(some, axis=1), axis=0, return_inverse=True)
        order = np.argsort(parts)
        parts, values = parts[order], unique[order]
        first = np.arange(len(order))
        for step in count(1):  # each is compared with the one so many places behind it
            first = first[: np.searchsorted(first, len(order) - step)]
            first = first[parts[first] == parts[first + step]]
            if not len(first):
                break
            differing = np.bitwise_count(values[first] ^ values[first + step]).sum(axis=1)
            near = first[differing <= distance]
            groups = _joined(groups, order[near], order[near + step])
    return groups[position]


def most_similar(
    values: np.ndarray, groups: np.ndarray, similarity: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each image, the one of another group whose features have the largest cosine with its own.

    All are compared with all, which takes a minute or two for 100,000 images.

    Args:
        values: features, (N, C); rows of zeros belong to images without any.
        groups: the number of the group of each image, (N,).
        similarity: the smallest cosine that counts.

    Returns:
        For each image the index of the other one, (N,), -1 where none is that similar; their
        cosine, (N,); and the groups after those of similar images were joined, (N,).

    Example:
        >>> import numpy as np
        >>> from cvt.data.duplicates import most_similar
        >>> values = np.array([[1.0, 0.0], [0.0, 1.0], [4.0, 3.0]])
        >>> nearest, cosines, groups = most_similar(values, np.arange(3), 0.7)
        >>> nearest.tolist(), (100 * cosines).round().tolist(), len(set(groups.tolist()))
        ([2, -1, 0], [80.0, 60.0, 80.0], 2)
    """
    values = np.asarray(values, np.float32)
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    directions = values / np.where(lengths > 0, lengths, 1)  # (N, C)
    _, numbers = np.unique(groups, return_inverse=True)
    after = np.arange(numbers.max(initial=-1) + 1)  # of each group
    nearest, cosines = np.full(len(values), -1), np.empty(len(values), np.float32)
    for start in range(0, len(values), COMPARED):
        part = slice(start, start + COMPARED)
        products = directions[part] @ directions.T
        products[numbers[part, None] == numbers] = -np.inf
        best = products.argmax(axis=1)
        cosines[part] = products[np.arange(len(best)), best]
        nearest[part] = np.where(cosines[part] >= similarity, best, -1)
        first, second = (products >= similarity).nonzero()
        after = _joined(after, numbers[part][first], numbers[second])
    return nearest, cosines, after[numbers]


def _joined(groups: np.ndarray, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The groups, (N,), after those of `ones` were joined with those of `others`, pair by pair."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = np.stack([groups[ones], groups[others]])
    ends = ends[:, ends[0] != ends[1]]
    if not ends.size:
        return groups
    pairs = coo_array((np.ones(ends.shape[1]), ends), shape=(len(groups), len(groups)))
    return connected_components(pairs, directed=False)[1][groups]
