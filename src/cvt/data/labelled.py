"""Labelled images, the form that every kind of data set takes: to be looked up, or streamed."""

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cvt.data.decoding import Source
from cvt.data.duplicates import equal_groups
from cvt.data.task import Task

if TYPE_CHECKING:
    from datasets import IterableDataset

TRAIN_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "valid", "validation")
TEST_NAMES = ("test", "testing")
SPLIT_NAMES = TRAIN_NAMES + VALIDATION_NAMES + TEST_NAMES
_ANY = "|".join(sorted(SPLIT_NAMES, key=len, reverse=True))
_WORD = re.compile(rf"(?<![a-z])({_ANY})(?![a-z])")
_AT_AN_END = re.compile(rf"(?<![a-z])({_ANY})|({_ANY})(?![a-z])")


def split_name(name: str) -> str | None:
    """The name of a split that is a word of a file's or folder's name, as in `train_set`."""
    found = _WORD.search(name.lower())
    return found[1] if found else None


def resembles_splits(names: Iterable[str]) -> list[str]:
    """Those of the names that may be meant as splits, as `mytrain` and `myval`.

    Returns:
        The names with the name of a split at the begin or end of a word; none if they are all of
        the same split, or if none is of images to train on.
    """
    found = {name: _AT_AN_END.search(name.lower()) for name in names}
    kinds = {name: (match[1] or match[2])[:3] for name, match in found.items() if match}
    several = len(set(kinds.values())) > 1 and TRAIN_NAMES[0][:3] in kinds.values()
    return sorted(kinds) if several else []


class _Labelled:
    """What images that are looked up and streamed ones share."""

    classes: list[str]
    task: Task

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.classes)}

    def target(self, label: str) -> int | list[float]:
        """What a classifier is trained to give for a label, see `Task.target`."""
        return self.task.target(label, self._indices)


class LabelledImages(_Labelled):
    """Images that can be looked up, each with its label.

    Attributes:
        sources: the images; one that is not a file is read on access.
        labels: of every image the name of its class, or what `task` says.
        classes: the names of the classes, or of the values, in the order of a classifier's outputs.
        task: what the labels mean.
        groups: what every image shows, if that is known; images of one group stay together.

    Example:
        >>> from pathlib import Path
        >>> from cvt.data import LabelledImages
        >>> images = LabelledImages([Path("a.png"), Path("b.png")], ["dog", "cat"])
        >>> len(images), images.classes, images[1][1]
        (2, ['cat', 'dog'], 'cat')
    """

    def __init__(
        self,
        sources: Sequence[Source],
        labels: Sequence[str],
        classes: list[str] | None = None,
        task: Task = Task(),  # noqa: B008 (it is frozen)
        groups: Sequence[str] | None = None,
    ) -> None:
        """By default the classes are those of the labels, sorted."""
        assert len(sources) == len(labels)
        self.sources = sources
        self.labels = labels
        self.task = task
        if classes is None:
            classes = sorted({name for label in set(labels) for name in task.classes_of(label)})
        self.classes = classes
        self.groups = groups

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def length(self) -> int:
        """How many images there are, as of streamed ones."""
        return len(self)

    @property
    def targets(self) -> np.ndarray:
        """Of every image the index of its class, (N,), or a target for each output, (N, K)."""
        dtype = np.int64 if self.task.has_one_class else np.float32
        return np.array([self.target(label) for label in self.labels], dtype)

    def name(self, index: int) -> str:
        """The name of an image, the same wherever its folder is; of a file its path from there."""
        return _name(self.sources, index)

    def __getitem__(self, index: int) -> tuple[Source, str]:
        return self.sources[index], self.labels[index]

    def __iter__(self) -> Iterator[tuple[Source, str]]:
        return zip(self.sources, self.labels, strict=True)

    def select(self, indices: Sequence[int]) -> "LabelledImages":
        """Some of the images, in the order of `indices`."""
        labels = [self.labels[i] for i in indices]
        groups = None if self.groups is None else [self.groups[i] for i in indices]
        sources = _Selection(self.sources, indices)
        return LabelledImages(sources, labels, self.classes, self.task, groups)

    @property
    def positions(self) -> Sequence[int]:
        """Of images that were selected, their positions in those that they were selected from."""
        return self.sources.indices if isinstance(self.sources, _Selection) else range(len(self))


def _name(sources: Sequence[Source], index: int) -> str:
    if isinstance(sources, _Selection):
        return _name(sources.sources, sources.indices[index])
    naming = getattr(sources, "name", None)  # of files and rows
    return naming(index) if naming else str(sources[index])


@dataclass(frozen=True)
class _Selection(Sequence[Source]):
    sources: Sequence[Source]
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.sources[self.indices[index]]


@dataclass(frozen=True)
class StreamedImages(_Labelled):
    """Images that are read one after the other, for sets that do not fit on one machine.

    Attributes:
        classes: the names of the classes in the order of a classifier's outputs.
        length: how many images one pass has, where that is known without reading them all.
        rows: what is streamed.
        sample: returns the image and the name of the class of a row.
        task: what the labels mean.

    Example:
        >>> from datasets import IterableDataset
        >>> from PIL import Image
        >>> from cvt.data import StoredImage, StreamedImages
        >>> rows = IterableDataset.from_generator(lambda: ({"n": n} for n in range(3)))
        >>> image = Image.new("RGB", (8, 8))
        >>> images = StreamedImages(
        ...     ["even", "odd"],
        ...     length=3,
        ...     rows=rows,
        ...     sample=lambda row: (StoredImage("", image), "odd" if row["n"] % 2 else "even"),
        ... )
        >>> [label for _, label in images]
        ['even', 'odd', 'even']
    """

    classes: list[str]
    length: int | None
    rows: "IterableDataset"
    sample: Callable[[dict[str, Any]], tuple[Source, str]]
    task: Task = Task()  # noqa: RUF009 (it is frozen)

    def __iter__(self) -> Iterator[tuple[Source, str]]:
        """All images once, in the order in which they are stored.

        Raises:
            OSError: what is streamed is damaged, or out of reach by now.
        """
        return self._samples(self.rows)

    def shuffled(
        self, seed: int, rank: int = 0, world: int = 1, buffer: int = 1000
    ) -> Iterator[tuple[Source, str]]:
        """One rank's share of the images, pass after pass without end, in an order of its own each.

        In every pass each image goes to one rank. Where there are enough shards (files) for all
        ranks, each is read by one rank alone; a rank with fewer then begins its next pass earlier.

        Args:
            seed: together with the other arguments, determines the order.
            rank: whose share, from 0 to `world` - 1.
            world: how many ranks share.
            buffer: how many images are kept, encoded, and drawn from, besides mixing the shards.

        Raises:
            OSError: what is streamed is damaged, or out of reach by now.
            ValueError: a pass has no image for this rank.
        """
        from datasets.distributed import split_dataset_by_node

        strategy = "shards" if self.rows.num_shards >= world else "examples"
        rows = self.rows.shuffle(seed=seed, buffer_size=buffer)
        rows = split_dataset_by_node(rows, rank, world, strategy)
        for epoch in itertools.count():
            rows.set_epoch(epoch)
            found = None
            for found in self._samples(rows):
                yield found
            if found is None:
                raise ValueError(f"the data has no image for rank {rank} of {world}")

    def _samples(self, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[Source, str]]:
        stored, last = iter(rows), "its start"
        while True:
            try:
                row = next(stored, None)
            except Exception as error:  # of an archive, a table, the network
                raise OSError(f"the stream broke off after {last}: {error}") from error
            if row is None:
                return
            source, label = self.sample(row)
            last = str(source)
            yield source, label


Images = LabelledImages | StreamedImages


def total_length(splits: Iterable[Images]) -> int | None:
    """How many images all splits have; None where that is unknown of one."""
    total = 0
    for images in splits:
        if images.length is None:
            return None
        total += images.length
    return total


class Splits(NamedTuple):
    """The images of a training run.

    Attributes:
        train: those to train on.
        validation: those by which the best epoch is chosen.
        test: those that are held out until the end; None where there are none.

    Example:
        >>> from cvt.data import open_training
        >>> splits = open_training("digits")
        >>> len(splits.train), len(splits.validation), splits.test
        (1437, 360, None)
    """

    train: Images
    validation: Images
    test: Images | None

    @property
    def drawn(self) -> bool:
        """Whether `validation` was drawn from the images of `train`'s folder or table."""
        sources = [getattr(images, "sources", None) for images in (self.train, self.validation)]
        selected = [source.sources for source in sources if isinstance(source, _Selection)]
        return len(selected) == 2 and selected[0] is selected[1]


# The splits of a data set, each opened when it is called; one that has none is called "".
SplitReaders = Mapping[str, Callable[[], Images]]


def split(images: LabelledImages, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Four fifths and one fifth of every class, drawn by `seed`, at least one image in each.

    Of images with values, and of those that have no class, four fifths and one fifth. Images of
    equal content, and those of one group, are on one side, whatever their classes; the fifth is as
    near as that allows.

    Raises:
        ValueError: a class has a single image, or too few that may be apart.

    Example:
        >>> from cvt.data import open_labelled, split
        >>> train, validation = split(open_labelled("digits"), seed=0)
        >>> len(train) + len(validation)
        360
    """
    return divide(images, _drawn(images, seed))


def divide(
    images: LabelledImages, validation: Container[int]
) -> tuple[LabelledImages, LabelledImages]:
    """The images to train on and those that validate, both class by class."""
    position = {name: i for i, name in enumerate(images.classes)}
    order = sorted(  # labels of several classes and values keep their order, behind the others
        range(len(images)), key=lambda i: position.get(images.labels[i], len(position))
    )
    train, validating = (
        [i for i in order if (i in validation) == validates] for validates in (False, True)
    )
    return images.select(train), images.select(validating)


def kept_together(images: LabelledImages) -> dict[int, list[int]]:
    """Of every image that is not alone, all that stay with it on one side of a split, sorted.

    These are the images of equal content and those of its group, and of theirs in turn.
    """
    named = defaultdict(list)
    for i, name in enumerate(images.groups or ()):
        named[name].append(i)
    together: dict[int, list[int]] = {}
    for members in (*named.values(), *equal_groups(images.sources)):
        if len(members) > 1:
            joined = sorted({j for i in members for j in together.get(i, [i])})
            together.update(dict.fromkeys(joined, joined))
    return together


def _drawn(images: LabelledImages, seed: int) -> set[int]:
    """The images that validate: of each class those drawn first, as many as a fifth has room for.

    An image is taken with all that are kept together with it, or not at all.
    """
    together = kept_together(images)
    names = [images.task.classes_of(label) or [""] for label in images.labels]
    groups: dict[str, list[list[int]]] = {name: [] for name in images.classes}
    for i, of_image in enumerate(names):
        for name in of_image:
            groups.setdefault(name, []).append(together.get(i, [i]))
    room = {name: max(1, round(len(found) / 5)) for name, found in groups.items()}
    validation: set[int] = set()
    decided: set[int] = set()

    def labels(group: list[int]) -> Counter[str]:
        return Counter(name for i in group for name in names[i])

    def fits(group: list[int]) -> bool:
        return all(count <= room[name] for name, count in labels(group).items())

    def decide(group: list[int], validates: bool) -> None:
        decided.update(group)
        if validates:
            validation.update(group)
            for name, count in labels(group).items():
                room[name] -= count

    def distinct(name: str) -> int:
        return len({group[0] for group in groups[name]})

    for name in sorted(groups, key=distinct):  # those with the least choice first
        drawn = groups[name]
        if len(drawn) == 1 and name:
            image, _ = images[drawn[0][0]]
            raise ValueError(f"class {name} has one image, {image}: too few to split")
        random.Random(f"{seed} {name}").shuffle(drawn)
        free = [group for group in drawn if group[0] not in decided]
        if free and not any(group[0] in validation for group in drawn) and not any(map(fits, free)):
            decide(min(free, key=len), validates=True)
        for group in free:
            if group[0] not in decided:
                decide(group, validates=fits(group))
        if len({group[0] in validation for group in drawn}) == 1 and name:
            raise ValueError(
                f"class {name} has too few images that differ to be split: images of equal "
                f"content{', or of one group' if images.groups else ''}, such as "
                f"{images[drawn[0][0]][0]}, are kept on one side"
            )
    return validation


def label_map(names: Sequence[str]) -> dict[str | int, str]:
    """The class names by all that may stand for them: themselves, else their positions."""
    by_position: dict[str | int, str] = dict(enumerate(names))
    as_text = {str(i): name for i, name in by_position.items()}
    return as_text | {name: name for name in names} | by_position
