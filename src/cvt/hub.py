"""The published CvT checkpoints, as data, and what transformers loads for their names.

Names and resolutions: github.com/microsoft/CvT, README. Hub ids: the `microsoft` organisation on
the Hugging Face hub. Top-1 in percent, ImageNet-1k validation: table 2 of the paper.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


def published(name: str | os.PathLike | None) -> Published | None:
    """The published checkpoint that `name` means, by its short name or its hub id.

    A folder of that name on this machine comes first, as it does in transformers: then None.
    """
    if name is None or os.path.isdir(name):
        return None
    by_hub_id = {checkpoint.hub_id: checkpoint for checkpoint in PUBLISHED.values()}
    return PUBLISHED.get(str(name)) or by_hub_id.get(str(name))


class UnavailableError(OSError):
    """A published checkpoint is neither on this machine nor within reach."""


@contextmanager
def resolved(name: str | os.PathLike, kwargs: dict[str, Any]) -> Iterator[str | os.PathLike]:
    """What transformers is to load for `name`: a published checkpoint's hub id, or the name itself.

    `kwargs` are those for its `from_pretrained`. Where the hub does not answer they get
    `local_files_only`, without which every file is tried for 23 seconds, or without end.

    Raises:
        UnavailableError: a published checkpoint is neither here nor within reach; names what to do.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError  # of the connection; not all are an OSError

    checkpoint = published(name)
    if checkpoint is None:
        yield name
        return
    failure = None if kwargs.get("local_files_only") else unreachable()
    if failure:
        kwargs["local_files_only"] = True
    try:
        yield checkpoint.hub_id
    except (OSError, HTTPError) as error:
        cause: BaseException | None = failure or error
        if isinstance(cause, UnavailableError):  # the configuration's error, which has everything
            raise
        # The error of the hub or of the connection; transformers may hide it behind a guess.
        while cause and not isinstance(cause, HTTPError):
            cause = cause.__cause__ or cause.__context__
        reason = " ".join(str(cause or failure or error).split())
        cache = kwargs.get("cache_dir") or constants.HF_HUB_CACHE
        raise UnavailableError(
            f"{checkpoint.hub_id} is not on this machine and could not be downloaded from "
            f"{constants.ENDPOINT}. Where there is network, run `hf download {checkpoint.hub_id}` "
            f"and copy the folder models--{checkpoint.hub_id.replace('/', '--')} from its cache "
            f"into {cache} here; behind a mirror, set HF_ENDPOINT. The hub library "
            f"reported: {reason}"
        ) from error


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
