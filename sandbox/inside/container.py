"""The first process of a container: looks around, starts the zygote, then bridges to it.

Its standard input and output are the stream to the worker. Process 1 of its namespace: what it
leaves when it ends, the kernel kills.
"""

import json
import os
import socket
from typing import Any, NoReturn

from sandbox.inside import promises, syscalls, zygote
from sandbox.inside.bridge import Bridge, Descriptors


def main(options: dict[str, Any]) -> NoReturn:
    """Serve as options["level"]; options["promised"]: refuse where the engine broke its word.

    options["toolchains"]: see `zygote.main`.
    """
    # Before the fork, for both: a candidate is of the same uid and must not see their memory.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
    broken = promises.facts(options["folder"]) if options["promised"] else []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if broken:
        theirs.send(json.dumps({"error": "; ".join(broken)}).encode())
    elif os.fork() == 0:
        ours.close()
        _become_zygote(theirs.detach(), options)
    theirs.close()
    Bridge(ours, Descriptors(0, 1), opens=False).run()
    os._exit(0)


def _become_zygote(control: int, options: dict[str, Any]) -> NoReturn:
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in range(3):
        os.dup2(null, descriptor)
    os.close(null)
    settings = {name: options.get(name) for name in ("level", "folder", "toolchains")}
    zygote.main({"control": control, **settings})


def examine(options: dict[str, Any]) -> NoReturn:
    """Print what holds in a container like this one: one line of JSON, then maybe a second.

    {"broken": [...], "level": ...}, then {"broken": [...]} of the limits. An engine that kills the
    whole container for breaking a limit kept it: then there is no second line.
    """
    first: dict[str, Any] = {"broken": promises.facts(options["folder"]), "level": None}
    try:
        first["level"] = options["level"] or promises.level(options["folder"])
    except OSError as error:
        first["broken"].append(str(error))
    print(json.dumps(first), flush=True)
    limits = promises.limits(
        options["memory_mib"], options["processes"], options["disk_mib"], options["folder"]
    )
    print(json.dumps({"broken": limits}), flush=True)
    os._exit(0)
