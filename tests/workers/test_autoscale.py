"""When to add and when to take away, by hand."""

from workers.autoscale import Autoscaler, Decision


def decisions(scaler: Autoscaler, size: int, *steps: tuple[float, float]) -> list[Decision | None]:
    return [scaler.after_step(size, learner, rollout) for learner, rollout in steps]


def test_one_more_after_three_steps_in_which_only_the_learner_waited() -> None:
    scaler = Autoscaler(1, 4)
    assert decisions(scaler, 2, (0.5, 0.1), (0.6, 0.2)) == [None, None]
    found = scaler.after_step(2, 0.4, 0.1)
    assert found is not None
    assert (found.before, found.after) == (2, 3)
    assert found.reason == (
        "over 3 steps the learner was idle 40% to 60%, rollout workers 10% to 20%"
    )
    assert decisions(scaler, 3, (0.5, 0.1), (0.5, 0.1)) == [None, None]  # measures anew


def test_one_less_if_rollout_workers_wait_for_a_busy_learner() -> None:
    found = decisions(Autoscaler(1, 4), 3, *[(0.01, 0.7)] * 3)[-1]
    assert found is not None
    assert (found.before, found.after) == (3, 2)


def test_never_beyond_its_bounds_nor_on_one_odd_step() -> None:
    assert decisions(Autoscaler(1, 2), 2, *[(0.9, 0.0)] * 9) == [None] * 9
    assert decisions(Autoscaler(2, 4), 2, *[(0.0, 0.9)] * 9) == [None] * 9
    assert decisions(Autoscaler(1, 4), 2, *[(0.9, 0.0), (0.9, 0.0), (0.1, 0.0)] * 3) == [None] * 9
    # An operator has gone beyond: that is not taken back.
    assert decisions(Autoscaler(1, 2), 6, *[(0.9, 0.0)] * 9) == [None] * 9


def test_who_takes_turns_is_asked_about_its_own_turn() -> None:
    """Synchronous: rollouts take 60 % of a step, the update 40 %."""
    working, waiting = (
        [(0.6, 0.45)] * 3,
        [(0.6, 0.75)] * 3,
    )  # 55 of these 60 %; 25: rewards are slow
    assert decisions(Autoscaler(1, 4), 2, *working) == [None] * 3
    found = decisions(Autoscaler(1, 4, take_turns=True), 2, *working)[-1]
    assert found is not None
    assert (found.before, found.after) == (2, 3)
    assert decisions(Autoscaler(1, 4, take_turns=True), 2, *waiting) == [None] * 3
