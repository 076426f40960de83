"""What the sandbox's tests share: a sandbox per level, the proof that a program leaves nothing, and
a real Docker engine.

The engine is a dockerd of our own: private socket, private data, no network. Its image is Debian's
smallest, made once by debootstrap and kept in the user's cache folder.
"""

import contextlib
import dataclasses
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox.docker import DockerHome, DockerOptions
from sandbox.inside.bridge import Descriptors
from sandbox.inside.shell import _SPARE_UIDS
from sandbox.probe import try_level
from sandbox.process import LocalHome
from sandbox.records import Case, Limits
from sandbox.remote import BOOT_COMMAND, BridgedHome, greeting
from sandbox.service import Sandbox

LIMITS = Limits(seconds=1.5, memory_mib=256, processes=8, output_kib=64, disk_mib=4)
PATIENT = dataclasses.replace(LIMITS, seconds=60.0)
HONEST = Case(
    id="honest", code="def f(x):\n    return x + 1", tests=("assert f(41) == 42",), limits=PATIENT
)


@pytest.fixture(
    scope="module",
    params=[
        "namespace",
        "landlock",
        pytest.param("docker", marks=pytest.mark.docker),
        pytest.param("docker-container", marks=pytest.mark.docker),
    ],
)
def sandbox(request):
    backend, _, level = request.param.partition("-")
    options = None
    if backend == "docker":
        options = request.getfixturevalue("docker_options")
        options = dataclasses.replace(options, level=level or None)
    elif (reason := try_level(backend)) is not None:
        pytest.skip(f"{backend}: {reason}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNMASK_TEST_SECRET", "secret-42")
        with Sandbox(backend, workers=1, docker=options) as made:
            yield made


@pytest.fixture
def in_bare_container(sandbox) -> bool:
    """Whether a program sees the files of its container, for want of Landlock."""
    return sandbox.backend == "docker" and sandbox._launcher.level == "container"


@pytest.fixture
def hurried() -> Limits:
    """Tight, for what must be ended; the `judge` fixture's own."""
    return LIMITS


@pytest.fixture
def patient() -> Limits:
    """As tight, but with time: where the verdict must not be a timeout."""
    return PATIENT


@pytest.fixture
def no_pass() -> set[str]:
    """What a program that earned nothing may get."""
    return {"fail", "timeout", "oom", "output_limit", "crash", "exited"}


@pytest.fixture
def judge(sandbox):
    """judge(code, test, limits) -> verdict. Afterwards all is as before, and honest code passes."""

    def one(code: str, test: str = "assert f(41) == 42", limits: Limits = LIMITS) -> str:
        result = sandbox.run([Case(id="x", code=code, tests=(test,), limits=limits)])[0]
        assert result.status == "ran", result
        assert not result.tests[0].weak
        return result.tests[0].verdict

    assert_honest(sandbox)
    before, files = state(sandbox), own_descriptors()
    yield one
    assert_honest(sandbox)
    assert state(sandbox) == before
    if sandbox.backend != "docker":  # whose client keeps some connections for a while
        assert own_descriptors() <= files  # an earlier test's client may let go of some meanwhile


def own_descriptors() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def assert_honest(sandbox: Sandbox) -> None:
    result = sandbox.run([HONEST])[0]
    assert result.pass_rate == 1.0, result


def state(sandbox: Sandbox) -> dict[str, object]:
    """What a test could leave: processes, descriptors, mounts, files and groups of each zygote."""
    (worker,) = sandbox._workers
    found: dict[str, object] = {}
    for role, zygote in worker._zygotes.items():
        look = state_of_container if isinstance(zygote.home, DockerHome) else state_of_home
        found |= {f"{role}: {what}": how for what, how in look(zygote.home, sandbox).items()}
    return found


def state_of_container(home: DockerHome, _: Sandbox) -> dict[str, object]:
    """Of a container, or of the one that replaced it after a timeout: processes, descriptors."""
    listing = home.container._engine._client.top(home.container.name)
    pids = [int(row[listing["Titles"].index("PID")]) for row in listing["Processes"]]
    return {
        "processes": len(pids),
        "descriptors": sorted(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        "mounts": [len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines()) for pid in pids],
        "files": os.listdir(f"/proc/{pids[0]}/root/tmp"),
    }


def state_of_home(home: LocalHome, sandbox: Sandbox) -> dict[str, object]:
    """Of a zygote of this machine: processes, descriptors, mounts, files, control group."""
    pids = [home.process.pid, *below(home.process.pid)]
    users = {os.stat(f"/proc/{pid}").st_uid for pid in pids} - {os.geteuid()}
    users.add(_SPARE_UIDS + home.process.pid)  # whom its tests are, if we are root
    found: dict[str, object] = {
        "processes": len(pids),
        "descriptors": [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids],
        "files": os.listdir(home.folder),
        "processes of its users": sum(map(processes_of, users)),
    }
    if sandbox.backend == "namespace":  # else the machine's own
        mounts = Path(f"/proc/{pids[-1]}/mountinfo").read_text()
        found["mounts"] = len(mounts.splitlines())
    if home.group is not None:
        for kind, folder in home.group._folders.items():
            members = (folder / "cgroup.procs").read_text().split()
            found[f"{kind} group"] = sorted(members) == sorted(map(str, pids))
    return found


def below(pid: int) -> list[int]:
    """All descendants, parents first."""
    pids = [pid]
    for parent in pids:
        for listing in Path(f"/proc/{parent}/task").glob("*/children"):
            pids += map(int, listing.read_text().split())
    return pids[1:]


def processes_of(uid: int) -> int:
    """How many processes a user has."""
    count = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            count += folder.stat().st_uid == uid
        except FileNotFoundError:
            continue
    return count


@pytest.fixture
def processes_below():
    """processes_below(pid) -> its descendants."""
    return below


IMAGE = "unmask-test"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmask-tests"
_START_SECONDS, _STOP_SECONDS = 60, 30
_BUILD_SECONDS = 240  # less than a test may take


class Dockerd:
    """One dockerd (it starts its own containerd). `start` it again after a `kill`."""

    def __init__(self) -> None:
        # Not pytest's folder: a socket's path may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="unmask-dockerd-"))
        self.host = f"unix://{self.folder}/docker.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises RuntimeError if it does not answer in time."""
        command = [
            "dockerd", "--host", self.host,
            "--data-root", self.folder / "data", "--exec-root", self.folder / "exec",
            "--pidfile", self.folder / "pid", "--exec-opt", "native.cgroupdriver=cgroupfs",
            "--iptables=false", "--ip6tables=false", "--bridge=none",
            "--cgroup-parent", f"/{self.folder.name}",
        ]  # fmt: skip
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                last = (self.folder / "log").read_text(errors="replace").splitlines()[-1:]
                raise RuntimeError(f"dockerd does not start here: {' '.join(last)}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        import docker

        try:
            docker.APIClient(base_url=self.host, version="auto", timeout=5).close()
        except docker.errors.DockerException:
            return False
        return True

    def kill(self) -> None:
        """Gone at once, as in a crash, and containerd with it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._end_below("containerd")

    def stop(self) -> None:
        """Gone, with everything that it started or mounted."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
            self.kill()
            self._end_below("")
        points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for point in sorted((p for p in points if p.startswith(f"{self.folder}/")), reverse=True):
            subprocess.run(["umount", "--lazy", point], timeout=30)
        for group in Path("/sys/fs/cgroup").glob(f"**/{self.folder.name}"):
            with contextlib.suppress(FileNotFoundError):  # by another name, already
                group.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _end_below(self, name: str) -> None:
        """Kill what was started with a path in our folder, and wait until it is gone."""
        deadline = time.monotonic() + _STOP_SECONDS
        while time.monotonic() < deadline and (found := self._below(name)):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        if name:
            (self.folder / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)

    def _below(self, name: str) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                inside = any(word.startswith(bytes(self.folder)) for word in words)
                if inside and (not name or Path(words[0].decode()).name == name):
                    found.append(int(folder.name))
        return found


@pytest.fixture(scope="session")
def dockerd() -> Iterator[Dockerd]:
    """A running engine that has the image."""
    rootfs = _root_file_system()
    daemon = Dockerd()
    try:
        try:
            daemon.start()
        except RuntimeError as error:
            pytest.skip(str(error))
        _import(daemon.host, rootfs)
        yield daemon
    finally:
        daemon.stop()


@pytest.fixture(scope="session")
def docker_options(dockerd: Dockerd) -> DockerOptions:
    """What a `Sandbox` needs to use that engine."""
    return DockerOptions(image=IMAGE, host=dockerd.host)


def _import(host: str, rootfs: Path) -> None:
    import docker

    client = docker.APIClient(base_url=host, version="auto", timeout=300)
    client.import_image_from_file(str(rootfs), repository=IMAGE)
    client.close()


def _root_file_system() -> Path:
    """A tar of Debian's smallest system with Python, from this machine's apt mirror."""
    mirror, suite = _apt_source()
    kept = _CACHE / f"{suite}-python3.tar"
    if kept.is_file():
        return kept
    _CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unmask-debootstrap-") as folder:
        root = Path(folder) / "root"
        command = ["debootstrap", "--variant=minbase", "--include=python3", suite, root, mirror]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.skip(f"debootstrap took more than {_BUILD_SECONDS} s")
        if done.returncode:
            pytest.skip(f"debootstrap failed: {(done.stdout + done.stderr).strip()[-300:]}")
        partial = kept.with_suffix(f".{os.getpid()}")
        leave = ("./var/cache/apt", "./var/lib/apt/lists", "./usr/share/doc", "./usr/share/locale")
        subprocess.run(
            ["tar", "-C", root, *(f"--exclude={path}/*" for path in leave), "-cf", partial, "."],
            check=True,
            timeout=300,
        )
        partial.rename(kept)
    return kept


def _apt_source() -> tuple[str, str]:
    """(mirror, suite) of this system."""
    wanted = [
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI) $(CODENAME)",
        "Created-By: Packages",
    ]
    try:
        listed = subprocess.run(wanted, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs apt's list of sources: {error}")
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    for line in listed.stdout.splitlines():
        mirror, _, name = line.partition(" ")
        if name == suite:
            return mirror, suite
    pytest.skip(f"no apt source for {suite!r}")


class PipeLauncher:
    """Zygotes at the far end of two pipes: everything a container has but the container."""

    def __init__(self, level: str) -> None:
        self._level = level
        self.started: list[str] = []

    def start(self, role: str) -> "PipeHome":
        self.started.append(role)
        return PipeHome(self._level)

    def problem(self, limits: object) -> str | None:
        return None

    def worn(self, role: str, jobs: int, timed_out: bool) -> bool:
        return False


class PipeHome(BridgedHome):
    def __init__(self, level: str) -> None:
        self._folder = tempfile.mkdtemp(prefix="unmask-pipe-")
        os.chmod(self._folder, 0o711)
        python = getattr(sys, "_base_executable", None) or sys.executable
        self.process = subprocess.Popen(
            [python, *BOOT_COMMAND],
            env={},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        reading, writing = os.dup(self.process.stdout.fileno()), os.dup(self.process.stdin.fileno())
        self.process.stdin.close()
        self.process.stdout.close()
        options = {"level": level, "folder": self._folder, "promised": False}
        super().__init__(Descriptors(reading, writing), greeting("main", options))

    def stop(self) -> None:
        super().stop()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@pytest.fixture
def pipe_launcher() -> type[PipeLauncher]:
    """Makes launchers whose zygotes are beyond a bridge, without an engine."""
    return PipeLauncher
