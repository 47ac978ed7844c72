"""Models on the Hugging Face hub: the published CvT checkpoints, as data, and what names mean.

Names and resolutions: github.com/microsoft/CvT, README. Hub ids: the `microsoft` organisation on
the Hugging Face hub. Top-1 in percent, ImageNet-1k validation: table 3 of the paper.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Published:
    """One published checkpoint: 1000 ImageNet-1k classes, trained with QuickGELU."""

    name: str
    authors_file: str
    variant: str
    image_size: int
    pretraining: str
    top1: float

    @property
    def hub_id(self) -> str:
        """Its repository on the hub."""
        return f"microsoft/{self.name}"


PUBLISHED = {
    name: Published(name, f"CvT-{file}.pth", variant, size, pretraining, top1)
    for name, file, variant, size, pretraining, top1 in (
        ("cvt-13", "13-224x224-IN-1k", "cvt-13", 224, "ImageNet-1k", 81.6),
        ("cvt-13-384", "13-384x384-IN-1k", "cvt-13", 384, "ImageNet-1k", 83.0),
        ("cvt-13-384-22k", "13-384x384-IN-22k", "cvt-13", 384, "ImageNet-22k", 83.3),
        ("cvt-21", "21-224x224-IN-1k", "cvt-21", 224, "ImageNet-1k", 82.5),
        ("cvt-21-384", "21-384x384-IN-1k", "cvt-21", 384, "ImageNet-1k", 83.3),
        ("cvt-21-384-22k", "21-384x384-IN-22k", "cvt-21", 384, "ImageNet-22k", 84.9),
        ("cvt-w24-384-22k", "w24-384x384-IN-22k", "cvt-w24", 384, "ImageNet-22k", 87.7),
    )
}


_WORD = r"\w(?:[\w.-]*\w)?"
NAME = re.compile(rf"((?:{_WORD}/)?{_WORD})(?:@(.+))?", re.ASCII)


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, and its branch, tag or commit; None is its main branch."""

    hub_id: str
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> "Repository | None":
        """What USER/NAME, USER/NAME@REVISION or a published name means; None if it is neither."""
        match = NAME.fullmatch(name)
        if match and match[1] in PUBLISHED:
            return cls(PUBLISHED[match[1]].hub_id, match[2])
        return cls(match[1], match[2]) if match and "/" in match[1] else None


def repository(name: str | os.PathLike | None) -> Repository | None:
    """The repository that the name of a model means; None if it means none.

    A file or a folder on this machine comes first, as it does in transformers.

    Raises:
        ValueError: a revision is asked for, and the model is a folder on this machine.
    """
    if name is None or os.path.isdir(name) or (os.path.isfile(name) and "/" in os.fspath(name)):
        return None
    found = Repository.parse(os.fspath(name))
    if found and found.revision and os.path.isdir(found.hub_id):
        raise ValueError(f"{name}: {found.hub_id} is a folder here, which has no revisions")
    return found


def published(name: str | os.PathLike | None) -> Published | None:
    """The published checkpoint that `name` means, by its short name or its hub id.

    A folder of that name on this machine comes first, as it does in transformers: then None.
    """
    found = repository(name)
    by_hub_id = {checkpoint.hub_id: checkpoint for checkpoint in PUBLISHED.values()}
    return by_hub_id.get(found.hub_id) if found else None


def unknown_model(name: str | os.PathLike, known: Iterable[str] = PUBLISHED) -> FileNotFoundError:
    """The error for a name that means no model; `known` are names that do."""
    return FileNotFoundError(
        f"no model {os.fspath(name)}: it is no file, no folder, no USER/NAME of the hub and none "
        f"of {', '.join(known)}"
    )


class UnavailableError(FileNotFoundError):
    """A model is neither on this machine nor within reach on the hub."""


@contextmanager
def resolved(name: str | os.PathLike, kwargs: dict[str, Any]) -> Iterator[str | os.PathLike]:
    """What transformers is to load for `name`: the id of a repository, or the name itself.

    `kwargs` are those for its `from_pretrained`; they get the `revision` that the name has. Where
    the hub does not answer they get `local_files_only`, without which every file is tried for 23
    seconds, or without end.

    Raises:
        UnavailableError: the model is neither here nor within reach; names what to do.
        FileNotFoundError: the name means no model.
        ValueError: `kwargs` have another revision than the name.
    """
    from huggingface_hub.errors import HTTPError  # of the connection; not all are an OSError

    found = repository(name)
    if found is None:
        if name is not None and not os.path.exists(name):
            raise unknown_model(name)
        yield name
        return
    if found.revision:
        if kwargs.get("revision") not in (None, "main", found.revision):  # transformers' default
            raise ValueError(f"revision = {kwargs['revision']!r}: {name} has another")
        kwargs["revision"] = found.revision
    failure = None if kwargs.get("local_files_only") else unreachable()
    if failure:
        kwargs["local_files_only"] = True
    try:
        yield found.hub_id
    except (OSError, HTTPError) as error:
        asked = Repository(found.hub_id, kwargs.get("revision"))
        if message := _reason(asked, error, failure, kwargs.get("cache_dir")):
            raise UnavailableError(message) from error
        raise


def _reason(
    asked: Repository, error: Exception, failure: Exception | None, cache: str | None
) -> str:
    """Why a repository cannot be had, in a sentence; empty if the error is of another kind."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain: list[BaseException] = [error]  # transformers may hide that of the hub or connection
    while following := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(following)
    if not failure and any(isinstance(each, UnavailableError) for each in chain):
        return ""  # the configuration's error, which has everything
    cause = failure or next((each for each in chain if isinstance(each, HTTPError)), None)
    hub_id, place = asked.hub_id, f"{constants.ENDPOINT}/{asked.hub_id}"
    if isinstance(cause, GatedRepoError):
        return f"{hub_id} is gated: ask for access at {place}, then run `hf auth login`"
    if isinstance(cause, RepositoryNotFoundError):
        return (
            f"no model {hub_id}: there is no such folder here, and {place} does not exist or is "
            "private; where you have access, run `hf auth login`"
        )
    if isinstance(cause, RevisionNotFoundError):
        return f"{place} has no revision {asked.revision}"
    is_absent = any(isinstance(each, LocalEntryNotFoundError) for each in chain)
    if isinstance(cause, RemoteEntryNotFoundError) or not (cause or is_absent):
        return ""
    report = " ".join(str(cause or error).split())
    return (
        f"{hub_id} is not on this machine and could not be downloaded from "
        f"{constants.ENDPOINT}. Where there is network, run `hf download {hub_id}` "
        f"and copy the folder models--{hub_id.replace('/', '--')} from its cache "
        f"into {cache or constants.HF_HUB_CACHE} here; behind a mirror, set HF_ENDPOINT. The hub "
        f"library reported: {report}"
    )


def snapshot(name: str | os.PathLike, patterns: Sequence[str], **options: Any) -> Path:
    """The folder in the hub library's cache with the files of a repository that match `patterns`.

    Files that are there are not asked for again. The folder is named after the commit.

    Args:
        name: of the repository, as `repository` takes it.
        patterns: of names of files.
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        UnavailableError: the repository is neither here nor within reach; names what to do.
    """
    from huggingface_hub import snapshot_download

    with resolved(name, options) as hub_id:
        return Path(snapshot_download(str(hub_id), allow_patterns=list(patterns), **options))


def unreachable() -> Exception | None:
    """Why the hub does not answer at all; None if it answers, even with an error."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (OSError, HTTPError) as error:
        return error
    return None
