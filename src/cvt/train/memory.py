"""What a run may take: memory and disk that are free."""

import shutil
from contextlib import suppress
from pathlib import Path

import torch

CONTAINER = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")  # of Linux


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that are free: on a GPU, or of this machine or container."""
    if device is not None and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # accelerate's

    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # "max" is no limit
        limit, used = (int(path.read_text()) for path in CONTAINER)
        free = min(free, limit - used)
    return max(free, 0)


def free_disk(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
