"""Labelled images to train on and to evaluate with, whatever they are stored in.

What `data` may be, wherever this package asks for it:

| data | what it is | the validation split | classes |
|---|---|---|---|
| `digits` | scikit-learn's 1,797 digits | a fifth, always the same | 0 to 9 |
| folder of a folder per class | an image folder | a fifth of every class, by `seed` | the folders, sorted |
| folder with `train/` and `val/` or `test/` | image folders | `val/`, else `test/` | the folders, sorted |
| `FILE.csv` | lines of path and label; the path is relative to the csv file | its column `split`, else a fifth by `seed` | the labels, sorted |
| folder or `.tar.gz` of CIFAR-10 or CIFAR-100 | python or binary version | its test images | its own order; fine labels |
| folder of Oxford-IIIT Pet | `images/`, and `annotations/` with `trainval.txt` and `test.txt` | its test images | the breeds, by their numbers |
| folder of Flowers-102 | `jpg/`, `imagelabels.mat`, `setid.mat` | its own | their numbers, or the file `classes` |
| folder written by `save_to_disk` | a `Dataset` or `DatasetDict` of the library `datasets` | its split `validation`, else `test`, else a fifth | of the `ClassLabel`, else the labels, sorted |
| `FILE.parquet`, folder of parquet files | tables of encoded images; `train-*` and `validation-*` or `test-*` name the splits | likewise | likewise |
| `hub:OWNER/NAME`, and `:CONFIG` or `@SPLIT` behind it | a data set of the Hugging Face hub | likewise | likewise |
| `stream:hub:OWNER/NAME`, `stream:FOLDER` of parquet files or shards | the same, read one after the other | likewise, and never a fifth | of the `ClassLabel`, else the file `classes` |
| folder of `.tar` files, `shards/train-{000..012}.tar`, `shards/*.tar` | webdataset shards, always streamed | by their names, as for parquet files | the file `classes` |

A second such name, `val_data`, is the validation split where it is given. A file of `classes`, one name per line,
gives the order of the classes, and the names of labels that are numbers. The names of splits are those in
`TRAIN_NAMES`, `VALIDATION_NAMES` and `TEST_NAMES`. Where there are a validation and a test split, the test split is
held out; where there is a test split alone, it validates.
"""  # noqa: E501

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as in _HOME, for mypy, pyright and editors
    from cvt.data.decoding import ImageError as ImageError
    from cvt.data.decoding import StoredImage as StoredImage
    from cvt.data.decoding import decode as decode
    from cvt.data.digits import write_digits as write_digits
    from cvt.data.factory import open_labelled as open_labelled
    from cvt.data.factory import open_splits as open_splits
    from cvt.data.factory import open_training as open_training
    from cvt.data.findings import Check as Check
    from cvt.data.findings import Finding as Finding
    from cvt.data.findings import check as check
    from cvt.data.folder import image_folder as image_folder
    from cvt.data.folder import images_below as images_below
    from cvt.data.folder import oversized as oversized
    from cvt.data.folds import fold as fold
    from cvt.data.image_processor import image_processor as image_processor
    from cvt.data.labelled import Images as Images
    from cvt.data.labelled import LabelledImages as LabelledImages
    from cvt.data.labelled import Splits as Splits
    from cvt.data.labelled import StreamedImages as StreamedImages
    from cvt.data.labelled import split as split
    from cvt.data.split_file import read_split as read_split
    from cvt.data.split_file import without_trained as without_trained
    from cvt.data.split_file import write_split as write_split
    from cvt.data.task import Task as Task

_HOME = {
    "Check": "findings",
    "Finding": "findings",
    "ImageError": "decoding",
    "Images": "labelled",
    "LabelledImages": "labelled",
    "Splits": "labelled",
    "StoredImage": "decoding",
    "StreamedImages": "labelled",
    "Task": "task",
    "check": "findings",
    "decode": "decoding",
    "fold": "folds",
    "image_folder": "folder",
    "image_processor": "image_processor",
    "images_below": "folder",
    "open_labelled": "factory",
    "open_splits": "factory",
    "open_training": "factory",
    "oversized": "folder",
    "read_split": "split_file",
    "split": "labelled",
    "without_trained": "split_file",
    "write_digits": "digits",
    "write_split": "split_file",
}
__all__ = list(_HOME)


if not TYPE_CHECKING:  # or type checkers would accept any name

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            return getattr(import_module(f"cvt.data.{_HOME[name]}"), name)
        raise AttributeError(f"module 'cvt.data' has no attribute {name!r}")
