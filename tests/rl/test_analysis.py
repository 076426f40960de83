"""The numbers of an analysis, on groups small enough to work out by hand."""

import math
from collections.abc import Sequence

import pytest

from common.records import Completion, Group, Problem, Rollout, Score
from diffusion.unmasking import GRID_BITS
from models.request import DecodingConfig
from rl.analysis import (
    Change,
    at_speed,
    at_temperature,
    cautions,
    certain_share,
    changes,
    effects,
    random_ar_ness,
    sink_point,
)
from rl.estimates import Estimate, difference, distinct_shares, passes_at_k

FORWARD, BACKWARD = (0, 1, 2, 3), (3, 2, 1, 0)
Sample = tuple[str, bool | None, Sequence[int]]
PLAIN = DecodingConfig(gen_length=8, remasking="entropy")


def group(problem_id: str, *samples: Sample, sure: float = -0.5) -> Group:
    """One rollout per (text, passed, step map); passed None was not judged."""
    rollouts = []
    for index, (text, good, step_map) in enumerate(samples):
        length = len(step_map)
        completion = Completion(
            tuple(range(length)), (), text, "eos", tuple(step_map), (sure,) * length
        )
        total = None if good is None else float(good)
        score = Score(total, verdicts=("pass" if good else "fail",))
        rollouts.append(Rollout(problem_id, index, (1,), completion, 0, 0, score))
    return Group(Problem(problem_id, "do"), tuple(rollouts))


# Two problems of three samples: one of three passes and two texts agree; none passes, all differ.
GROUPS = [
    group("a", ("x", True, FORWARD), ("y", False, FORWARD), ("x", False, BACKWARD)),
    group("b", ("x", False, BACKWARD), ("y", False, BACKWARD), ("z", False, BACKWARD)),
]


def test_one_temperature_by_hand() -> None:
    row = at_temperature(0.7, GROUPS, (1, 2, 3), "entropy", seed=0)
    # 1 of 3 passes: pass@1 = 1/3, pass@2 = 1 - C(2,2)/C(3,2) = 2/3, pass@3 = 1; the other 0.
    rates = [row.pass_at_k[k].value for k in ("1", "2", "3")]
    assert rates == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    assert row.distinct.value == pytest.approx((2 / 3 + 1) / 2)
    # Forward is 1 everywhere. Backward: nobody right after a left neighbour; one of four events
    # takes the leftmost mask. Means first within a problem (2 of 3 forward), then over the two.
    assert row.ar_local["1"].value == pytest.approx((2 / 3 + 0) / 2)
    assert row.ar_global["1"].value == pytest.approx(((1 + 1 + 1 / 4) / 3 + 1 / 4) / 2)
    assert row.ar_global["4"].value == 1.0
    assert (row.length.value, row.length.n, row.certain.value) == (4.0, 2, 0.0)


def test_samples_that_were_not_judged_do_not_count() -> None:
    some = [group("a", ("x", True, FORWARD), ("y", None, FORWARD))]
    assert passes_at_k(some, 1) == {"a": 1.0}
    assert passes_at_k(some, 2) == {}
    row = at_temperature(1.0, some, (1, 2), "entropy", seed=0)
    assert math.isnan(row.pass_at_k["2"].value) and row.pass_at_k["2"].n == 0
    assert distinct_shares(some) == {"a": 1.0}


@pytest.mark.parametrize(
    ("remasking", "sure", "expected"),
    [
        ("entropy", -0.0, 1.0),
        ("entropy", -(2.0**-GRID_BITS) / 3, 1.0),
        ("entropy", -(2.0**-GRID_BITS), 0.0),
        ("low_confidence", 1.0, 1.0),
        ("low_confidence", 1.0 - 2.0**-10, 0.0),
        ("margin", 1.0, 1.0),
    ],
)
def test_who_is_as_sure_as_an_order_can_tell(remasking: str, sure: float, expected: float) -> None:
    completion = group("a", ("x", True, FORWARD), sure=sure).rollouts[0].completion
    assert certain_share(completion, remasking) == expected  # type: ignore[arg-type]


def test_speeds_are_compared_in_pairs() -> None:
    slow = [group("a", ("x", True, FORWARD)), group("b", ("x", False, FORWARD))]
    fast = [group("a", ("x", False, (0, 0, 1, 1))), group("b", ("x", False, (0, 0, 1, 1)))]
    row = at_speed(2, 2, fast, slow, "entropy", seed=0)
    assert (row.tokens_per_step, row.pass_at_1.value, row.minus_1x.value) == (2.0, 0.0, -0.5)
    assert row.ar_local["1"].value == 1.0  # tokens of one pass count from left to right


def test_effects_take_the_published_pair_of_temperatures_and_read_the_interval() -> None:
    cold = [group(f"p{i}", ("x", False, FORWARD)) for i in range(40)]
    warm = [group(f"p{i}", ("x", i % 2 == 0, BACKWARD)) for i in range(40)]
    hot = [group(f"p{i}", ("x", False, FORWARD)) for i in range(40)]
    found = changes({1.2: warm, 0.2: cold, 1.6: hot}, k=1, seed=0)
    assert {(c.temperature, c.lowest) for c in found} == {(1.2, 0.2), (1.6, 0.2)}
    by_name = {effect.quantity: effect for effect in effects(found, k=1)}
    assert {effect.to_temperature for effect in by_name.values()} == {1.2}
    assert by_name["ar_global@1"].difference.value == -0.75
    assert by_name["pass@1"].difference.value == 0.5
    assert {effect.found for effect in by_name.values()} == {"yes"}
    # Without 1.2, the highest: there nothing changed at all.
    other = effects(changes({0.2: cold, 1.6: hot}, k=1, seed=0), k=1)
    assert {(e.to_temperature, e.found) for e in other} == {(1.6, "unclear")}
    assert effects(changes({0.2: cold}, k=1, seed=0), k=1) == []


@pytest.mark.parametrize(
    ("low", "high", "quantity", "expected"),
    [
        (0.01, 0.2, "pass@4", "yes"),
        (-0.2, -0.01, "pass@4", "no"),
        (-0.1, 0.2, "pass@4", "unclear"),
        (-0.2, -0.01, "ar_local@1", "yes"),
        (0.01, 0.2, "ar_local@1", "no"),
        (0.0, 0.2, "ar_local@1", "unclear"),
    ],
)
def test_the_sign_of_an_effect(low: float, high: float, quantity: str, expected: str) -> None:
    change = Change(
        quantity=quantity,
        temperature=1.2,
        lowest=0.2,
        difference=Estimate((low + high) / 2, low, high, 9),
    )
    (effect,) = effects([change], k=4)
    assert effect.found == expected


def test_difference_needs_a_common_problem() -> None:
    assert difference({"a": 0.0, "b": 1.0}, {"a": 1.0, "c": 0.0}).value == 1.0
    with pytest.raises(ValueError, match="in common"):
        difference({"a": 0.0}, {"b": 0.0})


def test_random_order_keeps_to_the_blocks() -> None:
    ones = random_ar_ness(GROUPS, 1, "prompt", seed=0)
    assert ones == {kind: dict.fromkeys("1248", 1.0) for kind in ("local", "global")}
    assert random_ar_ness(GROUPS, 4, "prompt", seed=0)["global"]["1"] < 1.0


def test_cautions_name_ties_small_blocks_and_orders_that_are_not_the_models() -> None:
    tied = [group("a", ("x", True, FORWARD), sure=0.0)]
    rows = [
        at_temperature(0.2, tied, (1,), "entropy", 0),
        at_temperature(1.2, GROUPS, (1,), "entropy", 0),
    ]
    chance = random_ar_ness(GROUPS, 4, "prompt", seed=0)
    ties, small = cautions(rows, chance, 4, PLAIN)
    assert ties.startswith("At temperature 0.2 100.0 % of the tokens")
    assert small.startswith("Blocks of 4: global AR-ness@k is 1 from k = 4 on")
    # Neither where chance breaks ties and the canvas is one long block; nor where few are tied.
    broken = DecodingConfig(gen_length=64, remasking="entropy", order_temperature=0.0001)
    assert cautions(rows, chance, 64, broken) == []
    assert cautions(rows[1:], chance, 64, PLAIN) == []
    (text,) = cautions(rows[1:], chance, 64, DecodingConfig(gen_length=64, remasking="random"))
    assert "remasking random" in text


def test_a_sink_point_weighs_problems_equally() -> None:
    values = {"a": [(1.0, 0.0), (0.5, 1.0)], "b": [(0.25, 2.0)]}
    point = sink_point(3, values, seed=0)
    assert point.distance == 3
    assert (point.confidence.value, point.entropy.value) == ((0.75 + 0.25) / 2, (0.5 + 2.0) / 2)
    assert point.confidence.n == 2
