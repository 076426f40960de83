"""The weights of older rollouts: by hand, over ranks, and against an enumerated policy."""

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from diffusion.layout import Sequence
from diffusion.views import EstimatorConfig
from rl.batch import Sample
from rl.loss import LossTerms, clipped_policy_loss
from rl.offpolicy import BehaviourScoring, Correction, check_behaviour, importance

LOG2, LOG3 = math.log(2.0), math.log(3.0)


class Ranks:
    """An engine of which only the sums are asked: `others` are what the other ranks hand in."""

    def __init__(self, rank: int = 0, *others: Mapping[str, float]) -> None:
        self.rank, self.world_size = rank, 1 + len(others)
        self._others = others

    def sum_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        assert all(other.keys() == values.keys() for other in self._others)
        return {n: v + sum(other[n] for other in self._others) for n, v in values.items()}


def sample(version: int, *behaviour: tuple[float, ...], length: int = 2) -> Sample:
    sequence = Sequence((1,), (2,) * length, length)
    return Sample("p", 3, sequence, 1.0, 7, version, behaviour)


def policy_terms(old: Tensor, advantages: Tensor, importance: Tensor | None) -> LossTerms:
    return LossTerms(
        old=old,
        advantages=advantages,
        supervised=torch.ones_like(old, dtype=torch.bool),
        normaliser=1.0,
        epsilon_low=0.2,
        epsilon_high=0.2,
        importance=importance,
    )


def test_weights_by_hand() -> None:
    proximal = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -2.0, 0.0], [-3.0, -1.0, -1.0]])
    samples = [
        sample(5, (-9.0, -9.0, -9.0), length=3),  # as new as the learner: whatever it says
        sample(4, (0.0, 0.0), (-1.0 - LOG2, -2.0 + LOG3)),  # shorter than its row
        sample(3, (0.0,) * 3, (-3.0, -1.0, -1.0), length=3),
    ]
    weights = importance(samples, proximal, iteration=1, version=5)
    assert weights is not None
    assert weights[0].tolist() == [1.0, 1.0, 1.0]
    assert weights[1].tolist() == pytest.approx([2.0, 1 / 3, 1.0])
    assert weights[2].tolist() == [1.0, 1.0, 1.0]  # equal numbers: exactly one
    assert importance(samples[:1], proximal[:1], iteration=1, version=5) is None


def test_the_loss_with_correction_by_hand() -> None:
    # weights 2, 3 -> 2.5 (truncated), 1/2; the learner has not moved, so every ratio is 1
    logps = torch.tensor([[-1.0, -1.0, -1.0]], requires_grad=True)
    behaviour = (-1.0 - LOG2, -1.0 - LOG3, -1.0 + LOG2)
    old, supervised = logps.detach(), torch.ones(1, 3, dtype=torch.bool)
    correction = Correction(cap=2.5, version=1)
    weights = correction.weigh([sample(0, behaviour, length=3)], old, supervised, 0)
    assert weights is not None
    assert not weights.requires_grad
    loss, _ = clipped_policy_loss(logps, policy_terms(old, torch.tensor([-2.0]), weights))
    assert loss.item() == pytest.approx(2.0 * (2.0 + 2.5 + 0.5))
    loss.backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [pytest.approx([4.0, 5.0, 1.0])]
    # After a step the ratio is the learner to its own start; the weight stays as it was.
    moved = (old + torch.tensor([[0.1, -0.1, 1.0]])).requires_grad_()
    loss, sums = clipped_policy_loss(moved, policy_terms(old, torch.tensor([1.0]), weights))
    kept = 2.0 * math.exp(0.1) + 2.5 * math.exp(-0.1) + 0.5 * 1.2
    assert loss.item() == pytest.approx(-kept)
    assert sums["clip_high"] == 1.0


def test_metrics_count_supervised_tokens_of_older_samples_only() -> None:
    correction = Correction(cap=1.5, version=2)
    proximal = torch.zeros(2, 3)
    both = [sample(2, length=3), sample(1, (-LOG2, LOG2, -50.0), length=3)]
    supervised = torch.tensor([[True, True, True], [True, True, False]])
    assert correction.weigh(both, proximal, supervised, 0) is not None
    assert correction.weigh(both[:1], proximal[:1], supervised[:1], 0) is None
    # A micro-batch that only keeps ranks in step counts nothing.
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert correction.weigh(both[1:], proximal[1:], nothing, 0) is not None
    assert correction.metrics(Ranks()) == {  # type: ignore[arg-type]
        "async/older_share": pytest.approx(2 / 8),
        "async/importance_mean": pytest.approx((1.5 + 0.5) / 2),
        "async/importance_max": pytest.approx(2.0),
        "async/importance_truncated": 0.5,
    }


def test_metrics_over_ranks() -> None:
    correction = Correction(cap=5.0, version=1)
    correction.weigh([sample(0, (-LOG2, -LOG2))], torch.zeros(1, 2), torch.ones(1, 2) > 0, 0)
    numbers = {"tokens": 6.0, "older": 2.0, "truncated": 1.0, "weight": 8.0}
    other = numbers | {"peak 0": 0.0, "peak 1": 0.0, "peak 2": 9.0}
    third = dict.fromkeys(other, 0.0) | {"tokens": 2.0}
    found = correction.metrics(Ranks(1, other, third))  # type: ignore[arg-type]
    assert found == {
        "async/older_share": pytest.approx(4 / 10),
        "async/importance_mean": pytest.approx((4 + 8) / 4),
        "async/importance_max": 9.0,
        "async/importance_truncated": 0.25,
    }


def test_metrics_without_older_samples() -> None:
    correction = Correction(cap=5.0, version=1)
    assert correction.weigh([sample(1)], torch.zeros(1, 2), torch.ones(1, 2) > 0, 0) is None
    assert correction.metrics(Ranks()) == {  # type: ignore[arg-type]
        "async/older_share": 0.0,
        "async/importance_mean": 1.0,
        "async/importance_max": 1.0,
        "async/importance_truncated": 0.0,
    }


def test_samples_of_other_settings_are_refused() -> None:
    check_behaviour([sample(0, (0.0, 0.0)), sample(1)], version=1, num_iterations=1)
    line = r"p, sample 3: .* under 1 masks, but algorithm\.num_iterations=2; .*importance_cap=null"
    with pytest.raises(UserError, match=line):
        check_behaviour([sample(0, (0.0, 0.0))], version=1, num_iterations=2)


def test_a_worker_asks_for_the_masks_of_the_update() -> None:
    scoring = BehaviourScoring(EstimatorConfig(), num_iterations=3)
    assert scoring.mask_seeds(7, "p", 3) == tuple(sample(0).mask_seed(i) for i in range(3))


class Enumerated:
    """Two tokens drawn from tables of their own; nine completions, a reward for each."""

    def __init__(self, reward: Any) -> None:
        gen = torch.Generator().manual_seed(0)
        self.learner, self.worker = torch.randn(2, 2, 3, generator=gen, dtype=torch.float64)
        self.completions = torch.tensor(list(product(range(3), repeat=2)))
        self.reward = torch.tensor([float(reward(*c)) for c in self.completions.tolist()]).double()

    def logps(self, table: Tensor) -> Tensor:
        """Of every token of every completion, [9, 2]."""
        return table.log_softmax(-1)[torch.arange(2), self.completions]

    def on_policy(self) -> Tensor:
        """The exact gradient of minus the learner's expected reward."""
        table = self.learner.clone().requires_grad_()
        (-(self.logps(table).sum(-1).exp() * self.reward).sum()).backward()
        assert table.grad is not None
        return table.grad

    def expected(self, cap: float | None) -> Tensor:
        """The gradient of the loss, over completions of the worker in their exact shares."""
        table = self.learner.clone().requires_grad_()
        logps, behaviour = self.logps(table), self.logps(self.worker)
        share = behaviour.sum(-1).exp()
        samples = [sample(0, tuple(row)) for row in behaviour.tolist()]
        weights, old = None, logps.detach()
        if cap is not None:
            every = torch.ones_like(old, dtype=torch.bool)
            weights = Correction(cap, version=1).weigh(samples, old, every, 0)
        # The loss is linear in advantages, so shares may be multiplied to them.
        clipped_policy_loss(logps, policy_terms(old, share * self.reward, weights))[0].backward()
        assert table.grad is not None
        return table.grad


def test_expected_gradient_of_older_rollouts_is_the_on_policy_gradient() -> None:
    """Unbiased while nothing is truncated; uncorrected and truncated ones are not.

    With a reward that adds up over tokens: a weight per token cannot know of the others.
    """
    case = Enumerated(lambda a, b: (a == 1) + 0.5 * b)
    exact = case.on_policy()
    assert torch.allclose(case.expected(cap=1e9), exact, atol=1e-6)
    uncorrected = (case.expected(cap=None) - exact).norm() / exact.norm()
    truncated = (case.expected(cap=1.5) - exact).norm() / exact.norm()
    assert uncorrected > 0.3
    assert 0.01 < truncated < uncorrected


def test_what_a_weight_per_token_leaves() -> None:
    """A reward of both tokens together: nearer to the truth than uncorrected, not unbiased."""
    case = Enumerated(lambda a, b: a == b)
    exact = case.on_policy()
    uncorrected = (case.expected(cap=None) - exact).norm() / exact.norm()
    corrected = (case.expected(cap=1e9) - exact).norm() / exact.norm()
    assert 0.01 < corrected < uncorrected
