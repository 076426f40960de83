"""The process that runs a test. Candidate code never runs here; only data and handles come in.

What a test's text says is done by this interpreter: its comparisons, its builtins, its imports.
The verdict goes to a descriptor that the candidate's process never had. One judge for the tests
of a case, one candidate process for each.
"""

import ast
import contextlib
import json
import socket
import sys
import traceback
import types
from dataclasses import asdict
from typing import Any

from sandbox.inside import mutate, names
from sandbox.inside.codec import CodecError, Table
from sandbox.inside.peer import Channel, Lost, Peer, TooLong

_MESSAGE_CHARS = 400
CONTROLS = "controls "
"""Begins the order for a test's `mutate.Plan`; the test's number follows."""
Outcome = tuple[str, str]


def serve(payload: dict[str, Any], orders: socket.socket, max_bytes: int) -> None:
    """Judge the tests of one case until the worker hangs up.

    An order is a test's number, with the descriptor of the channel to a fresh candidate process.
    The answer is one JSON object: "verdict" is one of the contract's, or `lost` (the candidate
    ended: how, its parent knows), or `invalid` (setup or test do not compile or the setup fails:
    no candidate could pass), or `uncarriable` (the test passes what only a shared process can);
    "message" says more. Every test has a namespace of its own.

    CONTROLS and a number order the `mutate.Plan` of a test instead, as JSON into the descriptor;
    no other answer.
    """
    while True:
        data, descriptors, _, _ = socket.recv_fds(orders, 64, 1)
        if not data:
            return
        order = data.decode()
        with socket.socket(fileno=descriptors[0]) as connection:
            if order.startswith(CONTROLS):
                _send_plan(payload, int(order.removeprefix(CONTROLS)), connection)
                continue
            verdict, message = _judge(payload, int(order), Channel(connection, max_bytes))
        text = message[:_MESSAGE_CHARS].encode("utf-8", "backslashreplace").decode()
        orders.send(json.dumps({"verdict": verdict, "message": text}).encode())


def _judge(payload: dict[str, Any], index: int, channel: Channel) -> Outcome:
    module = types.ModuleType("test")
    sys.modules["test"] = module
    scope = module.__dict__
    try:
        setup = ast.parse(payload["setup"], "<setup>")
        test = ast.parse(payload["tests"][index], "<test>")
        test_code = compile(test, "<test>", "exec")
        exec(compile(setup, "<setup>", "exec"), scope)
    except BaseException as error:
        return "invalid", f"setup or test: {_summary(error)}"
    peer = Peer(channel, opaque=False)
    wanted, supplied = names.resolve([setup, test], payload["entry_point"], scope)
    try:
        channel.send(wanted)
        first = channel.receive()
        if first[0] != "ready":
            return _refusal(first)
        scope |= supplied
        scope |= _dictionary(peer.codec.decode(first[1], Table()), wanted)
    except TooLong as error:
        return "output_limit", str(error)
    except (Lost, CodecError, TypeError, ValueError, LookupError) as error:
        return "lost", str(error)
    return _run(test_code, scope, peer)


def _send_plan(payload: dict[str, Any], index: int, connection: socket.socket) -> None:
    setup = ast.parse(payload["setup"], "<setup>")
    test = ast.parse(payload["tests"][index], "<test>")
    scope: dict[str, Any] = {"__name__": "test"}
    exec(compile(setup, "<setup>", "exec"), scope)
    theirs, _ = names.resolve([setup, test], payload["entry_point"], scope)
    found = mutate.plan(test, set(theirs), seed=f"controls {index}")
    with contextlib.suppress(OSError):  # the worker gave up: it says why
        connection.sendall(json.dumps(asdict(found)).encode())


def _dictionary(value: Any, wanted: list[str]) -> dict[str, Any]:
    """Only the names asked for: the candidate must not bind any other name of the test."""
    if type(value) is not dict or not value.keys() <= set(wanted):
        raise CodecError("malformed message: names")
    return value


def _refusal(first: Any) -> Outcome:
    own_name, arguments = first[1][1:3]
    verdict = "oom" if own_name == "MemoryError" else "fail"
    return verdict, f"loading: {own_name}: {_shown(arguments)}"


def _run(test_code: types.CodeType, scope: dict[str, Any], peer: Peer) -> Outcome:
    outcome: Outcome = ("pass", "")
    try:
        exec(test_code, scope)
    except MemoryError as error:
        outcome = ("oom", _summary(error))
    except BaseException as error:
        outcome = ("fail", _summary(error))
    # Sticky, whatever the test's own `except` did with them.
    if peer.uncarriable is not None:
        message = f"{peer.uncarriable}, which cannot cross to the candidate's process"
        return peer.uncarriable.verdict, message
    if isinstance(peer.lost, TooLong):
        return "output_limit", str(peer.lost)
    if peer.lost is not None:
        return "lost", str(peer.lost)
    return outcome


def _summary(error: BaseException) -> str:
    try:
        line = next(
            (f.lineno for f in reversed(traceback.extract_tb(error.__traceback__))
             if f.filename == "<test>"), None,
        )  # fmt: skip
        where = f" (line {line} of the test)" if line else ""
        text = str(error)
        return f"{type(error).__name__}{': ' if text else ''}{text[:_MESSAGE_CHARS]}{where}"
    except Exception:  # a message that cannot be shown must not cost the verdict
        return type(error).__name__


def _shown(value: Any) -> str:
    items = value if type(value) is list else [value]
    return ", ".join(item if type(item) is str else repr(item)[:100] for item in items)
