"""Training a classifier: the paper's recipe, resumable, on one process or many."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cvt.train.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from cvt.train.callbacks import Callback, RunState
    from cvt.train.cross_validation import cross_validate, resume_folds
    from cvt.train.trainer import resume, train
    from cvt.train.tuning import Trial, tune

_HOME = {
    "Callback": "callbacks",
    "RunState": "callbacks",
    "Trial": "tuning",
    "cross_validate": "cross_validation",
    "resume": "trainer",
    "resume_folds": "cross_validation",
    "train": "trainer",
    "tune": "tuning",
}
__all__ = [
    "Callback",
    "Recipe",
    "RunState",
    "Trial",
    "cross_validate",
    "load_recipe",
    "resume",
    "resume_folds",
    "train",
    "tune",
]


if not TYPE_CHECKING:  # or type checkers would accept any name

    def __getattr__(name: str) -> Any:
        """Import the others on first use: a recipe alone loads no torch."""
        if name in _HOME:
            return getattr(import_module(f"cvt.train.{_HOME[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
