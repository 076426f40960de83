"""`benchmarks/async.py` at a size where it says nothing: does it run, and what does it print."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from common.config import dump_config
from rl.config import TrainConfig

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "async.py"
SMALL = ["data.train_count=8", "data.test_count=2", "rollout.decoding.gen_length=8"]


@pytest.fixture
def arguments(
    make_config: Callable[..., TrainConfig], checkpoint_folder: Path, tmp_path: Path
) -> list[str]:
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_config(make_config(engine={"kind": "torch"})))
    return ["--config", str(config), "--model", str(checkpoint_folder), *SMALL]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the file puts the checkout into its place
    spec = importlib.util.spec_from_file_location("async_benchmark", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_simulated(
    module: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GENERATE", "SCORE", "UPDATE", "SYNC"):
        monkeypatch.setattr(module, name, 0.002)
    rows = module.simulated(module.parse(["--steps", "4", *arguments]))
    assert [(row["case"], row["metric"]) for row in rows] == [
        (f"simulated_{k}", metric) for k in (1, 2) for metric in ("step_time", "over_bound")
    ]
    assert all(row["ours"] > 0 for row in rows)
    assert rows[0]["reference"] == rows[2]["reference"]


def test_what_is_read_from_a_run(module: ModuleType) -> None:
    steps = [{"timing_s/step": float(n)} for n in (9, 9, 9, 1, 2, 3)] + [{"eval/pass@1": 0.5}]
    assert module.step_seconds(steps) == 2.0  # without the first three
    assert module.pass_at_1(steps) == 50.0


@pytest.mark.slow
def test_demo_as_json(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(FILE), "--json", "--cases", "demo", "--steps", "2", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["name"] == "async"
    assert [(row["case"], row["metric"]) for row in record["rows"]] == [
        (f"demo_{name}_seed0", metric)
        for name in ("staleness_1", "staleness_2", "uncorrected")
        for metric in ("step_time", "pass@1")
    ]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--cases", "all"], "--cases all: there are simulated,demo"),
        (["--variants", "x"], "--variants x: there are staleness_1,staleness_2,uncorrected"),
        (["--model", "nowhere"], "--model nowhere is not there: `make demo` leaves one"),
    ],
)
def test_bad_arguments(
    module: ModuleType, given: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        module.parse(given)
    assert ended.value.code == 2
    assert line in capsys.readouterr().err
