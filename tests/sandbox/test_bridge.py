"""The bridge: what crosses, what is held back, and what a hostile other side achieves (nothing)."""

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.inside import frames
from sandbox.inside.bridge import Bridge, Descriptors
from sandbox.inside.channels import MAX_WAITING, WINDOW, Pump
from sandbox.inside.frames import (
    ACK,
    CHUNK,
    CLOSE,
    DATA,
    END,
    MESSAGE,
    OPEN,
    BridgeError,
    Parser,
    frame,
    pack_number,
    pack_numbers,
)
from sandbox.probe import probe
from sandbox.process import LocalLauncher, ZygoteError, ZygoteProcess
from sandbox.records import Case, Limits, StdinTest
from sandbox.worker import Worker

LIMITS = Limits(seconds=20.0)
SECONDS = 20.0  # patience with threads on a busy machine


def message_pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        end.settimeout(SECONDS)
    return pair


def stream_pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair()
    for end in pair:
        end.settimeout(SECONDS)
    return pair


class Crossing:
    """Two bridges over a socket pair, each in a thread, and the control socket of each."""

    def __init__(self) -> None:
        self.near, near_inner = message_pair()
        self.far, far_inner = message_pair()
        left, right = (end.detach() for end in stream_pair())
        bridges = [
            Bridge(near_inner, Descriptors(left, left), opens=True),
            Bridge(far_inner, Descriptors(right, right), opens=False),
        ]
        self.threads = [threading.Thread(target=bridge.run, daemon=True) for bridge in bridges]
        for thread in self.threads:
            thread.start()

    def send(self, data: bytes, *descriptors: int) -> list[int]:
        """What arrives of `descriptors` at the far side; ours are closed."""
        socket.send_fds(self.near, [data], list(descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
        arrived, received, _, _ = socket.recv_fds(self.far, CHUNK, 8)
        assert arrived == data
        return received

    def close(self) -> None:
        self.near.close()
        self.far.close()
        for thread in self.threads:
            thread.join(SECONDS)
            assert not thread.is_alive()


@pytest.fixture
def crossing() -> Iterator[Crossing]:
    before = set(os.listdir("/proc/self/fd"))
    made = Crossing()
    yield made
    made.close()
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def memory_file(data: bytes) -> int:
    descriptor = os.memfd_create("test")
    os.write(descriptor, data)
    return descriptor


def read_all(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def test_messages_cross_both_ways_and_keep_their_borders(crossing):
    for data in (b"a", b"b" * CHUNK, b"\x00\xff"):
        crossing.near.send(data)
    assert [crossing.far.recv(1 << 20) for _ in range(3)] == [b"a", b"b" * CHUNK, b"\x00\xff"]
    crossing.far.send(b"back")
    assert crossing.near.recv(100) == b"back"


def test_files_arrive_with_their_contents_at_their_beginning(crossing):
    contents = [b"", b"x", os.urandom(3 * CHUNK + 5)]
    received = crossing.send(b"files", *[memory_file(content) for content in contents])
    assert [read_all(descriptor) for descriptor in received] == contents


def test_a_socket_carries_both_ways_and_a_half_close_stays_one(crossing):
    ours, theirs = stream_pair()
    far = socket.socket(fileno=crossing.send(b"socket", theirs.detach())[0])
    far.settimeout(SECONDS)
    ours.sendall(b"question")
    ours.shutdown(socket.SHUT_WR)
    assert far.makefile("rb").read() == b"question"
    far.sendall(b"answer")
    far.close()
    assert ours.makefile("rb").read() == b"answer"
    ours.close()


def test_a_socket_that_is_closed_far_away_breaks_here(crossing):
    ours, theirs = stream_pair()
    os.close(crossing.send(b"socket", theirs.detach())[0])
    assert ours.recv(10) == b""
    with pytest.raises(OSError):
        for _ in range(10000):
            ours.send(b"x")
    ours.close()


def test_pipes_cross_in_either_direction(crossing):
    reading, writing = os.pipe()
    fed, feeding = os.pipe()
    far_writing, far_reading = crossing.send(b"pipes", writing, fed)
    data = os.urandom(5 * WINDOW)
    feeder = threading.Thread(target=lambda: os.fdopen(feeding, "wb").write(data))
    feeder.start()
    assert read_all(far_reading) == data
    feeder.join(SECONDS)
    writer = threading.Thread(target=lambda: os.fdopen(far_writing, "wb").write(data))
    writer.start()
    assert read_all(reading) == data
    writer.join(SECONDS)


def test_a_pipe_that_nobody_reads_breaks_for_its_far_writer(crossing):
    reading, writing = os.pipe()
    far_writing = crossing.send(b"pipe", writing)[0]
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        while True:
            os.write(far_writing, b"x" * 1000)
    os.close(far_writing)


def test_orders_open_channels_of_their_own(crossing):
    """As the worker does with a judge: a socket sent over a socket that was sent."""
    orders, theirs = message_pair()
    far_orders = socket.socket(fileno=crossing.send(b"judge", theirs.detach())[0])
    far_orders.settimeout(SECONDS)
    ours, connection = stream_pair()
    socket.send_fds(orders, [b"7"], [connection.fileno()])
    connection.close()
    data, received, _, _ = socket.recv_fds(far_orders, 64, 1)
    assert data == b"7"
    far_connection = socket.socket(fileno=received[0])
    far_connection.sendall(b"names")
    assert ours.recv(100) == b"names"
    far_orders.send(b"verdict")
    assert orders.recv(100) == b"verdict"
    orders.close()
    assert far_orders.recv(100) == b""
    for end in (far_orders, ours, far_connection):
        end.close()


def test_what_nobody_reads_is_not_taken(crossing):
    """A far process that writes without end is made to wait: nothing grows on the way."""
    reading, writing = os.pipe()
    far_writing = crossing.send(b"pipe", writing)[0]
    os.set_blocking(far_writing, False)
    taken, idle = 0, 0
    while idle < 20:
        try:
            taken += os.write(far_writing, b"x" * 4096)
            idle = 0
        except BlockingIOError:
            idle += 1
            threading.Event().wait(0.02)
    pipe_buffers = 2 * (1 << 16)
    assert WINDOW <= taken <= WINDOW + pipe_buffers
    os.close(far_writing)
    assert len(read_all(reading)) == taken


@pytest.mark.parametrize("side", ["near", "far"])
def test_either_hang_up_ends_everything(side):
    before = len(os.listdir("/proc/self/fd"))
    crossing = Crossing()
    ours, theirs = stream_pair()
    far = crossing.send(b"socket", theirs.detach())[0]
    getattr(crossing, side).close()
    assert ours.recv(10) == b""
    crossing.close()
    for descriptor in (ours.detach(), far):
        os.close(descriptor)
    assert len(os.listdir("/proc/self/fd")) <= before


# --- a hostile other side -----------------------------------------------------------------------


def besieged(data: bytes) -> bytes:
    """Run a worker's bridge whose other side says `data` and hangs up.

    Its worker has sent a socket (channel 1), a pipe to be written far away (2), one to be read (3),
    a mailbox (4) and a file (5). Returns what the worker's control socket got, and the most bytes
    that were held at once.
    """
    control, inner = message_pair()
    left, right = stream_pair()
    ours = [*socket.socketpair(), *socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
    out_read, out_write = os.pipe()
    in_read, in_write = os.pipe()
    sent = [ours[1].fileno(), out_write, in_read, ours[3].fileno(), memory_file(b"x")]
    socket.send_fds(control, [b"run"], sent)
    ours[1].close()
    ours[3].close()
    for descriptor in (out_write, in_read, sent[4]):
        os.close(descriptor)
    feeder = threading.Thread(target=_say, args=(right, data), daemon=True)
    feeder.start()
    bridge = Bridge(inner, Descriptors(left.fileno(), left.detach()), opens=True)
    try:
        bridge.run()
    finally:
        right.close()
        feeder.join(SECONDS)
        control.setblocking(False)
        for end in (ours[0], ours[2]):
            end.close()
        for descriptor in (out_read, in_write):
            os.close(descriptor)
        got = b""
        while part := control.recv(1 << 20):
            got += part
        control.close()
    assert all(len(c._pending) <= WINDOW for c in bridge._channels.values() if isinstance(c, Pump))
    return got


def _say(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
    except OSError:
        return


MALFORMED = {
    "no_frame": b"\xff" * 9,
    "kind_0": frame(0, 0),
    "kind_7": frame(7, 0, b"x"),
    "huge": DATA.to_bytes(1, "big") + bytes(4) + (1 << 31).to_bytes(4, "big"),
    "just_too_large": frame(DATA, 1, b"x" * (CHUNK + 65)),
    "opens_a_channel": frame(OPEN, 6, b"s"),
    "opens_a_file": frame(OPEN, 6, b"f"),
    "reopens_a_channel": frame(OPEN, 1, b"s"),
    "channel_that_never_was": frame(DATA, 6, b"x"),
    "channel_far_away": frame(DATA, 0xFFFFFFFF, b"x"),
    "data_to_a_mailbox": frame(DATA, 4, b"x"),
    "data_to_control": frame(DATA, 0, b"x"),
    "ack_to_a_mailbox": frame(ACK, 4, pack_number(1)),
    "end_of_a_mailbox": frame(END, 4),
    "message_to_a_pump": frame(MESSAGE, 1, pack_numbers([]) + b"x"),
    "empty_message": frame(MESSAGE, 0, pack_numbers([])),
    "message_without_head": frame(MESSAGE, 0),
    "truncated_message": frame(MESSAGE, 0, b"\x02\x00\x00"),
    "message_with_a_descriptor": frame(MESSAGE, 0, pack_numbers([1]) + b"x"),
    "message_with_the_file": frame(MESSAGE, 0, pack_numbers([5]) + b"x"),
    "message_after_close": frame(CLOSE, 4) + frame(MESSAGE, 4, pack_numbers([]) + b"x"),
    "data_after_end": frame(END, 1) + frame(DATA, 1, b"x"),
    "data_into_a_pipe_to_read": frame(DATA, 3, b"x"),
    "end_of_a_pipe_to_read": frame(END, 3),
    "beyond_the_window": b"".join(frame(DATA, 1, b"x" * CHUNK) for _ in range(40)),
    "ack_of_nothing": frame(ACK, 1, pack_number(1)),
    "ack_too_short": frame(ACK, 1, b"\x01"),
    "ack_overflow": frame(ACK, 1, pack_number(0xFFFFFFFF)),
    "more_messages_than_taken": frame(MESSAGE, 4, pack_numbers([]) + b"x" * CHUNK)
    * (MAX_WAITING * 4),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_frames_end_the_bridge(name):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BridgeError):
        besieged(MALFORMED[name])
    assert len(os.listdir("/proc/self/fd")) <= before


def test_an_end_in_the_middle_of_a_frame_is_no_crime():
    got = besieged(frame(MESSAGE, 0, pack_numbers([]) + b"answer") + frame(DATA, 2, b"x")[:4])
    assert got == b"answer"


def test_frames_that_crossed_our_farewell_are_no_crime():
    control, inner = message_pair()
    left, right = stream_pair()
    bridge = Bridge(inner, Descriptors(left.fileno(), left.detach()), opens=True)
    thread = threading.Thread(target=bridge.run, daemon=True)
    thread.start()
    ours, theirs = stream_pair()
    socket.send_fds(control, [b"run"], [theirs.fileno()])
    ours.close()
    theirs.close()
    parser = Parser()
    kinds: list[tuple[int, int]] = []
    while (CLOSE, 1) not in kinds:
        kinds += [(kind, number) for kind, number, _ in parser.feed(right.recv(1 << 16))]
    right.sendall(frame(DATA, 1, b"late") + frame(ACK, 1, pack_number(4)) + frame(CLOSE, 1))
    right.sendall(frame(MESSAGE, 0, pack_numbers([]) + b"answer"))
    assert control.recv(100) == b"answer"
    control.close()
    thread.join(SECONDS)
    assert not thread.is_alive()
    right.close()


numbers = st.integers(0, 6)
some_frames = st.builds(frame, st.integers(1, 6), numbers, st.binary(max_size=80))
long_frames = st.builds(frame, st.just(DATA), numbers, st.just(b"x" * CHUNK))
messages = st.builds(
    lambda number, listed, data: frame(MESSAGE, number, pack_numbers(listed) + data),
    numbers,
    st.lists(numbers, max_size=2),
    st.binary(max_size=50),
)


@settings(max_examples=150)
@given(st.lists(some_frames | messages | long_frames | st.binary(max_size=30), max_size=30))
def test_no_bytes_do_anything_but_end_the_bridge(parts):
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.suppress(BridgeError):
        besieged(b"".join(parts))
    assert len(os.listdir("/proc/self/fd")) <= before


@given(st.lists(some_frames, max_size=8), st.lists(st.integers(0, 1000), max_size=8))
def test_frames_are_the_same_however_they_are_cut(sent, cuts):
    whole = b"".join(sent)
    borders = sorted({min(cut, len(whole)) for cut in cuts} | {0, len(whole)})
    parser = Parser()
    pieces = [whole[start:end] for start, end in zip(borders, borders[1:], strict=False)]
    found = [item for piece in pieces for item in parser.feed(piece)]
    assert [frame(*item) for item in found] == sent


def test_numbers_are_packed_and_unpacked():
    assert frames.unpack_numbers(pack_numbers([1, 70000]) + b"rest") == ([1, 70000], b"rest")
    assert frames.number(pack_number(4_000_000_000)) == 4_000_000_000


# --- zygotes beyond a bridge --------------------------------------------------------------------

CASES = [
    Case(id="ok", code="def f(x): return [x]", tests=("assert f(1) == [1]", "assert f(1) == 1")),
    Case(id="exit", code="import os\ndef f(): os._exit(0)", tests=("assert f() is None",)),
    Case(id="crash", code="import os\ndef f(): os.abort()", tests=("assert f() is None",)),
    Case(
        id="slow",
        code="def f():\n    while True: pass",
        tests=("assert f()",),
        limits=Limits(seconds=0.5),
    ),
    Case(
        id="big",
        code="def f(n): return 'x' * n",
        tests=("assert len(f(3000000)) == 3000000", "assert len(f(9000000)) == 1"),
    ),
    Case(
        id="mutates", code="def f(a): a.append(a[0])", tests=("a=[[]]\nf(a)\nassert a[0] is a[1]",)
    ),
    Case(id="callback", code="def f(g): return g(2)", tests=("assert f(lambda x: x * 3) == 6",)),
    Case(id="invalid", code="", tests=("assert (",)),
    Case(
        id="stdin",
        code="import sys\nfor line in sys.stdin: print(line.strip()[::-1])",
        stdin_tests=(StdinTest("ab\ncd\n", "ba\ndc"), StdinTest("ab", "ab")),
    ),
    Case(id="flood", code="while True: print('x' * 9999)", stdin_tests=(StdinTest("", ""),)),
    Case(
        id="stderr",
        code="import sys\nsys.stderr.write('e' * 10**6)\nprint(1)\nsys.exit(3)",
        stdin_tests=(StdinTest("", "1"),),
    ),
]


def outcomes(worker: Worker) -> list[tuple[str, str, list[tuple[str, str]]]]:
    results = [worker.run(case) for case in CASES]
    worker.close()
    return [(r.id, r.status, [(t.verdict, t.message) for t in r.tests]) for r in results]


def test_a_bridge_changes_no_verdict(pipe_launcher):
    level = probe().level
    level = "unsafe" if level == "namespace" else level  # what is the same in both
    near = outcomes(Worker("here", LocalLauncher(level)))
    assert outcomes(Worker("there", pipe_launcher(level))) == near
    assert [outcome[2][0][0] for outcome in near if outcome[2]][:4] == [
        "pass", "exited", "crash", "timeout"
    ]  # fmt: skip


def test_a_far_end_that_dies_costs_a_retry(pipe_launcher):
    launcher = pipe_launcher("unsafe")
    worker = Worker("there", launcher)
    try:
        assert worker.run(CASES[0]).passed == 1
        for zygote in worker._zygotes.values():
            os.killpg(zygote.home.process.pid, signal.SIGKILL)
        assert worker.run(CASES[0]).passed == 1
        assert sorted(launcher.started) == ["candidate", "candidate", "judge", "judge"]
    finally:
        worker.close()


def test_a_far_end_that_speaks_no_sense_is_an_infra_error(pipe_launcher, monkeypatch):
    sources = {"sandbox": "", "sandbox.inside": "", "sandbox.inside.container": NONSENSE}
    monkeypatch.setattr("sandbox.remote._sources", lambda: sources)
    worker = Worker("there", pipe_launcher("unsafe"))
    result = worker.run(CASES[0])
    worker.close()
    assert result.status == "infra_error"
    assert "no frame" in result.tests[0].message


NONSENSE = "def main(options):\n    import os\n    os.write(1, b'HTTP/1.1 200 OK and so on')"


@pytest.mark.parametrize(
    "answer",
    [
        b"{", b"[]", b"[" * 60000, b'{"status": "0", "cpu": 0.0, "excess": "", "refused": ""}',
        b'{"status": 4095, "cpu": 0.0, "excess": "", "refused": ""}',
        b'{"status": 0, "cpu": [], "excess": "", "refused": ""}',
        b'{"status": 0, "cpu": 0.0, "excess": "all", "refused": ""}',
        b'{"status": 0, "cpu": 0.0, "excess": "", "refused": "no seccomp"}', b"\xff",
    ],
)  # fmt: skip
def test_answers_of_a_zygote_are_not_trusted(answer):
    class Home:
        def __init__(self) -> None:
            self.control, self.far = message_pair()
            self.far.send(b'{"ready": 1}')

        def limit(self, role: str, limits: object) -> None:
            pass

        def why(self) -> str:
            return ""

        def stop(self) -> None:
            self.control.close()

    class Launcher(LocalLauncher):
        def start(self, role: str) -> Home:
            return Home()

    zygote = ZygoteProcess(Launcher("unsafe"))
    zygote.home.far.send(answer)
    with pytest.raises(ZygoteError):
        zygote.wait(SECONDS)
    zygote.close()


def test_the_sources_are_sent_whole():
    from sandbox.remote import greeting

    data = greeting("main", {"level": "unsafe"})
    size = int.from_bytes(data[:8], "big")
    content = json.loads(data[8:])
    assert size == len(data) - 8
    assert {"sandbox", "sandbox.inside", "sandbox.inside.zygote"} <= set(content["files"])
    assert content["start"] == ["sandbox.inside.container", "main", {"level": "unsafe"}]
