"""The run folder of RL training: which steps are saved, and which one a resume starts from.

Not the contents of a checkpoint: the cluster writes `policy/` and, if it moves, `reference/` into
the folder it is given. A checkpoint is complete or absent: it is written under a temporary name,
flushed to disk, renamed, and only then does `rl/latest` point to it.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from common.errors import InfrastructureError, UserError

STATE_FILE = "state.json"
_STEP = re.compile(r"global_step_(\d+)")


@dataclass(frozen=True)
class RunState:
    """What `state.json` holds beside the engine's own files.

    step: finished updates. pending: problem ids of the batches that were in flight; they are
    worked out again from (data seed, step), this is their record.
    """

    step: int
    policy_version: int
    run_seed: int
    code_version: str = ""
    pending: tuple[tuple[str, ...], ...] = ()


class Checkpoints:
    """The `rl/` part of a run folder; keeps the newest `keep_last_n` steps."""

    def __init__(self, run_folder: Path, keep_last_n: int = 2) -> None:
        self.folder = run_folder / "rl"
        self._keep = keep_last_n

    def save(self, state: RunState, write: Callable[[Path], None]) -> Path:
        """Save one step; `write(folder)` puts the cluster's files into the folder it is given.

        Raises:
            InfrastructureError: the file system refused; the previous checkpoint is untouched.
        """
        final = self.folder / f"global_step_{state.step}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            record = asdict(state) | {"code_version": code_version()}
            (temporary / STATE_FILE).write_text(json.dumps(record, indent=2) + "\n")
            _flush_tree(temporary)
            _replace_folder(temporary, final)
            self._point_to(final)
            self._prune(state.step)
        except OSError as error:
            raise InfrastructureError(f"cannot save {final}: {error}") from error
        return final

    def saved(self) -> list[Path]:
        """Complete checkpoints, oldest step first."""
        found = [p for p in self.folder.glob("global_step_*") if (p / STATE_FILE).is_file()]
        return sorted(found, key=_step_of)

    def latest(self) -> Path | None:
        """Where `rl/latest` points; the newest complete checkpoint if it points nowhere."""
        pointer = self.folder / "latest"
        if pointer.is_file():
            named = self.folder / pointer.read_text().strip()
            if (named / STATE_FILE).is_file():
                return named
        saved = self.saved()
        return saved[-1] if saved else None

    def resume_from(self, resume: str) -> Path | None:
        """The checkpoint folder that `resume` (auto, never or a path) means; None starts anew.

        Raises:
            UserError: `never` over an existing run, or a path without a checkpoint.
        """
        if resume == "auto":
            return self.latest()
        if resume == "never":
            if (latest := self.latest()) is not None:
                raise UserError(
                    f"run.resume=never, but {latest} exists; choose another run.folder, remove "
                    "this one, or set run.resume=auto"
                )
            return None
        path = Path(resume)
        found = path if (path / STATE_FILE).is_file() else Checkpoints(path).latest()
        if found is None:
            raise UserError(
                f"run.resume={resume}: no checkpoint there; give a run folder or one of its "
                "rl/global_step_N folders"
            )
        return found

    def _point_to(self, final: Path) -> None:
        pointer = self.folder / "latest"
        temporary = self.folder / ".latest.tmp"
        temporary.write_text(final.name + "\n")
        _flush(temporary)
        os.replace(temporary, pointer)
        _flush(self.folder)

    def _prune(self, step: int) -> None:
        # Steps after this one belong to a future that a resume from an earlier step left behind:
        # they do not count, and they are not ours to delete.
        past = [path for path in self.saved() if _step_of(path) <= step]
        for path in past[: -self._keep]:
            shutil.rmtree(path)


def read_state(folder: Path, run_seed: int) -> RunState:
    """`state.json` of a checkpoint folder.

    Raises:
        UserError: missing, damaged, or of a run with another seed.
    """
    path = folder / STATE_FILE
    try:
        values = json.loads(path.read_text())
        values["pending"] = tuple(tuple(batch) for batch in values["pending"])
        state = RunState(**values)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; this folder holds no complete checkpoint") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); resume from an earlier step") from error
    if state.run_seed != run_seed:
        raise UserError(
            f"{path}: saved with run.seed={state.run_seed}, this run has run.seed={run_seed}; "
            "set it back, or choose another run.folder"
        )
    return state


def code_version() -> str:
    """The commit this code was checked out at; "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Hold the first Ctrl-C back until the block has ended; the second one gets through at once.

    For the stretch in which a checkpoint would catch a half-applied update.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal waiting
        if waiting:
            raise KeyboardInterrupt
        waiting = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _replace_folder(temporary: Path, final: Path) -> None:
    """Rename over an existing folder, which `rename` alone cannot do."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    _flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _flush(path)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
