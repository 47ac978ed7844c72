"""From the name of a model to its weights: published names; transformers' loading made strict."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cvt.zoo import PUBLISHED, Published

logger = logging.getLogger(__name__)


def published(name: str | os.PathLike) -> Published | None:
    """The published checkpoint that `name` means, by its short name or its hub id.

    A folder of that name on this machine comes first, as it does in transformers: then None.
    """
    if os.path.isdir(name):
        return None
    by_hub_id = {checkpoint.hub_id: checkpoint for checkpoint in PUBLISHED.values()}
    return PUBLISHED.get(str(name)) or by_hub_id.get(str(name))


@contextmanager
def resolved(name: str | os.PathLike) -> Iterator[str | os.PathLike]:
    """What transformers is to load for `name`: a published checkpoint's hub id, or the name itself.

    Raises:
        OSError: a published checkpoint is neither here nor within reach; says what to do.
    """
    checkpoint = published(name)
    if checkpoint is None:
        yield name
        return
    try:
        yield checkpoint.hub_id
    except OSError as error:
        raise OSError(
            f"{checkpoint.hub_id} is not on this machine and could not be downloaded. Where there "
            f"is network, run `hf download {checkpoint.hub_id} --local-dir {checkpoint.name}`, "
            "copy the folder here and name the folder instead; behind a mirror, set HF_ENDPOINT. "
            f"The hub library said: {error}"
        ) from error


def load_strictly(
    load: Callable[..., Any], name: str | os.PathLike, *args: Any, **kwargs: Any
) -> Any:
    """Call `PreTrainedModel.from_pretrained`, given as `load`, and refuse weights that do not fit.

    A classifier for another number of classes is made anew, random, if `num_labels` or `id2label`
    asks for it; that is logged. `ignore_mismatched_sizes` and `output_loading_info` leave the
    judgement to the caller.

    Raises:
        ValueError: weights are missing, unexpected or of the wrong shape; lists all of them.
        OSError: there is no such model, or it cannot be reached.
    """
    with resolved(name) as source:
        if kwargs.get("ignore_mismatched_sizes") or kwargs.get("output_loading_info"):
            return load(source, *args, **kwargs)
        kwargs |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, loaded = load(source, *args, **kwargs)
    new_head: set[str] = set()
    if "num_labels" in kwargs or "id2label" in kwargs:
        new_head = {"classifier.weight", "classifier.bias"}
    missing, unexpected = loaded["missing_keys"], loaded["unexpected_keys"]
    mismatched = {name: sizes for name, *sizes in loaded["mismatched_keys"]}
    faults = [
        *(f"missing {weight}" for weight in sorted(missing - new_head)),
        *(f"unexpected {weight}" for weight in sorted(unexpected)),
        *(
            f"{weight} is {tuple(mismatched[weight][0])}, expected {tuple(mismatched[weight][1])}"
            for weight in sorted(mismatched.keys() - new_head)
        ),
    ]
    if faults:
        raise ValueError(
            f"the weights of {name} do not fit {type(model).__name__} (num_labels would ask for a "
            "new classifier):\n  " + "\n  ".join(faults)
        )
    if new_head & (missing | mismatched.keys()):
        logger.warning(
            f"New classifier of {model.config.num_labels} classes: {name} has none for them. It is "
            "random until trained."
        )
    return model
