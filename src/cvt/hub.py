"""Names of published models, and what transformers loads for them from the hub."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cvt.zoo import PUBLISHED, Published


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
        UnavailableError: a published checkpoint is neither here nor within reach; says what to do.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError  # of the connection; not all are an OSError

    checkpoint = published(name)
    if checkpoint is None:
        yield name
        return
    silence = None if kwargs.get("local_files_only") else unreachable()
    if silence:
        kwargs["local_files_only"] = True
    try:
        yield checkpoint.hub_id
    except (OSError, HTTPError) as error:
        cause: BaseException | None = silence or error
        if isinstance(cause, UnavailableError):  # the configuration's: it has said all
            raise
        # What the hub or the connection said; transformers may hide it behind a guess of its own.
        while cause and not isinstance(cause, HTTPError):
            cause = cause.__cause__ or cause.__context__
        reason = " ".join(str(cause or silence or error).split())
        cache = kwargs.get("cache_dir") or constants.HF_HUB_CACHE
        raise UnavailableError(
            f"{checkpoint.hub_id} is not on this machine and could not be downloaded from "
            f"{constants.ENDPOINT}. Where there is network, run `hf download {checkpoint.hub_id}` "
            f"and copy the folder models--{checkpoint.hub_id.replace('/', '--')} from its cache "
            f"into {cache} here; behind a mirror, set HF_ENDPOINT. The hub library said: {reason}"
        ) from error


def unreachable() -> Exception | None:
    """Why the hub does not answer at all; None if it does, whatever it says."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (OSError, HTTPError) as error:
        return error
    return None
