"""From problems to scored groups through two crews, piece by piece. Not the crews; knows no Ray.

A piece is scored as soon as it is decoded, whatever the others are doing: no reward worker waits
for a batch, and no rollout worker for a reward.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

from common.futures import chained, gathered, then
from common.records import Group, Problem, Scored
from rewards.compose import check_failures
from rl.protocol import Hear, nobody
from workers.pool import cut
from workers.reward import join


class Crew(Protocol):
    """What is asked of `workers.crew.Crew`."""

    @property
    def size(self) -> int: ...
    def submit(self, work: Sequence[tuple[str, tuple[Any, ...]]]) -> Future[list[Any]]: ...


class Flow:
    """Both crews at work on the same batches.

    Args:
        smallest: problems in a piece of rollout work, groups in a piece of reward work.
        max_failed_share: of rewards, before a batch is an error.
    """

    def __init__(
        self, rollouts: Crew, rewards: Crew, smallest: tuple[int, int], max_failed_share: float
    ) -> None:
        self._rollouts = rollouts
        self._rewards = rewards
        self._smallest = smallest
        self._max_failed_share = max_failed_share

    def roll_out(
        self, problems: Sequence[Problem], rest: tuple[Any, ...], hear: Hear = nobody
    ) -> Future[Scored]:
        """`RolloutWorker.generate(piece, *rest)`, then `RewardWorker.score`; groups in order."""
        pieces = cut(problems, self._rollouts.size, self._smallest[0])
        return self._joined([self._piece(piece, rest, hear) for piece in pieces])

    def _piece(self, piece: list[Problem], rest: tuple[Any, ...], hear: Hear) -> Future[Scored]:
        def score(groups: list[Group]) -> Future[Scored]:
            hear("generated", groups)
            return then(gathered(self._scored(groups, hear)), join)

        return chained(_one(self._rollouts, "generate", piece, *rest), score)

    def _scored(self, groups: Sequence[Group], hear: Hear) -> list[Future[Scored]]:
        def heard(scored: Scored) -> Scored:
            hear("scored", scored.groups)
            return scored

        pieces = cut(groups, self._rewards.size, self._smallest[1])
        return [then(_one(self._rewards, "score", piece), heard) for piece in pieces]

    def _joined(self, parts: Sequence[Future[Scored]]) -> Future[Scored]:
        return then(gathered(parts), partial(_checked, self._max_failed_share))


def _one(crew: Crew, method: str, *args: Any) -> Future[Any]:
    """A piece of work of its own: nobody waits for it together with others."""
    return then(crew.submit([(method, args)]), lambda results: results[0])


def _checked(max_failed_share: float, parts: Sequence[Scored]) -> Scored:
    scored = join(parts)
    check_failures(scored.groups, max_failed_share)
    return scored
