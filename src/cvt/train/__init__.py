"""Training a classifier: the paper's recipe, resumable, on one process or many."""

from typing import TYPE_CHECKING, Any

from cvt.train.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from cvt.train.callbacks import Callback, RunState
    from cvt.train.trainer import resume, train
    from cvt.train.tuning import Trial, tune

__all__ = ["Callback", "Recipe", "RunState", "Trial", "load_recipe", "resume", "train", "tune"]


MODULES = {
    "Callback": "callbacks",
    "RunState": "callbacks",
    "Trial": "tuning",
    "resume": "trainer",
    "train": "trainer",
    "tune": "tuning",
}

if not TYPE_CHECKING:  # or type checkers would accept any name

    def __getattr__(name: str) -> Any:
        """Import the others on first use: a recipe alone loads no torch."""
        from importlib import import_module

        if module := MODULES.get(name):
            return getattr(import_module(f"cvt.train.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
