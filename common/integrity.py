"""Checksums of files: taken while they are written, compared before they are read.

Not a defence against forgers: CRC-32 finds what disks, networks and full file systems do, at five
times the speed of the fastest cryptographic hash (7.0 against 1.4 GiB/s for blake2b on one core).
"""

import json
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

MANIFEST = "manifest.json"
CHUNK = 2**22
READERS = 4
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # of a manifest


class FileRecord(NamedTuple):
    """What a file must be: its size in bytes and its CRC-32."""

    size: int
    crc32: int


class CheckedWriter:
    """A binary file that keeps the record of what went through it.

    Writers in C++ lose the error of a Python file: `error` is the first that writing raised.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self.crc32 = 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`."""
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        count = memoryview(data).nbytes
        self.size += count
        self.crc32 = zlib.crc32(data, self.crc32)
        return count

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()

    @property
    def record(self) -> FileRecord:
        """Of everything written so far."""
        return FileRecord(self.size, self.crc32)


def record_of(path: Path) -> FileRecord:
    """Read a file and return its record. Raises OSError."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return FileRecord(size, crc)


def write_manifest(folder: Path, known: Mapping[str, FileRecord]) -> int:
    """Write `manifest.json` of everything under `folder`; returns the bytes it covers.

    Args:
        known: records taken while writing, by path relative to `folder`; other files are read.
    """
    records = dict(known)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in records:
            records[name] = record_of(path)
    files = {name: records[name]._asdict() for name in sorted(records)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
    return sum(record.size for record in records.values())


def covered_bytes(folder: Path) -> int:
    """How many bytes the manifest of a folder covers; 0 if it cannot be read."""
    try:
        return sum(record.size for record in _read_manifest(folder).values())
    except UNREADABLE:
        return 0


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder that has a manifest, in a few words; None if nothing is.

    Sizes are compared first; then the files are read, a few at a time.
    """
    try:
        records = _read_manifest(folder)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except UNREADABLE as error:
        return f"{MANIFEST} is damaged ({error})"
    for name, record in records.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != record.size:
            return f"{name} has {size} bytes instead of {record.size}"
    with ThreadPoolExecutor(READERS) as pool:
        for name, damage in zip(
            records,
            pool.map(lambda name: _differs(folder / name, records[name]), records),
            strict=True,
        ):
            if damage:
                return f"{name}: {damage}"
    return None


def flush(path: Path) -> None:
    """Force a file's or a folder's content to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(folder: Path) -> dict[str, FileRecord]:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return {name: FileRecord(**record) for name, record in files.items()}


def _differs(path: Path, record: FileRecord) -> str | None:
    try:
        return None if record_of(path) == record else "its checksum differs"
    except OSError as error:
        return f"cannot be read ({error})"
