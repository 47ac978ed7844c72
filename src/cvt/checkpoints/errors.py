"""The error of a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and every fault found in it.

    Example:
        >>> from pathlib import Path
        >>> from cvt.checkpoints import read_weights
        >>> _ = Path("empty.pth").write_bytes(b"")
        >>> read_weights("empty.pth")
        Traceback (most recent call last):
            ...
        cvt.checkpoints.errors.CheckpointError: empty.pth is empty
    """
