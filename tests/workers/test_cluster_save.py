"""Saving from Ray actors, and going on with another number of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import InfrastructureError
from common.integrity import record_of
from common.records import Group
from rl.config import TrainConfig
from workers.cluster import RayCluster

MakeConfig = Callable[..., TrainConfig]
SMALL = {"num_cpus": 0.1}
Open = Callable[..., RayCluster]


@pytest.fixture
def open_ranks(ray_started: None, make_config: MakeConfig) -> Iterator[Open]:
    opened: list[RayCluster] = []

    def make(ranks: int, **engine: Any) -> RayCluster:
        cluster = {"kind": "ray", "learner": SMALL | {"ranks": ranks}}
        opened.append(RayCluster(make_config(cluster=cluster, engine=engine)))
        return opened[-1]

    yield make
    for cluster in opened:
        cluster.close()


@pytest.mark.ray
@pytest.mark.parametrize(("before", "after", "stage"), [(1, 2, 3), (2, 1, 1), (2, 1, 0)])
def test_another_number_of_ranks_goes_on(
    open_ranks: Open,
    scored_groups: list[Group],
    tmp_path: Path,
    before: int,
    after: int,
    stage: int,
) -> None:
    saving = open_ranks(before, zero_stage=stage)
    saving.update(scored_groups, 0)
    written = saving.save(tmp_path / "step").result(250)
    expected = [saving.update(scored_groups, step) for step in (1, 2)]
    saving.close()
    files = {path.resolve() for path in (tmp_path / "step").rglob("*") if path.is_file()}
    assert {Path(path) for path in written} == files  # of all ranks
    assert all(record_of(Path(path)) == record for path, record in written.items())
    resumed = open_ranks(after, zero_stage=stage)
    resumed.load(tmp_path / "step", version=7)
    assert resumed.sync_weights(6) == 7
    found = [resumed.update(scored_groups, step) for step in (1, 2)]
    for ours, theirs in zip(found, expected, strict=True):
        assert untimed(ours) == pytest.approx(untimed(theirs), rel=1e-3, abs=1e-5)


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith("idle/")}


@pytest.mark.ray
def test_a_save_that_fails_costs_the_save_only(
    open_ranks: Open, scored_groups: list[Group], tmp_path: Path
) -> None:
    cluster = open_ranks(2, zero_stage=1)
    (tmp_path / "file").write_text("in the way")
    future = cluster.save(tmp_path / "file")
    assert cluster.update(scored_groups, 0)["update/optimizer_steps"] == 2.0
    with pytest.raises(InfrastructureError, match=r"cannot write .*file/policy"):
        future.result(250)
    assert cluster.save(tmp_path / "step").result(250)
