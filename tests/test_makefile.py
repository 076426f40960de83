"""What a newcomer sees when something is missing: one clear line, and a failing exit code."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*words: str) -> tuple[int, list[str]]:
    """(exit code, lines that are ours)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", *words], cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment
    )
    lines = (done.stdout + done.stderr).splitlines()
    return done.returncode, [line for line in lines if not line.startswith("make")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("need-python", "PYTHON=no-such-python"), "needs Python 3.11"),
        (("need-disk", "DISK_GIB=99999999"), "GiB of free disk"),
        (("need-shm", "SHM=/nowhere"), "no shared memory for Ray: /nowhere"),
        (("need-shm", "SHM_MIB=99999999999"), "MiB of shared memory"),
    ],
)
def test_what_is_missing_is_one_line(words: tuple[str, ...], expected: str) -> None:
    code, lines = make(*words)
    assert code != 0
    assert len(lines) == 1 and lines[0].startswith("unmask: ") and expected in lines[0]


def test_an_old_python_is_named_with_its_version(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    code, lines = make("need-python", f"PYTHON={old}")
    assert code != 0 and "is Python 3.9.2" in lines[0]


def test_all_is_well_is_silent() -> None:
    assert make("need-python", "need-disk", "DISK_GIB=0", "need-shm", "SHM_MIB=0") == (0, [])


def test_help_lists_the_targets() -> None:
    code, lines = make("help")
    text = "\n".join(lines)
    targets = ("setup", "demo", "test", "check", "format", "bench", "clean")
    assert code == 0 and all(f"make {target}" in text for target in targets)


def test_the_lock_file_pins_everything_and_names_no_host() -> None:
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    names = [pin.split("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(names) == len(set(names))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    for requirement in wanted:
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        assert match and match.group().lower().replace("_", "-") in names, requirement


def test_every_package_is_listed_for_installation() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tops = {name.split(".")[0] for name in listed}
    found = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in tops
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(listed) == found
