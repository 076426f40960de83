"""`unmask analyze` from end to end on a tiny random model; bad input before any work."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import rl.analyze
from common.records import Group, Score, Scored
from rl.cli import app

ROOT = Path(__file__).resolve().parents[2]
Folder = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path, write_checkpoint: Folder) -> Folder:
    def make(attention: str = "block_causal", block_size: int | None = 4) -> Path:
        return write_checkpoint(
            tmp_path / attention,
            attention=attention,
            block_size=block_size,
            initializer_range=0.3,
        )

    return make


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"Do {n}.", "tests": ["assert True"]} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class EvenLength:
    """Instead of the sandbox: a completion passes if its text is of even length."""

    def __init__(self, config: Any) -> None:
        self.rewards = {"even": self}
        self.runs_tests = True

    def __enter__(self) -> "EvenLength":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def score(self, groups: Sequence[Group]) -> Scored:
        def scored(group: Group) -> Group:
            passes = [len(r.completion.text) % 2 == 0 for r in group.rollouts]
            scores = [Score(float(p), verdicts=("pass" if p else "fail",)) for p in passes]
            pairs = zip(group.rollouts, scores, strict=True)
            return replace(group, rollouts=tuple(replace(r, score=s) for r, s in pairs))

        return Scored([scored(group) for group in groups])


def analyze(folder: Path, *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a small analysis."""
    command = ["analyze", "--checkpoint", str(folder), "--config", "configs/rl/tiny_cpu.yaml"]
    command += [*words, "rollout.decoding.gen_length=8"]
    found = CliRunner().invoke(app, command, env={"COLUMNS": "80"})
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.stdout, found.stderr


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def small(data: Path, out: Path) -> list[str]:
    return [
        "--data", str(data), "--out", str(out), "--problems", "9", "--samples", "3",
        "--temperatures", "1.2,0.2", "--seed", "5",
    ]  # fmt: skip


def test_an_analysis_from_end_to_end(
    checkpoint: Folder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rl.analyze, "Rewarder", EvenLength)
    folder, out = checkpoint(), tmp_path / "new" / "out"
    code, text, _ = analyze(folder, *small(data, out))
    assert code == 0
    assert "pass@3 %" in text and "tokens a pass" in text and "analysis.html" in text
    assert "…" not in text  # the tables fit a narrow terminal
    values = json.loads((out / "analysis.json").read_text())
    assert (values["checkpoint"], values["data"], values["seed"]) == (str(folder), str(data), 5)
    assert (values["problems"], values["samples"]) == (9, 3)
    assert values["completions"] == 9 * (3 + 2 * 3) and values["dropped"] == 0
    assert (values["attention"], values["block_size"]) == ("block_causal", 4)
    assert values["commit"]
    assert [row["temperature"] for row in values["temperatures"]] == [0.2, 1.2]
    for row in values["temperatures"]:
        assert list(row["pass_at_k"]) == ["1", "2", "3"]
        rates = [rate["value"] for rate in row["pass_at_k"].values()]
        assert rates == sorted(rates) and rates[0] >= 0
        assert row["ar_global"]["4"]["value"] == 1.0  # blocks of four
        assert row["pass_at_k"]["1"]["n"] == 9
    assert [row["steps_per_block"] for row in values["speeds"]] == [4, 2, 1]
    measured = [row["tokens_per_step"] for row in values["speeds"]]
    assert measured == [1.0, 2.0, 4.0]
    assert values["speeds"][0]["minus_1x"]["value"] == 0.0
    assert {change["temperature"] for change in values["changes"]} == {1.2}
    assert [effect["quantity"] for effect in values["effects"]][-1] == "pass@3"
    assert len(values["sink"]["passes"]) == 4
    assert [point["distance"] for point in values["sink"]["passes"][0]] == [0, 1, 2, 3]
    assert len(values["sink"]["from_prompt"]) in (4, 8)
    assert list(values["seconds"]) == ["decode", "judge", "certainty"]
    assert not list(out.glob("*.partial")) and len(list(out.iterdir())) == 2


def test_the_same_seed_finds_the_same_and_problems_are_judged_in_parts(
    checkpoint: Folder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rl.analyze, "Rewarder", EvenLength)
    folder, found = checkpoint(), []
    for together in (8, 2):
        monkeypatch.setattr(rl.analyze, "JUDGED_TOGETHER", together)
        assert analyze(folder, *small(data, tmp_path / "out"))[0] == 0
        found.append(json.loads((tmp_path / "out" / "analysis.json").read_text()))
        found[-1].pop("seconds")
    assert found[0] == found[1]


def test_a_bidirectional_canvas_is_one_block(
    checkpoint: Folder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rl.analyze, "Rewarder", EvenLength)
    code, _, _ = analyze(checkpoint("bidirectional", None), *small(data, tmp_path / "out"))
    assert code == 0
    values = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert values["block_size"] == 8
    assert [row["steps_per_block"] for row in values["speeds"]] == [8, 4, 2]
    assert [p["distance"] for p in values["sink"]["passes"][0]] == list(range(8))
    assert values["sink"]["passes"][0] == values["sink"]["from_prompt"]


def test_speeds_that_a_block_has_no_room_for_are_named(
    checkpoint: Folder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rl.analyze, "Rewarder", EvenLength)
    code, text, _ = analyze(checkpoint("block_causal", 2), *small(data, tmp_path / "out"))
    assert code == 0 and "blocks of 2 are too small" in text
    values = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert [row["nominal"] for row in values["speeds"]] == [1, 2]
    assert values["speeds_left_out"] == [4]


def test_the_real_sandbox_judges(checkpoint: Folder, tmp_path: Path) -> None:
    words = ["--problems", "2", "--samples", "1", "--temperatures", "1", "--out", str(tmp_path)]
    code, text, _ = analyze(checkpoint(), *words)
    assert code == 0 and "higher temperature" not in text  # one temperature shows no effect
    (row,) = json.loads((tmp_path / "analysis.json").read_text())["temperatures"]
    assert row["pass_at_k"] == {"1": {"value": 0.0, "low": 0.0, "high": 0.0, "n": 2}}


class Tags(HTMLParser):
    """Collects tags and what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_is_one_file_with_every_figure(
    checkpoint: Folder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rl.analyze, "Rewarder", EvenLength)
    assert analyze(checkpoint(), *small(data, tmp_path / "out"))[0] == 0
    page = (tmp_path / "out" / "analysis.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.links == [] and "script" not in tags.seen
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert page.count("<figure") == page.count("<svg") == 11
    for text in ("Two published effects", "Global AR-ness", "Entropy sink", "pass@3", "T = 1.2"):
        assert text in page


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--data", "none.jsonl"], "none.jsonl: no such file"),
        (["--data", "embedded:all"], "embedded:all: no such split"),
        (["--data", "BAD"], "bad.jsonl, line 2: column 'tests' is missing"),
        (["--out", "BAD"], "is a file; name a folder"),
        (["--temperatures", "6"], "--temperatures 6: must be above 0 and at most 5"),
        (["--samples", "2", "-k", "3"], "-k 3"),
        (["rollout.decoding.gen_length=6"], "rollout.decoding.gen_length 6"),
        (["data.prompt_limit=1"], "the limit is 1"),
        (["reward.functions=[{name: code_format}]"], "none of them runs tests"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_decoded(
    checkpoint: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    expected: str,
) -> None:
    def decode(*args: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(rl.analyze, "decode_groups", decode)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "tests": ["assert 1"]}\n{"prompt": "b"}\n')
    words = [str(bad) if word == "BAD" else word for word in words]
    own = [word for word in words if word.startswith("rollout.decoding.gen_length")]
    command = ["analyze", "--checkpoint", str(checkpoint()), "--problems", "2", *words]
    command += [] if own else ["rollout.decoding.gen_length=8"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 2, found.output
    assert found.stderr.startswith("unmask: ") and expected in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_an_autoregressive_checkpoint_is_refused(checkpoint: Folder, tmp_path: Path) -> None:
    code, _, error = analyze(checkpoint("causal", 1), "--out", str(tmp_path / "out"))
    assert code == 2 and "autoregressive" in error and "unmask evaluate" in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
