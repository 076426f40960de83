"""From scored groups to micro-batches: who is trained on, with what weight, on which rank.

Not the loss and not the forward pass. Everything here is a pure function of the groups, so every
rank works out the same plan by itself and no rank needs to ask another.
"""

import statistics
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from typing import Literal

from common.records import Completion, Group, Problem, Rollout, Score, Scored
from common.seeding import derive_seed
from diffusion.arness import ar_ness
from diffusion.layout import Sequence, decoded_sequence
from rl.advantage import Advantages, Baseline, group_advantages
from rl.estimates import distinct_shares

AR_NESS_K = (1, 2, 4, 8)

# What became of a sample: trained on, or why not.
Fate = Literal["trained", "stale", "no_score", "no_spread", "too_few", "empty"]
# What becomes of samples that are too old (`settle_stale`).
StaleRule = Literal["drop", "recompute"]


def mask_seed(seed: int, problem_id: str, sample_index: int, iteration: int) -> int:
    """The seed of a sample's masks: made of names, never of counters or positions.

    Args:
        seed: that the completion was decoded by. It names the run and the step that the batch was
            asked for, whenever it is used; so the worker that decodes knows the masks as well.
    """
    return derive_seed(seed, "mask", problem_id, sample_index, iteration)


@dataclass(frozen=True)
class Sample:
    """One completion to train on.

    seed: that it was decoded by. policy_version: of the weights that decoded it.
    behaviour_logps: of `Completion`: under the masks of every iteration, or empty.
    """

    problem_id: str
    sample_index: int
    sequence: Sequence
    advantage: float
    seed: int = 0
    policy_version: int = 0
    behaviour_logps: tuple[tuple[float, ...], ...] = ()

    def mask_seed(self, iteration: int) -> int:
        """See the function of this name."""
        return mask_seed(self.seed, self.problem_id, self.sample_index, iteration)


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward pass. `weight` 0 marks padding that only keeps ranks in step."""

    samples: tuple[Sample, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Batch:
    """The samples of one update and what was left out.

    normaliser: supervised tokens of all samples: fixed before any sharding.
    """

    samples: tuple[Sample, ...]
    normaliser: int
    groups: int
    groups_no_spread: int
    groups_too_few: int
    samples_missing: int


def sequence_of(rollout: Rollout) -> Sequence:
    """What is scored of a rollout, and in which context."""
    return decoded_sequence(rollout.prompt_ids, rollout.completion)


def make_batch(groups: List[Group], kind: Baseline, scale_by_std: bool) -> Batch:
    """Samples with their advantages; groups without spread and samples without score dropped."""
    samples: list[Sample] = []
    outcomes: list[Advantages] = []
    for group in groups:
        outcome = group_advantages(_rewards(group), kind, scale_by_std)
        outcomes.append(outcome)
        for rollout, advantage in zip(group.rollouts, outcome.values, strict=True):
            if advantage is not None and rollout.completion.token_ids:
                samples.append(_sample(rollout, advantage))
    return Batch(
        samples=tuple(samples),
        normaliser=sum(sample.sequence.supervised for sample in samples),
        groups=len(groups),
        groups_no_spread=sum(outcome.state == "no_spread" for outcome in outcomes),
        groups_too_few=sum(outcome.state == "too_few" for outcome in outcomes),
        samples_missing=sum(outcome.missing for outcome in outcomes),
    )


def fates(group: Group) -> list[Fate]:
    """What `make_batch` does with each sample of a group, whatever the baseline."""
    rewards = _rewards(group)
    state = group_advantages(rewards).state
    found: list[Fate] = []
    for rollout, reward in zip(group.rollouts, rewards, strict=True):
        if reward is None:
            found.append("no_score")
        elif state != "kept":
            found.append(state)
        else:
            found.append("trained" if rollout.completion.token_ids else "empty")
    return found


def _rewards(group: Group) -> list[float | None]:
    return [r.score.total if r.score is not None else None for r in group.rollouts]


def _sample(rollout: Rollout, advantage: float) -> Sample:
    return Sample(
        rollout.problem_id,
        rollout.sample_index,
        sequence_of(rollout),
        advantage,
        rollout.seed,
        rollout.policy_version,
        rollout.completion.behaviour_logps,
    )


def micro_batches(
    samples: List[Sample], costs: List[int], budget: int, rank: int = 0, world_size: int = 1
) -> list[MicroBatch]:
    """This rank's micro-batches: as many as every other rank's, each within the token budget.

    Samples are sorted by cost (stable) and dealt out like cards, so ranks get like loads; a
    micro-batch costs its longest member times its size, because rows are padded to the longest.
    A single sample over the budget travels alone. Ranks that come out short are filled up with
    the cheapest sample at weight 0: collectives of a sharded model need every rank every time.

    Args:
        costs: forward tokens of each sample, prompts, views and all.
        budget: tokens of a micro-batch.
    """
    if not samples:
        return []
    order = sorted(range(len(samples)), key=lambda index: costs[index])
    shards = [
        _pack([(samples[i], costs[i]) for i in order[r::world_size]], budget)
        for r in range(world_size)
    ]
    most = max(len(shard) for shard in shards)
    padding = MicroBatch((samples[order[0]],), weight=0.0)
    mine = shards[rank]
    return mine + [padding] * (most - len(mine))


def _pack(items: list[tuple[Sample, int]], budget: int) -> list[MicroBatch]:
    """Greedy: items come sorted by cost, so the newest is always the longest."""
    out: list[MicroBatch] = []
    current: list[Sample] = []
    for sample, cost in items:
        if current and cost * (len(current) + 1) > budget:
            out.append(MicroBatch(tuple(current)))
            current = []
        current.append(sample)
    if current:
        out.append(MicroBatch(tuple(current)))
    return out


def settle_stale(
    scored: Scored,
    version: int,
    bound: int,
    again: Callable[[List[Problem]], Scored] | None = None,
) -> tuple[Scored, list[Group], dict[str, float]]:
    """What there is to train on that is at most `bound` versions older than `version`.

    Args:
        again: rolls problems out once more, with the same seeds and the newest weights. A group
            with a sample that is too old is then replaced as a whole; nothing of its tokens or
            scores is kept. None drops such samples.

    Returns:
        The batch with its replacements, what of it is young enough, and counts.
    """
    too_old = [
        any(version - rollout.policy_version > bound for rollout in group.rollouts)
        for group in scored.groups
    ]
    recomputed = 0
    if again is not None and any(too_old):
        fresh = again([g.problem for g, old in zip(scored.groups, too_old, strict=True) if old])
        recomputed = sum(len(group.rollouts) for group in fresh.groups)
        new = iter(fresh.groups)
        groups = [next(new) if old else g for g, old in zip(scored.groups, too_old, strict=True)]
        sums = Counter(scored.sums)
        sums.update(fresh.sums)
        scored = Scored(groups, dict(sums))
    kept, metrics = drop_stale(scored.groups, version, bound)
    return scored, kept, metrics | {"async/recomputed_stale": float(recomputed)}


def drop_stale(
    groups: List[Group], version: int, bound: int
) -> tuple[list[Group], dict[str, float]]:
    """Remove rollouts whose weights are more than `bound` versions old; say how old they were."""
    ages = [version - r.policy_version for group in groups for r in group.rollouts]
    kept = [
        replace(g, rollouts=tuple(r for r in g.rollouts if version - r.policy_version <= bound))
        for g in groups
    ]
    return kept, {
        "async/staleness_mean": sum(ages) / max(len(ages), 1),
        "async/staleness_max": float(max(ages, default=0)),
        "async/dropped_stale": float(sum(age > bound for age in ages)),
    }


def batch_metrics(batch: Batch) -> dict[str, float]:
    """How much of the batch carries signal."""
    groups = max(batch.groups, 1)
    return {
        "frac_reward_zero_std": batch.groups_no_spread / groups,
        "batch/groups": float(batch.groups),
        "batch/groups_too_few": float(batch.groups_too_few),
        "batch/samples": float(len(batch.samples)),
        "batch/samples_dropped": float(batch.samples_missing),
        "batch/tokens": float(batch.normaliser),
    }


def rollout_metrics(groups: List[Group]) -> dict[str, float]:
    """Rewards, lengths, orders and verdicts of scored groups, named as in DESIGN section 3."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scores = [rollout.score for rollout in rollouts if rollout.score is not None]
    totals = [score.total for score in scores if score.total is not None]
    metrics: dict[str, float] = {}
    if totals:
        metrics["reward/mean"] = statistics.fmean(totals)
        metrics["reward/std"] = statistics.pstdev(totals)
    if scores:
        failed = statistics.fmean(score.error is not None for score in scores)
        metrics |= {"rewards/failed_share": failed} | _reward_metrics(scores)
    if rollouts:
        metrics |= _completion_metrics([rollout.completion for rollout in rollouts])
        shares = distinct_shares(groups).values()
        metrics["completions/distinct_ratio"] = statistics.fmean(shares)
    verdicts = [verdict for score in scores for verdict in score.verdicts]
    for name in sorted(set(verdicts)):
        metrics[f"sandbox/{name}"] = verdicts.count(name) / len(verdicts)
    return metrics


def _reward_metrics(scores: List[Score]) -> dict[str, float]:
    """Means of each reward and of what it logs besides, over the samples that have them."""
    values: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.parts.items():
            if value is not None:
                values.setdefault(f"rewards/{name}/mean", []).append(value)
        for name, value in score.extras.items():
            values.setdefault(f"rewards/{name}", []).append(value)
    return {name: statistics.fmean(found) for name, found in sorted(values.items())}


def _completion_metrics(completions: List[Completion]) -> dict[str, float]:
    mean = statistics.fmean
    metrics = {
        "completions/count": float(len(completions)),
        "completions/length_mean": mean(len(c.token_ids) for c in completions),
        "completions/clipped_ratio": mean(c.finish_reason == "length" for c in completions),
    }
    maps = [c.step_map for c in completions if c.step_map]
    if maps:
        metrics["decode/tokens_per_step"] = mean(len(m) / (max(m) + 1) for m in maps)
        found = [ar_ness(m, AR_NESS_K) for m in maps]
        for place, k in enumerate(AR_NESS_K):
            metrics[f"decode/ar_local@{k}"] = mean(local[place] for local, _ in found)
            metrics[f"decode/ar_global@{k}"] = mean(whole[place] for _, whole in found)
    return metrics
