"""The reward worker: groups in, scored groups out. Not the rewards, not the sandbox.

A plain class; `workers.cluster` wraps it in an actor. It never imports torch: many of them fit
beside the models.
"""

from collections.abc import Sequence

from common.records import Group
from rewards.compose import RewardConfig, Rewarder


class RewardWorker:
    """Scores with the rewards of `config`; UserError if one of them does not import."""

    def __init__(self, config: RewardConfig) -> None:
        self._rewarder = Rewarder(config)

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups, in their order, with `score` filled in every rollout."""
        return self._rewarder.score(groups)

    def close(self) -> None:
        """End the sandbox's processes."""
        self._rewarder.close()
