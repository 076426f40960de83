"""Each failing line has a remedy and turns the exit code; what is merely absent does not."""

import importlib.metadata
import io
from pathlib import Path

import pytest
from rich.console import Console

from rl.doctor import (
    CORE,
    EXTRAS,
    Line,
    check_disk,
    check_docker,
    check_extras,
    check_gpu,
    check_languages,
    check_memory,
    check_packages,
    check_python,
    check_sandbox,
    check_shm,
    examine,
    show,
)
from sandbox.records import SandboxError


def absent(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 13, 1), "ok")]
)
def test_python(version: tuple[int, ...], state: str) -> None:
    (line,) = check_python(version)
    assert line.state == state and line.found == ".".join(map(str, version))


def test_memory() -> None:
    assert check_memory(3.9)[0].state == "fail"
    assert check_memory(4.1)[0].state == "ok"


def test_shared_memory_that_is_missing(tmp_path: Path) -> None:
    (line,) = check_shm(tmp_path / "none")
    assert line.state == "fail" and "--shm-size" in line.remedy
    assert check_shm(tmp_path)[0].state == "ok"


def test_packages_and_extras_that_are_missing() -> None:
    missing = check_packages(absent)
    assert [line.what for line in missing] == list(CORE)
    assert all(line.state == "fail" and "make setup" in line.remedy for line in missing)
    optional = check_extras(absent)
    assert len(optional) == len(EXTRAS)
    assert all(line.state == "note" and "pip install" in line.remedy for line in optional)


def test_disk_is_measured_where_runs_go(tmp_path: Path) -> None:
    assert check_disk(tmp_path)[0].what == "disk"


def test_sandbox_and_gpu_say_something_of_this_machine() -> None:
    lines = {line.what: line for line in check_sandbox()}
    assert lines["sandbox"].found
    assert lines["sandbox ladder"].found.startswith("namespace: ")
    groups = lines["sandbox control groups"]
    assert (groups.state == "note") is groups.found.startswith("none (")
    assert check_gpu()[0].what.startswith("GPU")


def test_languages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    found, missing = check_languages()
    assert found.found.startswith("python 3.") and "," not in found.found
    assert missing.state == "note" and "javascript, typescript, bash, c" in missing.found
    assert "go: install golang-go" in missing.remedy


def test_a_docker_engine_is_shown_and_its_absence_is_no_fault() -> None:
    def none() -> str:
        raise SandboxError("no engine answers at unix:///nowhere")

    assert check_docker(lambda: "engine 20.10")[0] == Line("Docker", "engine 20.10")
    (line,) = check_docker(none)
    assert line.state == "note"
    assert "unix:///nowhere" in line.remedy


def test_every_failing_line_has_a_remedy() -> None:
    lines = examine()
    assert {"Python", "CPU cores", "torch", "sandbox"} <= {line.what for line in lines}
    assert all(line.remedy for line in lines if line.state == "fail")


@pytest.mark.parametrize(
    ("lines", "code", "text"),
    [
        ([Line("Python", "3.11")], 0, "all good"),
        ([Line("GPU", "none", "note")], 0, "all good"),
        ([Line("disk", "1 GiB", "fail", "free some")], 1, "free some"),
        ([Line("a", "", "fail", "x"), Line("b", "", "fail", "y")], 1, "2 lines fail"),
    ],
)
def test_exit_code_and_table(lines: list[Line], code: int, text: str) -> None:
    stream = io.StringIO()
    assert show(lines, Console(file=stream, width=100)) == code
    assert text in stream.getvalue()
