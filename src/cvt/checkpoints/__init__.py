"""Checkpoints of every dialect: the authors' files, transformers' folders and ours."""

from cvt.checkpoints.authors import load_authors
from cvt.checkpoints.conversion import Conversion, convert
from cvt.checkpoints.loading import (
    image_size_of,
    load_classifier,
    load_config,
    load_processor,
)
from cvt.checkpoints.names import authors_to_transformers, transformers_to_authors
from cvt.checkpoints.reading import CheckpointError, read_weights

__all__ = [
    "CheckpointError",
    "Conversion",
    "authors_to_transformers",
    "convert",
    "image_size_of",
    "load_authors",
    "load_classifier",
    "load_config",
    "load_processor",
    "read_weights",
    "transformers_to_authors",
]
