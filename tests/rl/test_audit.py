"""The ledger's lines and their proof: whatever is taken away or put in twice must be found."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.errors import UserError
from common.metrics import METRICS_FILE, JsonlSink
from common.records import Completion, Group, Problem, Rollout, Score
from rl.audit import audit
from rl.cli import app
from rl.ledger import LEDGER_FILE, Ledger, Life


def group(name: str, *rewards: float | None, tokens: int = 1) -> Group:
    completion = Completion((4,) * tokens, (), "x", "eos", (), ())
    rollouts = (
        Rollout(name, i, (3,), completion, 1, 0, Score(reward)) for i, reward in enumerate(rewards)
    )
    return Group(Problem(name, "do"), tuple(rollouts))


GROUPS = [group("a", 1.0, 0.0, None), group("b", 1.0, 1.0, 1.0), group("c", None, None, 1.0)]
STALE = [replace(GROUPS[0], rollouts=GROUPS[0].rollouts[1:]), GROUPS[1], GROUPS[2]]


def step(life: Life, number: int, sink: JsonlSink | None, fresh: list[Group] = GROUPS) -> None:
    life.planned(number, [g.problem for g in GROUPS])
    life.came(number, "generated", GROUPS)
    life.came(number, "scored", GROUPS)
    life.settled(number, GROUPS, fresh)
    if sink is not None:
        values = {"timing_s/update": 1.0, "completions/count": 9.0, "batch/samples": 2.0}
        sink.log(values, step=number + 1, stage="rl")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three steps, the learner lost in the fourth, back to step 2, on to four steps."""
    ledger = Ledger(tmp_path / LEDGER_FILE, group_size=3)
    sink = JsonlSink(tmp_path / METRICS_FILE)
    life = ledger.begin(0, "start")
    for number in range(3):
        step(life, number, sink)
    life.planned(3, [g.problem for g in GROUPS])
    again = ledger.begin(2, "learner lost")
    life.came(3, "generated", GROUPS)  # a late thread of the first life
    for number in (2, 3):
        step(again, number, sink)
    return tmp_path


def test_lives_and_fates(run: Path) -> None:
    found = audit(run)
    assert found.violations == []
    assert (found.steps, found.planned, found.trained) == (4, 36, 8)
    # By hand, of each step: a trains two and misses one; b is all equal; c misses two, one is left.
    assert found.dropped == {"no_score": 12, "no_spread": 12, "too_few": 4}
    assert [(life["life"], life["step"]) for life in found.lives] == [(1, 0), (2, 2)]
    assert found.superseded == 4 + 2


def test_stale_and_empty_samples_have_their_reason(tmp_path: Path) -> None:
    life = Ledger(tmp_path / LEDGER_FILE, group_size=3).begin(0, "start")
    step(life, 0, None, fresh=STALE)
    life.planned(1, [Problem("d", "do")])
    life.settled(1, [group("d", 1.0, 0.0, 0.5, tokens=0)], [group("d", 1.0, 0.0, 0.5, tokens=0)])
    entries = [json.loads(line) for line in (tmp_path / LEDGER_FILE).read_text().splitlines()]
    assert entries[4]["dropped"]["stale"] == [["a", [0]]]
    # Without its first sample, `a` has one reward left.
    assert entries[4]["trained"] == []
    assert entries[-1]["dropped"] == {"empty": [["d", [0, 1, 2]]]}


def test_samples_that_were_rolled_out_again(tmp_path: Path) -> None:
    """They are said, counted, and must be of the plan; they excuse no second settling."""
    life = Ledger(tmp_path / LEDGER_FILE, group_size=3).begin(0, "start")
    sink = JsonlSink(tmp_path / METRICS_FILE)
    life.came(0, "recomputed", GROUPS[:1])
    step(life, 0, None)
    sink.log({"timing_s/update": 1.0, "async/recomputed_stale": 3.0}, step=1, stage="rl")
    found = audit(tmp_path)
    assert (found.violations, found.recomputed, found.trained) == ([], 3, 2)
    assert "3 were too old and rolled out once more" in command(str(tmp_path)).stdout
    sink.log({"timing_s/update": 1.0, "async/recomputed_stale": 2.0}, step=1, stage="rl")
    life.came(0, "recomputed", [group("x", 1.0)])
    assert audit(tmp_path).violations == [
        "step 0: x sample 0 recomputed but never planned",
        "step 0: metrics.jsonl says async/recomputed_stale 2, the ledger 4",
    ]


def test_a_step_without_an_optimizer_step_has_trained_nobody(tmp_path: Path) -> None:
    life = Ledger(tmp_path / LEDGER_FILE, group_size=3).begin(0, "start")
    sink = JsonlSink(tmp_path / METRICS_FILE)
    life.planned(0, [g.problem for g in GROUPS])
    life.came(0, "generated", GROUPS)
    life.came(0, "scored", GROUPS)
    life.settled(0, GROUPS, GROUPS, applied=False)
    values = {"timing_s/update": 1.0, "completions/count": 9.0, "batch/samples": 2.0}
    sink.log(values, step=1, stage="rl")
    found = audit(tmp_path)
    assert (found.violations, found.trained, found.dropped["skipped"]) == ([], 0, 2)


def test_a_run_that_goes_on_from_another_ones_step_has_no_gap(tmp_path: Path) -> None:
    life = Ledger(tmp_path / LEDGER_FILE, group_size=3).begin(150, "resume")
    sink = JsonlSink(tmp_path / METRICS_FILE)
    for number in (150, 151):
        step(life, number, sink)
    found = audit(tmp_path)
    assert (found.violations, found.steps, found.trained) == ([], 2, 4)


def lines_of(run: Path) -> list[str]:
    return (run / LEDGER_FILE).read_text().splitlines()


def write(run: Path, lines: list[str]) -> None:
    (run / LEDGER_FILE).write_text("".join(line + "\n" for line in lines))


def test_the_indices_below_are_the_living_entries(run: Path) -> None:
    entries = [json.loads(line) for line in lines_of(run)]
    living = [i for i, e in enumerate(entries) if e["event"] != "begin"]
    living = [i for i in living if entries[i]["life"] == 2 or entries[i]["step"] < 2]
    assert living == [*range(1, 9), *range(16, 24)]


@pytest.mark.parametrize("number", [*range(1, 9), *range(16, 24)])
@pytest.mark.parametrize("change", ["without", "twice", "one sample less", "one sample more"])
def test_any_change_is_a_violation(run: Path, number: int, change: str) -> None:
    lines = lines_of(run)
    entry: dict[str, Any] = json.loads(lines[number])
    if change == "without":
        del lines[number]
    elif change == "twice":
        lines.insert(number, lines[number])
    else:
        names = entry.get("problems") or (entry.get("samples") or entry["trained"])[0][1]
        names.pop() if change == "one sample less" else names.append(names[-1])
        lines[number] = json.dumps(entry)
    write(run, lines)
    found = audit(run)
    last = change == "without" and number == 23  # the last step merely is not over
    assert bool(found.violations) or (last and found.in_flight == [3])


def test_metrics_must_agree(run: Path) -> None:
    records = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    records[1]["batch/samples"] = 3.0
    del records[0]
    (run / METRICS_FILE).write_text("".join(json.dumps(r) + "\n" for r in records))
    assert audit(run).violations == [
        "step 0: settled, but metrics.jsonl has no record of it",
        "step 1: metrics.jsonl says batch/samples 3, the ledger 2",
    ]


def test_a_record_without_its_step(run: Path) -> None:
    JsonlSink(run / METRICS_FILE).log({"timing_s/update": 1.0}, step=9, stage="rl")
    assert audit(run).violations == ["step 8: metrics.jsonl has a record, but it was never settled"]


def test_half_a_line_of_a_killed_process(run: Path) -> None:
    whole = lines_of(run)
    with (run / LEDGER_FILE).open("a") as file:
        file.write('{"event":"plan')
    assert audit(run).violations == []
    life = Ledger(run / LEDGER_FILE, 3).begin(4, "resume")
    assert life.number == 3
    assert lines_of(run)[:-1] == whole


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["audit", "--run", *arguments])


def test_the_command(run: Path) -> None:
    found = command(str(run))
    assert (found.exit_code, found.stderr) == (0, "")
    assert "4 steps, 36 samples: 8 trained" in found.stdout
    assert "life 2 began at step 2: learner lost" in found.stdout
    write(run, lines_of(run)[:-3])
    lines = lines_of(run)
    write(run, [*lines[:3], *lines[4:]])
    found = command(str(run), "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["violations"][0] == "step 0: a sample 0 scored 0 times"


def broken(run: Path) -> Path:
    write(run, [*lines_of(run), "{}"])
    return run


@pytest.mark.parametrize("where", [lambda run: run / "nowhere", broken], ids=["none", "broken"])
def test_what_cannot_be_audited_is_one_line(run: Path, where: Callable[[Path], Path]) -> None:
    folder = where(run)
    with pytest.raises(UserError, match=r"ledger\.jsonl: "):
        audit(folder)
    found = command(str(folder))
    assert found.exit_code == 2
    assert len(found.stderr.strip().splitlines()) == 1
