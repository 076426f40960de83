"""A copy of training state that later steps do not change, and what a full disk does to it."""

import os
import subprocess
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.errors import InfrastructureError
from common.integrity import record_of
from models.state_files import StateFiles


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_later_changes_do_not_reach_the_files(tmp_path: Path) -> None:
    weight = torch.arange(6.0)
    state = OrderedDict(a={"w": weight, "step": 3}, sizes=[torch.Size([2, 3])], none=None)
    files = StateFiles()
    files.add(tmp_path / "deep" / "state.pt", state)
    files.add_json(tmp_path / "meta.json", {"step": 3})
    weight.fill_(9.0)
    state["a"]["step"] = 4
    assert not list(tmp_path.iterdir())  # nothing is touched before `write`
    written = files.write_beside().result(60)
    back = torch.load(tmp_path / "deep" / "state.pt", weights_only=False)
    assert isinstance(back, OrderedDict)
    assert torch.equal(back["a"]["w"], torch.arange(6.0))
    assert (back["a"]["step"], back["sizes"], back["none"]) == (3, [torch.Size([2, 3])], None)
    assert (tmp_path / "meta.json").read_text() == '{\n  "step": 3\n}\n'
    assert written == {
        str(path.resolve()): record_of(path)
        for path in (tmp_path / "deep" / "state.pt", tmp_path / "meta.json")
    }


def test_tied_tensors_stay_one_and_views_do_not_drag_their_base(tmp_path: Path) -> None:
    base = torch.zeros(100_000)
    files = StateFiles()
    files.add(tmp_path / "a.pt", {"x": base[:10], "tied": base[:10], "other": base[5:10]})
    size = files.write()[str((tmp_path / "a.pt").resolve())].size
    assert size < 10_000
    back = torch.load(tmp_path / "a.pt", weights_only=True)
    assert back["x"].data_ptr() == back["tied"].data_ptr()
    assert back["other"].data_ptr() != back["x"].data_ptr()


def test_a_full_disk_is_named(small_disk: Path) -> None:
    """torch's own writer would complain of an unexpected position."""
    files = StateFiles()
    files.add(small_disk / "big.pt", {"x": torch.zeros(2**21)})
    with pytest.raises(InfrastructureError, match=r"cannot write .*big\.pt: .*No space left"):
        files.write_beside().result(60)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    files = StateFiles()
    files.add_json(tmp_path / "file" / "meta.json", {})
    with pytest.raises(InfrastructureError, match="cannot write"):
        files.write()
