"""What the loop is given: its numbers, the processes that work, and whoever is told. No bodies.

`workers.local` and `workers.cluster` are the processes; `rl.train` has the one who is told.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from common.records import Group, Problem, Scored
from models.decoding import DecodingConfig
from models.state_files import Written
from rl.batch import StaleRule

# Is told what has come back, as it comes, in any order and from any thread.
Arrival = Literal["generated", "scored"]
Hear = Callable[[Arrival, Sequence[Group]], None]


def nobody(event: Arrival, groups: Sequence[Group]) -> None:
    """A `Hear` that does not."""


@dataclass(frozen=True, kw_only=True)
class LoopPlan:
    """Numbers of one run. `save_every` 0 saves at the end only, `eval_every` 0 never evaluates.

    take_up: use the batches that were scored when the run was saved.
    """

    steps: int
    eval_decoding: DecodingConfig
    run_seed: int = 0
    save_every: int = 0
    eval_every: int = 0
    eval_at_start: bool = False
    max_staleness: int = 0
    stale: StaleRule = "drop"
    take_up: bool = True
    timeout_s: float = 600.0


class Cluster(Protocol):
    """The processes that do the work.

    Rollout and reward workers that die are the cluster's own business. A learner that dies raises
    `LearnerLost` from whatever was asked of it; then only `recover` and `close` make sense.
    """

    def roll_out(self, problems: Sequence[Problem], seed: int, hear: Hear) -> Future[Scored]:
        """Decode a group for every problem and score it, each as soon as it can be."""
        ...

    def update(self, groups: Sequence[Group], step: int) -> dict[str, float]: ...
    def sync_weights(self, step: int) -> int:
        """Publish the weights after `step` steps; the version that rollouts have from now on."""
        ...

    def evaluate(
        self, problems: Sequence[Problem], decoding: DecodingConfig, group_size: int, seed: int
    ) -> Future[list[Group]]: ...
    def save(self, folder: Path) -> Future[Written]:
        """Copy the learner's state; the future ends when its files are in `folder`, on disk."""
        ...

    def load(self, folder: Path, version: int | None = None) -> None:
        """Restore it. The next `sync_weights` publishes as `version` (None: goes on counting)."""
        ...

    def recover(self, folder: Path | None) -> None:
        """After `LearnerLost`: drop all work under way, start the learner anew, load `folder`.

        None is the run's first weights. Call `sync_weights` before the next rollout.
        """
        ...

    def export(self, folder: Path) -> None: ...
    def close(self) -> None: ...


class Monitor(Protocol):
    """Who is told what happens; the loop itself prints and writes nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def say(self, text: str) -> None: ...
