"""From groups to scores: weights, what is run, shared and dropped, what stops a run."""

import threading
import time

import pytest

from common.config import dump_config, load_config
from common.errors import InfrastructureError, UserError
from common.records import Problem, StdinTest
from rewards.compose import RewardConfig, Rewarder, RewardSection, verify_rewards
from sandbox.docker import DockerOptions
from sandbox.records import Result, SandboxError

GOOD = "```python\ndef f(x):\n    return x + 1\n```"
HALF = "```python\ndef f(x):\n    return 2\n```\nthere"
BROKEN = "```python\ndef f(x:\n```"


def config(*sections, **others):
    functions = {"functions": sections} if sections else {}
    return RewardConfig(**functions, **others)


def scores(scored):
    return [rollout.score for made in scored.groups for rollout in made.rollouts]


def test_published_weights_end_to_end(group):
    with Rewarder(RewardConfig()) as rewarder:
        scored = rewarder.score([group(GOOD, HALF, BROKEN, "no")])
    good, half, broken, none = scores(scored)
    assert [s.total for s in (good, half, broken, none)] == [2.5, 1.5, 0.25, 0.0]
    assert half.parts == {"code": 0.5, "code_format": 1.0}
    assert good.verdicts == ("pass", "pass") and half.verdicts == ("pass", "fail")
    assert broken.verdicts == () and broken.parts["code"] == 0.0
    assert all(s.error is None for s in (good, half, broken, none))
    assert scored.sums["sandbox/programs"] == 2 and scored.sums["sandbox/tests"] == 4
    assert scored.sums["sandbox/cpu_seconds"] > 0


def test_stdin_problems(group):
    problem = Problem("q", "echo", stdin_tests=(StdinTest("a", "a"), StdinTest("b", "c")))
    with Rewarder(config(RewardSection(name="code"))) as rewarder:
        answer = rewarder.score([group("```python\nprint(input())\n```", problem=problem)])
    assert scores(answer)[0].total == 0.5


def test_equal_programs_under_equal_tests_run_once(fake, group):
    other = Problem("other", "", tests=("assert f(1) == 5",))
    rewarder = Rewarder(RewardConfig())
    answer = rewarder.score([group(GOOD, GOOD, HALF), group(GOOD, problem=other), group(GOOD)])
    assert len(fake.cases) == len({case.id for case in fake.cases}) == 3
    assert all(score.total == 2.5 for score in scores(answer))
    assert answer.sums["sandbox/programs"] == 3
    assert answer.sums["sandbox/shared"] == 2
    assert answer.sums["sandbox/not_judged"] == 0


def test_equal_texts_are_parsed_once_and_no_text_never(fake, group):
    Rewarder(RewardConfig()).score([group(GOOD, GOOD, "no", BROKEN), group(BROKEN)])
    assert fake.texts == ["def f(x):\n    return x + 1\n", "def f(x:\n"]


def test_groups_and_rollouts_keep_their_order(fake, group):
    groups = [group("no", GOOD), group(), group(BROKEN)]
    answer = Rewarder(RewardConfig()).score(groups)
    assert [[r.sample_index for r in g.rollouts] for g in answer.groups] == [[0, 1], [], [0]]
    assert [s.total for s in scores(answer)] == [0.0, 2.5, 0.25]


def test_a_program_that_does_not_parse_is_not_run_unless_asked(fake, group):
    Rewarder(RewardConfig()).score([group(BROKEN, "no")])
    assert fake.cases == []
    Rewarder(config(code_needs_format=False)).score([group(BROKEN, "no")])
    assert [case.code for case in fake.cases] == ["def f(x:\n"]


@pytest.mark.parametrize(
    ("names", "needs_format", "parses", "runs"),
    [
        (["code_format"], True, True, False),
        (["code"], True, True, True),
        (["code"], False, False, True),
        (["repetition"], True, False, False),
    ],
)
def test_nothing_is_parsed_or_run_for_nobody(fake, group, names, needs_format, parses, runs):
    sections = [RewardSection(name=name) for name in names]
    scored = Rewarder(config(*sections, code_needs_format=needs_format)).score([group(GOOD)])
    assert (bool(fake.texts), bool(fake.cases)) == (parses, runs)
    assert ("sandbox/seconds" in scored.sums) == (parses or runs)


def test_rewards_without_programs_need_no_sandbox(monkeypatch):
    def refuse(*_):
        raise SandboxError("no namespaces")

    monkeypatch.setattr("rewards.compose.Sandbox", refuse)
    verify_rewards(config(RewardSection(name="repetition")))
    for name in ("code", "code_binary", "code_format"):
        with pytest.raises(UserError, match="reward.sandbox: no namespaces"):
            verify_rewards(config(RewardSection(name=name)))


def test_the_case_carries_what_the_judge_needs(fake, group):
    problem = Problem("p", "", tests=("assert f(1)",), setup="import math", entry_point="f")
    options = {"seconds": 2.5, "memory_mib": 128}
    made = config(sandbox={"backend": "auto", **options})
    Rewarder(made).score([group(GOOD, problem=problem)])
    case = fake.cases[0]
    assert (case.setup, case.entry_point, case.tests) == ("import math", "f", ("assert f(1)",))
    assert (case.limits.seconds, case.limits.memory_mib) == (2.5, 128)


def test_a_sandbox_failure_drops_the_sample_and_counts(fake, group, result):
    fake.result = result("infra_error", status="infra_error")
    rewarder = Rewarder(config(max_failed_share=0.5))
    scored = rewarder.score([group(GOOD, "no")])
    dropped, kept = scores(scored)
    assert dropped.total is None and "why" in dropped.error
    assert dropped.verdicts == ("infra_error",)
    assert kept.total == 0.0
    assert scored.sums["sandbox/not_judged"] == 1.0


def test_a_sandbox_that_cannot_parse_stops_the_run(fake, group):
    def fail(texts):
        raise SandboxError("the zygote is gone")

    fake.parses = fail
    with pytest.raises(InfrastructureError, match=r"reward\.sandbox: the zygote is gone"):
        Rewarder(RewardConfig()).score([group(GOOD)])


def test_too_many_failures_stop_the_run(fake, group):
    fake.result = Result(id="x", status="invalid_case", message="has no tests")
    with pytest.raises(InfrastructureError, match="1 of 1.*problem 'p' sample 0: has no tests"):
        Rewarder(RewardConfig()).score([group(GOOD)])


PLUGINS = """
def length(completions, **columns):
    return [{'reward': len(t), 'n': 1} if t else None for t in completions]

def fails(completions, **columns):
    return [1 / (len(t) - 2) for t in completions]

def nothing(completions, **columns):
    return [None for _ in completions]

def judged(verdicts, cpu_seconds, programs, **columns):
    return [{'reward': len(v), 'cpu': sum(c), 'has_program': p is not None}
            for v, c, p in zip(verdicts, cpu_seconds, programs)]

import threading
meeting = threading.Barrier(2)

def one(completions, **columns):
    meeting.wait(20)
    return [1.0 for _ in completions]

async def other(completions, **columns):
    meeting.wait(20)
    return [2.0 for _ in completions]
"""


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGINS)
    return lambda name, **values: RewardSection(path=f"{file}:{name}", **values)


def test_plugins_weights_none_and_extras(mine, group):
    sections = (mine("length", weight=0.5), mine("fails", weight=-1.0))
    rewarder = Rewarder(config(*sections, max_failed_share=0.5))
    scored = rewarder.score([group("", "ab", "abcd")])
    empty, bad, good = scores(scored)
    assert empty.total == 0.5 and empty.parts == {"length": None, "fails": -0.5}
    assert bad.total is None and "ZeroDivisionError" in bad.error
    assert bad.parts == {"length": 2.0, "fails": None}
    assert good.total == pytest.approx(0.5 * 4 - 0.5)
    assert good.extras == {"length/n": 1.0}
    assert set(scored.sums) == {"rewards/length/seconds", "rewards/fails/seconds"}


def test_a_sample_no_reward_applies_to_has_no_total(mine, group):
    score = scores(Rewarder(config(mine("nothing"))).score([group("a")]))[0]
    assert score.total is None and score.error is None


def test_a_plugin_that_names_the_sandboxs_results_gets_them(mine, fake, group, result):
    fake.result = result("pass", "fail", cpu=0.25)
    scored = Rewarder(config(mine("judged"))).score([group(GOOD, BROKEN, "no")])
    found = scores(scored)
    assert [s.total for s in found] == [2.0, 0.0, 0.0]
    assert [s.extras["judged/cpu"] for s in found] == [0.5, 0.0, 0.0]
    assert [s.extras["judged/has_program"] for s in found] == [1.0, 1.0, 0.0]
    assert scored.sums["sandbox/cpu_seconds"] == 0.5


def test_rewards_run_side_by_side_and_keep_their_names(tmp_path, group):
    """Two plug-ins that wait for each other; they share a module because it is imported once."""
    (tmp_path / "meet_in_one_module.py").write_text(PLUGINS)
    for name in ("one", "other"):
        (tmp_path / f"{name}.py").write_text(f"from meet_in_one_module import {name}\n")
    sections = [RewardSection(path=f"{tmp_path}/{n}.py:{n}") for n in ("other", "one")]
    score = scores(Rewarder(config(*sections)).score([group("a")]))[0]
    assert score.error is None
    assert list(score.parts.items()) == [("other", 2.0), ("one", 1.0)]


def test_soft_overlong_takes_the_runs_length():
    section = RewardSection(name="soft_overlong", options={"cache_tokens": 5})
    given = RewardSection(name="soft_overlong", options={"max_tokens": 8})
    assert config(section).for_length(50).functions[0].options == {
        "cache_tokens": 5,
        "max_tokens": 50,
    }
    assert config(given).for_length(50) == config(given)
    verify_rewards(config(section).for_length(5))
    with pytest.raises(UserError, match=r"soft_overlong: options\.max_tokens: missing"):
        verify_rewards(config(section))
    with pytest.raises(UserError, match="cache_tokens=5 exceeds max_tokens=4"):
        verify_rewards(config(section).for_length(4))


@pytest.mark.parametrize(
    ("yaml", "text"),
    [
        ("functions: [{name: code, path: a.py:f}]", "exactly one"),
        ("functions: [{weight: 1.0}]", "exactly one"),
        ("functions: [{name: cod}]", "no built-in reward 'cod'"),
        ("functions: []", "at least one"),
        ("functions: [{name: code}, {name: code}]", "two rewards.*rename"),
        ("functions: [{name: code, weight: heavy}]", "weight"),
        ("functions: [{name: code, options: {a: 1}}]", r"functions\.0.*options\.a.*takes none"),
        ("functions: [{name: length, options: {taget: 9}}]", r"options\.taget|options\.target"),
        ("functions: [{name: repetition, options: {ngram: 2.5}}]", r"options\.ngram.*integer"),
        ("functions: [{name: code, wieght: 1}]", "wieght"),
        ("max_failed_share: 2.0", "max_failed_share"),
        ("code_block: frist", "code_block"),
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
    file.write_text(
        "functions: [{name: code, weight: 2}, {name: repetition, options: {max_penalty: -2}}]\n"
        "code_block: last\n"
    )
    loaded = load_config(RewardConfig, file)
    assert loaded.functions[0].weight == 2.0 and loaded.code_block == "last"
    assert loaded.functions[1].options == {"max_penalty": -2}


def test_a_config_of_containers_loads_and_is_dumped_whole(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("sandbox: {backend: docker, docker: {image: mine, runtime: runsc}}\n")
    loaded = load_config(RewardConfig, file, ["sandbox.docker.strict=true"])
    assert loaded.sandbox.docker == DockerOptions(image="mine", runtime="runsc", strict=True)
    file.write_text(dump_config(loaded))
    assert load_config(RewardConfig, file) == loaded


def test_verify_fails_before_any_work(mine):
    with pytest.raises(UserError, match="no such file"):
        verify_rewards(config(RewardSection(path="nowhere.py:f")))
    with pytest.raises(UserError, match=r"options\.wieght: length has no parameter"):
        verify_rewards(config(mine("length", options={"wieght": 1})))


def test_no_thread_is_left_behind(mine, group):
    before = threading.active_count()
    rewarder = Rewarder(config(mine("length"), RewardSection(name="repetition")))
    for _ in range(5):
        rewarder.score([group("a", "b")])
    deadline = time.monotonic() + 30  # those of the last calls are on their way out
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before
