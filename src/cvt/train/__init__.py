"""Training a classifier on labelled images."""

from cvt.train.loop import Recipe, train

__all__ = ["Recipe", "train"]
