"""Saving beside training: one save at a time, none of which may end a run that still learns.

Not what a checkpoint holds (`rl.checkpoint`). Training pauses while the state is copied; a full
disk costs the new checkpoint, never the run: the one before stays, a line and a metric say so.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from common.errors import InfrastructureError
from rl.checkpoint import Checkpoints, RunState, Write, interrupt_deferred
from rl.inflight import Flight, ready
from rl.protocol import Monitor

# Later than the cluster's own limit on writing files, which says what it was waiting for.
SAVE_TIMEOUTS = 8.0


class Saver:
    """Starts saves, and looks after the one that is under way.

    Args:
        checkpoints: where they go.
        write: copies the workers' state and writes it (`Cluster.save`).
        monitor: gets `timing_s/save` (how long training paused) at once and, when the files are on
            disk, `timing_s/save_written`, `checkpoint/bytes` and `checkpoint/failed` (0 or 1).
        newest: the checkpoint that the run started from.
        timeout_s: longest wait for one answer of a worker.

    step: of the last save that was begun, or from which the run goes on.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        write: Write,
        monitor: Monitor,
        newest: Path | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self._checkpoints, self._write, self._monitor = checkpoints, write, monitor
        self._timeout_s = timeout_s
        self._under_way: tuple[int, float, Future[Path]] | None = None
        self.newest = newest
        self.step = 0

    def go_on(self, lost: bool) -> Path | None:
        """Which checkpoint the run goes on from; None is its very start.

        Args:
            lost: the learner died. A checkpoint may have been damaged since it was written.

        Raises:
            UserError: none is sound any more.
        """
        self.finish()
        if lost and self.newest is not None:
            self.newest = self._checkpoints.sound_from(self.newest, self._monitor.say)
        if self.newest is not None:
            self._checkpoints.abandon_after(self.newest, self._monitor.say)
        return self.newest

    def save(self, state: RunState, in_flight: Sequence[Flight]) -> None:
        """Copy the state and return; a save that is still under way is waited for first.

        Args:
            in_flight: the batches after `state.step`; those that are scored are saved too.

        Raises:
            InfrastructureError: a worker failed while it copied its state.
        """
        began = time.monotonic()
        self.finish()
        pending = tuple(tuple(p.problem_id for p in problems) for problems, _ in in_flight)
        state, batches = replace(state, pending=pending), ready(in_flight, state.step)
        with interrupt_deferred():
            future = self._checkpoints.begin(state, self._write, batches)
            self._under_way, self.step = (state.step, began, future), state.step
        self._monitor.log(state.step, {"timing_s/save": time.monotonic() - began})

    def poll(self) -> None:
        """Report a save that has ended since the last call; waits for nothing."""
        if self._under_way is not None and self._under_way[2].done():
            self.finish()

    def finish(self, must: bool = False) -> None:
        """Wait for the save that is under way, if there is one, and report it.

        Raises:
            InfrastructureError: it failed, and `must` says that nobody will try again.
        """
        if self._under_way is None:
            return
        step, began, future = self._under_way
        try:  # an interrupt in here leaves it under way, for whoever handles the interrupt
            self.newest = future.result(SAVE_TIMEOUTS * self._timeout_s)
        except (InfrastructureError, TimeoutError) as error:
            self._under_way = None
            self._failed(step, error, must)
            return
        self._under_way = None
        self._monitor.log(
            step,
            {
                "timing_s/save_written": time.monotonic() - began,
                "checkpoint/bytes": float(self._checkpoints.bytes_written),
                "checkpoint/failed": 0.0,
            },
        )

    def _failed(self, step: int, error: Exception, must: bool) -> None:
        self._monitor.log(step, {"checkpoint/failed": 1.0})
        kept = f"{self.newest} stays the last" if self.newest else "there is none yet"
        text = f"step {step} was not saved: {str(error) or type(error).__name__}"
        if must:
            raise InfrastructureError(f"{text}; {kept}: make room and run again") from error
        self._monitor.say(f"{text}; training goes on, {kept}")
