"""`make demo`'s code path at reduced size: a two-layer model, every stage, in this process.

What is checked is the pipeline: files, reuse, seeds, settings that changed. That it learns is
measured by `make demo` itself (docs/RESULTS.md).
"""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from common.config import load_config
from common.errors import UserError
from common.metrics import read_metrics, series
from common.progress import LineProgress
from rl.demo import Demo, DemoConfig

ROOT = Path(__file__).resolve().parents[2]
OPTIM = {"lr": 3e-3}


def stage(name: str, objective: str, data: str) -> dict[str, object]:
    sizes = {"steps": 2, "rows_per_step": 2, "rows_per_micro_batch": 2, "row_length": 128}
    return {
        "name": name,
        "objective": objective,
        "data": data,
        "count": 40,
        "optim": OPTIM,
        **sizes,
    }


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A demo.yaml beside its two halves, everything tiny."""
    pretrain = {
        "run": {"name": "demo", "folder": "unused"},
        "architecture": {
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        "tokenizer": {"vocab_size": 300},
        "engine": {"kind": "torch"},
        "threads": 1,
        "stages": [
            stage("ar", "ar", "embedded:pretrain"),
            stage("block", "block", "embedded:pretrain"),
            stage("sft", "block", "embedded:sft"),
        ],
    }
    rl = yaml.safe_load((ROOT / "configs/rl/tiny_cpu.yaml").read_text())
    rl["data"] |= {"train_count": 4, "test_count": 3, "prompt_limit": 400}
    rl["rollout"] |= {"group_size": 2, "prompts_per_step": 2}
    rl["rollout"]["decoding"]["gen_length"] = 8
    rl["train"] |= {"steps": 2, "save_every": 1, "eval_every": 2}
    rl["cluster"] = {"kind": "local"}
    rl["engine"] = {"kind": "torch"}
    demo = {
        "run": {"folder": str(tmp_path / "runs" / "demo")},
        "pretrain": {"config": str(tmp_path / "pretrain.yaml")},
        "rl": {"config": str(tmp_path / "rl.yaml")},
        "evaluate": {"count": 3, "samples": 1},
    }
    for name, values in (("pretrain", pretrain), ("rl", rl), ("demo", demo)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "demo.yaml"


def run(config: Path, *overrides: str, fresh: bool = False) -> tuple[dict, list[str]]:
    """(report, lines said)."""
    said: list[str] = []
    demo = Demo(load_config(DemoConfig, config, overrides))
    return demo.run(LineProgress(said.append), fresh), said


@pytest.mark.slow
def test_the_pipeline_leaves_a_whole_run_and_is_reused(config: Path, tmp_path: Path) -> None:
    report, _ = run(config)
    folder = tmp_path / "runs" / "demo"
    assert list(report["stages"]) == ["ar", "block", "sft", "rl"]
    assert report["missing"] == [] and report["seed"] == 0 and len(report["reward"]) == 2
    assert report["rl_minus_sft"]["n"] == 3
    assert 0 < report["peak_rss_gib"] < 16
    assert report["seconds_total"] >= sum(row["seconds"] for row in report["stages"].values()) - 1
    for name in ("ar", "block", "sft"):
        assert (folder / "stages" / name / "diffusion.json").is_file()
    assert (folder / "rl" / "hf" / "model.safetensors").is_file()
    assert (folder / "report.html").stat().st_size > 20_000
    records = read_metrics(folder / "metrics.jsonl")
    assert {record["stage"] for record in records} == {"ar", "block", "sft", "rl"}

    again, said = run(config)
    assert again == report
    assert sum("reused" in line for line in said) == 8  # four stages, four evaluations
    assert read_metrics(folder / "metrics.jsonl") == records

    # Other RL settings: the pretrained stages stay, RL starts anew, and so does its clock.
    notes = json.loads((folder / "pipeline.json").read_text())
    notes["seconds"]["rl"], notes["peak_rss_gib"] = 1e6, 0.0
    (folder / "pipeline.json").write_text(json.dumps(notes))
    shorter, said = run(config, "rl.overrides=[train.steps=1]")
    assert any("starts anew" in line for line in said)
    assert len(shorter["reward"]) == 1
    assert shorter["seconds_total"] < 1e5 and shorter["peak_rss_gib"] > 0
    assert list(series(read_metrics(folder / "metrics.jsonl"), "rl", "reward/mean")) == [1]
    assert shorter["stages"]["sft"] == report["stages"]["sft"]

    # Another seed: the first run is set aside, and comes back when it is asked for again.
    other, said = run(config, "run.seed=1")
    assert other["seed"] == 1 and (tmp_path / "runs" / "demo-seed0" / "report.json").is_file()
    back, _ = run(config, "rl.overrides=[train.steps=1]")
    assert back == shorter
    assert json.loads((tmp_path / "runs/demo-seed1/report.json").read_text())["seed"] == 1

    # Fresh discards the run of this seed, never that of another.
    run(config, "run.seed=1", fresh=True)
    assert (tmp_path / "runs" / "demo-seed0" / "report.json").is_file()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_fresh_starts_anew(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rl.demo.prepare", interrupt)
        run(config)
    folder = tmp_path / "runs" / "demo"
    assert json.loads((folder / "pipeline.json").read_text())["peak_rss_gib"] > 0
    report, said = run(config)
    assert report["missing"] == []
    assert sum("reused" in line for line in said) == 6  # three stages and their evaluations
    _, said = run(config, fresh=True)
    assert not any("reused" in line for line in said)


def test_fresh_never_deletes_a_folder_that_is_not_a_demo(config: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="will not delete"):
        run(config, f"run.folder={precious}", fresh=True)
    assert (precious / "thesis.txt").is_file()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.sead=1", "run.sead: unknown key"),
        ("pretrain.config=none.yaml", "none.yaml: no such config file"),
        ("rl.overrides=[train.stpes=3]", "train.stpes: unknown key"),
        ("evaluate.source=none.jsonl", "none.jsonl"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(
    config: Path, tmp_path: Path, override: str, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        run(config, override)
    assert not (tmp_path / "runs").exists()


def test_the_shipped_config_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    demo = Demo(load_config(DemoConfig, Path("configs/demo.yaml")))
    assert len(demo.problems) >= 300
    assert demo.training.model.path == str(demo.last_stage)
    assert [stage.name for stage in demo.pretraining.stages] == ["ar", "block", "sft"]


def test_the_printed_result_names_the_report(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rl import demo as module

    values = {
        "stages": {},
        "missing": ["rl"],
        "rl_minus_sft": None,
        "peak_rss_gib": 2.0,
        "seconds_total": 90.0,
    }
    monkeypatch.setattr(module.Demo, "run", lambda *_: values)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    module.run_demo(config, console=console)
    text = console.export_text()
    assert "1.5 minutes, 2.00 GiB" in text and "report.html" in text and "not run yet" in text
