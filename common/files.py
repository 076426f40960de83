"""Files and folders of a run: for whom they are, and how lines get to their end. Not the lines."""

import errno
import os
import time
from pathlib import Path

from common.errors import InfrastructureError

FULL_DISK_S = 60.0
POLL_S = 0.2


def private_folder(path: Path) -> None:
    """Make `path` and its missing parents, for their owner only; what exists stays as it is.

    What a run writes (texts of models, resolved settings, logs) is nobody else's business on a
    shared machine. `chmod` opens one folder to others.
    """
    for folder in [*reversed(path.parents), path]:
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)


def append_line(path: Path, line: str, durable: bool = False) -> None:
    """Append `line` whole, or nothing of it; there must be one writer at a time.

    A full disk is waited for: a checkpoint that has filled it is removed within moments.

    Args:
        durable: it is on disk afterwards, not only on its way.

    Raises:
        InfrastructureError: the disk was full for a minute.
    """
    data, deadline = (line + "\n").encode(), time.monotonic() + FULL_DISK_S
    while not _appended(path, data, durable):
        if time.monotonic() > deadline:
            raise InfrastructureError(f"{path}: the disk has been full for {FULL_DISK_S:g} s")
        time.sleep(POLL_S)


def _appended(path: Path, data: bytes, durable: bool) -> bool:
    """False: there was no room for all of it, and nothing of it is left."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            written = 0
        if written < len(data):
            os.ftruncate(descriptor, before)
            return False
        if durable:
            os.fsync(descriptor)
        return True
    finally:
        os.close(descriptor)
