"""A Docker engine, through docker-py: the only file that knows it. Not what runs in a container.

Every container is made with the same restrictions: no network, no capabilities, no new privileges,
a read-only root with one small writable place in memory, a user of its own, limits on memory and
processes. Whether they hold is found out by `sandbox.docker`.
"""

import contextlib
import functools
import logging
import os
import random
import socket
import ssl
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.records import SandboxError

LABEL = "unmask.sandbox"
FOLDER = "/tmp"  # the writable place
_DEFAULT_ADDRESS = "unix:///var/run/docker.sock"
_READ_BYTES = 1 << 18
_ERRORS_KEPT = 2000
_FILES = 4096
# A user id for each container, or the limit on processes would count those of all of them. Above
# the ids of people, below those that a rootless engine may not have.
_USERS = range(20_000, 60_000)
_LOG = logging.getLogger(__name__)


class EngineError(Exception):
    """The engine did not do as asked, or is gone. One line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One container to start: `command` in `image`, with what it may use."""

    image: str
    command: Sequence[str]
    runtime: str | None
    memory_mib: int
    disk_mib: int
    processes: int


class Engine:
    """The engine at `host` (None: DOCKER_HOST, else the local socket). Threads may share it.

    Raises:
        SandboxError: docker-py is missing, or no engine answers.
    """

    def __init__(self, host: str | None = None, timeout: float = 60.0) -> None:
        try:
            import docker
        except ImportError:
            raise SandboxError(
                "backend 'docker' needs docker-py; install it: pip install -e '.[docker]'"
            ) from None
        self._docker: Any = docker
        settings = docker.utils.kwargs_from_env()
        if host is not None:
            settings["base_url"] = host
        self.address = settings.get("base_url") or _DEFAULT_ADDRESS
        try:
            self._client: Any = docker.APIClient(version="auto", timeout=timeout, **settings)
        except (docker.errors.DockerException, OSError, ValueError) as error:
            raise SandboxError(
                f"backend 'docker': no engine answers at {self.address}; start it, or name another "
                f"with DOCKER_HOST ({_brief(error)})"
            ) from None

    def describe(self) -> str:
        """Version, storage driver and runtimes, in one line. Raises EngineError."""
        with self._errors():
            info = self._client.info()
        runtimes = ", ".join(sorted(info["Runtimes"]))
        return f"engine {info['ServerVersion']}, storage {info['Driver']}, runtimes {runtimes}"

    def check(self, image: str, runtime: str | None) -> None:
        """Raises SandboxError if either is missing here; warns once about slow storage."""
        try:
            with self._errors():
                info = self._client.info()
                found = self._inspect(image)
        except EngineError as error:
            raise SandboxError(f"backend 'docker': {error}") from None
        if runtime is not None and runtime not in info["Runtimes"]:
            known = ", ".join(sorted(info["Runtimes"]))
            raise SandboxError(
                f"docker.runtime: {runtime!r} is unknown to the engine at {self.address}, which "
                f"has {known}; install it and name it in /etc/docker/daemon.json"
            )
        if not found:
            raise SandboxError(
                f"docker.image: the engine at {self.address} has no image {image!r}; build it: "
                f"docker build -t {image} -f deploy/sandbox/Dockerfile ."
            )
        if info["Driver"] == "vfs":
            _warn_about_vfs(self.address)

    def _inspect(self, image: str) -> bool:
        try:
            return bool(self._client.inspect_image(image))
        except self._docker.errors.ImageNotFound:
            return False

    def remove_orphans(self) -> int:
        """Remove the containers of owners that are gone; how many. Raises EngineError."""
        with self._errors():
            listed = self._client.containers(all=True, filters={"label": LABEL})
            orphans = [c["Id"] for c in listed if _is_orphan(c["Labels"][LABEL])]
            for name in orphans:
                self._remove(name)
        return len(orphans)

    def start(self, request: Request) -> "Container":
        """Raises EngineError."""
        with self._errors():
            name = self._create(request)
        try:
            with self._errors():
                # Attached first: nothing it says is lost.
                params = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
                stream = AttachedStream(self._client.attach_socket(name, params))
                self._client.start(name)
        except EngineError:
            self.remove(name)
            raise
        return Container(self, name, stream)

    def _create(self, request: Request) -> str:
        memory = f"{request.memory_mib}m"
        options = f"size={request.disk_mib}m,nr_inodes={_FILES},mode=1777,nosuid,nodev,exec"
        limits = self._client.create_host_config(
            network_mode="none",
            ipc_mode="none",  # no /dev/shm
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            read_only=True,
            tmpfs={FOLDER: options},
            mem_limit=memory,
            memswap_limit=memory,
            pids_limit=request.processes,
            auto_remove=True,
            runtime=request.runtime,
            log_config={"type": "none"},  # or the engine would write every byte to its disk
        )
        user = random.SystemRandom().choice(_USERS)
        return self._client.create_container(
            request.image,
            entrypoint=list(request.command),
            user=f"{user}:{user}",
            working_dir="/",
            stdin_open=True,
            healthcheck={"test": ["NONE"]},
            labels={LABEL: _owner()},
            host_config=limits,
        )["Id"]

    def remove(self, name: str) -> None:
        """Kill and remove a container; if the engine is gone, only logs what may be left."""
        try:
            with self._errors():
                self._remove(name)
        except EngineError as error:
            _LOG.warning("container %s may be left: %s", name[:12], error)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(self._docker.errors.NotFound):
            try:
                self._client.remove_container(name, force=True, v=True)
            except self._docker.errors.APIError as error:
                if error.status_code != 409:
                    raise
                self._client.wait(name, condition="removed")  # it went by itself, and is going

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (self._docker.errors.DockerException, OSError) as error:
            raise EngineError(f"engine at {self.address}: {_brief(error)}") from None

    def close(self) -> None:
        """Let go of the connections; containers stay."""
        self._client.close()


class Container:
    """A running container and the stream to its first process."""

    def __init__(self, engine: Engine, name: str, stream: "AttachedStream") -> None:
        self._engine = engine
        self.name = name
        self.stream = stream

    def complaint(self) -> str:
        """The last line that it wrote to its standard error."""
        lines = bytes(self.stream.errors).decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else ""

    def remove(self) -> None:
        """Kill and remove it."""
        self._engine.remove(self.name)


class AttachedStream:
    """The attached streams of a container: what goes in is raw, what comes out is multiplexed.

    A `sandbox.inside.bridge.Stream` of standard input and output; of standard error, the tail is
    kept in `errors`.
    """

    def __init__(self, attached: Any) -> None:
        self._attached = attached  # docker-py's object; the connection lives as long as it
        self._socket: socket.socket = getattr(attached, "_sock", attached)
        self._socket.setblocking(False)
        self._header = bytearray()
        self._left = 0
        self._is_output = False
        self.errors = bytearray()

    def descriptors(self) -> tuple[int, int]:
        """See `Stream`."""
        return self._socket.fileno(), self._socket.fileno()

    def read(self) -> bytes | None:
        """See `Stream`."""
        output = bytearray()
        ended = False
        while len(output) < _READ_BYTES and not ended:
            try:
                data = self._socket.recv(_READ_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            except ConnectionError:
                data = b""
            ended = not data
            output += self._demultiplex(data)
        if output:
            return bytes(output)
        return b"" if ended else None

    def _demultiplex(self, data: bytes) -> bytes:
        output = bytearray()
        at = 0
        while at < len(data):
            if not self._left:
                missing = 8 - len(self._header)
                self._header += data[at : at + missing]
                at += missing
                if len(self._header) == 8:
                    kind, self._left = struct.unpack(">BxxxI", self._header)
                    self._is_output = kind == 1
                    self._header.clear()
                continue
            part = data[at : at + self._left]
            at += len(part)
            self._left -= len(part)
            if self._is_output:
                output += part
            else:
                self.errors += part
                del self.errors[:-_ERRORS_KEPT]
        return bytes(output)

    def write(self, data: bytes) -> int:
        """See `Stream`."""
        try:
            return self._socket.send(data)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def close(self) -> None:
        """See `Stream`."""
        self._socket.close()
        self._attached.close()


@functools.cache
def _warn_about_vfs(address: str) -> None:
    _LOG.warning(
        "the engine at %s stores images with vfs, which copies the whole image for every "
        "container: slow, and much disk; use overlay2",
        address,
    )


def _brief(error: BaseException) -> str:
    text = str(getattr(error, "explanation", None) or error)
    return " ".join(text.split())[:300]


def _owner() -> str:
    """This process, as no other is ever called."""
    return f"{_machine()}/{os.getpid()}/{_start_time(os.getpid())}"


def _machine() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"


def _start_time(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None if there is none of that number."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _is_orphan(owner: str) -> bool:
    """Whether `owner` was a process of this machine, and is no more."""
    machine, pid, started = (owner.rsplit("/", 2) + ["", ""])[:3]
    return machine == _machine() and pid.isdigit() and _start_time(int(pid)) != started
