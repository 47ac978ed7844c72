"""What the page accepts and for how long it keeps it."""

MIB = 2**20
FILE_BYTES = 20 * MIB  # of one picture
REQUEST_BYTES = 100 * MIB  # of the pictures that are given at once
MESSAGE_BYTES = MIB  # of any other request: what is clicked, and what is on the page
PIXELS = 50_000_000  # of one picture, by its header
PICTURES = 12  # of one visitor at a time
WAITING = 24  # requests in the queue; the next one is asked to come back
FOLDER_BYTES = 1024 * MIB  # of all uploads and heat maps on the disk
STORE_BYTES = 256 * MIB  # of the pictures of all visitors in memory
VISITORS = 64  # whose pictures are in memory at a time
KEPT_SECONDS = 300  # that pictures stay on the disk, and in memory since the last click
ABANDONED_SECONDS = 2 * KEPT_SECONDS  # after which what a broken connection left is deleted
SWEEP_SECONDS = 15  # between two looks for what is too old
SHOWN_SIDE = 768  # pixels of the longer side of the copy that is kept and shown


def megabytes(size: int) -> str:
    """A number of bytes for a sentence, as in `20 MB`."""
    return f"{size / MIB:g} MB"
