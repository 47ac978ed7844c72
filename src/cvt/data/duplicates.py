"""Images that are equal, by their bytes, and nearly equal, by hashes of how they look."""

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
