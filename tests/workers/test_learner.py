"""One learner rank without Ray: update, publish, save, load, export."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from common.records import Group
from models import deepspeed_engine
from models.checkpoint import load_checkpoint
from rl.config import TrainConfig
from workers.learner import LearnerPlan, LearnerWorker, wire_dtype
from workers.weights import LocalWeightStore

MakeConfig = Callable[..., TrainConfig]


def learner(config: TrainConfig) -> tuple[LearnerWorker, LocalWeightStore]:
    store = LocalWeightStore()
    worker = LearnerWorker(LearnerPlan.of(config), store)
    worker.start()
    return worker, store


def weights(store: LocalWeightStore) -> dict[str, torch.Tensor]:
    pieces = (piece for bucket in store.fetch()[1] for piece in bucket.pieces)
    return {piece.name: piece.values.view(piece.shape) for piece in pieces}


def test_update_moves_what_is_published(
    make_config: MakeConfig, scored_groups: list[Group], checkpoint_folder: Path
) -> None:
    worker, store = learner(make_config())
    assert worker.publish(1) == 1
    start = dict(load_checkpoint(checkpoint_folder).denoiser.model.named_parameters())
    assert list(weights(store)) == list(start)
    assert all(torch.equal(value, start[name]) for name, value in weights(store).items())
    metrics = worker.update(scored_groups, step=0)
    assert metrics["update/optimizer_steps"] == 2.0
    assert metrics["policy/grad_norm"] > 0
    old = weights(store)
    worker.publish(2)
    assert not torch.equal(weights(store)["model.norm.weight"], old["model.norm.weight"])


@pytest.mark.parametrize("engine", [{"kind": "torch"}, {"zero_stage": 2}, {"zero_stage": 3}])
def test_engines_agree(
    make_config: MakeConfig, scored_groups: list[Group], engine: dict[str, object]
) -> None:
    ours, our_store = learner(make_config(engine=engine))
    theirs, their_store = learner(make_config())
    for step in range(2):
        found, expected = ours.update(scored_groups, step), theirs.update(scored_groups, step)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    ours.publish(1), theirs.publish(1)
    for name, value in weights(our_store).items():
        torch.testing.assert_close(value, weights(their_store)[name], rtol=1e-3, atol=1e-5)


def test_save_and_load_continue_exactly(
    make_config: MakeConfig, scored_groups: list[Group], tmp_path: Path
) -> None:
    straight, straight_store = learner(make_config())
    straight.update(scored_groups, 0)
    straight.save(tmp_path / "step").result(60)
    resumed, resumed_store = learner(make_config())
    resumed.load(tmp_path / "step")
    assert resumed.update(scored_groups, 1) == straight.update(scored_groups, 1)
    straight.publish(1), resumed.publish(1)
    for name, value in weights(straight_store).items():
        assert torch.equal(value, weights(resumed_store)[name]), name


def test_zero_3_is_gathered_bucket_by_bucket(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, store = learner(make_config(engine={"zero_stage": 3}))
    engine = worker._engine
    parameters = list(engine._engine.module.parameters())  # type: ignore[attr-defined]
    largest = max(4 * value.ds_numel for value in parameters)
    whole = sum(4 * value.ds_numel for value in parameters)

    def gathered() -> int:
        """Bytes of parameters that are whole on this rank, beside its shards."""
        return sum(4 * value.numel() for value in parameters)

    seen: list[int] = []
    export = deepspeed_engine.export_tensor

    def watching(value: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(gathered())
        return export(value, *rest)

    def small(max_bytes: int = largest) -> Iterator[dict[str, torch.Tensor]]:
        for bucket in buckets(largest):
            assert gathered() == 0  # while a bucket is on its way nothing is gathered
            assert sum(4 * value.numel() for value in bucket.values()) <= largest
            yield bucket

    monkeypatch.setattr(deepspeed_engine, "export_tensor", watching)
    buckets = engine.state_buckets
    monkeypatch.setattr(engine, "state_buckets", small)
    worker.publish(1)
    assert len(seen) == len(parameters)
    assert 0 < max(seen) <= largest < whole / 2
    assert sum(value.numel() * 4 for value in weights(store).values()) == whole


@pytest.mark.parametrize("stage", [0, 3])
def test_export_loads_in_stock_transformers(
    make_config: MakeConfig, scored_groups: list[Group], tmp_path: Path, stage: int
) -> None:
    worker, store = learner(make_config(engine={"zero_stage": stage}))
    worker.update(scored_groups, 0)
    worker.publish(1)
    worker.export(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for name, value in weights(store).items():
        assert torch.equal(dict(model.named_parameters())[name], value), name
    assert load_checkpoint(tmp_path / "hf").spec.block_size == 4


def test_bf16_on_the_wire_is_the_cast_of_what_fp32_sends(make_config: MakeConfig) -> None:
    whole, whole_store = learner(make_config())
    narrow, narrow_store = learner(make_config(cluster={"wire": "bf16"}))
    whole.publish(1), narrow.publish(1)
    assert any(not torch.equal(v, v.bfloat16().float()) for v in weights(whole_store).values())
    for name, value in weights(narrow_store).items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, weights(whole_store)[name].bfloat16()), name


@pytest.mark.parametrize(
    ("precision", "wire", "expected"),
    [
        ("fp32", "engine", torch.float32),
        ("bf16", "engine", torch.bfloat16),
        ("fp32", "bf16", torch.bfloat16),
    ],
)
def test_weights_travel_as_the_engine_computes(
    make_config: MakeConfig, precision: str, wire: str, expected: torch.dtype
) -> None:
    config = make_config(engine={"precision": precision}, cluster={"wire": wire})
    assert wire_dtype(config) == expected


def test_two_ranks_need_a_meeting_point(make_config: MakeConfig) -> None:
    plan = LearnerPlan.of(make_config())
    with pytest.raises(UserError, match=r"cluster\.kind=ray"):
        LearnerWorker(plan, LocalWeightStore(), rank=0, world_size=2).start()


@pytest.mark.peft
@pytest.mark.parametrize("engine", [{"kind": "torch"}, {"zero_stage": 2}, {"zero_stage": 3}])
def test_adapters_need_no_second_model(
    make_config: MakeConfig, scored_groups: list[Group], tmp_path: Path, engine: dict[str, object]
) -> None:
    """KL to the stock model: zero at first, then what a second copy of it would say."""
    lora = {"rank": 4, "alpha": 64.0, "targets": ("q_proj", "down_proj")}
    config = make_config(engine=engine | {"lora": lora}, algorithm={"num_iterations": 1})
    worker, store = learner(config)
    assert worker._updater._reference is not None
    assert worker._updater._reference._denoiser is None
    assert worker.update(scored_groups, 0)["policy/kl"] < 1e-9  # rounding: batched otherwise
    copied, _ = learner(config)
    copied.update(scored_groups, 0)
    theirs = copied._updater._reference
    assert theirs is not None and not theirs._known  # nothing that would be said again
    reference = theirs._denoiser = load_checkpoint(copied._plan.checkpoint_folder).denoiser
    metrics = worker.update(scored_groups, 1)
    assert metrics["policy/kl"] > 1e-6
    assert metrics == pytest.approx(copied.update(scored_groups, 1), rel=1e-3, abs=1e-7)
    worker.publish(1)
    published, stock = weights(store), dict(reference.model.named_parameters())
    assert list(published) == list(stock)  # a rollout worker loads it as any other policy
    moved = {name for name, value in stock.items() if not torch.equal(value, published[name])}
    assert moved == {name for name in stock if name.endswith(("q_proj.weight", "down_proj.weight"))}
    worker.export(tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").named_parameters()
    assert all(torch.equal(value, published[name]) for name, value in exported)
