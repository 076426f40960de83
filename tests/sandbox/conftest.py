"""A real Docker engine for the tests that want one, and sandboxes on it and over a bare bridge.

The engine is a dockerd of our own: private socket, private data, no network. Its image is Debian's
smallest, made once by debootstrap and kept in the user's cache folder.
"""

import contextlib
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

from sandbox.docker import DockerOptions
from sandbox.inside.bridge import Descriptors
from sandbox.remote import BOOT_COMMAND, BridgedHome, greeting

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

    def worn(self, role: str, jobs: int) -> bool:
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
