"""What can never be placed, by hand."""

import pytest

from workers.fitting import Node, Want, missing, room_beside

TWO = [
    Node("a", {"CPU": 8, "GPU": 2}, {"zone": "east"}),
    Node("b", {"CPU": 8, "GPU": 1, "fast_disk": 1}, {"zone": "west"}),
]


@pytest.mark.parametrize(
    "wants",
    [
        [Want("rollout", 3, {"GPU": 1})],
        [Want("rollout", 16, {"CPU": 1}), Want("reward", 5, {})],
        [Want("rollout", 20, {"CPU": 0.1, "GPU": 0.1})],  # 0.1 is no exact number
        [Want("learner", 2, {"GPU": 1}, apart=True)],
        [Want("reward", 1, {"fast_disk": 1})],
        [Want("rollout", 8, {"CPU": 1}, {"zone": "east"})],
    ],
)
def test_possible(wants: list[Want]) -> None:
    assert missing(TWO, wants) is None


@pytest.mark.parametrize(
    ("wants", "line"),
    [
        (
            [Want("rollout", 2, {"GPU": 1}), Want("learner", 2, {"GPU": 1})],
            "cluster: asks for 4 GPU (rollout 2, learner 2) but Ray has 3 (a has GPU 2; b has GPU "
            "1); lower cluster.*.num_gpus or the numbers of workers",
        ),
        (  # three GPUs in all, but no node has three
            [Want("learner", 1, {"GPU": 3})],
            "cluster.learner: asks for 1 x (GPU 3), at most 0 fit: a has GPU 2; b has GPU 1; lower "
            "cluster.learner or add nodes",
        ),
        (
            [Want("learner", 3, {"CPU": 1}, apart=True)],
            "cluster.learner: asks for 3 x (CPU 1) on nodes of their own, at most 2 fit: a has CPU "
            "8; b has CPU 8; lower cluster.learner or add nodes",
        ),
        (
            [Want("reward", 9, {"CPU": 1}, {"zone": "west"})],
            "cluster.reward: asks for 9 x (CPU 1) on nodes labelled zone=west, at most 8 fit: a "
            "has CPU 8, zone=east; b has CPU 8, zone=west; lower cluster.reward or add nodes",
        ),
        (
            [Want("reward", 1, {"fast_disk": 2})],
            "cluster.reward: asks for 1 x (fast_disk 2), at most 0 fit: a has fast_disk 0; b has "
            "fast_disk 1; lower cluster.reward or add nodes",
        ),
    ],
)
def test_impossible(wants: list[Want], line: str) -> None:
    assert missing(TWO, wants) == line


ROLLOUT = Want("rollout", 9, {"GPU": 2})


@pytest.mark.parametrize(
    ("others", "room"),
    [
        ([], 5),  # 3, 2 and none: a GPU of the second node is over
        ([Want("learner", 4, {"GPU": 1})], 3),  # fills the smaller node, which loses 2
        ([Want("learner", 2, {"GPU": 1}, apart=True)], 4),
        ([Want("learner", 1, {"GPU": 1}, {"zone": "east"})], 4),
        ([Want("reward", 3, {"CPU": 8})], 5),  # only one fits: nothing is taken for the others
        ([Want("learner", 1, {"GPU": 99})], 5),  # nobody can help that
        ([Want("learner", 20, {"GPU": 1})], 0),
    ],
)
def test_room_beside_others(others: list[Want], room: int) -> None:
    nodes = [
        Node("a", {"GPU": 6}, {"zone": "east"}),
        Node("b", {"GPU": 5}, {"zone": "west"}),
        Node("c", {"CPU": 8}),
    ]
    assert room_beside(nodes, others, ROLLOUT) == room
    assert room_beside(nodes, others, Want("rollout", 1, {"GPU": 2})) == min(room, 1)
