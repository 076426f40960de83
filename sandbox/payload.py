"""Data for a sandboxed process, by descriptor: never through a zygote's memory or a shared file."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def memory_file(data: bytes) -> Iterator[int]:
    """A descriptor of an anonymous file that holds `data`, at offset 0."""
    descriptor = os.memfd_create("job", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def payload(content: Any) -> contextlib.AbstractContextManager[int]:
    """The same for `content` as JSON."""
    return memory_file(json.dumps(content).encode())
