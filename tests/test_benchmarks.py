"""Every benchmark still starts: they are scripts, which neither mypy nor another test imports."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.lib.record import better, lines, report, row
from benchmarks.lib.simulated import Simulated, SleepingReward, SleepingRollout
from common.records import Problem
from common.seeding import derive_seed

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_it_says_how_it_is_used(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, script, "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


def test_rows_say_which_way_is_better() -> None:
    assert better("c", "m", "s", 1.0, 2.0, lower=True)["ratio"] == 2.0
    assert better("c", "m", "%", 50.0, 40.0)["ratio"] == 1.25
    assert math.isnan(better("c", "m", "%", 50.0, 0.0)["ratio"])
    assert row("c", "m", "s", 1.23456, 12345.6, 3.0, load=2) == {
        "case": "c", "metric": "m", "unit": "s",
        "ours": 1.235, "reference": 12350.0, "ratio": 3.0, "load": 2,
    }  # fmt: skip


def test_a_table_and_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("a long case", "time", "s", 1, 2, 3), row("b", "m", "1/s", 10, 20, 3, note="odd")]
    assert lines(rows) == [
        "case         metric  unit  ours  reference  ratio",
        "a long case  time    s      1.0        2.0    3.0",
        "b            m       1/s   10.0       20.0    3.0  note odd",
    ]
    report("some", rows, False, machine="2 threads", note="tiny", absent={"c": "no GPU"})
    first, *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"some on \S+, \d+ cores, 2 threads, commit \S*; tiny", first)
    assert last == "c: absent, no GPU"
    report("some", rows, True, workers=2)
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["absent"], found["workers"]) == (rows, {}, 2)


@pytest.mark.ray
def test_scaling_at_a_tiny_size() -> None:
    sizes = ["--workers=2", "--steps=2", "--long-steps=10", "--long-workers=1", "--crew=3"]
    sizes += ["--calls=10", "--buckets=5"]
    quick = ["--seconds=0.01", "--reward-seconds=0", "--update-seconds=0", "--tokens=8"]
    done = subprocess.run(
        [sys.executable, "benchmarks/scaling.py", "--json", *sizes, *quick],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["name"] == "scaling" and found["machine"] and found["commit"]
    assert [(row["case"], row["metric"], row["unit"]) for row in found["rows"]] == [
        ("crew of 3", "piece", "ms"),
        ("actor call", "driver", "ms"),
        ("catalogue of 5 buckets", "shelf", "ms"),
        ("catalogue of 5 buckets", "owner", "ms"),
        ("catalogue of 5 buckets", "reader", "ms"),
        ("2 rollout, 1 reward", "throughput", "1/s"),
        ("2 rollout, 1 reward", "driver", "ms"),
        ("10 steps", "memory", "MiB"),
        ("10 steps", "driver", "ms"),
    ]
    rows = {(row["case"], row["metric"]): row for row in found["rows"]}
    for case in (("crew of 3", "piece"), ("actor call", "driver"), ("10 steps", "driver")):
        assert rows[case]["ours"] > 0
    # What two workers would do if they only slept: 100 rollouts/s each, 20 % more or less.
    assert 160 < rows["2 rollout, 1 reward", "throughput"]["reference"] < 250


def test_simulated_workers_return_what_real_ones_would() -> None:
    simulated = Simulated(rollout_s=0.0, reward_s=0.0, update_s=0.0, tokens=10)
    problems = [Problem("a", "do"), Problem("b", "do")]
    groups = SleepingRollout(simulated).generate(problems, 7, 3, None, 5)
    assert [group.problem for group in groups] == problems
    for group in groups:
        for index, one in enumerate(group.rollouts):
            assert (one.sample_index, one.policy_version) == (index, 5)
            assert one.seed == derive_seed(7, group.problem.problem_id, index)
            assert len(one.completion.token_ids) == len(one.completion.confidences) == 10
            # Blocks of four in order, the last one cut short.
            assert sorted(one.completion.step_map[:4]) == [0, 1, 2, 3]
            assert sorted(one.completion.step_map[4:8]) == [4, 5, 6, 7]
    assert groups == SleepingRollout(simulated).generate(problems, 7, 3, None, 5)
    scored = SleepingReward(simulated).score(groups)
    assert [g.problem for g in scored.groups] == problems
    assert {r.score.total for g in scored.groups for r in g.rollouts if r.score} == {0.0, 2.0}


def test_a_group_is_slept_for_as_long_as_it_is_counted() -> None:
    """Within 20 % of the rollouts' own time, and by their seeds alone."""
    simulated = Simulated(rollout_s=0.002, reward_s=0.0, update_s=0.0, tokens=4)
    worker = SleepingRollout(simulated)
    began = time.monotonic()
    groups = worker.generate([Problem(str(n), "do") for n in range(5)], 1, 4, None, 0)
    took = time.monotonic() - began
    each = [simulated.decoding_s(group) for group in groups]
    assert all(0.8 * 0.008 <= seconds <= 1.2 * 0.008 for seconds in each)
    assert len(set(each)) == 5
    assert took >= sum(each)
    assert SleepingReward(simulated).score(groups).sums == {"simulated/slept_s": sum(each)}


def test_simulated_workers_do_without_torch() -> None:
    """Or a hundred of their processes would not fit on a small machine."""
    code = (
        "import benchmarks.lib.simulated, workers.placement, sys; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=120, cwd=ROOT)
    assert done.returncode == 0
