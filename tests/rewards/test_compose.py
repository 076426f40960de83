"""From groups to scores: weights, what is run, shared and dropped, what stops a run."""

import pytest

from common.config import dump_config, load_config
from common.errors import InfrastructureError, UserError
from common.records import Completion, Group, Problem, Rollout, StdinTest
from rewards.compose import RewardConfig, Rewarder, RewardSection, verify_rewards
from sandbox.docker import DockerOptions
from sandbox.records import Result, SandboxError, TestResult

PROBLEM = Problem("p", "add one", tests=("assert f(1) == 2", "assert f(2) == 3"), entry_point="f")
GOOD = "```python\ndef f(x):\n    return x + 1\n```"
HALF = "```python\ndef f(x):\n    return 2\n```\nthere"
BROKEN = "```python\ndef f(x:\n```"


def group(*texts, problem=PROBLEM):
    rollouts = tuple(
        Rollout(problem.problem_id, i, (), Completion((), (), t, "eos", (), ()), 0, 0)
        for i, t in enumerate(texts)
    )
    return Group(problem, rollouts)


def config(*sections, **others):
    functions = {"functions": sections} if sections else {}
    return RewardConfig(**functions, **others)


class FakeSandbox:
    """Answers every case with `result`; remembers what it was asked."""

    def __init__(self, result=None):
        self.result = result or Result(id="x", status="ran", tests=(TestResult("pass", 0.0),))
        self.cases = []

    def run(self, cases):
        cases = list(cases)
        self.cases += cases
        return [self.result for _ in cases]

    def close(self):
        pass


@pytest.fixture
def fake(monkeypatch):
    sandbox = FakeSandbox()
    monkeypatch.setattr("rewards.compose.Sandbox", lambda *_: sandbox)
    return sandbox


def scores(groups):
    return [rollout.score for made in groups for rollout in made.rollouts]


def test_published_weights_end_to_end():
    with Rewarder(RewardConfig()) as rewarder:
        good, half, broken, none = scores(rewarder.score([group(GOOD, HALF, BROKEN, "no")]))
    assert [s.total for s in (good, half, broken, none)] == [2.5, 1.5, 0.25, 0.0]
    assert half.parts == {"code": 0.5, "code_format": 1.0}
    assert good.verdicts == ("pass", "pass") and half.verdicts == ("pass", "fail")
    assert broken.verdicts == () and broken.parts["code"] == 0.0
    assert all(s.error is None for s in (good, half, broken, none))


def test_stdin_problems():
    problem = Problem("q", "echo", stdin_tests=(StdinTest("a", "a"), StdinTest("b", "c")))
    with Rewarder(config(RewardSection(name="code"))) as rewarder:
        answer = rewarder.score([group("```python\nprint(input())\n```", problem=problem)])
    assert scores(answer)[0].total == 0.5


def test_equal_programs_under_equal_tests_run_once(fake):
    other = Problem("other", "", tests=("assert f(1) == 5",))
    rewarder = Rewarder(RewardConfig())
    answer = rewarder.score([group(GOOD, GOOD, HALF), group(GOOD, problem=other), group(GOOD)])
    assert len(fake.cases) == 3
    assert all(score.total == 2.5 for score in scores(answer))
    assert rewarder.last_metrics["sandbox/programs"] == 3
    assert rewarder.last_metrics["sandbox/shared"] == 2


def test_groups_and_rollouts_keep_their_order(fake):
    groups = [group("no", GOOD), group(), group(BROKEN)]
    answer = Rewarder(RewardConfig()).score(groups)
    assert [[r.sample_index for r in g.rollouts] for g in answer] == [[0, 1], [], [0]]
    assert [s.total for s in scores(answer)] == [0.0, 2.5, 0.25]


def test_a_program_that_does_not_parse_is_not_run_unless_asked(fake):
    Rewarder(RewardConfig()).score([group(BROKEN, "no")])
    assert fake.cases == []
    Rewarder(config(code_needs_format=False)).score([group(BROKEN, "no")])
    assert [case.code for case in fake.cases] == ["def f(x:\n"]


def test_the_case_carries_what_the_judge_needs(fake):
    problem = Problem("p", "", tests=("assert f(1)",), setup="import math", entry_point="f")
    options = {"seconds": 2.5, "memory_mib": 128}
    made = config(sandbox={"backend": "auto", **options})
    Rewarder(made).score([group(GOOD, problem=problem)])
    case = fake.cases[0]
    assert (case.setup, case.entry_point, case.tests) == ("import math", "f", ("assert f(1)",))
    assert (case.limits.seconds, case.limits.memory_mib) == (2.5, 128)


def test_a_sandbox_failure_drops_the_sample_and_counts(fake):
    fake.result = Result(
        id="x", status="infra_error", tests=(TestResult("infra_error", 0.0, "no disk"),)
    )
    rewarder = Rewarder(config(max_failed_share=0.5))
    dropped, kept = scores(rewarder.score([group(GOOD, "no")]))
    assert dropped.total is None and "no disk" in dropped.error
    assert dropped.verdicts == ("infra_error",)
    assert kept.total == 0.0
    assert rewarder.last_metrics["rewards/failed_share"] == 0.5


def test_too_many_failures_stop_the_run(fake):
    fake.result = Result(id="x", status="invalid_case", message="has no tests")
    with pytest.raises(InfrastructureError, match="1 of 1.*has no tests"):
        Rewarder(RewardConfig()).score([group(GOOD)])


def test_plugins_weights_none_and_extras(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(completions, **_):\n"
        "    return [{'reward': len(t), 'n': 1} if t else None for t in completions]\n"
        "def fails(completions, **_):\n"
        "    return [1 / (len(t) - 2) for t in completions]\n"
    )
    sections = (
        RewardSection(path=f"{file}:length", weight=0.5),
        RewardSection(path=f"{file}:fails", weight=-1.0),
    )
    rewarder = Rewarder(config(*sections, max_failed_share=0.5))
    empty, bad, good = scores(rewarder.score([group("", "ab", "abcd")]))
    assert empty.total == 0.5 and empty.parts == {"length": None, "fails": -0.5}
    assert bad.total is None and "ZeroDivisionError" in bad.error
    assert bad.parts == {"length": 2.0, "fails": None}
    assert good.total == pytest.approx(0.5 * 4 - 0.5)
    assert good.extras == {"length/n": 1.0}
    assert rewarder.last_metrics["rewards/failed_share"] == pytest.approx(1 / 3)


def test_a_sample_no_reward_applies_to_has_no_total(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def nothing(completions, **_):\n    return [None for _ in completions]\n")
    rewarder = Rewarder(config(RewardSection(path=f"{file}:nothing")))
    score = scores(rewarder.score([group("a")]))[0]
    assert score.total is None and score.error is None


@pytest.mark.parametrize(
    ("yaml", "text"),
    [
        ("functions: [{name: code, path: a.py:f}]", "exactly one"),
        ("functions: [{weight: 1.0}]", "exactly one"),
        ("functions: [{name: cod}]", "no built-in reward 'cod'"),
        ("functions: []", "at least one"),
        ("functions: [{name: code}, {name: code}]", "two rewards"),
        ("functions: [{name: code, weight: heavy}]", "weight"),
        ("functions: [{name: code, options: {a: 1}}]", "no options"),
        ("functions: [{name: code, wieght: 1}]", "wieght"),
        ("max_failed_share: 2.0", "max_failed_share"),
        ("sandbox: {backend: qemu}", "backend"),
        ("sandbox: {docker: {imgae: x}}", "docker.imgae"),
        ("sandbox: {docker: {memory_mib: 0}}", "docker.memory_mib"),
        ("sandbox: {backend: docker, memory_mib: 4096}", "raise docker.memory_mib"),
    ],
)
def test_config_errors_name_the_key(tmp_path, yaml, text):
    file = tmp_path / "config.yaml"
    file.write_text(yaml + "\n")
    with pytest.raises(UserError, match=text) as caught:
        load_config(RewardConfig, file)
    assert "\n" not in str(caught.value)


def test_a_good_config_loads(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("functions: [{name: code, weight: 2}, {name: code_binary}]\ncode_block: last\n")
    loaded = load_config(RewardConfig, file)
    assert loaded.functions[0].weight == 2.0 and loaded.code_block == "last"


def test_a_config_of_containers_loads_and_is_dumped_whole(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("sandbox: {backend: docker, docker: {image: mine, runtime: runsc}}\n")
    loaded = load_config(RewardConfig, file, ["sandbox.docker.strict=true"])
    assert loaded.sandbox.docker == DockerOptions(image="mine", runtime="runsc", strict=True)
    file.write_text(dump_config(loaded))
    assert load_config(RewardConfig, file) == loaded


def test_verify_fails_before_any_work(monkeypatch):
    with pytest.raises(UserError, match="no such file"):
        verify_rewards(config(RewardSection(path="nowhere.py:f")))

    def refuse(*_):
        raise SandboxError("no namespaces")

    monkeypatch.setattr("rewards.compose.Sandbox", refuse)
    with pytest.raises(UserError, match="reward.sandbox: no namespaces"):
        verify_rewards(RewardConfig())
