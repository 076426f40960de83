"""What corrects for rollouts of older weights than the learner's. Not the loss and not the loop.

Decoupled form (ALGORITHMS section 4, off-policy; arXiv 2110.00641): the ratio that is clipped
compares with the learner at the start of the update (the proximal policy), and every token is
weighed by exp(proximal - behaviour), truncated. Only the weights that decoded a completion can give
its behaviour log-probabilities: the rollout worker scores it, under the masks that the update will
use. The weight is a token's own: how likely its neighbours were is not corrected for.
"""

from collections.abc import Sequence as List
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError
from diffusion.views import EstimatorConfig
from models.engine import Engine
from rl.batch import Sample, mask_seed


@dataclass(frozen=True)
class BehaviourScoring:
    """All that a rollout worker must know to score what it decodes as the learner will."""

    estimator: EstimatorConfig
    num_iterations: int

    def mask_seeds(self, seed: int, problem_id: str, sample_index: int) -> tuple[int, ...]:
        """Of the masks of every iteration, for the completion that `seed` decodes."""
        iterations = range(self.num_iterations)
        return tuple(mask_seed(seed, problem_id, sample_index, i) for i in iterations)


def check_behaviour(samples: List[Sample], version: int, num_iterations: int) -> None:
    """Every sample older than `version` has log-probabilities under the masks of every iteration.

    Raises:
        UserError: it has not: it was rolled out under other settings.
    """
    for sample in samples:
        if sample.policy_version < version and len(sample.behaviour_logps) != num_iterations:
            raise UserError(
                f"{sample.problem_id}, sample {sample.sample_index}: rolled out with "
                f"log-probabilities under {len(sample.behaviour_logps)} masks, but "
                f"algorithm.num_iterations={num_iterations}; resume with the settings that the "
                "checkpoint was saved with, or set algorithm.importance_cap=null"
            )


def importance(
    samples: List[Sample], proximal: Tensor, iteration: int, version: int
) -> Tensor | None:
    """exp(proximal - behaviour), not truncated: [B, C], exactly 1 for samples of `version`.

    None if all samples are.

    Args:
        proximal: log-probabilities of the learner at the start of the update, [B, C], detached.
        version: of the learner at the start of the update.
    """
    behaviour = proximal.clone()
    older = False
    for row, sample in enumerate(samples):
        if sample.policy_version < version:
            logps = torch.tensor(sample.behaviour_logps[iteration])
            behaviour[row, : len(logps)] = logps.to(proximal)
            older = True
    return torch.exp(proximal - behaviour) if older else None


class Correction:
    """Weighs the tokens of one update, and counts over its micro-batches, iterations and ranks.

    Args:
        cap: largest weight.
        version: of the learner at the start of the update.
    """

    def __init__(self, cap: float, version: int) -> None:
        self._cap = cap
        self._version = version
        self._tokens = self._older = self._truncated = 0
        self._weight = self._peak = 0.0

    def weigh(
        self, samples: List[Sample], proximal: Tensor, supervised: Tensor, iteration: int
    ) -> Tensor | None:
        """min(weight, cap) [B, C] for `clipped_policy_loss`; None if all samples are of `version`.

        Args:
            proximal: see `importance`.
            supervised: bool [B, C], tokens that count.
        """
        self._tokens += int(supervised.sum())
        weights = importance(samples, proximal, iteration, self._version)
        if weights is None:
            return None
        older = torch.tensor([sample.policy_version < self._version for sample in samples])
        found = weights[supervised & older.to(supervised.device)[:, None]]
        if len(found):
            self._older += len(found)
            self._truncated += int((found > self._cap).sum())
            self._weight += float(found.clamp(max=self._cap).sum())
            self._peak = max(self._peak, float(found.max()))
        return weights.clamp(max=self._cap)

    def metrics(self, engine: Engine) -> dict[str, float]:
        """Over tokens of older weights: mean weight, largest before truncation, share truncated.

        Without any such tokens: 1, 1 and 0. Collective: every rank enters.
        """
        sums = {
            "tokens": float(self._tokens),
            "older": float(self._older),
            "truncated": float(self._truncated),
            "weight": self._weight,
        }
        # Each rank's largest in a cell of its own: a maximum by means of sums.
        peaks = {f"peak {rank}": 0.0 for rank in range(engine.world_size)}
        peaks[f"peak {engine.rank}"] = self._peak
        total = engine.sum_over_ranks(sums | peaks)
        older = total["older"]
        return {
            "async/older_share": older / max(total["tokens"], 1.0),
            "async/importance_mean": total["weight"] / older if older else 1.0,
            "async/importance_max": max(total[name] for name in peaks) if older else 1.0,
            "async/importance_truncated": total["truncated"] / older if older else 0.0,
        }
