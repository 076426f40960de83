"""The reward worker: groups in, scored groups out. Not the rewards, not the sandbox.

A plain class; `workers.cluster` wraps it in an actor. It never imports torch: many of them fit
beside the models.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from common.records import Group, Scored
from rewards.compose import RewardConfig, Rewarder


class RewardWorker:
    """Scores with the rewards of `config`; UserError if one of them does not import.

    Failed samples are counted by whoever has the whole batch (`check_failures`): in a small piece
    of it, two bad samples are a large share.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._rewarder = Rewarder(config.model_copy(update={"max_failed_share": 1.0}))

    def score(self, groups: Sequence[Group]) -> Scored:
        """The same groups, in their order, with `score` filled in every rollout."""
        return self._rewarder.score(groups)

    def close(self) -> None:
        """End the sandbox's processes."""
        self._rewarder.close()


def join(parts: Iterable[Scored]) -> Scored:
    """What several reward workers returned, as if one had: groups in a row, sums added up."""
    groups: list[Group] = []
    sums: Counter[str] = Counter()
    for part in parts:
        groups += part.groups
        sums.update(part.sums)
    return Scored(groups, dict(sums))
