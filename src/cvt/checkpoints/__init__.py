"""Checkpoints of every dialect: the authors' files, transformers' folders and ours.

Names load on first use, so that `names` can be read where PyTorch is not.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "CheckpointError": "reading",
    "Conversion": "conversion",
    "authors_to_transformers": "names",
    "convert": "conversion",
    "image_size_of": "loading",
    "load_authors": "authors",
    "load_classifier": "loading",
    "load_config": "loading",
    "load_processor": "loading",
    "read_weights": "reading",
    "transformers_to_authors": "names",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"cvt.checkpoints.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cvt.checkpoints' has no attribute {name!r}")
