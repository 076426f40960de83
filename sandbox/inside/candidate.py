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
from sandbox.inside.peer import Channel, Lost, Peer, describe

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
        names = _load(payload, "candidate")
        peer = Peer(channel, opaque=True)
        offered = {name: names[name] for name in channel.receive() if name in names}
        channel.send(["ready", peer.codec.encode(offered, Table())])
        while True:
            peer.answer(channel.receive())
    except SystemExit as error:
        _EXIT(_exit_code(error))
    except Lost:
        _EXIT(0)
    except BaseException as error:
        with contextlib.suppress(BaseException):
            channel.send(["error", describe(error)])
        _EXIT(0)


def _load(payload: dict[str, Any], module_name: str) -> dict[str, Any]:
    module = types.ModuleType(module_name)
    sys.modules[module_name] = module  # dataclasses and typing look their module up
    names = module.__dict__
    for name in ("exit", "quit"):  # `site`, which is not loaded here, would define them
        setattr(builtins, name, _sitebuiltins.Quitter(name, ""))
    if payload["setup"]:
        exec(compile(payload["setup"], "<setup>", "exec"), names)
    exec(compile(payload["code"], "<solution>", "exec"), names)
    return names


def _stream(descriptor: int, mode: Literal["r", "w"], errors: str) -> io.TextIOWrapper:
    stream = open(descriptor, mode, encoding="utf-8", errors=errors, closefd=False)
    assert isinstance(stream, io.TextIOWrapper)
    return stream


def run_program(payload: dict[str, Any]) -> None:
    """Run the candidate as a script on descriptors 0, 1 and 2. Never returns."""
    sys.stdin = sys.__stdin__ = _stream(0, "r", "strict")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _stream(1, "w", "strict")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2, "w", "backslashreplace")  # type: ignore[misc]
    code = 0
    try:
        _load(payload, "__main__")
    except SystemExit as error:
        code = _exit_code(error)
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


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1
