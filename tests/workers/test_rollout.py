"""The rollout worker without Ray: seeds, grouping, versions."""

from pathlib import Path

import pytest
import torch

from common.errors import InfrastructureError
from common.records import Problem
from common.seeding import derive_seed
from models.checkpoint import load_checkpoint
from models.decoding import DecodingConfig
from workers.rollout import RolloutWorker
from workers.weights import LocalWeightStore
from workers.wire import Bucket, cut

DECODING = DecodingConfig(gen_length=16)


@pytest.fixture
def store() -> LocalWeightStore:
    return LocalWeightStore()


@pytest.fixture
def worker(checkpoint_folder: Path, store: LocalWeightStore) -> RolloutWorker:
    return RolloutWorker(checkpoint_folder, DECODING, store)


def other_weights(checkpoint_folder: Path) -> list[Bucket]:
    model = load_checkpoint(checkpoint_folder).denoiser.model
    generator = torch.Generator().manual_seed(9)
    changed = (
        {name: value + 0.3 * torch.randn(value.shape, generator=generator)}
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied
    )
    return list(cut(changed))


def test_groups_stay_together_and_in_order(worker: RolloutWorker, problems: list[Problem]) -> None:
    groups = worker.generate(problems, seed=5, group_size=3)
    assert [group.problem for group in groups] == problems
    for group in groups:
        assert [rollout.sample_index for rollout in group.rollouts] == [0, 1, 2]
        assert {rollout.problem_id for rollout in group.rollouts} == {group.problem.problem_id}
        assert {rollout.policy_version for rollout in group.rollouts} == {0}
        assert len({rollout.completion.token_ids for rollout in group.rollouts}) > 1
    assert groups[1].rollouts[2].seed == derive_seed(5, "p1", 2)


def test_a_completion_does_not_depend_on_its_neighbours(
    worker: RolloutWorker, problems: list[Problem]
) -> None:
    together = worker.generate(problems, seed=5, group_size=2)
    alone = [worker.generate([problem], seed=5, group_size=2)[0] for problem in problems]
    assert _tokens(together) == _tokens(alone)
    assert _tokens(worker.generate(problems, seed=6, group_size=2)) != _tokens(together)


def test_pulls_before_it_serves_and_stamps(
    worker: RolloutWorker,
    store: LocalWeightStore,
    checkpoint_folder: Path,
    problems: list[Problem],
) -> None:
    before = worker.generate(problems, seed=5, group_size=2)
    store.publish(4, other_weights(checkpoint_folder))
    after = worker.generate(problems, seed=5, group_size=2, at_least=4)
    assert {rollout.policy_version for group in after for rollout in group.rollouts} == {4}
    assert _tokens(after) != _tokens(before)
    # One that joins late has them from the start.
    late = RolloutWorker(checkpoint_folder, DECODING, store)
    assert _tokens(late.generate(problems, seed=5, group_size=2)) == _tokens(after)


def test_half_written_weights_are_never_served(
    worker: RolloutWorker,
    store: LocalWeightStore,
    checkpoint_folder: Path,
    problems: list[Problem],
) -> None:
    buckets = other_weights(checkpoint_folder)
    last = buckets[-1].pieces[-1].raw
    store.publish(4, buckets)
    last[0] ^= 1
    for _ in range(2):
        with pytest.raises(InfrastructureError, match=r"bucket \d+ of version 4 .*damaged"):
            worker.generate(problems, seed=5, group_size=1)
    last[0] ^= 1
    groups = worker.generate(problems, seed=5, group_size=1)
    assert {rollout.policy_version for group in groups for rollout in group.rollouts} == {4}


def test_starts_while_the_newest_weights_are_lost(
    checkpoint_folder: Path, store: LocalWeightStore, problems: list[Problem]
) -> None:
    buckets = other_weights(checkpoint_folder)
    store.publish(4, buckets)
    buckets[0].pieces[0].raw[0] ^= 1
    worker = RolloutWorker(checkpoint_folder, DECODING, store)
    with pytest.raises(InfrastructureError, match="version 4"):
        worker.generate(problems, seed=5, group_size=1)
    store.publish(5, buckets)
    [group] = worker.generate(problems[:1], seed=5, group_size=1)
    assert group.rollouts[0].policy_version == 5


def test_receives_a_version_once(
    worker: RolloutWorker, store: LocalWeightStore, checkpoint_folder: Path
) -> None:
    store.publish(4, other_weights(checkpoint_folder))
    worker.receive(4)
    worker.receive(4)
    with pytest.raises(InfrastructureError, match=r"no version 5; the store holds \[4\]"):
        worker.receive(5)


def test_never_serves_older_weights_than_promised(
    worker: RolloutWorker, problems: list[Problem]
) -> None:
    with pytest.raises(InfrastructureError, match="version 2 was promised, .* newest is 0"):
        worker.generate(problems, seed=5, group_size=1, at_least=2)


def test_another_decoding_for_evaluation(worker: RolloutWorker, problems: list[Problem]) -> None:
    greedy = DecodingConfig(gen_length=8, temperature=0.0)
    first = worker.generate(problems, 1, 1, greedy)
    assert _tokens(first) == _tokens(worker.generate(problems, 2, 1, greedy))
    assert all(len(r.completion.step_map) <= 8 for group in first for r in group.rollouts)


def _tokens(groups: list) -> list[tuple[int, ...]]:
    return [rollout.completion.token_ids for group in groups for rollout in group.rollouts]
