"""How good a policy is: pass@1 with intervals, differences between stages, pass@k.

The first half is pure numbers on scored groups; `evaluate_checkpoint` makes such groups in this
process. Not the report and not the table: those only show what is computed here.
"""

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import UserError
from common.records import Group, Problem, Rollout
from common.seeding import derive_seed
from models.checkpoint import load_checkpoint
from models.decoding import Decoder, DecodingConfig, Request
from models.tokenizer import encode_prompt
from rewards.compose import RewardConfig, Rewarder
from rl.data import check_prompt_lengths

RESAMPLES = 2000
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` problems with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Evaluation:
    """One checkpoint on one set of problems. `sampled` is None if it was not asked for."""

    greedy: Estimate
    sampled: Estimate | None
    pass_at_k: dict[int, float]
    dropped: int
    groups: list[Group]
    sampled_groups: list[Group]


def passed(rollout: Rollout) -> bool:
    """True if tests were run and every one of them passed."""
    score = rollout.score
    return score is not None and bool(score.verdicts) and set(score.verdicts) == {"pass"}


def dropped(rollout: Rollout) -> bool:
    """True if the sample could not be judged: neither a pass nor a fail."""
    return rollout.score is None or rollout.score.total is None


def pass_rates(groups: List[Group]) -> dict[str, float]:
    """Share of passing completions per problem id; problems with nothing judged are left out."""
    rates = {}
    for group in groups:
        judged = [passed(rollout) for rollout in group.rollouts if not dropped(rollout)]
        if judged:
            rates[group.problem.problem_id] = sum(judged) / len(judged)
    return rates


def pass_at_1(groups: List[Group], seed: int = 0) -> Estimate:
    """Mean pass rate over problems; the interval resamples problems (percentile bootstrap)."""
    return bootstrap(list(pass_rates(groups).values()), seed)


def paired_difference(before: List[Group], after: List[Group], seed: int = 0) -> Estimate:
    """pass@1 after minus before on the problems both have; resampled as pairs.

    Raises:
        ValueError: no problem in common.
    """
    old, new = pass_rates(before), pass_rates(after)
    common = [problem_id for problem_id in old if problem_id in new]
    if not common:
        raise ValueError("the two evaluations have no problem in common")
    return bootstrap([new[problem_id] - old[problem_id] for problem_id in common], seed)


def bootstrap(values: List[float], seed: int = 0) -> Estimate:
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


def mean_pass_at_k(groups: List[Group], k: int) -> float:
    """Mean unbiased pass@k over the problems with at least k judged samples; nan if none has."""
    values = []
    for group in groups:
        judged = [passed(rollout) for rollout in group.rollouts if not dropped(rollout)]
        if len(judged) >= k:
            values.append(pass_at_k(len(judged), sum(judged), k))
    return float(np.mean(values)) if values else float("nan")


def greedy(decoding: DecodingConfig) -> DecodingConfig:
    """The same decoding without chance."""
    return replace(decoding, temperature=0.0, top_p=1.0, top_k=0)


def evaluation_metrics(groups: List[Group], prefix: str = "eval/") -> dict[str, float]:
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


def evaluate_checkpoint(
    folder: Path,
    problems: List[Problem],
    decoding: DecodingConfig,
    reward: RewardConfig,
    *,
    samples: int = 0,
    ks: List[int] = (),
    seed: int = 0,
    prompt_limit: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Greedy pass@1 of a checkpoint and, with `samples` > 0, pass@1 and pass@k as configured.

    Args:
        decoding: how to sample; the greedy half takes it with temperature 0.
        samples: completions per problem for the sampled half.
        ks: for pass@k; each at most `samples`.
        seed: names the completions' seeds and the bootstrap's.
        prompt_limit: longest prompt in tokens; None does not check.
        on_progress: told (completions done, completions in all).

    Raises:
        UserError: a bad checkpoint, an over-long prompt, or k > samples.
    """
    if any(k > samples for k in ks):
        raise UserError(f"pass@{max(ks)} needs at least {max(ks)} samples, got samples={samples}")
    loaded = load_checkpoint(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    prompts = [encode_prompt(loaded.tokenizer, problem.prompt) for problem in problems]
    if prompt_limit is not None:
        check_prompt_lengths(problems, [len(ids) for ids in prompts], prompt_limit)
    decoder = Decoder(loaded.denoiser, loaded.tokenizer)
    done, total = 0, len(problems) * (1 + samples)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    def groups(config: DecodingConfig, size: int) -> list[Group]:
        return decode_groups(decoder, problems, prompts, config, size, seed, advance)

    with Rewarder(reward) as rewarder:
        certain = rewarder.score(groups(greedy(decoding), 1)).groups
        sampled = rewarder.score(groups(decoding, samples)).groups if samples else []
    both = [rollout for group in certain + sampled for rollout in group.rollouts]
    return Evaluation(
        greedy=pass_at_1(certain, seed),
        sampled=pass_at_1(sampled, seed) if sampled else None,
        pass_at_k={k: mean_pass_at_k(sampled, k) for k in ks},
        dropped=sum(dropped(rollout) for rollout in both),
        groups=certain,
        sampled_groups=sampled,
    )


def decode_groups(
    decoder: Decoder,
    problems: List[Problem],
    prompts: List[tuple[int, ...]],
    decoding: DecodingConfig,
    group_size: int,
    seed: int,
    on_progress: Callable[[int], None] | None = None,
) -> list[Group]:
    """Unscored groups; seeds by the same names as a rollout worker's, so results are the same."""
    requests = [
        Request(ids, derive_seed(seed, problem.problem_id, index))
        for problem, ids in zip(problems, prompts, strict=True)
        for index in range(group_size)
    ]
    completions = iter(decoder.decode(requests, decoding, on_progress))
    order = iter(requests)
    return [
        Group(
            problem,
            tuple(
                Rollout(
                    problem_id=problem.problem_id,
                    sample_index=index,
                    prompt_ids=ids,
                    completion=next(completions),
                    policy_version=0,
                    seed=next(order).seed,
                )
                for index in range(group_size)
            ),
        )
        for problem, ids in zip(problems, prompts, strict=True)
    ]
