"""What became of every sample: `ledger.jsonl`, beside `metrics.jsonl`. Not the proof: `rl.audit`.

A line for each thing that happens to a batch or a part of it (planned, generated, scored, perhaps
recomputed, settled), by step, problem and sample index. A run that goes on from a checkpoint begins
a new *life* at its step: whatever earlier lives wrote about that step and later ones stays in the
file but counts no more. Every line names its life, so a late line of an earlier one cannot be taken
for news.
"""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import append_line
from common.metrics import end_last_line, read_metrics
from common.records import Group, Problem
from rl.batch import Fate, fates

LEDGER_FILE = "ledger.jsonl"


class Ledger:
    """Appends whole lines and nothing else; half a line of a killed process is cut off.

    Args:
        path: made at the first entry.
        group_size: completions that are asked for per problem.
    """

    def __init__(self, path: Path, group_size: int) -> None:
        self._path = path
        self._group_size = group_size
        self._lock = threading.Lock()

    def begin(self, step: int, cause: str) -> "Life":
        """From now on the run goes on from `step` finished updates, because of `cause`."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        end_last_line(self._path)
        lives = [entry["life"] for entry in read_metrics(self._path)]
        life = max(lives, default=0) + 1
        entry = {"event": "begin", "life": life, "step": step, "cause": cause}
        self._append(entry | {"time": round(time.time(), 3)}, durable=True)
        return Life(self, life, self._group_size)

    def _append(self, entry: Mapping[str, Any], durable: bool = False) -> None:
        line = json.dumps(entry, separators=(",", ":"))
        with self._lock:
            append_line(self._path, line, durable)


@dataclass(frozen=True)
class Life:
    """The ledger as one stretch of the run writes it."""

    ledger: Ledger
    number: int
    group_size: int

    def planned(self, step: int, problems: Sequence[Problem]) -> None:
        """The batch of `step` is about to be rolled out."""
        names = [problem.problem_id for problem in problems]
        self._note("planned", step, problems=names, group_size=self.group_size)

    def came(self, step: int, event: str, groups: Sequence[Group]) -> None:
        """`event` has happened to these completions of a batch: to all of it, or to a part.

        Either `generated`; or `scored`: they came back from the reward workers (also those whose
        reward failed); or `recomputed`: they were too old, and what came first is not used.
        """
        self._note(event, step, samples=_samples(groups))

    def taken_up(self, step: int, problems: Sequence[Problem], groups: Sequence[Group]) -> None:
        """A batch that a checkpoint had scored already."""
        self.planned(step, problems)
        self.came(step, "generated", groups)
        self.came(step, "scored", groups)

    def settled(
        self, step: int, groups: Sequence[Group], fresh: Sequence[Group], applied: bool = True
    ) -> None:
        """The update is done. `fresh` is what of `groups` was not too old for it.

        Args:
            applied: False if no optimizer step was taken, for the gradient was not finite.
        """
        by_fate: dict[str, list[tuple[str, list[int]]]] = {}
        for group, kept in zip(groups, fresh, strict=True):
            inside = {rollout.sample_index for rollout in kept.rollouts}
            indices = [rollout.sample_index for rollout in group.rollouts]
            found: dict[int, Fate] = {index: "stale" for index in indices if index not in inside}
            found |= zip((r.sample_index for r in kept.rollouts), fates(kept), strict=True)
            for fate in sorted(set(found.values())):
                chosen = [index for index in indices if found[index] == fate]
                by_fate.setdefault(fate, []).append((group.problem.problem_id, chosen))
        trained = by_fate.pop("trained", [])
        if trained and not applied:
            by_fate["skipped"], trained = trained, []
        self._note("settled", step, durable=True, trained=trained, dropped=by_fate)

    def _note(self, event: str, step: int, durable: bool = False, **values: Any) -> None:
        entry = {"event": event, "life": self.number, "step": step, **values}
        self.ledger._append(entry, durable)


def _samples(groups: Sequence[Group]) -> list[tuple[str, list[int]]]:
    """[(problem, sample indices)]: a list, so that a double would show."""
    return [(g.problem.problem_id, [r.sample_index for r in g.rollouts]) for g in groups]
