"""From the name of a model to the place it is loaded from."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cvt.zoo import PUBLISHED, Published


def published(name: str | os.PathLike) -> Published | None:
    """The published checkpoint that `name` means, by its short name or its hub id.

    A folder of that name on this machine comes first, as it does in transformers: then the answer is None.
    """
    if os.path.isdir(name):
        return None
    by_hub_id = {checkpoint.hub_id: checkpoint for checkpoint in PUBLISHED.values()}
    return PUBLISHED.get(str(name)) or by_hub_id.get(str(name))


@contextmanager
def resolved(name: str | os.PathLike) -> Iterator[str | os.PathLike]:
    """What transformers is to load for `name`: the hub id of a published checkpoint, or the name itself.

    Raises:
        OSError: a published checkpoint is neither on this machine nor within reach; says what to do.
    """
    checkpoint = published(name)
    if checkpoint is None:
        yield name
        return
    try:
        yield checkpoint.hub_id
    except OSError as error:
        raise OSError(
            f"{checkpoint.hub_id} is not on this machine and could not be downloaded. Where there is network, run "
            f"`hf download {checkpoint.hub_id} --local-dir {checkpoint.name}`, copy the folder here and name the "
            f"folder instead; behind a mirror, set HF_ENDPOINT. The hub library said: {error}"
        ) from error
