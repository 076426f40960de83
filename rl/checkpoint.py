"""The run folder of RL training: which steps are saved, and which one a resume starts from.

Not the contents of a checkpoint: the cluster writes `policy/` and, if it moves, `reference/` into
the folder it is given. A checkpoint is complete or absent: it is written under a temporary name,
flushed to disk, its manifest last, renamed, and only then does `rl/latest` point to it.
"""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from common.errors import InfrastructureError, UserError
from common.files import private_folder
from common.futures import in_thread
from common.integrity import MANIFEST, FileRecord, covered_bytes, find_damage, flush, write_manifest
from rl.inflight import Batches, write_batches
from rl.origin import Origin

STATE_FILE = "state.json"
_STEP = re.compile(r"(?:global|abandoned)_step_(\d+)(?:\.\d+)?")
# Writes the workers' files into the folder it is given. The future, if there is one, ends when they
# are on disk, and holds their records by absolute path, so that nobody has to read them again.
Write = Callable[[Path], Future[dict[str, FileRecord]] | None]
WRITE_TIMEOUT_S = 24 * 3600.0
# A network file system may show what another node has written a little later.
VISIBLE_S = 30.0


@dataclass(frozen=True)
class RunState:
    """What `state.json` holds beside the engine's own files.

    step: finished updates; with data.seed the data cursor, with run_seed the first two names of
    every random number. policy_version: of the weights then served. pending: problem ids of the
    batches that were in flight; they are worked out again from (data seed, step), this is their
    record.
    """

    step: int
    policy_version: int
    run_seed: int
    code_version: str = ""
    pending: tuple[tuple[str, ...], ...] = ()


class Checkpoints:
    """The `rl/` part of a run folder; keeps the newest `keep_last_n` steps.

    Args:
        run_folder: of the run.
        keep_last_n: how many to keep; one more needs room while it is written.
        origin: said in every checkpoint; a reader needs none.
    """

    def __init__(
        self, run_folder: Path, keep_last_n: int = 2, origin: Origin | None = None
    ) -> None:
        self.folder = run_folder / "rl"
        self._keep = keep_last_n
        self._origin = origin
        self.bytes_written = 0

    def save(self, state: RunState, write: Write, batches: Batches | None = None) -> Path:
        """Save one step and wait until it is on disk. See `begin`."""
        return self.begin(state, write, batches).result(WRITE_TIMEOUT_S)

    def begin(self, state: RunState, write: Write, batches: Batches | None = None) -> Future[Path]:
        """Start to save one step; `write(folder)` puts the cluster's files into a folder.

        Returns as soon as `write` does; the rest is done in a thread that no exit waits for.
        `batches` are those in flight that are scored already. What a worker raises in `write` is
        passed on: that is not the file system's fault.

        The future raises:
            InfrastructureError: the file system refused; the previous checkpoint is untouched.
        """
        final = self.folder / f"global_step_{state.step}"
        temporary = self.folder / f".{final.name}.tmp"
        try:
            self._sweep()
            private_folder(self.folder)
            temporary.mkdir()
            self._check_room()
            files = write(temporary)
        except OSError as error:
            refused: Future[Path] = Future()
            refused.set_exception(_refused(temporary, final, error))
            return refused

        def finish() -> Path:
            try:
                records = {} if files is None else files.result(WRITE_TIMEOUT_S)
                self._complete(state, temporary, final, records, batches or {})
            except (OSError, InfrastructureError, UserError) as error:
                raise _refused(temporary, final, error) from error
            return final

        return in_thread(finish, f"save-{state.step}")

    def _sweep(self) -> None:
        """Remove what a save that was killed has left; there is never more than one under way."""
        for pattern in (".global_step_*.tmp", ".global_step_*.old"):
            for left in self.folder.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)

    def _check_room(self) -> None:
        """Refuse before the disk is full: metrics and logs are often written to the same one."""
        latest = self.latest()
        needed = 0 if latest is None else covered_bytes(latest)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{free} bytes free, the last checkpoint has {needed}")

    def _complete(
        self,
        state: RunState,
        temporary: Path,
        final: Path,
        records: Mapping[str, FileRecord],
        batches: Batches,
    ) -> None:
        record = asdict(state) | {"code_version": code_version()}
        (temporary / STATE_FILE).write_text(json.dumps(record, indent=2) + "\n")
        write_batches(temporary, batches)
        if self._origin is not None:
            self._origin.write(temporary)
        root = temporary.resolve()
        known = {Path(path).relative_to(root).as_posix(): r for path, r in records.items()}
        _check_shared(temporary, known)
        self.bytes_written = write_manifest(temporary, known)
        for path in temporary.rglob("*"):
            if path.relative_to(temporary).as_posix() not in known:  # those are on disk already
                flush(path)
        flush(temporary)
        _replace_folder(temporary, final)
        self._point_to(final)
        self._prune(state.step)

    def saved(self) -> list[Path]:
        """Complete checkpoints, oldest step first."""
        found = [p for p in self.folder.glob("global_step_*") if is_complete(p)]
        return sorted(found, key=_step_of)

    def latest(self) -> Path | None:
        """Where `rl/latest` points; the newest complete checkpoint if it points nowhere."""
        pointer = self.folder / "latest"
        if pointer.is_file():
            named = self.folder / pointer.read_text().strip()
            if is_complete(named):
                return named
        saved = self.saved()
        return saved[-1] if saved else None

    def newest_sound(self, say: Callable[[str], None]) -> Path | None:
        """`latest`, or the newest before it whose files are all as they were written.

        Args:
            say: hears of every checkpoint that is passed over, and why.

        Raises:
            UserError: there are checkpoints, and none of them is sound.
        """
        latest = self.latest()
        return None if latest is None else self.sound_from(latest, say)

    def sound_from(self, newest: Path, say: Callable[[str], None]) -> Path:
        """`newest`, or the newest before it whose files are all as they were written.

        See `newest_sound`.
        """
        before = [path for path in self.saved() if _step_of(path) < _step_of(newest)]
        damage = ""
        for path in [newest, *reversed(before)]:
            found = find_damage(path)
            if found is None:
                if damage:
                    say(f"{damage}; going back to {path}")
                return path
            damage = f"{path} is damaged ({found})"
        raise UserError(
            f"{damage}, and no earlier checkpoint is sound; remove {self.folder} to start anew, or "
            "choose another run.folder"
        )

    def resume_from(self, resume: str, say: Callable[[str], None] = print) -> Path | None:
        """The checkpoint folder that `resume` (auto, never or a path) means; None starts anew.

        Every file of it has been read and compared with its checksum.

        Args:
            say: hears of damaged checkpoints that `auto` passes over.

        Raises:
            UserError: `never` over an existing run, a path without a checkpoint, a damaged one.
        """
        if resume == "auto":
            return self.newest_sound(say)
        if resume == "never":
            if (latest := self.latest()) is not None:
                raise UserError(
                    f"run.resume=never, but {latest} exists; choose another run.folder, remove "
                    "this one, or set run.resume=auto"
                )
            return None
        path = Path(resume)
        found = path if is_complete(path) else Checkpoints(path).latest()
        if found is None:
            raise UserError(
                f"run.resume={resume}: no checkpoint there; give a run folder or one of its "
                "rl/global_step_N folders"
            )
        damage = find_damage(found)
        if damage is not None:
            raise UserError(
                f"run.resume={resume}: {found} is damaged ({damage}); name an earlier one"
            )
        return found

    def abandon_after(self, path: Path, say: Callable[[str], None]) -> None:
        """The run goes on from `path`: later steps of its folder are no longer of this run.

        They are kept under another name, for whoever wants that future back (`run.resume`).
        """
        if path.resolve().parent != self.folder.resolve():
            return
        later = [saved for saved in self.saved() if _step_of(saved) > _step_of(path)]
        if later or self.latest() != path:
            self._point_to(path)
        for saved in later:
            names = (f"abandoned_step_{_step_of(saved)}.{number}" for number in itertools.count(1))
            kept = next(new for name in names if not (new := self.folder / name).exists())
            saved.rename(kept)
            say(f"{saved.name} comes after {path.name}, where the run goes on: kept as {kept.name}")

    def _point_to(self, final: Path) -> None:
        pointer = self.folder / "latest"
        temporary = self.folder / ".latest.tmp"
        temporary.write_text(final.name + "\n")
        flush(temporary)
        os.replace(temporary, pointer)
        flush(self.folder)

    def _prune(self, step: int) -> None:
        past = [path for path in self.saved() if _step_of(path) <= step]
        for path in past[: -self._keep]:
            going = path.with_name(f".{path.name}.old")  # half deleted, it must not look whole
            path.rename(going)
            shutil.rmtree(going, ignore_errors=True)  # `_sweep` tries again


def is_complete(folder: Path) -> bool:
    """Whether a save went to its end here; not whether the files are still sound."""
    return (folder / MANIFEST).is_file() and (folder / STATE_FILE).is_file()


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
        if waiting:  # also if the block has failed: whoever wants to stop does not want a retry
            raise KeyboardInterrupt


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _check_shared(folder: Path, known: Mapping[str, FileRecord]) -> None:
    """What ranks of other nodes say that they have written must be here as well."""
    deadline = time.monotonic() + VISIBLE_S
    while (difference := _difference(folder, known)) is not None:
        if time.monotonic() > deadline:
            raise InfrastructureError(
                f"{difference}, though a rank has written it: run.folder must be on a file system "
                "that all nodes share"
            )
        time.sleep(VISIBLE_S / 60)


def _difference(folder: Path, known: Mapping[str, FileRecord]) -> str | None:
    for name, record in known.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != record.size:
            there = "is not here" if size is None else f"has {size} bytes here, not {record.size}"
            return f"{name} {there}"
    return None


def _replace_folder(temporary: Path, final: Path) -> None:
    """Rename over an existing folder, which `rename` alone cannot do."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _refused(temporary: Path, final: Path, error: Exception) -> InfrastructureError:
    """The error to raise, once what is half written is out of the way."""
    shutil.rmtree(temporary, ignore_errors=True)
    return InfrastructureError(f"cannot save {final}: {error}")
