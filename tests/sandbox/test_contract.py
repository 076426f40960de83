"""`python -m sandbox`, the records, the ladder of levels, and life as an ordinary user."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandbox import probe
from sandbox.process import LocalLauncher, ZygoteProcess
from sandbox.records import Case, InvalidCase, Limits, SandboxError, case_from_json
from sandbox.service import Sandbox, run_cases

ROOT = Path(__file__).resolve().parents[2]
GOOD = {
    "id": "a",
    "language": "python",
    "code": "def f(x): return x",
    "tests": ["assert f(1) == 1"],
}


def command(lines: list[str], *arguments: str, python: list[str] | None = None):
    return subprocess.run(
        [*(python or [sys.executable]), "-m", "sandbox", *arguments],
        input="\n".join(lines).encode("utf-8", "surrogateescape"),
        capture_output=True,
        cwd=ROOT,
        timeout=120,
    )


def test_command_line_keeps_order_and_survives_malformed_lines():
    stdin_case = {
        "id": "b",
        "code": "print(input())",
        "stdin_tests": [{"stdin": "x", "stdout": "x"}, {"stdin": "x", "stdout": "y"}],
        "limits": {"seconds": 20, "memory_mib": 256},
    }
    lines = [
        json.dumps(GOOD), "{not json", "", "[1]", "\udcff", json.dumps(stdin_case),
        json.dumps(GOOD | {"id": "c", "tests": []}),
        json.dumps(GOOD | {"id": "d", "limits": {"seconds": -1}}),
        json.dumps(GOOD | {"id": "e", "surprise": 1}),
        json.dumps(GOOD | {"id": "f", "language": "cobol"}),
        "[" * 100000,
    ]  # fmt: skip
    done = command(lines, "--workers", "1")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["status"] for r in records] == [
        "ran", *["invalid_case"] * 3, "ran", *["invalid_case"] * 5
    ]  # fmt: skip
    assert [r["id"] for r in records if r["id"]] == list("abcdef")
    first = records[0]
    assert set(first) == {
        "id", "status", "passed", "total", "pass_rate", "tests", "seconds", "backend"
    }  # fmt: skip
    assert set(first["tests"][0]) == {"verdict", "seconds", "message", "cpu_seconds"}
    assert records[4]["pass_rate"] == 0.5
    assert "limits.seconds" in records[6]["message"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--backend", "x"], "x"),
        (["--workers", "0"], "workers"),
        (["--backend", "docker"], "docker"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(arguments, text):
    done = command([], *arguments)
    assert done.returncode == 2
    assert text in done.stderr.decode().strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ([], "object"),
        ({"code": "x"}, "id"),
        (GOOD | {"code": 1}, "code"),
        (GOOD | {"tests": "assert"}, "tests"),
        (GOOD | {"tests": [1]}, "tests"),
        (GOOD | {"stdin_tests": [{"stdin": ""}]}, "stdin_tests"),
        (GOOD | {"limits": {"seconds": True}}, "limits.seconds"),
        (GOOD | {"limits": {"memory_mib": 1.5}}, "limits.memory_mib"),
        (GOOD | {"limits": {"cpu": 1}}, "limits"),
    ],
)
def test_malformed_records_name_the_key(record, text):
    with pytest.raises(InvalidCase, match=text):
        case_from_json(record)


def test_auto_refuses_the_weakest_level_unless_allowed(monkeypatch):
    weak = probe.Capabilities("unsafe", (("namespace", "no"), ("landlock", "no")), True, 0, False)
    monkeypatch.setattr(probe, "probe", lambda: weak)
    with pytest.raises(SandboxError, match="allow_unsafe"):
        probe.choose_level("auto", allow_unsafe=False)
    assert probe.choose_level("auto", allow_unsafe=True) == "unsafe"
    assert "no namespace: no" in weak.report()


def test_unsafe_level_judges_too():
    case = Case(id="a", code="def f(x): return x", tests=("assert f(1) == 1", "assert f(1) == 2"))
    result = run_cases([case], backend="unsafe", workers=1)[0]
    assert (result.backend, result.pass_rate) == ("unsafe", 0.5)


def test_a_lost_zygote_costs_a_retry_not_a_verdict():
    case = Case(id="a", code="def f(x): return x", tests=("assert f(1) == 1",) * 3)
    with Sandbox(workers=1) as sandbox:
        assert sandbox.run([case])[0].pass_rate == 1.0
        worker = sandbox._workers[0]
        for zygote in worker._zygotes.values():
            os.kill(zygote.home.process.pid, signal.SIGKILL)
        assert sandbox.run([case])[0].pass_rate == 1.0


def test_an_infrastructure_error_is_no_verdict(monkeypatch):
    with Sandbox(workers=1) as sandbox:  # probed, but no zygote started yet
        monkeypatch.setattr("sandbox.process._BOOT", "raise SystemExit(1)")
        result = sandbox.run([Case(id="a", code="", tests=("assert True",))])[0]
    assert result.status == "infra_error"
    assert result.tests[0].verdict == "infra_error"
    assert "status 1" in result.tests[0].message


def test_zygotes_end_with_their_worker():
    zygote = ZygoteProcess(LocalLauncher(probe.probe().level))
    process = zygote.home.process
    zygote.control.close()  # as the kernel does for a worker that was killed
    for _ in range(100):
        if process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() is not None, process.pid
    zygote.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_works_for_an_ordinary_user():
    python = "/usr/bin/python3"
    if not Path(python).exists() or subprocess.run([python, "-c", "import ctypes"]).returncode:
        pytest.skip("no system Python that nobody can read")
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", python, "-B"]
    done = command([json.dumps(GOOD)], "--workers", "1", python=nobody)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["pass_rate"], record["status"]) == (1.0, "ran")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_degrades_with_a_report_where_user_namespaces_are_forbidden():
    script = (
        "echo 0 > /proc/sys/user/max_user_namespaces && "
        f"{sys.executable} -B -c 'from sandbox.probe import probe; print(probe().report())'"
    )
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    if "unshare" in done.stderr or "sh:" in done.stderr:
        pytest.skip(f"cannot forbid user namespaces here: {done.stderr.strip()}")
    if probe.try_level("landlock") is None:
        assert done.stdout.startswith("sandbox level: landlock (no namespace: "), done
    else:
        assert done.stdout.startswith("sandbox level: unsafe"), done


def test_imports_only_the_standard_library():
    code = (
        "import sys; import sandbox.service, sandbox.__main__\n"
        "tops = {m.split('.')[0] for m in sys.modules}\n"
        "print(sorted(t for t in tops - set(sys.stdlib_module_names)"
        " if t not in ('sandbox', '__main__', '__mp_main__')))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_limits_have_sane_defaults():
    limits = Limits()
    assert (limits.seconds, limits.memory_mib, limits.processes) == (5.0, 512, 16)
