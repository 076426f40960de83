"""A zygote at the far end of a byte stream: the code that is sent there, the thread that bridges.

Whatever there is at the far end - a container, in tests a process - it needs python3 and nothing of
ours: the sources go first. Not how the far end is started (`sandbox.docker`).
"""

import functools
import json
import socket
import threading
from pathlib import Path
from typing import Any

from sandbox.inside.bridge import Bridge, BridgeError, Stream

_STOP_SECONDS = 5.0
_OLDEST = (3, 10)
# Reads a size and so much JSON from its standard input: {"files": {module: source}, "start":
# [module, function, options]}. From then on the input is the stream.
_BOOT = f"""
import sys
if sys.version_info < {_OLDEST}:
    sys.exit('needs Python %d.%d or newer, but is %d.%d' % ({_OLDEST} + sys.version_info[:2]))
import importlib, importlib.machinery, json, os
def read(size):
    data = b''
    while len(data) < size:
        part = os.read(0, size - len(data))
        if not part:
            sys.exit('the worker hung up')
        data += part
    return data
sent = json.loads(read(int.from_bytes(read(8), 'big')))
files = sent['files']
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in files:
            package = any(other.startswith(name + '.') for other in files)
            return importlib.machinery.ModuleSpec(name, self, is_package=package)
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        name = module.__name__
        exec(compile(files[name], '<' + name + '>', 'exec'), module.__dict__)
sys.meta_path.insert(0, Finder())
module, function, options = sent['start']
getattr(importlib.import_module(module), function)(options)
"""
BOOT_COMMAND = ("-I", "-S", "-E", "-B", "-c", _BOOT)


def greeting(function: str, options: dict[str, Any]) -> bytes:
    """What the far end reads first: the sources and what to call in `sandbox.inside.container`."""
    start = ["sandbox.inside.container", function, options]
    content = json.dumps({"files": _sources(), "start": start}).encode()
    return len(content).to_bytes(8, "big") + content


@functools.cache
def _sources() -> dict[str, str]:
    root = Path(__file__).resolve().parent
    names = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text("utf-8")
    return names


class BridgedHome:
    """The worker's side of a zygote at the far end of `stream`; a `sandbox.process.Home`.

    Ending it closes the stream: then the far end has to go by itself, or be ended by who made it.
    """

    def __init__(self, stream: Stream, first_bytes: bytes) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._why = ""
        bridge = Bridge(theirs, stream, opens=True, greeting=first_bytes)
        self._thread = threading.Thread(
            target=self._pump, args=(bridge,), name="sandbox-bridge", daemon=True
        )
        self._thread.start()

    def _pump(self, bridge: Bridge) -> None:
        try:
            bridge.run()
        except (BridgeError, OSError) as error:
            self._why = str(error)

    def limit(self, role: str, limits: dict[str, Any]) -> None:
        """What bounds the sum is set around the far end, once and for all."""

    def why(self) -> str:
        """What ended the bridge, if anything unusual."""
        self._thread.join(_STOP_SECONDS)
        return self._why

    def stop(self) -> None:
        """Hang up; returns when the stream is closed."""
        self.control.close()
        self._thread.join(_STOP_SECONDS)
