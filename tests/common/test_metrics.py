"""metrics.jsonl survives kills and NaN; optional sinks that are missing say what to install."""

import json
import math
import sys
import types
from pathlib import Path

import pytest

from common.errors import UserError
from common.metrics import (
    ConsoleSink,
    JsonlSink,
    MetricsConfig,
    open_metrics,
    read_metrics,
    series,
)


def test_jsonl_round_trip_writes_nan_as_null(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.log({"loss": 1.5, "policy/kl": math.nan}, step=3, stage="rl")
    sink.close()
    (record,) = read_metrics(path)
    assert record["time"] > 0
    assert {k: record[k] for k in ("stage", "step", "loss", "policy/kl")} == {
        "stage": "rl",
        "step": 3,
        "loss": 1.5,
        "policy/kl": None,
    }
    assert "NaN" not in path.read_text()


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.log({"loss": 1.0}, step=0, stage="ar")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    sink.close()


def test_a_torn_last_line_is_skipped_and_then_repaired(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps({"stage": "ar", "step": 0, "loss": 2.0})
    path.write_text(whole + "\n" + '{"stage": "ar", "st')
    assert [record["step"] for record in read_metrics(path)] == [0]
    sink = JsonlSink(path)
    sink.log({"loss": 1.0}, step=1, stage="ar")
    sink.close()
    assert [record["step"] for record in read_metrics(path)] == [0, 1]


@pytest.mark.parametrize("line", ["not json", "[1]"])
def test_a_broken_line_in_the_middle_names_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 1}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)


def test_no_file_is_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_series_takes_one_stage_and_the_last_of_repeated_steps() -> None:
    records = [
        {"stage": "rl", "step": 2, "reward/mean": 0.5},
        {"stage": "rl", "step": 1, "reward/mean": 0.2},
        {"stage": "rl", "step": 2, "reward/mean": 0.7},  # logged again after a resume
        {"stage": "rl", "step": 3, "reward/mean": None},
        {"stage": "sft", "step": 1, "reward/mean": 9.0},
    ]
    found = series(records, "rl", "reward/mean")
    assert found == {1: 0.2, 2: 0.7}
    assert list(found) == [1, 2]


def test_console_speaks_once_per_interval_and_stage_but_always_of_evaluations() -> None:
    lines: list[str] = []
    now = [0.0]
    sink = ConsoleSink(lines.append, every_s=60.0, clock=lambda: now[0])
    sink.log({"pretrain/loss": 2.0, "unknown": 1.0}, step=0, stage="ar")
    now[0] = 59.0
    sink.log({"pretrain/loss": 1.9}, step=1, stage="ar")
    sink.log({"eval/pass@1": 0.25}, step=1, stage="ar")
    sink.log({"reward/mean": 0.1}, step=0, stage="rl")
    now[0] = 120.0
    sink.log({"pretrain/loss": 1.8}, step=2, stage="ar")
    assert lines == [
        "ar step 0  pretrain/loss 2",
        "ar step 1  eval/pass@1 0.25",
        "rl step 0  reward/mean 0.1",
        "ar step 2  pretrain/loss 1.8",
    ]


def test_open_metrics_writes_jsonl_and_console(tmp_path: Path) -> None:
    lines: list[str] = []
    with open_metrics(tmp_path / "run", MetricsConfig(), lines.append) as metrics:
        metrics.log({"pretrain/loss": 1.0}, step=0, stage="ar")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1
    assert lines == ["ar step 0  pretrain/loss 1"]


@pytest.mark.parametrize(
    ("config", "package"),
    [(MetricsConfig(wandb="offline"), "wandb"), (MetricsConfig(tensorboard=True), "tensorboard")],
)
def test_a_missing_package_is_named_before_anything_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: MetricsConfig, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"), open_metrics(tmp_path, config):
        pass
    assert not (tmp_path / "metrics.jsonl").exists()


def test_wandb_is_offline_and_gets_each_stage_with_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, object] = {}
    run = types.SimpleNamespace(
        log=lambda values: calls.setdefault("log", values),
        finish=lambda: calls.setdefault("finished", True),
    )

    def init(**kwargs: object) -> types.SimpleNamespace:
        calls["init"] = kwargs
        return run

    fake = types.SimpleNamespace(init=init, Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with open_metrics(tmp_path, MetricsConfig(wandb="offline"), lambda _: None) as metrics:
        metrics.log({"loss": 1.0}, step=7, stage="sft")
    assert isinstance(calls["init"], dict) and calls["init"]["mode"] == "offline"
    assert calls["log"] == {"sft/step": 7, "sft/loss": 1.0}
    assert calls["finished"]


def test_sinks_are_closed_when_the_run_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[object] = []
    monkeypatch.setattr(JsonlSink, "close", lambda self: closed.append(self))
    with pytest.raises(ValueError), open_metrics(tmp_path, MetricsConfig()):
        raise ValueError
    assert len(closed) == 1
