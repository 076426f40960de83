"""`unmask train` end to end on a two-layer model in one process, and everything it refuses."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner, Result

import rl.train
from common.errors import InfrastructureError, UserError
from common.integrity import find_damage
from common.metrics import read_metrics
from common.progress import SilentProgress
from models.checkpoint import load_checkpoint
from models.outline import load_outline
from models.spec import DiffusionSpec
from models.tokenizer import train_tokenizer
from rl.audit import audit
from rl.checkpoint import Checkpoints, RunState
from rl.config import load_train_config
from rl.origin import Origin
from rl.train import prepare

CONFIGS = Path(__file__).parents[2] / "configs" / "rl"
REWARD = '''
def chance(prompts, completions, **columns):
    """Spread without meaning: most random completions of a group differ in it."""
    return [float(sum(map(ord, text)) % 3) for text in completions]
'''


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]
) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "sft"
    return write_checkpoint(folder, max_position_embeddings=256)


@pytest.fixture
def config_file(checkpoint: Path, tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"Add {n}.", "tests": [f"assert f(1) == {n + 1}"], "problem_id": f"p{n}"}
        for n in range(6)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(REWARD)
    values = {
        "run": {"name": "tiny", "folder": str(tmp_path / "run"), "seed": 1},
        "model": {"path": str(checkpoint)},
        "data": {"train": str(data), "test": str(data), "test_count": 2},
        "rollout": {
            "group_size": 3,
            "prompts_per_step": 2,
            "decoding": {"gen_length": 8, "steps_per_block": 2},
        },
        "reward": {"functions": [{"path": f"{tmp_path / 'reward.py'}:chance", "weight": 1.0}]},
        "algorithm": {"num_iterations": 2, "beta": 0.01},
        "optim": {"lr": 1e-3},
        "engine": {"kind": "torch"},
        "cluster": {"kind": "local"},
        "train": {"steps": 4, "save_every": 2, "eval_every": 2},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def invoke(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(rl.train.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(folder).denoiser.named_parameters())


def _is_timing(name: str) -> bool:
    return name.startswith(("timing_s", "perf")) or name.endswith("seconds")


class Notes:
    """A sink that remembers, and may pull the plug."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.records: list[tuple[int, dict[str, float]]] = []
        self._stop_at = stop_at

    def log(self, values: Mapping[str, float], *, step: int, stage: str) -> None:
        assert stage == "rl"
        self.records.append((step, dict(values)))
        if step == self._stop_at and "policy/loss" in values:
            raise KeyboardInterrupt

    def close(self) -> None:
        pass

    def learned(self) -> list[tuple[int, dict[str, float]]]:
        """What was computed, without what was timed."""
        return [
            (step, {k: v for k, v in values.items() if not _is_timing(k)})
            for step, values in self.records
            if "policy/loss" in values
        ]


def test_a_public_folder_is_trained_as_it_is(
    checkpoint: Path, config_file: Path, tmp_path: Path
) -> None:
    """DiffuCoder's layout: no diffusion.json, a model_type that transformers does not know."""
    public = Path(shutil.copytree(checkpoint, tmp_path / "public"))
    (public / "diffusion.json").unlink()
    config = json.loads((public / "config.json").read_text())
    config |= {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 2}
    (public / "config.json").write_text(json.dumps(config))
    overrides = [f"model.path={public}", "train.steps=1", "train.eval_every=0"]
    overrides.append("rollout.decoding.steps_per_block=8")
    settings = load_train_config(config_file, overrides)
    prepare(settings).run(Notes(), SilentProgress())
    out = settings.run.path / "rl" / "hf"
    assert load_checkpoint(out).spec == DiffusionSpec(
        mask_token_id=2, logit_shift=True, attention="bidirectional", block_size=None
    )
    moved = [(weights(out)[name] - value).abs().max() for name, value in weights(public).items()]
    assert 0 < max(moved) < 0.1


@pytest.mark.parametrize("name", ["tiny_cpu", "diffucoder_7b", "stable_diffcoder_8b"])
def test_dry_run_of_shipped_configs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("--config", CONFIGS / f"{name}.yaml", "--dry-run", "run.seed=5")
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout)["run"]["seed"] == 5
    assert "model.path" in result.stderr
    assert "is not there" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_dry_run_looks_at_the_data_that_is_there(config_file: Path) -> None:
    bad = config_file.parent / "bad.jsonl"
    write_rows(bad, {"prompt": "x", "tests": ["assert f("]})
    result = invoke("--config", config_file, "--dry-run", f"data.test={bad}")
    assert result.exit_code == 0, result.output
    assert f"dry run: data.test: {bad}, line 1: column 'tests', test 1" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_address_means_ray(config_file: Path) -> None:
    result = invoke("--config", config_file, "--dry-run", "--address", "10.0.0.1:6379")
    values = yaml.safe_load(result.stdout)
    assert values["cluster"]["kind"] == "ray"
    assert values["cluster"]["address"] == "10.0.0.1:6379"


def test_a_run_from_nothing_to_an_exported_model(config_file: Path, checkpoint: Path) -> None:
    result = invoke("--config", config_file)
    assert result.exit_code == 0, result.output
    run = config_file.parent / "run"
    assert load_train_config(run / "config.yaml").schedule.total_steps == 8
    assert (run / "rl" / "latest").read_text() == "global_step_4\n"
    assert (run / "rl" / "global_step_2" / "state.json").is_file()
    records = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in records if "policy/loss" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "eval/pass@1" in r] == [2, 4]
    assert all(r["perf/tokens_per_s"] > 0 for r in records if "policy/loss" in r)
    assert {r["stage"] for r in records} == {"rl"}
    proof = audit(run)
    assert (proof.steps, proof.planned, proof.violations) == (4, 24, [])
    assert proof.trained == sum(r["batch/samples"] for r in records if "policy/loss" in r)
    before, after = weights(checkpoint), weights(run / "rl" / "hf")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    again = invoke("--config", config_file)
    assert again.exit_code == 0
    assert "nothing to do" in again.output
    assert len(read_metrics(run / "metrics.jsonl")) == len(records)


def test_running_one_batch_ahead(config_file: Path) -> None:
    ahead = ["algorithm.max_staleness=1", "algorithm.stale=recompute", "train.eval_every=0"]
    notes = Notes()
    prepare(load_train_config(config_file, ahead)).run(notes, SilentProgress())
    steps = [values for _, values in notes.learned()]
    assert len(steps) == 4
    for values in steps:
        assert values["async/staleness_max"] <= 1
        assert values["async/dropped_stale"] == values["async/recomputed_stale"] == 0
        assert values["async/older_share"] == (values["async/staleness_max"] > 0)
        assert 0 < values["async/importance_mean"] <= 2.0
        assert math.isfinite(values["async/importance_max"])


ADAPTERS = "engine.lora={rank: 4, targets: [q_proj, down_proj]}"


@pytest.mark.parametrize(
    "overrides", [[], pytest.param([ADAPTERS, "optim.lr=0.01"], marks=pytest.mark.peft)]
)
def test_straight_equals_interrupted_and_resumed(
    config_file: Path, checkpoint: Path, overrides: list[str]
) -> None:
    """Bit for bit in parameters and metrics, also when Ctrl-C falls between two checkpoints."""
    there, here = config_file.parent / "straight", config_file.parent / "halves"
    straight = Notes()
    config = load_train_config(config_file, [f"run.folder={there}", *overrides])
    prepare(config).run(straight, SilentProgress())
    config = load_train_config(config_file, [f"run.folder={here}", *overrides])
    first, second = Notes(stop_at=3), Notes()
    with pytest.raises(KeyboardInterrupt):
        prepare(config).run(first, SilentProgress())
    latest = Checkpoints(here).latest()
    assert latest is not None
    state = prepare(config).run(second, SilentProgress())
    assert state.step == 4
    done = int(latest.name.removeprefix("global_step_"))
    kept = [record for record in first.learned() if record[0] <= done]
    assert kept + second.learned() == straight.learned()
    ours, theirs = weights(here / "rl" / "hf"), weights(there / "rl" / "hf")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    before = weights(checkpoint)
    moved = {name.split(".")[-2] for name in ours if not torch.equal(ours[name], before[name])}
    assert {"q_proj", "down_proj"} <= moved
    assert ("up_proj" in moved) is not bool(overrides)


def test_adapters_without_peft_are_refused_before_work(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    result = invoke("--config", config_file, ADAPTERS)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "unmask: engine.lora: peft is not installed; run `pip install peft` (pinned in "
        "requirements/cpu.txt) or set engine.lora=null"
    ]
    assert not (config_file.parent / "run").exists()


def test_interrupt_closes_the_cluster(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    make = rl.train.make_cluster

    def watched(config: Any, say: Any) -> Any:
        cluster: Any = make(config, say)
        close = cluster.close

        def note_and_close() -> None:
            closed.append(True)
            close()

        cluster.close = note_and_close
        return cluster

    monkeypatch.setattr(rl.train, "make_cluster", watched)
    with pytest.raises(KeyboardInterrupt):
        prepare(load_train_config(config_file)).run(Notes(stop_at=1), SilentProgress())
    assert closed == [True]


def write_rows(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def no_column(folder: Path) -> list[str]:
    write_rows(folder / "bad.jsonl", {"question": "x"})
    return [f"data.train={folder / 'bad.jsonl'}"]


def empty_tests(folder: Path) -> list[str]:
    write_rows(folder / "bad.jsonl", {"prompt": "x", "tests": []})
    return [f"data.train={folder / 'bad.jsonl'}"]


def long_prompt(folder: Path) -> list[str]:
    rows = [{"prompt": text, "tests": ["assert True"]} for text in ("short", "long " * 200)]
    write_rows(folder / "bad.jsonl", *rows)
    return [f"data.train={folder / 'bad.jsonl'}"]


def no_diffusion_json(folder: Path) -> list[str]:
    other = folder / "plain"
    other.mkdir()
    (other / "config.json").write_text("{}")
    return [f"model.path={other}"]


def other_tokenizer(folder: Path) -> list[str]:
    source = Path(yaml.safe_load((folder / "config.yaml").read_text())["model"]["path"])
    mixed = folder / "mixed"
    mixed.mkdir()
    for file in source.iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    texts = ["a quite different text about many other things, with longer words"] * 9
    train_tokenizer(texts, vocab_size=300).save_pretrained(mixed)
    return [f"model.path={mixed}"]


def another_run_there(folder: Path) -> list[str]:
    Checkpoints(folder / "run").save(RunState(2, 1, run_seed=99), lambda folder: None)
    return []


def another_model_there(folder: Path) -> list[str]:
    """The checkpoint of a run whose model had other blocks."""
    config = load_train_config(folder / "config.yaml")
    other = Path(shutil.copytree(config.model.path, folder / "other"))
    spec = DiffusionSpec.load(other)
    replace(spec, block_size=8).save(other)
    origin = Origin.of(config.model_dump(mode="json"), load_outline(other), [])
    Checkpoints(config.run.path, origin=origin).save(
        RunState(2, 1, run_seed=1), lambda folder: None
    )
    return []


def override(text: str) -> Callable[[Path], list[str]]:
    return lambda folder: [text]


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (override("model.path=/nowhere"), "/nowhere"),
        (override("data.train=/nowhere.jsonl"), "data.train: /nowhere.jsonl"),
        (override("data.test=/nowhere.jsonl"), "data.test: /nowhere.jsonl"),
        (override("rollout.prompts_per_step=7"), "batch of 7"),
        (override("rollout.decoding.gen_length=6"), "rollout.decoding.gen_length"),
        (
            override("rollout.decoding={gen_length: 8, block_size: 8}"),
            "rollout.decoding.block_size",
        ),
        (override("reward.functions=[{path: /nowhere.py:f, weight: 1.0}]"), "/nowhere.py"),
        (override("engine.attention=flex_attention"), "engine.attention"),
        (
            override("engine={kind: torch, attention: flash_attention_2, precision: bf16}"),
            "engine.attention=flash_attention_2 computes bidirectional attention only",
        ),
        (override("engine.lora.rank=0"), "lora.rank must be at least 1"),
        (override("engine.lora.targets=[query]"), "lora.targets: no query; choose among q_proj"),
        (override("run.resume=/nowhere"), "run.resume=/nowhere"),
        (override("cluster={kind: ray, address: '127.0.0.1:1'}"), "cluster.address=127.0.0.1:1"),
        (no_column, "bad.jsonl, line 1"),
        (empty_tests, "bad.jsonl, line 1"),
        (long_prompt, "data.prompt_limit"),
        (no_diffusion_json, "diffusion.json"),
        (other_tokenizer, "mixes two checkpoints"),
        (another_run_there, "run.seed=99"),
        (another_model_there, "checkpoint of another model (block_size=8"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_bad_input_is_one_line_and_nothing_is_written(
    config_file: Path, break_it: Callable[[Path], list[str]], named: str
) -> None:
    overrides = break_it(config_file.parent)
    before = sorted((config_file.parent / "run").rglob("*"))
    result = invoke("--config", config_file, *overrides)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("unmask: ")
    assert named in lines[0]
    assert sorted((config_file.parent / "run").rglob("*")) == before


def test_a_finished_run_is_not_overwritten(config_file: Path) -> None:
    prepare(load_train_config(config_file, ["train.steps=1"])).run(Notes(), SilentProgress())
    result = invoke("--config", config_file, "run.resume=never")
    assert result.exit_code == 2
    assert "run.resume=never" in result.stderr


def test_a_damaged_checkpoint_is_refused_in_one_line(config_file: Path) -> None:
    config = load_train_config(config_file, ["train.steps=2"])
    prepare(config).run(Notes(), SilentProgress())
    latest = Checkpoints(config.run.path).latest()
    assert latest is not None
    for file in (latest / "policy").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:100])
    result = invoke("--config", config_file)
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("unmask: ")
    assert "global_step_2 is damaged (policy/torch_engine.pt has 100 bytes" in last
    assert "no earlier checkpoint is sound" in last


def test_a_damaged_checkpoint_gives_way_and_the_end_is_the_same(config_file: Path) -> None:
    """Said aloud; and exactly the run that never was damaged."""
    config = load_train_config(config_file)
    prepare(config).run(Notes(), SilentProgress())
    expected = weights(config.run.path / "rl" / "hf")
    shutil.rmtree(config.run.path / "rl" / "hf")
    engine = config.run.path / "rl" / "global_step_4" / "policy" / "torch_engine.pt"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 16
    engine.write_bytes(content)
    result = invoke("--config", config_file)
    assert result.exit_code == 0, result.output
    assert "global_step_4 is damaged (policy/torch_engine.pt: its checksum" in result.stdout
    assert "going back to" in result.stdout
    assert "resuming from" in result.stdout
    found = weights(config.run.path / "rl" / "hf")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert find_damage(config.run.path / "rl" / "global_step_4") is None


def test_what_a_resume_changes_is_said(config_file: Path) -> None:
    deepspeed = ["engine={kind: deepspeed, zero_stage: 1}", "train={steps: 1}"]
    config = load_train_config(config_file, deepspeed)
    prepare(config).run(Notes(), SilentProgress())
    assert prepare(config).remarks == ()
    ranks = ["cluster={kind: ray, learner: {ranks: 2}}", "optim.lr=2e-3"]
    job = prepare(load_train_config(config_file, [*deepspeed, *ranks]))
    assert job.remarks == (
        "settings changed since the checkpoint: optim.lr 0.001 -> 0.002",
        "saved by 1 learner ranks, goes on with 2 (its shards are converted first)",
    )
    with pytest.raises(UserError, match="kind=deepspeed, this run has kind=torch"):
        prepare(load_train_config(config_file))


def test_a_lost_export_is_made_again(config_file: Path) -> None:
    config = load_train_config(config_file, ["train.steps=1"])
    prepare(config).run(Notes(), SilentProgress())
    (config.run.path / "rl" / "hf" / "training_step.json").unlink()
    notes = Notes()
    prepare(config).run(notes, SilentProgress())
    assert (config.run.path / "rl" / "hf" / "training_step.json").is_file()
    assert notes.records == []


def test_infrastructure_errors_end_with_the_root_cause(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: Any, say: Any) -> Any:
        try:
            raise MemoryError("the kernel said no")
        except MemoryError as error:
            raise InfrastructureError("learner-0 died, see logs") from error

    monkeypatch.setattr(rl.train, "make_cluster", broken)
    result = invoke("--config", config_file)
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1] == "unmask: root cause: MemoryError: the kernel said no"


def test_preparing_starts_nothing(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl.train, "make_cluster", None)
    job = prepare(load_train_config(config_file))
    assert len(job.test) == 2
    assert job.resume_from is None
    assert not (config_file.parent / "run").exists()
