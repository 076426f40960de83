"""How many workers there are when nodes come and go, operators wish and measurements say."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from common.errors import UserError
from workers.autoscale import Autoscaler
from workers.fitting import Node, Want
from workers.sizes import Sizes


@dataclass
class FakeCrew:
    role: str
    size: int

    def resize(self, size: int) -> None:
        self.size = size


class Stage:
    """A learner and rewards of one CPU together, rollout workers of one each; nodes of three."""

    def __init__(self, rollouts: int, nodes: int, autoscaler: Autoscaler | None = None) -> None:
        self.rollout, self.reward = FakeCrew("rollout", rollouts), FakeCrew("reward", 1)
        self.nodes = [Node(f"node-{i}", {"CPU": 3.0}) for i in range(nodes)]
        self.reward_labels: dict[str, str] = {}
        self.said: list[str] = []
        self.sizes = Sizes(
            [self.rollout, self.reward],
            self.wants,
            lambda: list(self.nodes),
            autoscaler,
            self.said.append,
        )

    def wants(self, sizes: Mapping[str, int]) -> list[Want]:
        return [
            Want("rollout", sizes["rollout"], {"CPU": 1.0}),
            Want("reward", sizes["reward"], {"CPU": 0.5}, self.reward_labels),
            Want("learner", 1, {"CPU": 0.5}),
        ]


def test_a_lost_node_takes_workers_and_brings_them_back() -> None:
    stage = Stage(rollouts=4, nodes=2)
    stage.sizes.look()
    assert stage.said == []
    lost = stage.nodes.pop()
    stage.sizes.look()
    stage.sizes.look()
    assert stage.rollout.size == 2
    assert stage.said == ["rollout workers 4 -> 2: no more fit on the nodes that are left"]
    stage.nodes.append(lost)
    stage.sizes.look()
    assert stage.rollout.size == 4
    assert stage.said[1:] == ["rollout workers 2 -> 4: there is room for them again"]


def test_what_others_lack_is_not_taken_from_rollout_workers() -> None:
    """Rewards need a node of their own kind, which is gone; to want fewer rollouts helps nobody."""
    stage = Stage(rollouts=4, nodes=2)
    stage.reward.size, stage.reward_labels = 3, {"pool": "sandbox"}
    stage.nodes.append(Node("node-2", {"CPU": 3.0}, {"pool": "sandbox"}))
    stage.sizes.look()
    stage.nodes.pop()
    stage.sizes.look()
    assert stage.rollout.size == 4 and stage.said == []


def test_room_that_another_role_gives_back_is_used() -> None:
    stage = Stage(rollouts=4, nodes=2)
    stage.reward.size = 3
    node = stage.nodes.pop()
    stage.sizes.look()
    assert stage.rollout.size == 1
    stage.sizes.scale({"reward": 1})
    assert stage.rollout.size == 2
    stage.nodes.append(node)
    stage.sizes.look()
    assert stage.rollout.size == 4


def test_one_rollout_worker_is_always_planned_for() -> None:
    stage = Stage(rollouts=4, nodes=2)
    stage.nodes.clear()
    stage.sizes.look()
    assert stage.rollout.size == 1


def test_a_worker_that_was_given_up_gets_another_chance_on_a_new_node() -> None:
    stage = Stage(rollouts=4, nodes=2)
    stage.rollout.size = 3  # by the crew itself
    stage.sizes.look()
    assert stage.rollout.size == 3
    stage.nodes.append(Node("node-2", {"CPU": 3.0}))
    stage.sizes.look()
    assert stage.rollout.size == 4


def test_wishes() -> None:
    stage = Stage(rollouts=4, nodes=2)
    assert stage.sizes.scale({"rollout": 3, "reward": 2}) == "rollout 4 -> 3, reward 1 -> 2"
    assert (stage.rollout.size, stage.reward.size) == (3, 2)
    with pytest.raises(UserError, match=r"cluster: asks for 7.5 CPU \(rollout 6, reward 1, "):
        stage.sizes.scale({"rollout": 6})
    for bad in ({"rollout": 0}, {"learner": 2}):
        with pytest.raises(UserError, match="give reward or rollout and a number from 1"):
            stage.sizes.scale(bad)
    assert (stage.rollout.size, stage.reward.size) == (3, 2)
    node = stage.nodes.pop()
    stage.sizes.look()
    stage.nodes.append(node)
    stage.sizes.look()
    assert stage.rollout.size == 3  # as wished last, not as it began


def test_what_was_measured_adds_no_worker_that_does_not_fit() -> None:
    stage = Stage(rollouts=4, nodes=2, autoscaler=Autoscaler(1, 9))
    for _ in range(12):
        stage.sizes.after_step(learner_idle=0.6, rollout_idle=0.1)
    assert stage.rollout.size == 5
    assert len(stage.said) == 1 and stage.said[0].startswith("rollout workers 4 -> 5: over 3 steps")
