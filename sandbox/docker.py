"""The Docker backend: zygotes in containers of their own, one for judges and one for candidates.

A container lives long and sees many tests, each in a process of its own that leaves nothing; it is
replaced after a timeout, when a test could not be ended, when it was killed, and after so many
jobs. Not the engine's API (`sandbox.engine`), not the stream to a container (`sandbox.remote`).
"""

import json
import select
import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sandbox.engine import FOLDER, Container, Engine, EngineError, Request
from sandbox.inside.bridge import Stream
from sandbox.process import PROGRAMS, ZygoteError
from sandbox.records import Limits, SandboxError
from sandbox.remote import BOOT_COMMAND, BridgedHome, greeting

_EXAMINE_SECONDS = 60.0
_PART_BYTES, _ANSWER_BYTES = 1 << 16, 1 << 16
_EXAMINED = {"memory_mib": 64, "processes": 32, "disk_mib": 4}  # of the container that is examined
_OUR_MEMORY_MIB = 96  # the zygote and the bridge beside a test


@dataclass(frozen=True, kw_only=True)
class DockerOptions:
    """Which containers, and what one may use.

    image: anything with python3 (3.10 or newer) and the toolchains of the languages to judge.
    host: the engine's address; None is DOCKER_HOST, else the local socket.
    runtime: the engine's name of another runtime (`runsc`); None is its default.
    strict: a new container for the candidates of every case; judges keep theirs.
    jobs_per_container: after so many processes a container is replaced.
    memory_mib, disk_mib, processes: of a container; no test can have more.
    level: how tests are confined inside; None is the strongest that works there.

    Raises:
        ValueError: a number that is not positive, an empty image.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    image: str = "unmask-sandbox"
    host: str | None = None
    runtime: str | None = None
    strict: bool = False
    jobs_per_container: int = 1000
    memory_mib: int = 1024
    disk_mib: int = 64
    processes: int = 128
    level: Literal["landlock", "container"] | None = None

    def __post_init__(self) -> None:
        if not self.image:
            raise ValueError("docker.image: name an image")
        for name in ("jobs_per_container", "memory_mib", "disk_mib", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"docker.{name}: {getattr(self, name)} is less than 1")

    def problem(self, limits: Limits) -> str | None:
        """Why no container can give a test `limits`, or None."""
        for name in ("memory_mib", "disk_mib", "processes"):
            asked, given = getattr(limits, name), getattr(self, name)
            if asked > given:
                return f"limits.{name}: {asked} is more than a container has; raise docker.{name}"
        return None


class DockerLauncher:
    """Homes for zygotes in containers; a `sandbox.process.Launcher`. Workers share one.

    Raises:
        SandboxError: no docker-py, engine, image or runtime, or an engine whose limits do not
            hold: found out in a container made for it (about a second).
    """

    def __init__(self, options: DockerOptions) -> None:
        self._options = options
        self._engine = Engine(options.host)
        self._engine.check(options.image, options.runtime)
        try:
            self._engine.remove_orphans()
            self.level = self._examine()
        except EngineError as error:
            raise SandboxError(f"backend 'docker': {error}") from None

    def _examine(self) -> str:
        """The level for tests. Raises SandboxError, EngineError."""
        wanted = {"folder": FOLDER, "level": self._options.level}
        request = self._request(**_EXAMINED)
        container = self._engine.start(request)
        try:
            data = _converse(container.stream, greeting("examine", {**wanted, **_EXAMINED}))
        finally:
            container.stream.close()
            container.remove()
        try:
            answers = [json.loads(line) for line in data.splitlines()]
        except ValueError:
            answers = []
        if not answers:
            reason = container.complaint() or "it said nothing of use"
            raise SandboxError(f"docker.image: {self._options.image!r} cannot be used: {reason}")
        broken = [reason for answer in answers for reason in answer["broken"]]
        if broken:
            raise SandboxError(
                f"the Docker engine at {self._engine.address} does not confine a container: "
                f"{'; '.join(broken)} (`docker info` names what its kernel lacks)"
            )
        return answers[0]["level"]

    def _request(self, memory_mib: int, disk_mib: int, processes: int) -> Request:
        return Request(
            image=self._options.image,
            command=("python3", *BOOT_COMMAND),
            runtime=self._options.runtime,
            memory_mib=memory_mib,
            disk_mib=disk_mib,
            processes=processes,
        )

    def start(self, role: str) -> "DockerHome":
        """See `Launcher`."""
        options = self._options
        memory = options.memory_mib + options.disk_mib + _OUR_MEMORY_MIB
        try:
            container = self._engine.start(
                self._request(memory, options.disk_mib, options.processes + 2)
            )
        except EngineError as error:
            raise ZygoteError(str(error)) from None
        settings: dict[str, Any] = {"level": self.level, "folder": FOLDER, "promised": True}
        if role == PROGRAMS:
            settings["toolchains"] = ""  # where they usually are: PATH is that of another machine
        return DockerHome(container, greeting("main", settings))

    def problem(self, limits: Limits) -> str | None:
        """See `Launcher`."""
        return self._options.problem(limits)

    def worn(self, role: str, jobs: int, timed_out: bool) -> bool:
        """See `Launcher`."""
        if role != "judge" and jobs > 0 and (self._options.strict or timed_out):
            return True
        return jobs >= self._options.jobs_per_container

    def close(self) -> None:
        """Let go of the engine; the homes have been stopped."""
        self._engine.close()


class DockerHome(BridgedHome):
    """A zygote in a container."""

    def __init__(self, container: Container, first_bytes: bytes) -> None:
        self.container = container
        super().__init__(container.stream, first_bytes)

    def why(self) -> str:
        """See `Home`."""
        return super().why() or self.container.complaint()

    def stop(self) -> None:
        """See `Home`."""
        super().stop()
        self.container.remove()


def engine_summary(timeout: float = 2.0) -> str:
    """The engine in one line, for `unmask doctor`. Raises SandboxError."""
    engine = Engine(timeout=timeout)
    try:
        return engine.describe()
    except EngineError as error:
        raise SandboxError(str(error)) from None
    finally:
        engine.close()


def _converse(stream: Stream, data: bytes) -> bytes:
    """Say `data`; what is answered until the end of the stream, or of our patience."""
    deadline = time.monotonic() + _EXAMINE_SECONDS
    answer = bytearray()
    reading, writing = stream.descriptors()
    while (left := deadline - time.monotonic()) > 0 and len(answer) < _ANSWER_BYTES:
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        if data:
            poll.register(writing, select.POLLIN | select.POLLOUT)
        poll.poll(left * 1000)
        try:
            data = data[stream.write(data[:_PART_BYTES]) :] if data else data
        except OSError:  # it ended; why, is in what it said
            data = b""
        part = stream.read()
        if part == b"":
            break
        answer += part or b""
    return bytes(answer)
