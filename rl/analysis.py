"""What `unmask analyze` finds, as records, and the numbers on scored groups that go into them.

Not the measuring (`rl.analyze`) and not the page (`rl.analysis_page`). The fields are those of
`analysis.json`; every `Estimate` is a mean over problems with its 95 % bootstrap interval.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch

from common.records import Completion, Group
from diffusion.arness import global_ar_ness, local_ar_ness, random_order
from diffusion.attention import BlockOrigin, first_place
from diffusion.masking import generator
from diffusion.unmasking import Remasking, most_certain, on_grid
from models.request import DecodingConfig
from rl.batch import AR_NESS_K
from rl.estimates import (
    Estimate,
    bootstrap,
    difference,
    distinct_shares,
    dropped,
    pass_rates,
    passes_at_k,
)

# The temperatures between which DiffuCoder (arXiv 2506.20639) shows its two effects.
PUBLISHED_FROM, PUBLISHED_TO = 0.2, 1.2
SINK_PASSES = 4
# Above this share of tokens that ties may have ordered, below this size of blocks: say so.
TIED, SMALL_BLOCK = 0.5, 8
Found = Literal["yes", "no", "unclear"]
ByProblem = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class AtTemperature:
    """All completions of one temperature; keys `k` are text because JSON wants it so.

    distinct: different texts over completions of a group. length: tokens up to the EOS.
    certain: share of tokens that were fixed as sure as the order can tell. Of several such places
        the leftmost goes first, so this is the most that AR-ness may owe to ties.
    """

    temperature: float
    pass_at_k: dict[str, Estimate]
    ar_local: dict[str, Estimate]
    ar_global: dict[str, Estimate]
    distinct: Estimate
    length: Estimate
    certain: Estimate


@dataclass(frozen=True, kw_only=True)
class Change:
    """One temperature minus the lowest one, in pairs of problems.

    quantity: `ar_local@1`, `ar_global@1` or `pass@k`.
    """

    quantity: str
    temperature: float
    lowest: float
    difference: Estimate


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A published effect and whether it is here: `unclear` if the interval holds 0.

    sign: of the published change. found: `yes`, `no` (the reverse, clearly) or `unclear`.
    """

    claim: str
    quantity: str
    sign: int
    from_temperature: float
    to_temperature: float
    difference: Estimate
    found: Found


@dataclass(frozen=True, kw_only=True)
class AtSpeed:
    """Greedy decoding with `nominal` tokens a pass; `minus_1x` is against one a pass, in pairs.

    certain: as `AtTemperature`; greedy decoding ranks by the plain model's certainty.
    """

    nominal: int
    steps_per_block: int
    tokens_per_step: float
    pass_at_1: Estimate
    minus_1x: Estimate
    ar_local: dict[str, Estimate]
    ar_global: dict[str, Estimate]
    certain: Estimate


@dataclass(frozen=True, kw_only=True)
class SinkPoint:
    """Masked places at one distance: probability of the likeliest token, entropy in nats."""

    distance: int
    confidence: Estimate
    entropy: Estimate


@dataclass(frozen=True, kw_only=True)
class Sink:
    """The plain model's certainty about masked places while it decodes greedily, one token a pass.

    passes: for each of the first passes of a block, by distance from the block's leftmost mask.
    from_prompt: the first pass that shows a place (with all of its block masked), by distance from
        the prompt.
    """

    passes: list[list[SinkPoint]]
    from_prompt: list[SinkPoint]


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The contents of `analysis.json`.

    attention, block_size: of the decoding (`block_size` is the canvas if there are no blocks).
    cautions: what to know before believing the numbers, in sentences.
    random_order: AR-ness of the same lengths in random order within blocks: what has no
        preference. speeds_left_out: tokens a pass that a block is too small for.
    dropped: completions that could not be judged. seconds: by phase.
    """

    checkpoint: str
    data: str
    commit: str
    seed: int
    problems: int
    samples: int
    completions: int
    dropped: int
    attention: str
    block_size: int
    decoding: dict[str, Any]
    interval: str
    temperatures: list[AtTemperature]
    changes: list[Change]
    effects: list[Effect]
    cautions: list[str]
    random_order: dict[str, dict[str, float]]
    speeds: list[AtSpeed]
    speeds_left_out: list[int]
    sink: Sink
    seconds: dict[str, float]


def at_temperature(
    temperature: float,
    groups: Sequence[Group],
    ks: Sequence[int],
    remasking: Remasking,
    seed: int,
) -> AtTemperature:
    """The numbers of one temperature."""
    return AtTemperature(
        temperature=temperature,
        pass_at_k={str(k): _estimate(passes_at_k(groups, k), seed) for k in ks},
        ar_local=ar_ness(groups, "local", seed),
        ar_global=ar_ness(groups, "global", seed),
        distinct=_estimate(distinct_shares(groups), seed),
        length=_estimate(_mean_of(groups, lambda c: len(c.token_ids)), seed),
        certain=_estimate(_mean_of(groups, lambda c: certain_share(c, remasking)), seed),
    )


def at_speed(
    nominal: int,
    steps: int,
    groups: Sequence[Group],
    at_one: Sequence[Group],
    remasking: Remasking,
    seed: int,
) -> AtSpeed:
    """The numbers of greedy groups; `at_one` are those of one token a pass."""
    maps = [r.completion.step_map for group in groups for r in group.rollouts]
    before, after = pass_rates(at_one), pass_rates(groups)
    judged = any(problem in before for problem in after)
    return AtSpeed(
        nominal=nominal,
        steps_per_block=steps,
        tokens_per_step=fmean(len(m) / (max(m) + 1) for m in maps),
        pass_at_1=_estimate(after, seed),
        minus_1x=difference(before, after, seed) if judged else bootstrap([]),
        ar_local=ar_ness(groups, "local", seed),
        ar_global=ar_ness(groups, "global", seed),
        certain=_estimate(_mean_of(groups, lambda c: certain_share(c, remasking)), seed),
    )


def ar_ness(
    groups: Sequence[Group], kind: Literal["local", "global"], seed: int
) -> dict[str, Estimate]:
    """AR-ness by k, of step maps as they were recorded: what was decoded behind an EOS counts."""
    measure = local_ar_ness if kind == "local" else global_ar_ness
    return {str(k): _estimate(_mean_of(groups, _of_step_map(measure, k)), seed) for k in AR_NESS_K}


def certain_share(completion: Completion, remasking: Remasking) -> float:
    """Share of tokens that were fixed as sure as an order can be (`unmasking.on_grid`)."""
    sure = on_grid(torch.tensor(completion.confidences))
    return float((sure == most_certain(remasking)).float().mean())


def random_ar_ness(
    groups: Sequence[Group], block_size: int, origin: BlockOrigin, seed: int
) -> dict[str, Any]:
    """Mean AR-ness of as long completions in random order within blocks: {"local": {"1": ...}}."""
    gen = generator(seed)
    maps = []
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        prompt = len(rollout.prompt_ids)
        given = prompt - first_place(prompt, block_size, origin)
        maps.append(random_order(len(rollout.completion.step_map), block_size, gen, given))
    return {
        name: {str(k): fmean(measure(m, k) for m in maps) for k in AR_NESS_K}
        for name, measure in (("local", local_ar_ness), ("global", global_ar_ness))
    }


def changes(by_temperature: Mapping[float, Sequence[Group]], k: int, seed: int) -> list[Change]:
    """Every temperature against the lowest: AR-ness@1 of both kinds, and pass@k."""
    lowest = min(by_temperature)
    values = {t: _quantities(groups, k) for t, groups in by_temperature.items()}
    return [
        Change(
            quantity=quantity,
            temperature=temperature,
            lowest=lowest,
            difference=difference(values[lowest][quantity], after[quantity], seed),
        )
        for temperature, after in sorted(values.items())
        if temperature > lowest
        for quantity in after
        if any(problem in values[lowest][quantity] for problem in after[quantity])
    ]


def effects(found: Sequence[Change], k: int) -> list[Effect]:
    """The published effects among `changes`: from the lowest temperature to 1.2, or to the highest.

    None if only one temperature was measured.
    """
    if not found:
        return []
    measured = {change.temperature for change in found}
    top = PUBLISHED_TO if PUBLISHED_TO in measured else max(measured)
    claims = {
        "ar_global@1": ("a higher temperature lowers global AR-ness", -1),
        "ar_local@1": ("a higher temperature lowers local AR-ness", -1),
        f"pass@{k}": (f"a higher temperature raises pass@{k}", 1),
    }
    chosen = {c.quantity: c for c in found if c.temperature == top}
    return [
        Effect(
            claim=claim,
            quantity=quantity,
            sign=sign,
            from_temperature=chosen[quantity].lowest,
            to_temperature=top,
            difference=chosen[quantity].difference,
            found=_verdict(chosen[quantity].difference, sign),
        )
        for quantity, (claim, sign) in claims.items()
        if quantity in chosen
    ]


def ties_rule(analysis: Analysis) -> bool:
    """Whether the AR-ness of the lowest temperature may be that of ties, which go to the left."""
    coldest = min(analysis.temperatures, key=lambda row: row.temperature)
    return _tied(coldest, analysis.decoding["order_temperature"])


def _tied(row: AtTemperature, order_temperature: float) -> bool:
    return row.certain.value > TIED and not order_temperature


def cautions(
    rows: Sequence[AtTemperature],
    chance: Mapping[str, Mapping[str, float]],
    block_size: int,
    decoding: DecodingConfig,
) -> list[str]:
    """What keeps the numbers from meaning what they seem to."""
    found = []
    coldest = min(rows, key=lambda row: row.temperature)
    if _tied(coldest, decoding.order_temperature):
        found.append(
            f"At temperature {coldest.temperature:g} {100 * coldest.certain.value:.1f} % of the "
            "tokens were fixed as sure as an order can be, and of several such places the leftmost "
            "goes first: AR-ness there is that rule's. rollout.decoding.order_temperature=0.0001 "
            "leaves such ties to chance."
        )
    if block_size <= SMALL_BLOCK:
        found.append(
            f"Blocks of {block_size}: global AR-ness@k is 1 from k = {block_size} on whatever the "
            f"order, and a random order has {chance['global']['1']:.2f} global, "
            f"{chance['local']['1']:.2f} local at k = 1."
        )
    if decoding.remasking in ("left_to_right", "random"):
        found.append(
            f"The order is fixed by remasking {decoding.remasking}: it is not the model's."
        )
    return found


def sink_point(
    distance: int, values: Mapping[str, Sequence[tuple[float, float]]], seed: int
) -> SinkPoint:
    """One point from (confidence, entropy) pairs per problem: mean in each, then over problems."""
    sure = {problem: fmean(pair[0] for pair in pairs) for problem, pairs in values.items()}
    entropy = {problem: fmean(pair[1] for pair in pairs) for problem, pairs in values.items()}
    return SinkPoint(
        distance=distance, confidence=_estimate(sure, seed), entropy=_estimate(entropy, seed)
    )


def count_dropped(groups: Iterable[Group]) -> int:
    """Completions that could not be judged."""
    return sum(dropped(rollout) for group in groups for rollout in group.rollouts)


def _verdict(found: Estimate, sign: int) -> Found:
    low, high = sorted((sign * found.low, sign * found.high))
    return "yes" if low > 0 else "no" if high < 0 else "unclear"


def _quantities(groups: Sequence[Group], k: int) -> dict[str, ByProblem]:
    return {
        "ar_local@1": _mean_of(groups, _of_step_map(local_ar_ness, 1)),
        "ar_global@1": _mean_of(groups, _of_step_map(global_ar_ness, 1)),
        f"pass@{k}": passes_at_k(groups, k),
    }


def _of_step_map(
    measure: Callable[[Sequence[int], int], float], k: int
) -> Callable[[Completion], float]:
    return lambda completion: measure(completion.step_map, k)


def _mean_of(groups: Sequence[Group], value: Callable[[Completion], float]) -> dict[str, float]:
    """Mean of `value` per problem id."""
    return {
        group.problem.problem_id: fmean(value(rollout.completion) for rollout in group.rollouts)
        for group in groups
        if group.rollouts
    }


def _estimate(values: ByProblem, seed: int) -> Estimate:
    return bootstrap(list(values.values()), seed)
