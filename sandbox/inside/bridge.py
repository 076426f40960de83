"""The control socket of a zygote over one byte stream: messages, descriptors and all.

A `Bridge` stands at each end of the stream. Beside it is a local process that sends descriptors:
files cross with their contents, sockets and pipes become channels whose bytes are pumped both
ways. So a worker speaks to a zygote in a container as it speaks to one on its own machine. Not how
the container is started (`sandbox.docker`), not what the messages say (`zygote`).

One side opens channels: the worker's. It believes the other nothing: the size and number of all
that can arrive are capped.
"""

import fcntl
import os
import select
import socket
import stat
import time
from typing import Protocol

from sandbox.inside import frames
from sandbox.inside.channels import Channel, Contents, Mailbox, Pump
from sandbox.inside.frames import CHUNK, DATA, OPEN, BridgeError

_CONTROL = 0
_MAX_CHANNELS = 64
_HIGH_WATER = 1 << 20  # bytes waiting for the stream above which nothing more is read for it
_FLUSH_SECONDS = 1.0

# What a descriptor is, in an OPEN frame. FILL, DRAIN: a pipe that the far process writes, reads.
_FILE, _SOCKET, _MAILBOX, _FILL, _DRAIN = b"f", b"s", b"m", b"w", b"r"


class Stream(Protocol):
    """A byte stream that never blocks."""

    def descriptors(self) -> tuple[int, int]:
        """What to poll for reading and for writing (may be the same)."""

    def read(self) -> bytes | None:
        """What is there; None if nothing is now, b"" at the end."""

    def write(self, data: bytes) -> int:
        """How much of it was taken; 0 if nothing is now. Raises OSError."""

    def close(self) -> None:
        """Nothing more either way."""


class Descriptors:
    """A stream of two descriptors."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        for descriptor in (reading, writing):
            os.set_blocking(descriptor, False)

    def descriptors(self) -> tuple[int, int]:
        """See `Stream`."""
        return self._reading, self._writing

    def read(self) -> bytes | None:
        """See `Stream`."""
        try:
            return os.read(self._reading, 4 * CHUNK)
        except BlockingIOError:
            return None
        except ConnectionError:
            return b""

    def write(self, data: bytes) -> int:
        """See `Stream`."""
        try:
            return os.write(self._writing, data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """See `Stream`."""
        for descriptor in {self._reading, self._writing}:
            os.close(descriptor)


class Bridge:
    """One side. `opens`: it is the worker's; `greeting`: bytes to send before the first frame."""

    def __init__(
        self, control: socket.socket, stream: Stream, *, opens: bool, greeting: bytes = b""
    ) -> None:
        self._stream = stream
        self._opens = opens
        self._parser = frames.Parser()
        self._out = bytearray(greeting)
        self._channels: dict[int, Channel] = {_CONTROL: Mailbox(self, _CONTROL, control)}
        self._next = _CONTROL + 1
        self._gifts: dict[int, int] = {}  # descriptors for a message that is still to come

    def run(self) -> None:
        """Pump until the stream ends, or the process at either control socket hangs up.

        Raises BridgeError if the other side broke the rules. Everything is closed afterwards.
        """
        try:
            while self._step():
                pass
            self._flush_last()
        finally:
            self._close()

    def _step(self) -> bool:
        ready = self._wait()
        # Local descriptors first: what arrives may close them, and their numbers be used again.
        for channel in list(self._channels.values()):
            events = ready.get(channel.descriptor)
            if events:
                channel.tend(events)
        if self._stream.descriptors()[0] in ready and not self._take():
            return False
        if len(self._out) < _HIGH_WATER:
            for channel in self._channels.values():
                channel.acknowledge()
        for number in [n for n, channel in self._channels.items() if channel.finished]:
            self._channels.pop(number).close()
        return self._flush() and _CONTROL in self._channels

    def _wait(self) -> dict[int, int]:
        poll = select.poll()
        may_send = len(self._out) < _HIGH_WATER
        for channel in self._channels.values():
            events = channel.interest(may_send)
            if events is not None:
                poll.register(channel.descriptor, events)
        reading, writing = self._stream.descriptors()
        wanted = {reading: select.POLLIN}
        if self._out:
            wanted[writing] = wanted.get(writing, 0) | select.POLLOUT
        for descriptor, events in wanted.items():
            poll.register(descriptor, events)
        return dict(poll.poll())

    def _take(self) -> bool:
        data = self._stream.read()
        if data is None:
            return True
        for kind, number, body in self._parser.feed(data):
            if kind == OPEN:
                self._open(number, body)
            elif number in self._channels:
                self._channels[number].receive(kind, body)
            elif number >= self._next:
                raise BridgeError("a frame for a channel that never was")
            # Else it crossed our own farewell.
        if not data:
            self._out.clear()  # nobody is there to read it
        return bool(data)

    def _open(self, number: int, kind: bytes) -> None:
        if self._opens or number != self._next or len(self._channels) >= _MAX_CHANNELS:
            raise BridgeError("a channel that nobody asked for")
        self._next += 1
        if kind == _FILE:
            self._channels[number] = Contents()
            return
        if kind in (_SOCKET, _MAILBOX):
            family = socket.SOCK_STREAM if kind == _SOCKET else socket.SOCK_SEQPACKET
            ours, theirs = socket.socketpair(socket.AF_UNIX, family)
            self._gifts[number] = theirs.detach()
            self._channels[number] = (
                Pump(self, number, ours.detach(), reads=True, writes=True)
                if kind == _SOCKET
                else Mailbox(self, number, ours)
            )
            return
        if kind not in (_FILL, _DRAIN):
            raise BridgeError("a channel of no known kind")
        reading, writing = os.pipe()
        fills = kind == _FILL
        self._gifts[number] = writing if fills else reading
        kept = reading if fills else writing
        self._channels[number] = Pump(self, number, kept, reads=fills, writes=not fills)

    def send(self, kind: int, channel: int, body: bytes = b"") -> None:
        """See `channels.Side`."""
        self._out += frames.frame(kind, channel, body)

    def offer(self, descriptors: list[int]) -> list[int]:
        """See `channels.Side`."""
        if descriptors and not self._opens:
            raise BridgeError("only the worker's side sends descriptors")
        return [self._offer(descriptor) for descriptor in descriptors]

    def _offer(self, descriptor: int) -> int:
        number = self._next
        self._next += 1
        kind = _kind(descriptor)
        self.send(OPEN, number, kind)
        if kind == _FILE:
            self._send_file(number, descriptor)
            os.close(descriptor)
        elif kind == _MAILBOX:
            self._channels[number] = Mailbox(self, number, socket.socket(fileno=descriptor))
        else:
            reads, writes = kind in (_SOCKET, _DRAIN), kind in (_SOCKET, _FILL)
            self._channels[number] = Pump(self, number, descriptor, reads=reads, writes=writes)
        return number

    def _send_file(self, number: int, descriptor: int) -> None:
        offset = 0
        while data := os.pread(descriptor, CHUNK, offset):
            self.send(DATA, number, data)
            offset += len(data)

    def claim(self, numbers: list[int]) -> list[int]:
        """See `channels.Side`."""
        claimed = []
        for number in numbers:
            channel = self._channels.get(number)
            if isinstance(channel, Contents) and not channel.finished:
                claimed.append(channel.release())
            elif number in self._gifts:
                claimed.append(self._gifts.pop(number))
            else:
                raise BridgeError("a message with a descriptor that was never sent")
        return claimed

    def _flush(self) -> bool:
        """Give the stream what it takes; False if nobody is there."""
        try:
            while self._out:
                count = self._stream.write(bytes(self._out[: 4 * CHUNK]))
                if not count:
                    break
                del self._out[:count]
        except OSError:
            return False
        return True

    def _flush_last(self) -> None:
        deadline = time.monotonic() + _FLUSH_SECONDS
        writing = self._stream.descriptors()[1]
        while self._flush() and self._out and (left := deadline - time.monotonic()) > 0:
            poll = select.poll()
            poll.register(writing, select.POLLOUT)
            poll.poll(left * 1000)

    def _close(self) -> None:
        for channel in self._channels.values():
            channel.close()
        for descriptor in self._gifts.values():
            os.close(descriptor)
        self._stream.close()


def _kind(descriptor: int) -> bytes:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return _FILE
    if stat.S_ISFIFO(mode):
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        return _FILL if access == os.O_WRONLY else _DRAIN
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        return _SOCKET if connection.type == socket.SOCK_STREAM else _MAILBOX
