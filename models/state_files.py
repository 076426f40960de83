"""Files of training state: copied into memory at once, written, checked and flushed later.

Not what the state is (the engines know) and not where a checkpoint lies (`rl.checkpoint`). The
copy is what training waits for; the writing is done beside it, by a thread.
"""

import copy
import json
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from common.errors import InfrastructureError
from common.futures import in_thread
from common.integrity import CheckedWriter, FileRecord, flush

Written = dict[str, FileRecord]


class StateFiles:
    """What one rank has to write. Later training steps do not change it."""

    def __init__(self) -> None:
        self._files: list[tuple[Path, Any]] = []

    def add(self, path: Path, state: Mapping[str, Any]) -> None:
        """Copy `state` (nested, with tensors of any device) to be written by `torch.save`."""
        self._files.append((path, _copied(state, {})))

    def add_json(self, path: Path, record: Mapping[str, Any]) -> None:
        """A small record for people."""
        self._files.append((path, (json.dumps(record, indent=2) + "\n").encode()))

    def write(self) -> Written:
        """Write and flush every file; their records by absolute path.

        Each copy is freed as soon as its file is on disk.

        Raises:
            InfrastructureError: the file system refused, for example because it is full.
        """
        written: Written = {}
        self._files.reverse()
        while self._files:
            path, content = self._files.pop()
            try:
                written[str(path.resolve())] = _write(path, content)
            except OSError as error:
                raise InfrastructureError(f"cannot write {path}: {error}") from error
        return written

    def write_beside(self) -> Future[Written]:
        """The same in a thread that no exit waits for."""
        return in_thread(self.write, "write-checkpoint")


def _write(path: Path, content: Any) -> FileRecord:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = CheckedWriter(file)
        if isinstance(content, bytes):
            writer.write(content)
        else:
            _torch_save(content, writer)
    flush(path)
    return writer.record


def _torch_save(content: Any, writer: CheckedWriter) -> None:
    try:
        torch.save(content, cast(BinaryIO, writer))
    except RuntimeError:
        # torch's writer loses the reason (no space left) and complains of a wrong position.
        if writer.error is None:
            raise
        raise writer.error from None


def _copied(value: Any, seen: dict[Any, Tensor]) -> Any:
    """A deep copy with tensors on the CPU; tensors that were one (tied weights) stay one."""
    if isinstance(value, Tensor):
        if value.numel() == 0:
            return value.detach().cpu().clone()
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in seen:
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, dict):
        new = copy.copy(value)
        for name, item in value.items():
            new[name] = _copied(item, seen)
        return new
    if type(value) in (list, tuple):
        return type(value)(_copied(item, seen) for item in value)
    return copy.deepcopy(value)
