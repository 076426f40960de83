"""Groups to samples to micro-batches: pure bookkeeping, checked by counting."""

from collections.abc import Sequence as List
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.records import Completion, Group, Problem, Rollout, Score, Scored
from diffusion.layout import Sequence
from rl.batch import (
    Sample,
    batch_metrics,
    drop_stale,
    make_batch,
    mask_seed,
    micro_batches,
    rollout_metrics,
    sequence_of,
    settle_stale,
)


def rollout(
    problem_id: str,
    index: int,
    total: float | None,
    tokens: tuple[int, ...] = (5, 6, 1),
    tail: tuple[int, ...] = (0,),
    version: int = 0,
) -> Rollout:
    steps = tuple(range(len(tokens) + len(tail)))
    completion = Completion(tokens, tail, "text", "eos", steps, (1.0,) * len(steps))
    score = Score(total, {"code": total}, verdicts=("pass",) if total else ("fail", "fail"))
    return Rollout(problem_id, index, (7, 8), completion, version, 0, score)


def group(problem_id: str, *totals: float | None, **changes: object) -> Group:
    rollouts = [rollout(problem_id, i, t, **changes) for i, t in enumerate(totals)]  # type: ignore[arg-type]
    return Group(Problem(problem_id, "do"), tuple(rollouts))


def sample(index: int, tokens: int = 3) -> Sample:
    return Sample("p", index, Sequence((1,), (2,) * tokens, tokens), 1.0)


def test_supervision_ends_at_the_first_eos() -> None:
    """Defect 9: pads after the first EOS dominated the loss. Here they are context only."""
    tokens, tail = (5, 6, 1), (1, 1, 1, 1, 1)
    sequence = sequence_of(rollout("p", 0, 1.0, tokens, tail))
    assert sequence.completion_ids == tokens + tail
    assert sequence.supervised == 3
    batch = make_batch([group("p", 1.0, 0.0, tokens=tokens, tail=tail)], "mean", False)
    assert batch.normaliser == 6  # two completions of 3, not of 8


def test_dropped_groups_and_samples_are_counted() -> None:
    groups = [
        group("spread", 1.0, 0.0, None),
        group("flat", 0.5, 0.5, 0.5),
        group("failed", 1.0, None, None),
    ]
    batch = make_batch(groups, "mean", False)
    assert [(s.problem_id, s.sample_index, s.advantage) for s in batch.samples] == [
        ("spread", 0, 0.5),
        ("spread", 1, -0.5),
    ]
    metrics = batch_metrics(batch)
    assert metrics["frac_reward_zero_std"] == pytest.approx(1 / 3)
    assert metrics["batch/groups_too_few"] == 1
    assert metrics["batch/samples_dropped"] == 3
    assert metrics["batch/tokens"] == 6


def test_masks_are_named_by_sample_and_iteration() -> None:
    samples = [replace(sample(index), seed=seed) for index in (0, 1) for seed in (8, 9)]
    assert len({s.mask_seed(i) for s in samples for i in (0, 1)}) == 8
    assert samples[0].mask_seed(1) == replace(sample(0, tokens=7), seed=8).mask_seed(1)
    # The worker that decodes asks for them by the same names.
    assert samples[0].mask_seed(1) == mask_seed(8, "p", 0, 1)


def test_samples_know_their_seed_version_and_log_probabilities() -> None:
    one = rollout("p", 0, 1.0, version=4)
    scored = replace(one.completion, behaviour_logps=((-1.0, -2.0, -3.0),))
    both = (replace(one, completion=scored, seed=17), rollout("p", 1, 0.0))
    first, second = make_batch([Group(Problem("p", "do"), both)], "mean", False).samples
    assert (first.seed, first.policy_version) == (17, 4)
    assert first.behaviour_logps == ((-1.0, -2.0, -3.0),)
    assert (second.seed, second.policy_version, second.behaviour_logps) == (0, 0, ())


def test_micro_batches_respect_the_budget_and_padding() -> None:
    # sorted costs 2, 3, 4, 10; budget 8: 2 then 3 (2 * 3 = 6), then 4 alone (3 * 4 = 12 > 8, and
    # 10 would cost 20), and 10 alone although it exceeds the budget
    samples = [sample(0), sample(1), sample(2), sample(3)]
    plan = micro_batches(samples, [10, 3, 2, 4], budget=8)
    assert [[s.sample_index for s in m.samples] for m in plan] == [[2, 1], [3], [0]]
    assert all(m.weight == 1.0 for m in plan)


def test_equal_costs_keep_their_order() -> None:
    plan = micro_batches([sample(i) for i in range(5)], [4] * 5, budget=12)
    assert [[s.sample_index for s in m.samples] for m in plan] == [[0, 1, 2], [3, 4]]


@given(
    costs=st.lists(st.integers(1, 50), min_size=1, max_size=40),
    budget=st.integers(1, 120),
    ranks=st.integers(1, 5),
)
def test_every_sample_is_on_one_rank_once(costs: list[int], budget: int, ranks: int) -> None:
    samples = [sample(i) for i in range(len(costs))]
    plans = [micro_batches(samples, costs, budget, rank, ranks) for rank in range(ranks)]
    assert len({len(plan) for plan in plans}) == 1
    real = [m for plan in plans for m in plan if m.weight > 0]
    assert sorted(s.sample_index for m in real for s in m.samples) == list(range(len(costs)))
    for micro in real:
        load = max(costs[s.sample_index] for s in micro.samples) * len(micro.samples)
        assert load <= budget or len(micro.samples) == 1
    padding = [m for plan in plans for m in plan if m.weight == 0]
    assert all(len(m.samples) == 1 for m in padding)


def test_stale_rollouts_are_dropped_one_by_one() -> None:
    fresh, stale = group("a", 1.0, 0.0, version=5), group("b", 1.0, 0.0, version=3)
    kept, metrics = drop_stale([fresh, stale], version=5, bound=1)
    assert [len(g.rollouts) for g in kept] == [2, 0]
    assert metrics == {
        "async/staleness_mean": 1.0,
        "async/staleness_max": 2.0,
        "async/dropped_stale": 2.0,
    }


def test_groups_that_are_too_old_are_rolled_out_again_as_a_whole() -> None:
    asked: list[list[str]] = []

    def again(problems: List[Problem]) -> Scored:
        asked.append([problem.problem_id for problem in problems])
        groups = [group(p.problem_id, 0.0, 1.0, version=5) for p in problems]
        return Scored(groups, {"sandbox/programs": 2.0, "sandbox/weak_tests": 1.0})

    young, old = group("a", 1.0, 0.0, version=4), group("b", 1.0, 0.0, version=3)
    mixed = group("c", 1.0, 0.0, version=5)
    mixed = replace(mixed, rollouts=(mixed.rollouts[0], rollout("c", 1, 0.0, version=2)))
    batch = Scored([old, young, mixed], {"sandbox/programs": 6.0})
    scored, fresh, metrics = settle_stale(batch, version=5, bound=1, again=again)
    assert asked == [["b", "c"]]
    assert [g.problem.problem_id for g in fresh] == ["b", "a", "c"]
    assert [[r.policy_version for r in g.rollouts] for g in fresh] == [[5, 5], [4, 4], [5, 5]]
    assert [r.score.total for r in fresh[0].rollouts if r.score] == [0.0, 1.0]
    assert scored.groups == fresh
    assert scored.sums == {"sandbox/programs": 8.0, "sandbox/weak_tests": 1.0}
    assert metrics == {
        "async/staleness_mean": pytest.approx(1 / 3),
        "async/staleness_max": 1.0,
        "async/dropped_stale": 0.0,
        "async/recomputed_stale": 4.0,
    }


def test_nothing_too_old_is_nothing_to_recompute() -> None:
    def again(problems: List[Problem]) -> Scored:
        raise AssertionError

    batch = Scored([group("a", 1.0, 0.0, version=4)], {"sandbox/programs": 2.0})
    scored, fresh, metrics = settle_stale(batch, version=5, bound=1, again=again)
    assert scored is batch
    assert fresh == batch.groups
    assert metrics["async/recomputed_stale"] == 0.0


def test_dropping_is_the_rule_without_a_way_to_recompute() -> None:
    batch = Scored([group("a", 1.0, 0.0, version=3)], {})
    scored, fresh, metrics = settle_stale(batch, version=5, bound=1)
    assert scored is batch
    assert [len(g.rollouts) for g in fresh] == [0]
    assert metrics["async/dropped_stale"] == 2.0


def test_rollout_metrics() -> None:
    metrics = rollout_metrics([group("a", 1.0, 0.0, None)])
    assert metrics["reward/mean"] == 0.5
    assert metrics["reward/std"] == 0.5
    assert metrics["rewards/code/mean"] == 0.5
    assert metrics["rewards/failed_share"] == 0.0
    assert metrics["completions/length_mean"] == 3.0
    assert metrics["completions/clipped_ratio"] == 0.0
    assert metrics["completions/distinct_ratio"] == pytest.approx(1 / 3)  # all three say the same
    assert metrics["decode/tokens_per_step"] == 1.0
    orders = {f"decode/ar_{kind}@{k}" for kind in ("local", "global") for k in (1, 2, 4, 8)}
    assert orders <= metrics.keys()
    assert metrics["decode/ar_local@1"] == metrics["decode/ar_global@4"] == 1.0
    # verdicts: one pass, two fails, and two fails of the failed reward
    assert metrics["sandbox/pass"] == pytest.approx(1 / 5)
    assert rollout_metrics([]) == {}


def test_means_of_rewards_and_of_what_they_log_are_over_the_samples_that_have_them() -> None:
    scores = [
        Score(1.0, {"mine": 1.0}, extras={"mine/depth": 4.0}),
        Score(3.0, {"mine": 3.0}, extras={"mine/depth": 1.0, "mine/width": 2.0}),
        Score(None, {"mine": None}, error="mine: failed"),
        Score(0.0, {"mine": None}),
    ]
    rollouts = [replace(rollout("a", i, 1.0), score=score) for i, score in enumerate(scores)]
    metrics = rollout_metrics([Group(Problem("a", "do"), tuple(rollouts))])
    assert metrics["rewards/mine/mean"] == 2.0
    assert metrics["rewards/mine/depth"] == 2.5
    assert metrics["rewards/mine/width"] == 2.0
    assert metrics["rewards/failed_share"] == 0.25
    assert metrics["reward/mean"] == pytest.approx(4 / 3)
