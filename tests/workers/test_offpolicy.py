"""What the rollout worker says of its completions is what the learner would have said."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import rl.update
from common.records import Group, Problem
from diffusion.likelihood import estimate_logps
from models.decoding import DecodingConfig
from rl.batch import make_batch
from rl.config import TrainConfig
from workers.local import LocalCluster

MakeConfig = Callable[..., TrainConfig]
Open = Callable[..., LocalCluster]
GREEDY = DecodingConfig(gen_length=8, temperature=0.0)


@pytest.fixture(params=["block_causal", "bidirectional"])
def model_folder(request: pytest.FixtureRequest, checkpoint_folder: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, and the same weights as a bidirectional one."""
    if request.param == "block_causal":
        return checkpoint_folder
    folder = Path(shutil.copytree(checkpoint_folder, tmp_path / "bidirectional"))
    spec = json.loads((folder / "diffusion.json").read_text())
    spec |= {"attention": "bidirectional", "block_size": None}
    (folder / "diffusion.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture
def open_local(make_config: MakeConfig) -> Iterator[Open]:
    opened: list[LocalCluster] = []

    def make(folder: Path, **algorithm: Any) -> LocalCluster:
        config = make_config(
            model={"path": str(folder)}, engine={"kind": "torch"}, algorithm=algorithm
        )
        opened.append(LocalCluster(config))
        return opened[-1]

    yield make
    for cluster in opened:
        cluster.close()


@pytest.fixture
def learner_logps(monkeypatch: pytest.MonkeyPatch) -> dict[Any, list[float]]:
    """By (sequence, mask seed): what the learner estimated first, before any step."""
    found: dict[Any, list[float]] = {}

    def spying(score: Any, spec: Any, sequences: Any, seeds: list[int], config: Any) -> Tensor:
        out = estimate_logps(score, spec, sequences, seeds, config)
        for sequence, seed, row in zip(sequences, seeds, out.tolist(), strict=True):
            found.setdefault((sequence, seed), row[: sequence.supervised])
        return out

    monkeypatch.setattr(rl.update, "estimate_logps", spying)
    return found


def rolled(cluster: LocalCluster, problems: list[Problem], seed: int) -> list[Group]:
    return cluster.roll_out(problems, seed).result(60).groups


@pytest.mark.parametrize(
    "estimator",
    [{"mode": "normalised", "num_pairs": 2}, {"mode": "parity"}, {"kind": "trace"}],
    ids=lambda estimator: "-".join(map(str, estimator.values())),
)
def test_worker_and_learner_agree_under_equal_weights_and_masks(
    model_folder: Path,
    estimator: dict[str, Any],
    open_local: Open,
    problems: list[Problem],
    learner_logps: dict[Any, list[float]],
) -> None:
    cluster = open_local(model_folder, max_staleness=1, beta=0.0, estimator=estimator)
    # Not the weights of the folder: the ones that a step has made, through the store.
    cluster.sync_weights(0)
    cluster.update(rolled(cluster, problems, seed=1), 0)
    cluster.sync_weights(1)
    learner_logps.clear()
    groups = rolled(cluster, problems, seed=2)
    # Used at another step than the one they were asked for: the masks stay the same.
    cluster.update(groups, 9)
    samples = make_batch(groups, "mean", False).samples
    assert len(samples) >= 8
    for sample in samples:
        assert len(sample.behaviour_logps) == 2
        for i, worker in enumerate(sample.behaviour_logps):
            learner = learner_logps[sample.sequence, sample.mask_seed(i)]
            assert list(worker) == pytest.approx(learner, rel=1e-4, abs=1e-4)


def test_two_batches_ahead_are_weighed(
    model_folder: Path, open_local: Open, problems: list[Problem]
) -> None:
    """The order of a run at staleness 1: the second batch is older than the learner."""
    cluster = open_local(model_folder, max_staleness=1)
    cluster.sync_weights(0)
    first, second = rolled(cluster, problems, seed=1), rolled(cluster, problems, seed=2)
    fresh = cluster.update(first, 0)
    assert (fresh["async/older_share"], fresh["async/importance_mean"]) == (0.0, 1.0)
    cluster.sync_weights(1)
    older = cluster.update(second, 1)
    assert older["async/older_share"] == 1.0
    assert older["async/importance_max"] > 1.01
    assert older["async/importance_mean"] != 1.0
    # The next batch comes from the weights that the learner has now.
    cluster.sync_weights(2)
    assert cluster.update(rolled(cluster, problems, seed=3), 2)["async/older_share"] == 0.0


def test_equal_weights_of_an_older_version_train_alike(
    model_folder: Path, open_local: Open, problems: list[Problem], tmp_path: Path
) -> None:
    """A run at staleness 0, and one with the correction on and nothing to correct."""
    metrics, weights = [], []
    for name, staleness in (("synchronous", 0), ("older", 1)):
        cluster = open_local(model_folder, max_staleness=staleness, num_iterations=1)
        groups = rolled(cluster, problems, seed=1)
        cluster.sync_weights(0)  # another version of the same weights
        metrics.append(cluster.update(groups, 0))
        cluster.export(tmp_path / name)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    assert metrics[1]["async/older_share"] == 1.0
    assert metrics[1]["async/importance_mean"] == pytest.approx(1.0, abs=1e-4)
    assert {name: metrics[1][name] for name in metrics[0]} == pytest.approx(metrics[0], rel=1e-3)
    # AdamW turns the rounding of a tiny gradient into a whole step (1e-3): rare, but there.
    pairs = [(value, weights[1][name]) for name, value in weights[0].items()]
    same = torch.cat([torch.isclose(a, b, atol=2e-5).flatten() for a, b in pairs])
    assert same.float().mean() > 0.99


def test_only_what_is_for_training_is_scored_and_only_when_it_may_be_older(
    checkpoint_folder: Path, open_local: Open, problems: list[Problem]
) -> None:
    synchronous = open_local(checkpoint_folder, max_staleness=0)
    [group, *_] = rolled(synchronous, problems, 1)
    assert all(r.completion.behaviour_logps == () for r in group.rollouts)
    ahead = open_local(checkpoint_folder, max_staleness=1)
    [scored, *_] = rolled(ahead, problems, 1)
    for ours, theirs in zip(scored.rollouts, group.rollouts, strict=True):
        assert replace(ours.completion, behaviour_logps=()) == theirs.completion
        lengths = [len(logps) for logps in ours.completion.behaviour_logps]
        assert lengths == [len(ours.completion.token_ids)] * 2
    [evaluated, *_] = ahead.evaluate(problems, GREEDY, 1, 7).result()
    assert evaluated.rollouts[0].completion.behaviour_logps == ()
