"""The Docker backend on a real engine: its promises, its replacements, its failures, its errors."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from sandbox.docker import DockerOptions, engine_summary
from sandbox.engine import LABEL, Engine, Request, _owner
from sandbox.inside import promises
from sandbox.records import Case, Limits, SandboxError, StdinTest
from sandbox.service import Sandbox

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(seconds=60.0)
GOOD = Case(id="good", code="def f(x): return x", tests=("assert f(1) == 1",), limits=LIMITS)
SLOW = Case(
    id="slow",
    code="import time\ndef f(x):\n    time.sleep(1.5)\n    return x",
    tests=("assert f(1) == 1",),
    limits=LIMITS,
)


@pytest.fixture
def engine(docker_options):
    made = Engine(docker_options.host)
    yield made
    made.close()


def ours(engine: Engine) -> list[str]:
    return [c["Id"] for c in engine._client.containers(all=True, filters={"label": LABEL})]


def eventually(condition) -> bool:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def containers(sandbox: Sandbox) -> dict[str, str]:
    """Container by role, of a sandbox with one worker."""
    zygotes = sandbox._workers[0]._zygotes
    return {role: zygote.home.container.name for role, zygote in zygotes.items()}


@pytest.mark.docker
def test_a_container_has_what_was_promised_and_goes_with_its_sandbox(engine, docker_options):
    with Sandbox("docker", workers=1, docker=docker_options) as sandbox:
        assert sandbox.run([GOOD])[0].backend == "docker"
        assert sandbox._launcher.level in promises.LEVELS
        assert len(set(containers(sandbox).values())) == 2
        for name in containers(sandbox).values():
            found = engine._client.inspect_container(name)
            limits = found["HostConfig"]
            assert limits["NetworkMode"] == "none"
            assert limits["CapDrop"] == ["ALL"]
            assert limits["ReadonlyRootfs"] is True
            assert limits["LogConfig"]["Type"] == "none"
            assert limits["Memory"] == limits["MemorySwap"] > 0
            assert limits["PidsLimit"] == docker_options.processes + 2
            assert found["Config"]["User"].partition(":")[0] not in ("", "0", "65534")
    assert ours(engine) == []


@pytest.mark.docker
@pytest.mark.parametrize("level", promises.LEVELS)
def test_other_languages_are_those_of_the_image(docker_options, level):
    tests = (StdinTest("41\n", "42\n"), StdinTest("41\n", "43\n"))
    code = "read x\nsleep 300 >&- 2>&- <&- &\necho $((x + 1)) > /dev/stdout"
    case = Case(id="b", language="bash", code=code, stdin_tests=tests, limits=LIMITS)
    options = dataclasses.replace(docker_options, level=level)
    with Sandbox("docker", workers=1, docker=options) as sandbox:
        found, missing = sandbox.run([case, dataclasses.replace(case, language="rust")])
        assert [test.verdict for test in found.tests] == ["pass", "fail"], found
        assert missing.status == "invalid_case" and "rust" in missing.message
        assert len(set(containers(sandbox).values())) == 1  # no judge, no candidate in Python


@pytest.mark.docker
def test_no_descriptor_and_no_thread_is_left(docker_options):
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with Sandbox("docker", workers=2, docker=docker_options) as sandbox:
        assert all(r.pass_rate == 1.0 for r in sandbox.run([GOOD] * 6))
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= files


@pytest.mark.docker
def test_strict_gives_every_case_a_container_of_its_own(docker_options):
    strict = dataclasses.replace(docker_options, strict=True)
    with Sandbox("docker", workers=1, docker=strict) as sandbox:
        seen = []
        start = sandbox._launcher.start
        sandbox._launcher.start = lambda role: seen.append((role, start(role))) or seen[-1][1]
        assert [r.passed for r in sandbox.run([GOOD] * 3)] == [1, 1, 1]
    assert [role for role, _ in seen].count("candidate") == 3
    assert [role for role, _ in seen].count("judge") == 1
    assert len({home.container.name for _, home in seen}) == 4


@pytest.mark.docker
def test_a_container_is_replaced_after_so_many_jobs(docker_options):
    options = dataclasses.replace(docker_options, jobs_per_container=3)
    case = dataclasses.replace(GOOD, tests=GOOD.tests * 2)
    with Sandbox("docker", workers=1, docker=options) as sandbox:
        names = []
        for _ in range(3):
            assert sandbox.run([case])[0].passed == 2
            names.append(containers(sandbox).get("candidate"))
    assert names[0] is not None and names[1] is None and names[2] not in (None, names[0])


@pytest.mark.docker
def test_a_timeout_costs_its_test_and_afterwards_the_container(docker_options):
    case = dataclasses.replace(
        GOOD,
        code="import time\ndef f(x):\n    time.sleep(600 * (x == 2))\n    return x",
        tests=tuple(f"assert f({i}) == {i}" for i in (1, 2, 3)),
        limits=Limits(seconds=3.0),
    )
    with Sandbox("docker", workers=1, docker=docker_options) as sandbox:
        sandbox.run([GOOD])
        before = containers(sandbox)["candidate"]
        verdicts = [test.verdict for test in sandbox.run([case])[0].tests]
        assert verdicts == ["pass", "timeout", "pass"]
        judges = containers(sandbox)["judge"]
        sandbox.run([GOOD])
        assert containers(sandbox)["candidate"] != before
        assert containers(sandbox)["judge"] == judges  # nothing of the program ran there


LITTER = """
import os
def f(x):
    seen = []
    for folder in ('/tmp', '/dev/shm', '/dev/mqueue'):
        try:
            seen += [name for name in os.listdir(folder) if name != os.path.basename(os.getcwd())]
        except OSError:
            pass
    with open('half', 'wb') as file:
        file.write(b'x' * (40 << 20))
    os.makedirs('a/b/c')
    os.rename('half', 'a/b/c/half')
    for folder in ('/tmp', '/dev/shm', '/dev/mqueue', '/', '/dev', '/var/tmp', '/run'):
        try:
            os.close(os.open(folder + '/left', os.O_CREAT | os.O_WRONLY))
        except OSError:
            pass
    return seen
"""


@pytest.mark.docker
@pytest.mark.parametrize("level", [None, "container"])
def test_a_test_leaves_nothing_in_its_container(docker_options, level):
    """Neither files nor, in the 64 MiB there are, less room than it found."""
    options = dataclasses.replace(docker_options, level=level)
    limits = dataclasses.replace(LIMITS, disk_mib=64)
    case = dataclasses.replace(GOOD, code=LITTER, tests=("assert f(1) == []",) * 3, limits=limits)
    with Sandbox("docker", workers=1, docker=options) as sandbox:
        result = sandbox.run([case])[0]
        assert [test.verdict for test in result.tests] == ["pass"] * 3, result
        assert sandbox._workers[0]._zygotes["candidate"].jobs == 3  # one container


@pytest.mark.docker
@pytest.mark.parametrize("role", ["judge", "candidate"])
def test_a_killed_container_is_replaced_in_the_middle_of_a_test(engine, docker_options, role):
    with Sandbox("docker", workers=1, docker=docker_options) as sandbox:
        assert sandbox.run([GOOD])[0].passed == 1
        name = containers(sandbox)[role]
        first = engine._client.inspect_container(name)["State"]["Pid"]
        timer = threading.Timer(0.5, os.kill, (first, signal.SIGKILL))
        timer.start()
        result = sandbox.run([SLOW])[0]
        timer.join()
        assert (result.status, result.passed) == ("ran", 1)
        assert name not in containers(sandbox).values()
    assert eventually(lambda: not ours(engine))


@pytest.mark.docker
def test_a_hung_container_is_replaced(engine, docker_options):
    with Sandbox("docker", workers=1, docker=docker_options) as sandbox:
        assert sandbox.run([GOOD])[0].passed == 1
        name = containers(sandbox)["candidate"]
        engine._client.pause(name)
        short = dataclasses.replace(GOOD, limits=Limits(seconds=2.0))
        result = sandbox.run([short])[0]
        assert (result.status, result.passed) == ("ran", 1), result
        assert name not in containers(sandbox).values()
    assert eventually(lambda: not ours(engine))


@pytest.mark.docker
def test_an_engine_that_is_gone_is_an_infra_error_and_never_a_number(dockerd, docker_options):
    with Sandbox("docker", workers=1, docker=docker_options) as sandbox:
        assert sandbox.run([GOOD])[0].passed == 1
        timer = threading.Timer(0.5, dockerd.kill)
        timer.start()
        try:
            results = sandbox.run([SLOW, GOOD])
        finally:
            timer.join()
            dockerd.start()
        assert [r.status for r in results] == ["infra_error"] * 2
        assert [t.verdict for r in results for t in r.tests] == ["infra_error"] * 2
        assert sandbox.run([GOOD])[0].passed == 1  # the engine is back: so are we


@pytest.mark.docker
def test_what_a_killed_owner_left_goes(engine, docker_options):
    script = (
        "import sys, time; from sandbox.service import Sandbox; from sandbox.docker import *\n"
        "from sandbox.records import Case\n"
        f"s = Sandbox('docker', 1, docker=DockerOptions(image={docker_options.image!r},"
        f" host={docker_options.host!r}))\n"
        "s.run([Case(id='x', code='def f(): pass', tests=('assert f() is None',))])\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"ready\n"
        assert len(ours(engine)) == 2
        owner.kill()
    assert eventually(lambda: not ours(engine))  # their input ended: so did they


@pytest.mark.docker
def test_orphans_that_do_not_end_by_themselves_are_removed_at_the_next_start(
    engine, docker_options, monkeypatch
):
    request = Request(
        image=docker_options.image, command=("sleep", "600"), runtime=None,
        memory_mib=32, disk_mib=1, processes=8,
    )  # fmt: skip
    alive = engine.start(request)
    dead = _owner().rpartition("/")[0] + "/1"  # our number, but started long ago
    monkeypatch.setattr("sandbox.engine._owner", lambda: dead)
    orphan = engine.start(request)
    monkeypatch.setattr("sandbox.engine._owner", lambda: "elsewhere/1/2/3")
    elsewhere = engine.start(request)
    try:
        Sandbox("docker", workers=1, docker=docker_options).close()
        assert sorted(ours(engine)) == sorted([alive.name, elsewhere.name])
    finally:
        for container in (alive, orphan, elsewhere):
            container.stream.close()
            container.remove()


@pytest.mark.docker
def test_more_than_a_container_has_is_an_invalid_case(docker_options):
    options = dataclasses.replace(docker_options, memory_mib=256)
    case = dataclasses.replace(GOOD, limits=Limits(memory_mib=512))
    with Sandbox("docker", workers=1, docker=options) as sandbox:
        result = sandbox.run([case])[0]
    assert result.status == "invalid_case"
    assert "docker.memory_mib" in result.message


@pytest.mark.docker
def test_memory_spread_over_processes_ends_the_test_and_not_the_container(docker_options):
    options = dataclasses.replace(docker_options, memory_mib=256)
    code = """
import os, time
def f(x):
    for _ in range(6):
        if os.fork() == 0:
            keep = [b'x' * (1 << 20) for _ in range(100)]
            time.sleep(60)
    time.sleep(60)
"""
    limits = Limits(seconds=4.0, memory_mib=200, processes=16)
    case = dataclasses.replace(GOOD, code=code, limits=limits)
    honest = dataclasses.replace(GOOD, limits=dataclasses.replace(LIMITS, memory_mib=200))
    with Sandbox("docker", workers=1, docker=options) as sandbox:
        assert sandbox.run([honest])[0].passed == 1
        before = containers(sandbox)
        result = sandbox.run([case])[0]
        assert result.status == "ran" and result.passed == 0
        assert containers(sandbox) == before
        assert sandbox.run([honest])[0].passed == 1


@pytest.mark.docker
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image": "no-such-image"}, "docker build -t no-such-image -f deploy/sandbox/Dockerfile"),
        ({"runtime": "runsc-that-is-not-there"}, "docker.runtime"),
    ],
)
def test_what_the_engine_lacks_is_one_line(docker_options, change, text):
    with pytest.raises(SandboxError, match=text) as caught:
        Sandbox("docker", workers=1, docker=dataclasses.replace(docker_options, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.docker
@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("mem_limit", None, "more than 64 MiB of memory"),
        ("pids_limit", None, "more than 32 processes"),
        ("read_only", False, "not read-only"),
        ("network_mode", "host", "has a network"),
        ("tmpfs", {"/tmp": "mode=1777"}, "/tmp holds more than"),
        ("tmpfs", {"/tmp": "size=4m", "/var/tmp": "size=4m"}, "/var/tmp can be written to"),
        ("tmpfs", {"/tmp": "size=4m,ro"}, "/tmp cannot be written to"),
    ],
)
def test_an_engine_that_breaks_its_promises_is_refused(
    docker_options, monkeypatch, option, value, text
):
    import docker

    make = docker.APIClient.create_host_config

    def careless(client, **options):
        options[option] = value
        if option == "mem_limit":
            del options["memswap_limit"]
        return make(client, **options)

    monkeypatch.setattr(docker.APIClient, "create_host_config", careless)
    with pytest.raises(SandboxError, match=text) as caught:
        Sandbox("docker", workers=1, docker=docker_options)
    assert "\n" not in str(caught.value)


@pytest.mark.docker
def test_slow_storage_is_warned_about_once(engine, docker_options, monkeypatch, caplog):
    info = {**engine._client.info(), "Driver": "vfs"}
    monkeypatch.setattr(engine._client, "info", lambda: info)
    for _ in range(2):
        engine.check(docker_options.image, None)
    assert [r.levelname for r in caplog.records if "vfs" in r.message] == ["WARNING"]


@pytest.mark.docker
def test_an_image_without_python_is_one_line(dockerd, docker_options, tmp_path):
    import docker

    client = docker.APIClient(base_url=dockerd.host, version="auto")
    tarfile.open(tmp_path / "empty.tar", "w").close()
    client.import_image_from_file(str(tmp_path / "empty.tar"), repository="unmask-empty")
    client.close()
    with pytest.raises(SandboxError, match="python3") as caught:
        Sandbox(
            "docker", workers=1, docker=dataclasses.replace(docker_options, image="unmask-empty")
        )
    assert "\n" not in str(caught.value)


@pytest.mark.docker
def test_the_command_line(docker_options):
    lines = json.dumps({"id": "a", "code": "def f(x): return x", "tests": ["assert f(1) == 1"]})
    for extra in ([], ["--strict"]):
        done = subprocess.run(
            [sys.executable, "-m", "sandbox", "--backend", "docker", "--workers", "1",
             "--image", docker_options.image, "--host", str(docker_options.host), *extra],
            input=lines, capture_output=True, text=True, cwd=ROOT, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        assert (record["backend"], record["pass_rate"]) == ("docker", 1.0)


# --- without an engine --------------------------------------------------------------------------


def test_without_an_engine_it_says_where_it_looked(tmp_path):
    pytest.importorskip("docker")
    host = f"unix://{tmp_path}/docker.sock"
    with pytest.raises(SandboxError, match="no engine answers at") as caught:
        Sandbox("docker", workers=1, docker=DockerOptions(host=host))
    assert host in str(caught.value) and "DOCKER_HOST" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_doctor_is_told_the_same(tmp_path, monkeypatch):
    pytest.importorskip("docker")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    with pytest.raises(SandboxError, match="docker.sock"):
        engine_summary()


def test_without_docker_py_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(SandboxError, match=r"pip install -e '\.\[docker\]'"):
        Sandbox("docker", workers=1)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"image": ""}, "docker.image"), ({"memory_mib": 0}, "docker.memory_mib")],
)
def test_options_out_of_range_name_the_key(options, text):
    with pytest.raises(ValueError, match=text):
        DockerOptions(**options)


def test_arguments_for_docker_need_the_docker_backend():
    done = subprocess.run(
        [sys.executable, "-m", "sandbox", "--image", "x"],
        input="", capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--image" in done.stderr.splitlines()[-1]


def test_broken_promises_are_seen(tmp_path):
    """This process is no container: what is looked for is missing here."""
    broken = " ".join(promises.facts(str(tmp_path)))
    assert "not read-only" in broken and "can be written to" in broken
    assert ("runs as root" in broken) == (os.getuid() == 0)
    limits = promises.limits(memory_mib=16, processes=8, disk_mib=2, folder=str(tmp_path))
    assert len(limits) == 3, limits
    assert os.listdir(tmp_path) == []
