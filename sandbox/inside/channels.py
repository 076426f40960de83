"""The kinds of channel a `Bridge` pumps: bytes, messages, the contents of a file. Not the stream.

Each stands between a local descriptor and its twin at the other side, never waits, and holds no
more than its window. Whatever an honest twin would not send is a BridgeError.
"""

import contextlib
import os
import select
import socket
from collections import deque
from typing import Protocol

from sandbox.inside import frames
from sandbox.inside.frames import ACK, CHUNK, CLOSE, DATA, END, MESSAGE, BridgeError

WINDOW = 1 << 18  # bytes of a channel under way or waiting, each way
MAX_WAITING = 64  # messages that arrived for a process that does not take them
_MAX_DESCRIPTORS = 8
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Side(Protocol):
    """What a channel needs of its bridge."""

    def send(self, kind: int, channel: int, body: bytes = b"") -> None:
        """Queue a frame for the other side."""

    def offer(self, descriptors: list[int]) -> list[int]:
        """Channels for `descriptors`, which now belong to the bridge."""

    def claim(self, numbers: list[int]) -> list[int]:
        """The descriptors that a message brings to the local process. Raises BridgeError."""


class Channel(Protocol):
    """One end of a channel. `finished`: nothing will come or go any more."""

    descriptor: int
    finished: bool

    def interest(self, may_send: bool) -> int | None:
        """The poll events to wait for; None: leave the descriptor alone."""

    def tend(self, events: int) -> None:
        """Take and give what can be without waiting."""

    def receive(self, kind: int, body: bytes) -> None:
        """A frame for this channel arrived. Raises BridgeError."""

    def acknowledge(self) -> None:
        """Let the other side send more, if it is worth a frame."""

    def close(self) -> None:
        """Let go of the descriptor."""


class Pump:
    """Bytes, one way or both. A half-close stays one; a process that went is told to the other."""

    def __init__(
        self, side: Side, number: int, descriptor: int, *, reads: bool, writes: bool
    ) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self.finished = False
        self._side = side
        self._number = number
        self._writes = writes
        self._reading, self._writing = reads, writes  # the local descriptor, still
        self._far_done = not writes  # nothing more will arrive
        self._credit = WINDOW  # what may be sent before it is acknowledged
        self._pending = bytearray()  # arrived, not yet written
        self._written = 0  # not yet acknowledged

    def interest(self, may_send: bool) -> int | None:
        """See `Channel`."""
        events = select.POLLOUT if self._pending else 0
        if self._reading:
            if may_send and self._credit:
                return events | select.POLLIN
            return events or None  # what is still to be read comes before a hang-up
        return events

    def tend(self, events: int) -> None:
        """See `Channel`."""
        if self._pending:
            self._write()
        if self._reading:
            if self._credit and events & ~select.POLLOUT:
                self._read()
        elif events & _GONE:
            self._stop_writing()
        self._conclude()

    def _read(self) -> None:
        try:
            data = os.read(self.descriptor, min(CHUNK, self._credit))
        except BlockingIOError:
            return
        except OSError:  # reset: the process went without reading everything
            data = b""
        if data:
            self._credit -= len(data)
            self._side.send(DATA, self._number, data)
            return
        self._reading = False
        # Only an END if what the other side may still send has somewhere to go.
        deaf = not self._writing and not self._far_done
        self._side.send(CLOSE if deaf else END, self._number)

    def _write(self) -> None:
        try:
            count = os.write(self.descriptor, self._pending)
        except BlockingIOError:
            return
        except OSError:  # nobody reads here any more
            self._stop_writing()
            return
        del self._pending[:count]
        self._written += count

    def _stop_writing(self) -> None:
        if not self._writing:
            return
        self._pending.clear()
        self._writing = False
        if not self._reading and not self._far_done:
            self._side.send(CLOSE, self._number)

    def receive(self, kind: int, body: bytes) -> None:
        """See `Channel`."""
        if kind == DATA:
            self._receive_data(body)
        elif kind == ACK:
            self._credit += frames.number(body)
            if self._credit > WINDOW:
                raise BridgeError("an acknowledgement of what was never sent")
        elif kind == CLOSE or (kind == END and self._writes):
            self._far_done = True
            self._reading = self._reading and kind == END
        else:
            raise BridgeError("a frame of the wrong kind for a channel of bytes")
        self._conclude()

    def _receive_data(self, body: bytes) -> None:
        if self._far_done or len(self._pending) + self._written + len(body) > WINDOW:
            raise BridgeError("data that nobody asked for")
        if self._writing:
            self._pending += body
            self._write()

    def _conclude(self) -> None:
        if self._far_done and self._writing and not self._pending:
            self._writing = False
            if self._reading:
                _half_close(self.descriptor)
        self.finished = not self._reading and not self._writing

    def acknowledge(self) -> None:
        """See `Channel`."""
        if self._written >= WINDOW // 2 and not self._far_done:
            self._side.send(ACK, self._number, frames.pack_number(self._written))
            self._written = 0

    def close(self) -> None:
        """See `Channel`."""
        os.close(self.descriptor)


class Mailbox:
    """Whole messages, and the descriptors they bring, of a local SEQPACKET socket."""

    def __init__(self, side: Side, number: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.descriptor = connection.fileno()
        self.finished = False
        self._side = side
        self._number = number
        self._connection = connection
        self._far_done = False
        self._waiting: deque[tuple[bytes, list[int]]] = deque()

    def interest(self, may_send: bool) -> int | None:
        """See `Channel`."""
        events = select.POLLOUT if self._waiting else 0
        return (events | select.POLLIN if may_send else events) or None

    def tend(self, events: int) -> None:
        """See `Channel`."""
        if self._waiting:
            self._deliver()
        if events & ~select.POLLOUT and not self.finished:
            self._collect()

    def _collect(self) -> None:
        try:
            data, descriptors, flags, _ = socket.recv_fds(self._connection, CHUNK, _MAX_DESCRIPTORS)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors, flags = b"", [], 0
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise BridgeError("a message that is too long to cross")
        if not data:
            self._hang_up()
            return
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        numbers = self._side.offer(descriptors)
        self._side.send(MESSAGE, self._number, frames.pack_numbers(numbers) + data)

    def _hang_up(self) -> None:
        if not self._far_done:
            self._side.send(CLOSE, self._number)
        self.finished = True

    def receive(self, kind: int, body: bytes) -> None:
        """See `Channel`."""
        if kind == CLOSE:
            self._far_done = True
            self.finished = not self._waiting
            return
        if kind != MESSAGE or self._far_done:
            raise BridgeError("a frame of the wrong kind for a channel of messages")
        if len(self._waiting) == MAX_WAITING:
            raise BridgeError("more messages than anybody takes")
        numbers, data = frames.unpack_numbers(body)
        if not data:
            raise BridgeError("an empty message")
        self._waiting.append((data, self._side.claim(numbers)))
        self._deliver()

    def _deliver(self) -> None:
        try:
            while self._waiting:
                data, descriptors = self._waiting[0]
                socket.send_fds(self._connection, [data], descriptors)
                self._waiting.popleft()
                _close_all(descriptors)
        except BlockingIOError:
            return
        except OSError:  # nobody takes them any more
            self._hang_up()
        self.finished = self.finished or self._far_done

    def acknowledge(self) -> None:
        """See `Channel`; messages are so few that they are capped, not acknowledged."""

    def close(self) -> None:
        """See `Channel`."""
        for _, descriptors in self._waiting:
            _close_all(descriptors)
        self._connection.close()


class Contents:
    """A file that is arriving; it goes to the local process as a file in memory."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("job", os.MFD_CLOEXEC)
        self.finished = False

    def interest(self, may_send: bool) -> int | None:
        """See `Channel`."""
        return None

    def tend(self, events: int) -> None:
        """See `Channel`; nothing is ever waited for here."""

    def receive(self, kind: int, body: bytes) -> None:
        """See `Channel`."""
        if kind != DATA:
            raise BridgeError("a frame of the wrong kind for a file")
        while body:
            body = body[os.write(self.descriptor, body) :]

    def release(self) -> int:
        """The complete file, at its beginning; it is the caller's now."""
        descriptor = os.dup(self.descriptor)
        os.lseek(descriptor, 0, os.SEEK_SET)
        self.finished = True
        return descriptor

    def acknowledge(self) -> None:
        """See `Channel`; what sends files is trusted with their size."""

    def close(self) -> None:
        """See `Channel`."""
        os.close(self.descriptor)


def _half_close(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as connection, contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)  # fails if the process is gone: the next read says so


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
