"""Who gets into a Ray that we start, and what a worker in it knows. Started Rays are marked."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import UserError
from workers import access

ROOT = Path(__file__).resolve().parents[2]
AUTH = (access.MODE, access.TOKEN, access.TOKEN_PATH, "RAY_ADDRESS")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, and no token by variable."""
    for name in AUTH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_new_token_is_its_owners_only(home: Path) -> None:
    before = os.umask(0)
    try:
        access.keep_token()
    finally:
        os.umask(before)
    path = home / ".ray" / "auth_token"
    first = path.read_text()
    assert len(bytes.fromhex(first)) == 32
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    assert [p.name for p in path.parent.iterdir()] == ["auth_token"]
    access.keep_token()
    assert path.read_text() == first
    assert not set(AUTH) & os.environ.keys()


def test_a_token_that_ray_left_open_is_closed(home: Path) -> None:
    (home / ".ray").mkdir()
    path = home / ".ray" / "auth_token"
    path.write_text("known")
    path.chmod(0o644)
    access.keep_token()
    assert (path.read_text(), mode(path)) == ("known", 0o600)


def test_an_empty_token_file_is_none(home: Path) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").touch()
    access.keep_token()
    assert len((home / ".ray" / "auth_token").read_text()) == 64


def test_without_a_home_the_token_is_a_file_of_this_process(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setenv(access.TOKEN_PATH, "")  # so that it is restored
    monkeypatch.delenv(access.TOKEN_PATH)
    access.keep_token()
    path = Path(os.environ[access.TOKEN_PATH])
    assert (len(path.read_text()), mode(path), mode(path.parent)) == (64, 0o600, 0o700)


@pytest.mark.parametrize(
    ("name", "value"), [("MODE", "disabled"), ("TOKEN", "x"), ("TOKEN_PATH", "/x")]
)
def test_what_was_decided_stands(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(getattr(access, name), value)
    access.keep_token()
    assert not (home / ".ray").exists()


def test_secrets_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name for name in os.environ if not access.is_secret(name)}
    for name in ("HF_TOKEN", "https_proxy", access.TOKEN, access.TOKEN_PATH):
        monkeypatch.setenv(name, "http://a:b@c")
    access.forget_secrets()
    assert not {"HF_TOKEN", "https_proxy", access.TOKEN} & os.environ.keys()
    assert access.TOKEN_PATH in os.environ and before - {access.TOKEN} <= os.environ.keys()


def test_somebody_else_at_the_address(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that accepts and is silent: a bounded wait, one line."""
    monkeypatch.setattr(access, "KNOCK_TIMEOUT_S", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept(), daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(UserError) as caught, access.admission(address, "cluster.address"):
            raise AssertionError("let in")
        server.close()
    assert time.monotonic() - started < 30
    text = str(caught.value)
    assert text.startswith(f"cluster.address={address}: nobody there speaks Ray")
    assert "\n" not in text


# With Ray, started by another process as `unmask train` does


HEAD = """
import json, os, sys
import psutil
from functools import partial
from pathlib import Path
from workers.access import ray
from workers.nodes import connect
from workers.placement import launch, wait
class Parrot:
    def environment(self):
        return dict(os.environ)
if __name__ == "__main__":
    assert connect(None, logical_cpus=1, weight_bytes=0)
    log = Path(sys.argv[1]) / "logs" / "parrot.log"
    actor = launch("parrot", log, Parrot, run="x", num_cpus=0, secrets=False, local=True)
    (seen,) = wait([actor.call("environment")], 60)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    hosts = sorted({
        c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == "LISTEN"
    })
    modes = [oct(p.stat().st_mode & 0o777) for p in (log, log.parent)]
    address = ray.get_runtime_context().gcs_address
    found = {"address": address, "seen": seen, "hosts": hosts, "modes": modes}
    print(json.dumps(found), flush=True)
    sys.stdin.read()
    ray.shutdown()
"""
JOIN = """
import sys
from common.exits import exit_codes
from workers.access import ray
from workers.nodes import connect
with exit_codes():
    connect(sys.argv[1], logical_cpus=1, weight_bytes=0)
    print("joined", len(ray.nodes()))
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name not in AUTH}
    return clean | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | more


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """A Ray started in a new home; its driver has secrets of all kinds."""
    home = tmp_path_factory.mktemp("home")
    secrets = {"HF_TOKEN": "canary-77", "HTTPS_PROXY": "http://me:canary-77@proxy:1"}
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD, str(home / "run")],
        env=environment(home, **secrets),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield json.loads(process.stdout.readline()) | {"home": home}
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        finally:
            process.kill()


def join(head: dict[str, object], home: Path, **more: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", JOIN, str(head["address"])],
        env=environment(home, **more),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.ray
def test_a_ray_of_ours_listens_to_this_machine_only(head: dict[str, object]) -> None:
    """Pins the private switch of `access.loopback` too."""
    assert set(head["hosts"]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}  # type: ignore[call-overload]
    assert str(head["address"]).startswith("127.0.0.1:")


@pytest.mark.ray
def test_a_reward_worker_knows_no_secrets_and_logs_for_its_owner(head: dict[str, object]) -> None:
    assert "canary-77" not in json.dumps(head["seen"])
    assert head["modes"] == ["0o600", "0o700"]


@pytest.mark.ray
def test_the_owner_joins_without_any_set_up(head: dict[str, object]) -> None:
    code, out, error = join(head, Path(str(head["home"])))
    assert (code, out) == (0, "joined 1\n"), error


@pytest.mark.ray
@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({}, "asks for a token and none was found; put what `ray get-auth-token`"),
        ({access.TOKEN: "wrong"}, "refuses the token of RAY_AUTH_TOKEN"),
        ({access.MODE: "disabled"}, "RAY_AUTH_MODE=disabled forbids one; unset it"),
    ],
)
def test_others_stay_outside(
    head: dict[str, object], tmp_path: Path, variables: dict[str, str], text: str
) -> None:
    code, out, error = join(head, tmp_path, **variables)
    assert (code, out) == (2, "")
    (line,) = error.strip().splitlines()
    assert line.startswith(f"unmask: cluster.address={head['address']}: ") and text in line
