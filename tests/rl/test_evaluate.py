"""pass@1, intervals and pass@k on cases small enough to work out by hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

import rl.evaluate
from common.errors import UserError
from common.records import Completion, Group, Problem, Rollout, Score, Scored
from common.seeding import derive_seed
from models.decoding import DecodingConfig
from rl.estimates import (
    bootstrap,
    difference,
    evaluation_metrics,
    mean_pass_at_k,
    pass_at_1,
    pass_at_k,
    pass_rates,
    passed,
)
from rl.evaluate import evaluate_checkpoint


def group(problem_id: str, *outcomes: str) -> Group:
    """One rollout per letter: p passes, f fails, n ran no test, d was dropped."""
    scores = {
        "p": Score(2.5, verdicts=("pass", "pass")),
        "f": Score(1.0, verdicts=("pass", "timeout")),
        "n": Score(0.0),
        "d": Score(None, verdicts=("pass", "infra_error"), error="sandbox"),
    }
    completion = Completion((1,), (), "", "eos", (0,), (1.0,))
    rollouts = tuple(
        Rollout(problem_id, i, (1,), completion, 0, 0, scores[outcome])
        for i, outcome in enumerate(outcomes)
    )
    return Group(Problem(problem_id, "do"), rollouts)


def test_a_sample_passes_only_if_all_its_tests_did() -> None:
    assert [passed(r) for r in group("a", *"pfnd").rollouts] == [True, False, False, False]


def test_dropped_samples_are_neither_pass_nor_fail() -> None:
    groups = [group("a", *"pd"), group("b", *"pf"), group("c", *"dd"), group("d", *"nn")]
    assert pass_rates(groups) == {"a": 1.0, "b": 0.5, "d": 0.0}
    estimate = pass_at_1(groups)
    assert (estimate.value, estimate.n) == (0.5, 3)
    assert 0.0 <= estimate.low <= 0.5 <= estimate.high <= 1.0
    metrics = evaluation_metrics(groups)
    assert (metrics["eval/pass@1"], metrics["eval/n"], metrics["eval/dropped"]) == (0.5, 3.0, 3.0)
    assert metrics["eval/reward"] == pytest.approx((2.5 + 2.5 + 1.0 + 0 + 0) / 5)


def test_bootstrap_is_seeded_and_near_the_normal_interval() -> None:
    values = [1.0] * 120 + [0.0] * 180
    estimate = bootstrap(values, seed=3)
    assert estimate == bootstrap(values, seed=3)
    # mean 0.4, standard error sqrt(0.4 * 0.6 / 300) = 0.0283, so 0.4 -+ 0.0554
    assert estimate.value == 0.4
    assert estimate.low == pytest.approx(0.4 - 0.0554, abs=0.008)
    assert estimate.high == pytest.approx(0.4 + 0.0554, abs=0.008)
    assert math.isnan(bootstrap([]).value)


def test_pairing_removes_what_both_stages_share() -> None:
    # 100 problems: 40 pass before; the same 40 and 10 more pass after
    before = [group(f"p{i}", "p" if i < 40 else "f") for i in range(100)]
    after = [group(f"p{i}", "p" if i < 50 else "f") for i in range(100)]
    extra = [group("new", "p")]
    found = difference(pass_rates(before), pass_rates(after + extra))
    assert (found.value, found.n) == (pytest.approx(0.1), 100)
    # Paired: se = sqrt(0.1 * 0.9 / 100) = 0.03, so the interval excludes zero; unpaired it would
    # be sqrt(0.24 / 100 + 0.25 / 100) = 0.07 and include it.
    assert found.low > 0.03
    with pytest.raises(ValueError, match="in common"):
        difference(pass_rates(before), pass_rates(extra))


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 4, 2), (4, 0, 4)])
def test_pass_at_k_counts_subsets(n: int, c: int, k: int) -> None:
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_mean_pass_at_k() -> None:
    # a: 1 of 2 passes, pass@2 = 1; b: none; c has one judged sample and is left out
    groups = [group("a", *"pf"), group("b", *"ff"), group("c", *"pd")]
    assert mean_pass_at_k(groups, 2) == 0.5
    assert mean_pass_at_k(groups, 1) == pytest.approx((0.5 + 0 + 1) / 3)
    assert math.isnan(mean_pass_at_k(groups, 3))
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)


@pytest.fixture
def checkpoint(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> Path:
    return write_checkpoint(tmp_path / "model")


class EvenLength:
    """Instead of the sandbox: a completion passes if its text is of even length."""

    def __init__(self, config: Any) -> None:
        pass

    def __enter__(self) -> "EvenLength":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def score(self, groups: Sequence[Group]) -> Scored:
        return Scored([replace(g, rollouts=tuple(map(self._score, g.rollouts))) for g in groups])

    def _score(self, rollout: Rollout) -> Rollout:
        good = len(rollout.completion.text) % 2 == 0
        return replace(rollout, score=Score(float(good), verdicts=("pass" if good else "fail",)))


def test_evaluating_a_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl.evaluate, "Rewarder", EvenLength)
    problems = [Problem(f"p{i}", f"Do {i}.") for i in range(4)]
    decoding = DecodingConfig(gen_length=8, temperature=1.0)
    told: list[tuple[int, int]] = []

    def evaluate(subset: list[Problem]) -> rl.evaluate.Evaluation:
        return evaluate_checkpoint(
            checkpoint,
            subset,
            decoding,
            None,  # type: ignore[arg-type]
            samples=3,
            ks=(1, 3),
            seed=5,
            on_progress=lambda done, total: told.append((done, total)),
        )

    result = evaluate(problems)
    assert result.greedy.n == 4
    assert result.sampled is not None
    assert result.sampled.value == pytest.approx(result.pass_at_k[1])
    assert result.pass_at_k[3] >= result.pass_at_k[1]
    assert [len(g.rollouts) for g in result.groups + result.sampled_groups] == [1] * 4 + [3] * 4
    assert result.sampled_groups[2].rollouts[1].seed == derive_seed(5, "p2", 1)
    assert told[-1] == (16, 16)
    # A completion is a function of its request, not of its neighbours.
    alone = evaluate(problems[2:3]).sampled_groups[0].rollouts
    together = result.sampled_groups[2].rollouts
    assert [r.completion.token_ids for r in alone] == [r.completion.token_ids for r in together]


def test_evaluation_refuses_what_it_cannot_do(checkpoint: Path) -> None:
    decoding = DecodingConfig(gen_length=8)
    problems = [Problem("p", "word " * 50)]
    with pytest.raises(UserError, match="pass@4"):
        evaluate_checkpoint(checkpoint, problems, decoding, None, samples=2, ks=(4,))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="limit is 20"):
        evaluate_checkpoint(checkpoint, problems, decoding, None, prompt_limit=20)  # type: ignore[arg-type]
