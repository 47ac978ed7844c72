"""Checkpoints of every dialect: the authors' files, transformers' folders and ours.

Names load on first use, so that `names` can be read where PyTorch is not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in _HOME, for mypy, pyright and editors
    from cvt.checkpoints.authors import load_authors as load_authors
    from cvt.checkpoints.conversion import Conversion as Conversion
    from cvt.checkpoints.conversion import convert as convert
    from cvt.checkpoints.errors import CheckpointError as CheckpointError
    from cvt.checkpoints.loading import image_size_of as image_size_of
    from cvt.checkpoints.loading import load_classifier as load_classifier
    from cvt.checkpoints.loading import load_config as load_config
    from cvt.checkpoints.loading import load_processor as load_processor
    from cvt.checkpoints.names import authors_to_transformers as authors_to_transformers
    from cvt.checkpoints.names import transformers_to_authors as transformers_to_authors
    from cvt.checkpoints.preprocessing import load_preprocessing as load_preprocessing
    from cvt.checkpoints.reading import read_weights as read_weights
    from cvt.checkpoints.source import ModelSource as ModelSource
    from cvt.checkpoints.source import model_source as model_source

_HOME = {
    "CheckpointError": "errors",
    "Conversion": "conversion",
    "ModelSource": "source",
    "authors_to_transformers": "names",
    "convert": "conversion",
    "image_size_of": "loading",
    "load_authors": "authors",
    "load_classifier": "loading",
    "load_config": "loading",
    "load_preprocessing": "preprocessing",
    "load_processor": "loading",
    "model_source": "source",
    "read_weights": "reading",
    "transformers_to_authors": "names",
}
__all__ = list(_HOME)


if not TYPE_CHECKING:  # or type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(import_module(f"cvt.checkpoints.{_HOME[name]}"), name)
        raise AttributeError(f"module 'cvt.checkpoints' has no attribute {name!r}")
