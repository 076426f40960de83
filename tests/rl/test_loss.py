"""The clipped loss and the k3 KL on numbers worked out by hand."""

import math

import pytest
import torch

from rl.loss import LossTerms, clipped_policy_loss, k3_kl, mean_metrics

LOG2 = math.log(2.0)


def terms(old: list[list[float]], advantages: list[float], **changes: object) -> LossTerms:
    values: dict[str, object] = {
        "old": torch.tensor(old),
        "advantages": torch.tensor(advantages),
        "supervised": torch.ones(len(old), len(old[0]), dtype=torch.bool),
        "normaliser": 1.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.3,
    }
    return LossTerms(**(values | changes))  # type: ignore[arg-type]


def test_old_equals_new_gives_ratio_one_and_the_plain_policy_gradient() -> None:
    logps = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    loss, sums = clipped_policy_loss(logps, terms(logps.tolist(), [1.0, -2.0], normaliser=4.0))
    # -(1 + 1 - 2 - 2) / 4
    assert loss.item() == 0.5
    assert sums["ratio"] == sums["tokens"] == 4.0
    assert sums["clip_low"] == sums["clip_high"] == 0.0
    loss.backward()
    # d loss / d logp = -advantage * ratio / normaliser
    assert logps.grad is not None
    assert logps.grad.tolist() == [[-0.25, -0.25], [0.5, 0.5]]


def test_clipping_takes_the_pessimistic_side() -> None:
    # ratios 2 and 1/2 for a good (A = 1) and a bad (A = -1) completion; clip to [0.8, 1.3]
    logps = torch.tensor([[LOG2, -LOG2], [LOG2, -LOG2]], requires_grad=True)
    loss, sums = clipped_policy_loss(logps, terms([[0.0, 0.0], [0.0, 0.0]], [1.0, -1.0]))
    # good: min(2, 1.3) + min(0.5, 0.8) = 1.3 + 0.5; bad: min(-2, -1.3) + min(-0.5, -0.8) = -2 - 0.8
    assert loss.item() == pytest.approx(-(1.3 + 0.5 - 2.0 - 0.8))
    loss.backward()
    # The clipped tokens (good and already likely, bad and already unlikely) get no gradient.
    assert logps.grad is not None
    assert logps.grad.flatten().tolist() == pytest.approx([0.0, -0.5, 2.0, 0.0])
    assert (sums["clip_high"], sums["clip_low"]) == (1.0, 1.0)


def test_k3_kl() -> None:
    # d = ref - logp = log 2: 2 - log 2 - 1; d = 0: 0; d = -log 2: 1/2 + log 2 - 1
    logps = torch.tensor([-LOG2, -1.0, 0.0], dtype=torch.float64)
    reference = torch.tensor([0.0, -1.0, -LOG2], dtype=torch.float64)
    assert k3_kl(logps, reference).tolist() == pytest.approx([1 - LOG2, 0.0, LOG2 - 0.5])


def test_the_tail_of_k3_is_its_tangent() -> None:
    # tail = log 2, where k3 = 1 - log 2 and its slope is 2 - 1 = 1; one further: 2 - log 2.
    logps = torch.tensor([0.0, -LOG2, -LOG2 - 1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-LOG2, 0.0, 0.0], dtype=torch.float64)
    kl = k3_kl(logps, reference, tail=LOG2)
    assert kl.tolist() == pytest.approx([LOG2 - 0.5, 1 - LOG2, 2 - LOG2])
    kl.sum().backward()
    # d kl / d logp = 1 - exp(d), and never below 1 - exp(tail) = -1
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([0.5, -1.0, -1.0])


def test_beta_adds_the_kl_to_the_loss_once() -> None:
    logps = torch.tensor([[-LOG2]], requires_grad=True)
    loss, sums = clipped_policy_loss(
        logps, terms([[-LOG2]], [0.0], reference=torch.tensor([[0.0]]), beta=0.1)
    )
    # advantage 0, so only 0.1 * (2 - log 2 - 1)
    assert loss.item() == pytest.approx(0.1 * (1 - LOG2))
    assert sums["kl"] == pytest.approx(1 - LOG2)
    loss.backward()
    # d kl / d logp = 1 - exp(ref - logp) = 1 - 2
    assert logps.grad is not None
    assert logps.grad.item() == pytest.approx(-0.1)


def test_beta_with_one_iteration_works() -> None:
    """Defect 7: beta > 0 with mu = 1 (old is the current policy) crashed elsewhere."""
    logps = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, -2.0]])
    loss, _ = clipped_policy_loss(
        logps, terms(logps.detach().tolist(), [1.0], reference=reference, beta=0.5)
    )
    # -(1 + 1) + 0.5 * (exp(-0.5) + 0.5 - 1)
    assert loss.item() == pytest.approx(-2 + 0.5 * (math.exp(-0.5) - 0.5))


def test_beta_without_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="reference"):
        clipped_policy_loss(torch.zeros(1, 1), terms([[0.0]], [1.0], beta=0.1))


def test_the_normaliser_is_given_not_counted() -> None:
    """Splitting a batch in two and adding the losses changes nothing."""
    logps = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -3.0, -1.0]])
    old = logps - 0.1
    keep = torch.tensor([[True, True, False], [True, True, True]])
    whole, _ = clipped_policy_loss(
        logps, terms(old.tolist(), [1.0, -2.0], supervised=keep, normaliser=5.0)
    )
    parts = [
        clipped_policy_loss(
            logps[i : i + 1],
            terms(old[i : i + 1].tolist(), [a], supervised=keep[i : i + 1], normaliser=5.0),
        )[0]
        for i, a in enumerate([1.0, -2.0])
    ]
    assert (parts[0] + parts[1]).item() == pytest.approx(whole.item())


def test_metrics_are_sums_over_supervised_tokens_never_broadcast() -> None:
    """Defect 6: KL and clip metrics of B x B x L. With B = 3, L = 4 a broadcast would give 48."""
    rows, length = 3, 4
    keep = torch.ones(rows, length, dtype=torch.bool)
    keep[0, 2:] = False
    logps = torch.zeros(rows, length)
    _, sums = clipped_policy_loss(
        logps,
        terms(
            (logps - 1).tolist(),
            [1.0, 1.0, 1.0],
            supervised=keep,
            reference=logps + LOG2,
            beta=1.0,
        ),
    )
    assert sums["tokens"] == 10.0
    assert sums["clip_high"] == 10.0
    assert sums["kl"] == pytest.approx(10 * (1 - LOG2))


def test_importance_weights_the_policy_term_but_not_the_kl() -> None:
    weight = torch.tensor([[2.0, 4.0]])
    logps = torch.zeros(1, 2, requires_grad=True)
    reference = torch.full((1, 2), LOG2)
    loss, sums = clipped_policy_loss(
        logps, terms([[0.0, 0.0]], [1.0], importance=weight, reference=reference, beta=1.0)
    )
    # -(2 + 4) + 2 * (2 - log 2 - 1)
    assert loss.item() == pytest.approx(-6 + 2 * (1 - LOG2))
    loss.backward()
    # -weight, and 1 - exp(ref - logp) = -1 of the KL
    assert logps.grad is not None
    assert logps.grad.tolist() == [[pytest.approx(-3.0), pytest.approx(-5.0)]]
    assert sums["ratio"] == 2.0  # of the learner to its own start: the weight is not part of it


def test_mean_metrics_names() -> None:
    sums = {"loss": 2.0, "kl": 1.0, "ratio": 4.0, "logp": -8.0}
    metrics = mean_metrics(sums | {"clip_low": 1.0, "clip_high": 2.0, "tokens": 4.0})
    assert metrics == {
        "policy/loss": 0.5,
        "policy/kl": 0.25,
        "policy/ratio": 1.0,
        "policy/logp": -2.0,
        "policy/clip_ratio_low": 0.25,
        "policy/clip_ratio_high": 0.5,
        "policy/clip_ratio": 0.75,
    }
