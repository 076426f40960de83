"""Should there be one rollout worker more, or one less? A rule on measured idle shares, no acting.

While the learner waits for rollouts, more rollout workers help; while rollout workers wait for the
learner, fewer do as well. One worker at a time, after several steps that agree: weights must be
pulled and a batch is a noisy measure.
"""

from collections import deque
from dataclasses import dataclass

PATIENCE = 3
LEARNER_WAITS, LEARNER_BUSY = 0.3, 0.05
ROLLOUTS_BUSY, ROLLOUTS_WAIT = 0.3, 0.5


@dataclass(frozen=True)
class Decision:
    """From `before` to `after` workers, and why."""

    before: int
    after: int
    reason: str


class Autoscaler:
    """Between `least` and `most` workers.

    Args:
        take_turns: rollout workers have nothing to do while the learner works (max_staleness 0):
            whether they are busy is asked of the rest of the time.
    """

    def __init__(self, least: int, most: int, take_turns: bool = False) -> None:
        self._least, self._most = least, most
        self._take_turns = take_turns
        self._seen: deque[tuple[float, float]] = deque(maxlen=PATIENCE)

    def after_step(self, size: int, learner_idle: float, rollout_idle: float) -> Decision | None:
        """Note one step's idle shares; what to change, if anything."""
        self._seen.append((learner_idle, rollout_idle))
        if len(self._seen) < PATIENCE:
            return None
        learner = [learner for learner, _ in self._seen]
        rollouts = [rollouts for _, rollouts in self._seen]
        shares = (
            f"over {PATIENCE} steps the learner was idle {min(learner):.0%} to {max(learner):.0%}, "
            f"rollout workers {min(rollouts):.0%} to {max(rollouts):.0%}"
        )
        change = 0
        waits = [self._waits(*pair) for pair in self._seen]
        if min(learner) > LEARNER_WAITS and max(waits) < ROLLOUTS_BUSY:
            change = 1
        elif max(learner) < LEARNER_BUSY and min(rollouts) > ROLLOUTS_WAIT:
            change = -1
        after = max(self._least, min(self._most, size + change))
        if change == 0 or after == size or (after > size) != (change > 0):
            return None
        self._seen.clear()  # what was measured is of another size
        return Decision(size, after, shares)

    def _waits(self, learner_idle: float, rollout_idle: float) -> float:
        """Share of the time that is theirs in which rollout workers were idle."""
        theirs = learner_idle if self._take_turns else 1.0
        return 1.0 - min(1.0, (1.0 - rollout_idle) / max(theirs, 1e-9))
