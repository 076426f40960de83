"""The process in which untrusted code runs. It returns data; nothing it says is a verdict."""

import _sitebuiltins
import atexit
import builtins
import contextlib
import io
import os
import socket
import sys
import threading
import traceback
import types
from typing import Any, Literal

from sandbox.inside.codec import Table
from sandbox.inside.errors import describe
from sandbox.inside.peer import Channel, Lost, Peer

_SHUTDOWN = getattr(threading, "_shutdown", None)  # before the candidate can replace it
_ATEXIT = atexit._run_exitfuncs
_EXIT = os._exit


def serve_calls(payload: dict[str, Any], connection: socket.socket, max_bytes: int) -> None:
    """Load the candidate, then do what the judge asks until it hangs up. Never returns.

    The judge first sends the names it wants. The answer: ["ready", their encoded values], without
    those that do not exist, or ["error", [class, own class, args]].
    """
    channel = Channel(connection, max_bytes)
    try:
        channel.send(_first_answer(payload, channel, peer := Peer(channel, opaque=True)))
        while True:
            peer.answer(channel.receive())
    except SystemExit as error:
        _EXIT(exit_code(error))
    except Lost:
        _EXIT(0)
    except BaseException:  # KeyboardInterrupt, GeneratorExit: would end plain Python as well
        _EXIT(1)


def _first_answer(payload: dict[str, Any], channel: Channel, peer: Peer) -> list[Any]:
    try:
        names = _load(payload, "candidate")
    except (SystemExit, Lost):
        raise
    except BaseException as error:
        channel.receive()  # hanging up on a message that was not read would look like an exit
        return ["error", describe(error)]
    offered = {name: names[name] for name in channel.receive() if name in names}
    return ["ready", peer.codec.encode(offered, Table())]


def load(source: str, module_name: str) -> dict[str, Any]:
    """The names of a new module after executing `source` in it, the first to be executed here."""
    module = types.ModuleType(module_name)
    sys.modules[module_name] = module  # dataclasses and typing look their module up
    for name in ("exit", "quit"):  # `site`, which is not loaded here, would define them
        setattr(builtins, name, _sitebuiltins.Quitter(name, ""))
    if source:
        exec(compile(source, "<setup>", "exec"), module.__dict__)
    return module.__dict__


def _load(payload: dict[str, Any], module_name: str) -> dict[str, Any]:
    names = load(payload["setup"], module_name)
    exec(compile(payload["code"], "<solution>", "exec"), names)
    return names


def _stream(descriptor: int, mode: Literal["r", "w"], errors: str) -> io.TextIOWrapper:
    raw = io.FileIO(descriptor, mode, closefd=False)
    buffered = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, encoding="utf-8", errors=errors)


def run_program(payload: dict[str, Any]) -> None:
    """Run the candidate as a script on descriptors 0, 1 and 2. Never returns."""
    sys.stdin = sys.__stdin__ = _stream(0, "r", "strict")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _stream(1, "w", "strict")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2, "w", "backslashreplace")  # type: ignore[misc]
    code = 0
    try:
        _load(payload, "__main__")
    except SystemExit as error:
        code = exit_code(error)
    except BaseException:
        code = 1
        with contextlib.suppress(BaseException):
            traceback.print_exc()
    try:
        if _SHUTDOWN is not None:
            _SHUTDOWN()
        _ATEXIT()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        code = code or 120  # as Python itself reports output that could not be flushed
    _EXIT(code)


def exit_code(error: SystemExit) -> int:
    """The exit status that Python would give it."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1
