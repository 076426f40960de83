"""Frames on one byte stream: kind, channel, size, body. Not what they mean (`bridge`)."""

import struct
from collections.abc import Iterator

OPEN, MESSAGE, DATA, ACK, END, CLOSE = range(1, 7)
CHUNK = 1 << 16  # bytes of a message or of stream data in one frame
_HEADER = struct.Struct(">BII")
_NUMBER = struct.Struct(">I")
_MAX_BODY = CHUNK + 64  # a message also names its descriptors


class BridgeError(Exception):
    """The other side sent what an honest one never would: nothing more is believed from it."""


def frame(kind: int, channel: int, body: bytes = b"") -> bytes:
    """The wire form of one frame."""
    return _HEADER.pack(kind, channel, len(body)) + body


def pack_numbers(numbers: list[int]) -> bytes:
    """A count and so many numbers, as the head of a message."""
    return bytes([len(numbers)]) + b"".join(map(_NUMBER.pack, numbers))


def unpack_numbers(body: bytes) -> tuple[list[int], bytes]:
    """The numbers at the head of `body`, and the rest. Raises BridgeError."""
    end = 1 + 4 * body[0] if body else 1
    if not body or len(body) < end:
        raise BridgeError("a truncated message")
    return [_NUMBER.unpack_from(body, at)[0] for at in range(1, end, 4)], body[end:]


def pack_number(value: int) -> bytes:
    """One number as a body."""
    return _NUMBER.pack(value)


def number(body: bytes) -> int:
    """The one number that is `body`. Raises BridgeError."""
    if len(body) != 4:
        raise BridgeError("a number of the wrong size")
    return _NUMBER.unpack(body)[0]


class Parser:
    """Cuts a stream into frames; keeps less than one frame between calls."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """(kind, channel, body) of every frame that is complete now. Raises BridgeError."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _HEADER.size:
            kind, channel, size = _HEADER.unpack_from(self._buffer, start)
            if not OPEN <= kind <= CLOSE or size > _MAX_BODY:
                raise BridgeError("bytes that are no frame")
            end = start + _HEADER.size + size
            if len(self._buffer) < end:
                break
            yield kind, channel, bytes(self._buffer[end - size : end])
            start = end
        del self._buffer[:start]
