"""Advantages on numbers worked out by hand."""

import pytest

from rl.advantage import group_advantages


def test_mean_baseline() -> None:
    # mean of 1, 0, 0.5, 0.5 is 0.5
    result = group_advantages([1.0, 0.0, 0.5, 0.5])
    assert result.values == (0.5, -0.5, 0.0, 0.0)
    assert result.state == "kept"
    assert result.missing == 0


def test_leave_one_out_is_distance_to_the_mean_of_the_others() -> None:
    # others' means: (0+.5+.5)/3 = 1/3, (1+.5+.5)/3 = 2/3, (1+0+.5)/3 = 1/2, 1/2
    result = group_advantages([1.0, 0.0, 0.5, 0.5], "leave_one_out")
    assert result.values == pytest.approx((2 / 3, -2 / 3, 0.0, 0.0))


def test_division_by_the_sample_standard_deviation() -> None:
    # 3, 1: mean 2, variance ((1)^2 + (1)^2) / (2 - 1) = 2
    result = group_advantages([3.0, 1.0], "mean", scale_by_std=True)
    assert result.values == pytest.approx((2**-0.5, -(2**-0.5)))
    # leave-one-out: G / (G - 1) = 2 on top
    both = group_advantages([3.0, 1.0], "leave_one_out", scale_by_std=True)
    assert both.values == pytest.approx((2**0.5, -(2**0.5)))


def test_a_failed_reward_takes_no_part() -> None:
    # mean of 2 and 0 is 1; a None counted as 0 would have made it 2/3
    result = group_advantages([2.0, None, 0.0])
    assert result.values == (1.0, None, -1.0)
    assert result.missing == 1
    # leave-one-out over the two valid ones: 2 / (2 - 1) * 1
    assert group_advantages([2.0, None, 0.0], "leave_one_out").values == (2.0, None, -2.0)


def test_a_group_without_spread_is_dropped() -> None:
    result = group_advantages([0.3, 0.1 + 0.2, 0.3], scale_by_std=True)
    assert result.values == (None, None, None)
    assert result.state == "no_spread"


@pytest.mark.parametrize("rewards", [[], [1.0], [1.0, None], [None, None]])
def test_a_group_with_fewer_than_two_valid_rewards_is_dropped(rewards: list[float | None]) -> None:
    result = group_advantages(rewards)
    assert result.state == "too_few"
    assert result.values == (None,) * len(rewards)
    assert result.missing == rewards.count(None)
