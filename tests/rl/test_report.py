"""The report of a whole run, of half a run, and of no run; its numbers worked out by hand."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from common.errors import UserError
from common.records import Completion, Group, Message, Problem, Rollout, Score
from rl.estimates import Estimate
from rl.figures import figures
from rl.page import clock, percent
from rl.plots import COLOURS, HEAT, Line, curves, running_mean, stacked
from rl.report import stage_table, write_report
from rl.results import (
    Sample,
    StageResult,
    make_sample,
    paired,
    pick_samples,
    read_result,
    read_results,
    write_result,
)

SAMPLE = Sample(
    problem_id="test/7",
    prompt="Write f(xs) with a <b> & more",
    text="return x < 1",
    passed=False,
    reward=1.25,
    tests=("assert f([]) == 0", "assert f([1]) == 1"),
    verdicts=("pass", "timeout"),
    tokens=("return", " x", " < 1"),
    steps=(2, 0, 1),
)


def result(stage: str, rates: dict[str, float], **changes: object) -> StageResult:
    value = sum(rates.values()) / len(rates)
    base = StageResult(
        stage=stage,
        checkpoint=f"stages/{stage}",
        greedy=Estimate(value, value - 0.05, value + 0.05, len(rates)),
        sampled=Estimate(value / 2, 0.0, 1.0, len(rates)),
        samples_per_problem=2,
        temperature=1.0,
        pass_at_k={"1": 0.5},
        dropped=0,
        seconds=61.0,
        evaluate_seconds=5.0,
        seed=3,
        rates=rates,
        metrics={"sandbox/pass": 0.75, "sandbox/crash": 0.25},
        samples=(SAMPLE,),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def metrics(folder: Path, steps: int = 6) -> None:
    lines = [{"stage": "ar", "step": 1, "time": 10.0, "pretrain/loss": 2.0}]
    for step in range(1, steps + 1):
        lines.append(
            {
                "stage": "rl",
                "step": step,
                "time": 10.0 + step,
                "reward/mean": step / 10,
                "rewards/code/mean": step / 20,
                "completions/length_mean": 30.0,
                "decode/ar_local@1": 0.5,
                "timing_s/update": 2.0,
                "timing_s/rollouts": 1.0,
                "timing_s/step": 3.0,
                "idle/rollout": 0.25,
                "idle/learner": 0.75,
                "sandbox/pass": 0.5,
                "sandbox/fail": 0.5,
            }
        )
    lines.append(
        {
            "stage": "rl",
            "step": steps,
            "eval/pass@1": 0.6,
            "eval/pass@1_low": 0.5,
            "eval/pass@1_high": 0.7,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four stages: SFT solves problems 0 and 1 of 4, RL 0, 1 and 2."""
    folder = tmp_path / "demo"
    metrics(folder)
    solved = {"ar": 0, "block": 1, "sft": 2, "rl": 3}
    for stage, count in solved.items():
        write_result(folder, result(stage, {f"p{i}": float(i < count) for i in range(4)}))
    pipeline = {"seed": 3, "seconds_total": 600.5, "peak_rss_gib": 2.5, "seconds": {"rl": 300.0}}
    (folder / "pipeline.json").write_text(json.dumps(pipeline))
    (folder / "config.yaml").write_text("run: {name: demo, seed: 3}\n")
    return folder


class Tags(HTMLParser):
    """Collects what a page refers to and checks that its tags nest."""

    VOID = {"meta", "br", "link", "img", "path", "use", "input", "rect"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_report_json_has_the_agreed_shape(run: Path) -> None:
    values = write_report(run)
    assert json.loads((run / "report.json").read_text()) == values
    assert list(values["stages"]) == ["ar", "block", "sft", "rl"]
    rl = values["stages"]["rl"]
    assert rl["pass@1"] == 0.75
    assert rl["pass@1_sampled"] == 0.375
    assert rl["ci95"] == pytest.approx([0.7, 0.8])
    assert (rl["n"], rl["seconds"]) == (4, 61.0)
    assert values["rl_minus_sft"]["difference"] == 0.25  # one problem of four
    low, high = values["rl_minus_sft"]["ci95"]
    assert low == 0.0 and 0.5 <= high <= 0.75  # no problem got worse
    assert values["reward"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert values["seconds_total"] == 600.5
    assert values["peak_rss_gib"] == 2.5
    assert values["seed"] == 3
    assert values["missing"] == []
    assert values["evaluations"] == [{"step": 6, "pass@1": 0.6, "ci95": [0.5, 0.7]}]


def test_the_page_is_one_file_with_nesting_tags(run: Path) -> None:
    write_report(run)
    page = (run / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.links == []  # nothing is loaded from elsewhere
    assert "script" not in tags.seen
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)


def test_the_page_shows_stages_curves_and_verdicts(run: Path) -> None:
    write_report(run)
    page = (run / "report.html").read_text()
    for text in ("75.0 %", "+25.0 points", "Reward", "Completion length", "Local AR-ness"):
        assert text in page
    for text in ("Seconds per step", "✓ pass", "✗ timeout", "1 of 2 tests", "10:00", "2.50 GiB"):
        assert text in page
    assert page.count("<svg") >= 7


def test_text_of_models_is_escaped(run: Path) -> None:
    write_report(run)
    page = (run / "report.html").read_text()
    assert "a &lt;b&gt; &amp; more" in page
    assert "<b> & more" not in page


def test_a_script_that_a_model_wrote_stays_text(run: Path) -> None:
    evil = "</span></pre><script>alert('x')</script><img src=x onerror=alert(1)>"
    sample = replace(
        SAMPLE,
        problem_id=evil,
        prompt=evil,
        text=evil,
        tests=(evil, evil),
        verdicts=("pass", evil),
        tokens=("return", evil, evil),
    )
    for path in (run / "evaluations").glob("*.json"):
        found = read_result(path)
        write_result(run, replace(found, samples=(sample,) * len(found.samples)))
    write_report(run)
    page = (run / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert "&lt;script&gt;alert" in page
    assert tags.open == [] and tags.links == []
    assert "script" not in tags.seen and "img" not in tags.seen


def test_tokens_carry_their_step_and_share(run: Path) -> None:
    write_report(run)
    page = (run / "report.html").read_text()
    assert '<span style="--t:1.0" title="step 2">return</span>' in page
    assert '<span style="--t:0.0" title="step 0"> x</span>' in page
    assert '<span style="--t:0.5" title="step 1"> &lt; 1</span>' in page


def test_a_half_finished_run_says_what_is_missing(run: Path) -> None:
    (run / "evaluations" / "rl.json").unlink()
    (run / "evaluations" / "block.json").unlink()
    (run / "pipeline.json").unlink()
    values = write_report(run)
    assert values["missing"] == ["block", "rl"]
    assert values["rl_minus_sft"] is None
    assert values["seconds_total"] == 6.0  # from the first record to the last
    assert values["seed"] == 3  # of config.yaml
    page = (run / "report.html").read_text()
    assert "not evaluated yet" in page  # rl was trained
    assert "not run yet" in page  # block was not
    assert "Sample completions of stage sft" in page


def test_a_run_of_rl_alone_has_curves_and_no_stage_table(tmp_path: Path) -> None:
    metrics(tmp_path / "mine")
    values = write_report(tmp_path / "mine")
    assert values["stages"] == {} and values["missing"] == []
    page = (tmp_path / "mine" / "report.html").read_text()
    assert "<h2>Stages</h2>" not in page
    assert "no stage has been evaluated yet" in page


def test_no_run_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is it a run folder"):
        write_report(tmp_path / "empty")


def test_nan_becomes_null(run: Path) -> None:
    nan = Estimate(float("nan"), float("nan"), float("nan"), 0)
    write_result(run, result("rl", {"p0": 0.0}, greedy=nan, sampled=None))
    row = write_report(run)["stages"]["rl"]
    assert row["pass@1"] is None and row["ci95"] == [None, None] and row["pass@1_sampled"] is None


def test_console_table_has_every_stage_and_the_difference(run: Path) -> None:
    (run / "evaluations" / "block.json").unlink()
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(stage_table(write_report(run)))
    text = console.export_text()
    assert "75.0 %" in text and "+25.0 points" in text and "not run yet" in text


def test_results_round_trip_and_name_a_damaged_file(tmp_path: Path) -> None:
    one = result("sft", {"p": 1.0}, fingerprint="abc")
    path = write_result(tmp_path, one)
    assert read_result(path) == one
    assert read_results(tmp_path) == {"sft": one}
    path.write_text(path.read_text()[:-40])
    with pytest.raises(UserError, match=r"sft\.json"):
        read_result(path)


def test_paired_difference_uses_common_problems_only() -> None:
    before = result("sft", {"a": 0.0, "b": 1.0, "only_before": 0.0})
    after = result("rl", {"a": 1.0, "b": 1.0, "only_after": 0.0})
    found = paired(before, after)
    assert found is not None and (found.value, found.n) == (0.5, 2)
    assert paired(before, result("rl", {"other": 1.0})) is None


class FakeTokenizer:
    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{number}>" for number in ids)


def group(number: int) -> Group:
    completion = Completion((4, 5, 9), (7,), "<4><5>", "eos", (1, 0, 2, 3), (0.5,) * 4)
    problem = Problem(f"p{number}", (Message("user", "add"),), ("assert f() == 1",))
    score = Score(2.0, {"code": 1.0}, verdicts=("pass",))
    return Group(problem, (Rollout(f"p{number}", 0, (1,), completion, 0, 0, score),))


def test_a_sample_leaves_out_the_end_of_text_and_the_tail() -> None:
    sample = make_sample(group(0).problem, group(0).rollouts[0], FakeTokenizer())  # type: ignore[arg-type]
    assert sample.tokens == ("<4>", "<5>") and sample.steps == (1, 0)
    assert sample.prompt == "user: add" and sample.passed and sample.reward == 2.0


def test_samples_are_spread_over_the_problems() -> None:
    groups = [group(number) for number in range(40)]
    samples = pick_samples(groups, FakeTokenizer())  # type: ignore[arg-type]
    assert [sample.problem_id for sample in samples] == [f"p{n}" for n in range(0, 40, 4)]
    assert len(pick_samples(groups[:3], FakeTokenizer())) == 3  # type: ignore[arg-type]


def test_plots_take_their_colours_from_the_page() -> None:
    plot = curves([Line("one", {1: 1.0, 2: 3.0}), Line("two", {1: 2.0})], "two curves")
    assert plot is not None
    assert plot.keys == (("one", "var(--s1)"), ("two", "var(--s2)"))
    assert "var(--s1)" in plot.svg and "var(--muted)" in plot.svg
    assert not any(colour in plot.svg for colour in COLOURS)
    assert "#000000" not in plot.svg  # black would vanish on a dark page
    assert 'aria-label="two curves"' in plot.svg


def test_curves_to_compare_with_share_a_colour_and_are_not_in_the_legend() -> None:
    hot = HEAT[7]
    lines = [
        Line("measured", {0.2: 0.5, 1.2: 0.7}, colour=hot),
        Line("", {0.2: 0.4, 1.2: 0.4}, dashed=True, colour=hot),
        Line("third", {0.2: 0.1}),
    ]
    plot = curves(lines, "by temperature", x_label="temperature")
    assert plot is not None
    assert plot.keys == (("measured", "var(--h8)"), ("third", "var(--s3)"))
    assert "stroke-dasharray" in plot.svg and ">temperature<" in plot.svg
    assert ">step<" not in plot.svg and hot not in plot.svg


def test_the_same_numbers_draw_the_same_picture() -> None:
    lines = [Line("one", {1: 1.0, 2: 3.0}, smooth=True)]
    assert curves(lines, "label") == curves(lines, "label")


def test_nothing_to_draw_is_none() -> None:
    assert curves([Line("one", {})], "x") is None
    assert stacked({"one": {}, "two": {3: 0.0}}, "x") is None
    assert all(block.plot is None for block in figures([]))


def test_only_shares_are_stacked_as_verdicts() -> None:
    """The sandbox's counts and seconds bear the same prefix."""
    values = {"sandbox/fail": 0.25, "sandbox/pass": 0.75, "sandbox/programs": 38.0}
    records = [{"stage": "rl", "step": 1, **values, "sandbox/seconds": 0.4}]
    (block,) = [block for block in figures(records) if block.section == "Sandbox"]
    assert block.plot is not None
    assert [name for name, _ in block.plot.keys] == ["pass", "fail"]


def test_one_step_can_be_drawn() -> None:
    assert curves([Line("one", {1: 1.0}, smooth=True)], "x") is not None
    assert stacked({"one": {1: 2.0}}, "x") is not None


def test_running_mean_by_hand() -> None:
    assert running_mean({1: 2.0, 3: 4.0, 4: 9.0}, 2) == {1: 2.0, 3: 3.0, 4: 6.5}


def test_words_for_numbers() -> None:
    assert percent(0.1234) == "12.3 %" and percent(None) == "–"
    assert clock(61.4) == "1:01" and clock(3661) == "1:01:01" and clock(None) == "–"


def test_a_report_needs_no_torch() -> None:
    code = "import sys, rl.report; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
