"""The policy-gradient loss on per-token log-probabilities. Not the estimator that makes them.

Shapes: B completions, C the longest supervised length; every tensor is [B, C] unless it says so.
Metrics are sums beside the number of tokens they are sums over: ranks add them up, then divide.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """What the loss needs beside the current log-probabilities.

    old: log-probabilities of the proximal policy (the learner at the start of the update), same
        masks, detached.
    advantages: float [B].
    supervised: bool [B, C], True on tokens that count.
    normaliser: supervised tokens of the whole global batch, fixed before any sharding.
    epsilon_low, epsilon_high: the ratio is clipped to [1 - epsilon_low, 1 + epsilon_high].
    reference: log-probabilities of the reference policy, same masks; needed if beta > 0.
    beta: weight of the k3 KL to the reference. kl_tail: see `k3_kl`.
    importance: truncated weight behaviour -> proximal of older rollouts (`rl.offpolicy`), detached;
        None is 1.
    """

    old: Tensor
    advantages: Tensor
    supervised: Tensor
    normaliser: float
    epsilon_low: float
    epsilon_high: float
    reference: Tensor | None = None
    beta: float = 0.0
    kl_tail: float | None = None
    importance: Tensor | None = None


def k3_kl(logps: Tensor, reference: Tensor, tail: float | None = None) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token: exp(d) - d - 1, d = ref - logp.

    Never negative, zero where the two agree. Beyond d = `tail` it goes on along its tangent: one
    token that a mask shows in a context which decoding never visits can have a d of 10, and its
    gradient of exp(10) would be all that is left of the step after clipping.
    """
    difference = reference - logps
    if tail is None:
        return torch.expm1(difference) - difference
    near = difference.clamp(max=tail)
    return torch.expm1(near) - near + (difference - near) * math.expm1(tail)


def clipped_policy_loss(logps: Tensor, terms: LossTerms) -> tuple[Tensor, dict[str, float]]:
    """Clipped surrogate plus beta * KL, summed over tokens and divided by the fixed normaliser.

    Source: ALGORITHMS section 4; PPO's clip (arXiv 1707.06347) per token, with separate bounds.

    Returns:
        The scalar loss (differentiable) and sums over supervised tokens: `loss` (of the undivided
        terms), `kl`, `ratio`, `clip_low`, `clip_high` (tokens whose gradient the clip removed) and
        `tokens`.

    Raises:
        ValueError: beta > 0 without `reference`.
    """
    keep = terms.supervised.to(logps.dtype)
    advantage = terms.advantages[:, None].to(logps.dtype)
    ratio = torch.exp(logps - terms.old)
    clipped = ratio.clamp(1.0 - terms.epsilon_low, 1.0 + terms.epsilon_high)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    if terms.importance is not None:
        gain = gain * terms.importance
    per_token = -gain
    kl = torch.zeros_like(logps)
    if terms.reference is not None:
        kl = k3_kl(logps, terms.reference, terms.kl_tail)
    elif terms.beta > 0:
        raise ValueError("beta > 0 needs the reference's log-probabilities")
    if terms.beta > 0:
        per_token = per_token + terms.beta * kl
    total = (per_token * keep).sum()
    sums = {
        "loss": total,
        "kl": (kl * keep).sum(),
        "ratio": (ratio * keep).sum(),
        "logp": (logps * keep).sum(),
        "clip_low": (((ratio < 1 - terms.epsilon_low) & (advantage < 0)) * keep).sum(),
        "clip_high": (((ratio > 1 + terms.epsilon_high) & (advantage > 0)) * keep).sum(),
        "tokens": keep.sum(),
    }
    return total / terms.normaliser, {name: float(value.detach()) for name, value in sums.items()}


def mean_metrics(sums: Mapping[str, float], prefix: str = "policy/") -> dict[str, float]:
    """Token means of summed metrics, under the names of DESIGN section 3."""
    tokens = max(sums["tokens"], 1.0)
    means = {name: value / tokens for name, value in sums.items() if name != "tokens"}
    means["clip_ratio"] = means["clip_low"] + means["clip_high"]
    renamed = {"clip_low": "clip_ratio_low", "clip_high": "clip_ratio_high"}
    return {f"{prefix}{renamed.get(name, name)}": value for name, value in means.items()}
