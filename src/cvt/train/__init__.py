"""Training a classifier: the paper's recipe, resumable, on one process or many."""

from typing import TYPE_CHECKING, Any

from cvt.train.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from cvt.train.trainer import resume, train

__all__ = ["Recipe", "load_recipe", "resume", "train"]


if not TYPE_CHECKING:  # or type checkers would accept any name

    def __getattr__(name: str) -> Any:
        """Import the trainer on first use: a recipe alone loads no torch."""
        if name in ("resume", "train"):
            from cvt.train import trainer

            return getattr(trainer, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
