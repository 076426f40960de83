"""Numbers on scored groups: pass@1 with intervals, paired differences, pass@k. No models, no torch.

Not the evaluating itself (`rl.evaluate`) and not what shows it (`rl.report`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.records import Group, Rollout

RESAMPLES = 2000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` problems with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int


def passed(rollout: Rollout) -> bool:
    """True if tests were run and every one of them passed."""
    score = rollout.score
    return score is not None and bool(score.verdicts) and set(score.verdicts) == {"pass"}


def dropped(rollout: Rollout) -> bool:
    """True if the sample could not be judged: neither a pass nor a fail."""
    return rollout.score is None or rollout.score.total is None


def pass_rates(groups: Sequence[Group]) -> dict[str, float]:
    """Share of passing completions per problem id; problems with nothing judged are left out."""
    rates = {}
    for group in groups:
        judged = [passed(rollout) for rollout in group.rollouts if not dropped(rollout)]
        if judged:
            rates[group.problem.problem_id] = sum(judged) / len(judged)
    return rates


def pass_at_1(groups: Sequence[Group], seed: int = 0) -> Estimate:
    """Mean pass rate over problems; the interval resamples problems (percentile bootstrap)."""
    return bootstrap(list(pass_rates(groups).values()), seed)


def difference(before: Mapping[str, float], after: Mapping[str, float], seed: int = 0) -> Estimate:
    """After minus before where both know the problem; resampled as pairs.

    Raises:
        ValueError: no problem in common.
    """
    common = [problem_id for problem_id in before if problem_id in after]
    if not common:
        raise ValueError("the two evaluations have no problem in common")
    return bootstrap([after[problem_id] - before[problem_id] for problem_id in common], seed)


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of `values` and its 95 % percentile interval from 2000 seeded resamples."""
    if not values:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    sample: Array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(sample), (RESAMPLES, len(sample)))
    low, high = np.percentile(sample[draws].mean(axis=1), [2.5, 97.5])
    return Estimate(float(sample.mean()), float(low), float(high), len(sample))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased pass@k of one problem: 1 - C(n - c, k) / C(n, k) for c of n samples that pass.

    Source: Chen et al. 2021 (arXiv 2107.03374), section 2.1.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {n}")
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def mean_pass_at_k(groups: Sequence[Group], k: int) -> float:
    """Mean unbiased pass@k over the problems with at least k judged samples; nan if none has."""
    values = list(passes_at_k(groups, k).values())
    return float(np.mean(values)) if values else float("nan")


def passes_at_k(groups: Sequence[Group], k: int) -> dict[str, float]:
    """Unbiased pass@k per problem id, of the problems with at least k judged samples."""
    values = {}
    for group in groups:
        judged = [passed(rollout) for rollout in group.rollouts if not dropped(rollout)]
        if len(judged) >= k:
            values[group.problem.problem_id] = pass_at_k(len(judged), sum(judged), k)
    return values


def distinct_shares(groups: Sequence[Group]) -> dict[str, float]:
    """Different texts over completions, per problem id: 1 / n if all n agree, 1 if none do."""
    return {
        group.problem.problem_id: len({r.completion.text for r in group.rollouts})
        / len(group.rollouts)
        for group in groups
        if group.rollouts
    }


def evaluation_metrics(groups: Sequence[Group], prefix: str = "eval/") -> dict[str, float]:
    """What the training loop logs of an evaluation."""
    estimate = pass_at_1(groups)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    totals = [r.score.total for r in rollouts if r.score is not None and r.score.total is not None]
    return {
        f"{prefix}pass@1": estimate.value,
        f"{prefix}pass@1_low": estimate.low,
        f"{prefix}pass@1_high": estimate.high,
        f"{prefix}n": float(estimate.n),
        f"{prefix}dropped": float(sum(dropped(rollout) for rollout in rollouts)),
        f"{prefix}reward": float(np.mean(totals)) if totals else float("nan"),
    }
