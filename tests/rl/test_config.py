"""The training configuration: what ships is valid, what is impossible says so in one line."""

from pathlib import Path

import pytest

from common.config import dump_config
from common.errors import UserError
from rl.config import TrainConfig, load_train_config

ROOT = Path(__file__).parents[2]
SHIPPED = ["tiny_cpu", "diffucoder_7b", "stable_diffcoder_8b"]
TINY = ROOT / "configs" / "rl" / "tiny_cpu.yaml"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_train_config(ROOT / "configs" / "rl" / f"{name}.yaml")
    again = tmp_path / "config.yaml"
    again.write_text(dump_config(config))
    assert load_train_config(again) == config


@pytest.mark.parametrize("name", SHIPPED[1:])
def test_published_settings(name: str) -> None:
    """ALGORITHMS section 4."""
    config = load_train_config(ROOT / "configs" / "rl" / f"{name}.yaml")
    algorithm, optim, decoding = config.algorithm, config.optim, config.rollout.decoding
    assert config.rollout.group_size == 10
    assert algorithm.num_iterations == 2
    assert algorithm.beta == 0.01
    assert algorithm.epsilon_low == algorithm.epsilon_high == 0.5
    assert algorithm.reference_refresh_steps == 64
    assert algorithm.estimator.mode == "normalised"
    assert (optim.lr, optim.betas, optim.weight_decay, optim.grad_clip) == (
        1e-6,
        (0.9, 0.99),
        0.1,
        0.2,
    )
    assert (optim.schedule, optim.min_lr_ratio) == ("cosine", 0.1)
    assert config.data.prompt_limit == 200
    assert decoding.gen_length == 256


def test_the_schedule_is_as_long_as_the_run() -> None:
    config = load_train_config(TINY, ["train.steps=7", "algorithm.num_iterations=3"])
    assert config.schedule.total_steps == 21
    assert load_train_config(TINY, ["optim.total_steps=5"]).schedule.total_steps == 5


def test_the_run_folder() -> None:
    assert load_train_config(TINY, ["run.name=x"]).run.path == Path("runs/x")
    assert load_train_config(TINY, ["run.folder=/tmp/y"]).run.path == Path("/tmp/y")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rollout.group_size=1", "rollout.group_size=1"),
        ("rollout.decoding.temperature=0.0", "rollout.decoding.temperature=0"),
        ("rollout.decoding.block_size=5", "rollout.decoding.block_size=5"),
        ("rollout.decoding.gen_length=0", "rollout.decoding: "),
        ("algorithm.estimator={mode: parity, num_pairs: 0}", "algorithm.estimator.num_pairs=0"),
        ("algorithm.estimator.mask_ratio_min=0.9", "mask_ratio_min"),
        ("algorithm.estimator.num_pairs=-1", "algorithm.estimator: "),
        (
            "rollout.decoding={gen_length: 8, block_size: 4, steps_per_block: 5}",
            "steps_per_block=5",
        ),
        ("algorithm.importance_cap=0.0", "algorithm.importance_cap: "),
        ("algorithm.importance_cap=0.5", "greater than or equal to 1"),
        ("algorithm.stale=forget", "algorithm.stale: "),
        ("algorithm.max_staleness=-1", "algorithm.max_staleness: "),
        ("algorithm={beta: 0.0, reference_refresh_steps: 4}", "reference_refresh_steps=4"),
        ("engine.lora.rank=0", "lora.rank must be at least 1"),
        ("engine.lora.targets=[q_proj, w1]", "lora.targets: no w1; choose among q_"),
        ("engine={offload_reference: true, lora: {}}", "no second model to offload"),
        ("cluster={kind: local, learner: {ranks: 2}}", "cluster.learner.ranks=2"),
        (
            "cluster={kind: local, learner: {ranks: 1}, address: 'h:1'}",
            "cluster.address=h:1",
        ),
        (
            "cluster={kind: local, learner: {ranks: 1}, weights: broadcast}",
            "cluster.weights=broadcast",
        ),
        ("cluster.rollout={min: 3, max: 2}", "cluster.rollout.min=3"),
        ("rollout.group_sise=4", "rollout.group_sise: unknown key"),
        ("rollout.group_size=four", "rollout.group_size"),
        ("algorithm.num_iterations=0", "algorithm.num_iterations"),
        ("algorithm.epsilon_low=1.5", "algorithm.epsilon_low"),
        ("algorithm.advantage=median", "algorithm.advantage"),
        ("train.steps=0", "train.steps"),
        ("optim.lr=-1.0", "optim"),
        ("metrics.wandb=maybe", "metrics.wandb"),
    ],
)
def test_errors_are_one_line_with_key_and_file(override: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        load_train_config(TINY, [override])
    line = str(caught.value)
    assert named in line
    assert str(TINY) in line
    assert "\n" not in line
    assert len(line) < 400


def test_a_reference_of_adapters_is_not_refreshed() -> None:
    with pytest.raises(UserError, match="model without adapters, for ever; set it to 0") as caught:
        load_train_config(TINY, ["engine.lora.rank=4", "algorithm.reference_refresh_steps=4"])
    assert "\n" not in str(caught.value)


def test_torch_engine_has_one_rank() -> None:
    with pytest.raises(UserError, match=r"engine\.kind=torch"):
        load_train_config(TINY, ["engine.kind=torch", "cluster.learner.ranks=2"])


def test_missing_keys_and_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load_train_config(tmp_path / "none.yaml")
    empty = tmp_path / "empty.yaml"
    empty.write_text("run: {name: x}\n")
    with pytest.raises(UserError, match=r"empty\.yaml.*missing"):
        load_train_config(empty)
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: {name: [\n")
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_train_config(broken)
    with pytest.raises(UserError, match="key=value"):
        load_train_config(TINY, ["train.steps"])


def test_impossible_configs_cannot_be_built_in_code_either() -> None:
    config = load_train_config(TINY)
    with pytest.raises(UserError, match=r"cluster\.learner\.ranks"):
        TrainConfig(
            **dict(config)
            | {
                "cluster": config.cluster.model_copy(
                    update={
                        "kind": "local",
                        "learner": config.cluster.learner.model_copy(update={"ranks": 2}),
                    }
                )
            }
        )
