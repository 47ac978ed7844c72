"""Which epoch of a run is the best, and whether the run ends early; both by its results alone."""

from collections.abc import Mapping, Sequence
from math import inf

from cvt.train.progress import Row
from cvt.train.recipe import LOWER_IS_BETTER, Recipe


def result(row: Mapping[str, float | None], metric: str) -> float | None:
    """A metric of the model that an epoch wrote, averaged where there is an average.

    None if the epoch was not validated.
    """
    return row.get(f"ema_{metric}", row.get(f"val_{metric}"))


def quality(metric: str, value: float) -> float:
    """The value of a metric, negated where a lower one is better: so the best is the highest."""
    return -value if metric in LOWER_IS_BETTER else value


def best(history: Sequence[Row], metric: str = "top1") -> Row:
    """The row with the best `metric`, among equals that of the lowest loss, then the first."""

    def of_row(row: Row) -> tuple[float, float]:
        value, loss = result(row, metric), result(row, "loss")
        if value is None or loss is None:
            return -inf, -inf
        return quality(metric, value), -loss

    return max(history, key=of_row)


def early_end(history: Sequence[Row], recipe: Recipe, is_late: bool) -> str:
    """Why a run ends before its last step; empty if it does not.

    Args:
        history: of the run so far.
        recipe: of the run.
        is_late: whether its time is over.
    """
    if is_late:
        return f"max_hours = {recipe.max_hours:g} is over; --resume with more continues"
    if recipe.patience is None or not history:
        return ""
    found = best(history, recipe.metric)
    since = history[history.index(found) + 1 :]
    if sum(result(row, "loss") is not None for row in since) < recipe.patience:
        return ""
    return (
        f"patience = {recipe.patience} is over, epoch {found['epoch']} stays the best by "
        f"{recipe.metric}; --resume with more continues"
    )
