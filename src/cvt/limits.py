"""The numbers that people give, and the bounds beyond which a library hangs or ends the process."""

import os
from numbers import Integral
from typing import Any

# Threads and processes beyond these only slow each other down.
MOST_AT_ONCE = max(256, 16 * (os.cpu_count() or 1))
MOST_IMAGES = 65_536  # at a time
# The smallest and the largest of each; None where there is no largest.
BOUNDS: dict[str, tuple[int, int | None]] = {
    "threads": (1, MOST_AT_ONCE),
    "workers": (0, MOST_AT_ONCE),
    "batch_size": (1, MOST_IMAGES),
    "max_batch": (1, MOST_IMAGES),
    "max_queue": (1, MOST_IMAGES),
    "top_k": (1, None),  # beyond the classes, it is all of them
}


def check_counts(**counts: Any) -> None:
    """Make sure that whole numbers are within `BOUNDS`.

    Args:
        counts: the numbers by their names, which are those in `BOUNDS`.

    Raises:
        TypeError: one is not a whole number; names it.
        ValueError: one is out of its bounds; names both.
    """
    for name, count in counts.items():
        if not isinstance(count, Integral) or isinstance(count, bool):
            raise TypeError(f"{name} is of type {type(count).__name__}: must be a whole number")
        least, most = BOUNDS[name]
        count = int(count)
        if count < least:
            raise ValueError(f"{name} = {count}: must be at least {least}")
        if most is not None and count > most:
            raise ValueError(f"{name} = {count}: must be at most {most}")
