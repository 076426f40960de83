"""Emptying a folder: whatever a test made of it, as an ordinary user, and nothing beside it."""

import os
import shutil
import socket
import tempfile
from pathlib import Path

import pytest

from sandbox.inside.folders import empty


def as_nobody(action) -> int:
    """Do `action` in a child of no privileges; its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def folder():
    # Not pytest's: others may not even look into that one.
    made = Path(tempfile.mkdtemp(prefix="unmask-cleanup-"))
    made.chmod(0o777)
    yield made
    shutil.rmtree(made, ignore_errors=True)


def deep(folder):
    os.chdir(folder)
    for _ in range(3000):
        os.mkdir("d")
        open("file", "w").close()
        os.chdir("d")
    os.chdir("/")


def forbidden(folder):
    for name in ("a", "b"):
        (folder / name / "inner" / "innermost").mkdir(parents=True)
        (folder / name / "inner" / "file").write_text("x")
    for path in ("a/inner/innermost", "a/inner", "a", "b/inner"):
        (folder / path).chmod(0)


def odd_things(folder):
    os.mkfifo(folder / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    open(os.fsencode(folder) + b"/\xff\n", "w").close()
    (folder / " ").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "file").write_text("x")
    os.link(folder / "file", folder / "link")
    (folder / "file").chmod(0)


def wide(folder):
    for number in range(1500):
        (folder / f"f{number}").touch()
        (folder / f"d{number}").mkdir()


@pytest.mark.parametrize("make", [deep, forbidden, odd_things, wide])
def test_everything_goes(folder, make):
    assert as_nobody(lambda: make(folder)) == 0
    assert os.listdir(folder)
    assert as_nobody(lambda: empty(str(folder))) == 0
    assert os.listdir(folder) == []


def test_links_are_not_followed(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("x")
    (folder / "link").symlink_to(other)
    (folder / "sub").mkdir()
    (folder / "sub" / "link").symlink_to(other)
    empty(str(folder))
    assert os.listdir(folder) == []
    assert (other / "kept").read_text() == "x"
    assert other.stat().st_mode & 0o777


def test_what_stays_is_an_error(folder):
    (folder / "theirs").mkdir()
    (folder / "theirs" / "file").touch()
    if os.geteuid() != 0:
        pytest.skip("needs root, to own what somebody else cannot remove")
    assert as_nobody(lambda: empty(str(folder))) == 1
    assert os.listdir(folder)
