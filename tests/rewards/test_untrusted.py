"""What a program wrote reaches us as text and numbers: nothing is unpickled, no secret is found."""

import ast
import json
import os
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import pytest

from common.records import Completion, Group, Problem, Rollout
from rewards.compose import RewardConfig, Rewarder
from sandbox.probe import try_level
from sandbox.records import Case, TestResult
from sandbox.service import Sandbox

ROOT = Path(__file__).resolve().parents[2]
# They build whatever objects their input names.
FORBIDDEN = {
    "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
    "multiprocessing", "torch", "ray", "yaml",
}  # fmt: skip
HOSTILE = [
    # What comes back unpickles into a call, says it is another class, or lies about its type.
    """
import os
class Bomb(str):
    def __reduce__(self):
        return (os.system, ('touch PWNED',))
    __reduce_ex__ = lambda self, protocol: self.__reduce__()
    __class__ = str
def f(x):
    return Bomb('42')
""",
    "import pickle\ndef f(x):\n    return pickle.dumps(Exception) + b'cos\\nsystem\\n(Vx\\ntR.'",
    "class E(Exception):\n    def __reduce__(self):\n        return (print, ('x',))\n"
    "def f(x):\n    raise E('<script>alert(1)</script>', object())",
]


@pytest.mark.parametrize("package", ["sandbox", "rewards"])
def test_no_unpickler_is_imported(package: str) -> None:
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            found |= {(path.name, name) for name in names if name.split(".")[0] in FORBIDDEN}
    assert found == set()


def group(code: str) -> Group:
    completion = Completion((1,), (), f"```python\n{code}\n```", "eos", (0,), (1.0,))
    problem = Problem("p", "say", tests=("assert f(41) == '42'",))
    return Group(problem, (Rollout("p", 0, (1,), completion, 0, 0, None),))


def test_scores_of_hostile_programs_are_plain_records() -> None:
    """The way back from a reward worker: Ray pickles it, so it may hold only what we made."""
    with Rewarder(RewardConfig()) as rewarder:
        scored = rewarder.score([group(code) for code in HOSTILE])
    data = pickle.dumps(scored, protocol=2)
    made = {arg for code, arg, _ in pickletools.genops(data) if code.name in ("GLOBAL", "INST")}
    assert made
    for name in made:
        assert name.split()[0] in ("common.records", "copyreg") or name == "__builtin__ object", (
            made
        )
    for scores in (rollout.score for g in scored.groups for rollout in g.rollouts):
        assert scores is not None and type(scores.total) is float
        assert {type(value) for value in scores.parts.values()} <= {float}


def test_verdicts_are_plain_values() -> None:
    tests = ("assert f(41) == '42'", "assert f(41) == 42", "f(1).x")
    with Sandbox(workers=1) as sandbox:
        results = sandbox.run(
            [Case(id=str(i), code=code, tests=tests) for i, code in enumerate(HOSTILE)]
        )
    plain = {"verdict": str, "message": str, "seconds": float, "cpu_seconds": float, "weak": bool}
    for result in results:
        assert result.status == "ran"
        for test in result.tests:
            assert type(test) is TestResult
            for name, kind in plain.items():
                assert type(getattr(test, name)) is kind, (result.id, name)


# Runs hostile programs in a process that notices every global a pickle asks for.
WATCHED = """
import json, sys
asked = []
sys.addaudithook(lambda event, args: asked.append(args) if event == 'pickle.find_class' else None)
from sandbox.records import Case
from sandbox.service import Sandbox
if sys.argv[2:] == ['prove']:
    import pickle, fractions
    pickle.loads(pickle.dumps(fractions.Fraction))
with Sandbox(workers=1) as sandbox:
    codes = json.loads(sys.argv[1])
    tests = ("assert f(41) == '42'", "f(1).x")
    results = sandbox.run([Case(id='x', code=code, tests=tests) for code in codes])
    print([result.status for result in results], len(asked))
"""


@pytest.mark.parametrize(("words", "count"), [([], 0), (["prove"], 1)])
def test_nothing_that_a_program_wrote_is_unpickled(words: list[str], count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(HOSTILE), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.stdout.strip() == f"{['ran'] * len(HOSTILE)} {count}", done.stderr


# Looks where a process could keep what it was told: variables, other processes, the token's file.
SNOOP = """
import glob, os, sys
def f(x):
    found = repr(dict(os.environ)) + repr(sys.argv) + repr(sys.orig_argv)
    homes = ['HOME_OF_THE_WORKER', os.path.expanduser('~')]
    paths = glob.glob('/proc/*/environ') + glob.glob('/proc/*/cmdline')
    paths += [f'/proc/{pid}/environ' for pid in ('self', 'thread-self', 1, os.getppid())]
    paths += [f'/proc/{pid}/environ' for pid in range(2, 40000)]  # also if it cannot be listed
    paths += [home + '/.ray/auth_token' for home in homes]
    paths += ['/var/run/secrets/kubernetes.io/serviceaccount/token']
    paths += glob.glob('/tmp/ray/session_*/*') + glob.glob('/proc/self/fd/*')
    for path in paths:
        try:
            if os.path.isfile(path):  # reading a pipe would wait
                file = open(path, 'rb', 0)
                found += file.read(1 << 16).decode(errors='replace')
        except OSError:
            pass
    return 'canary' + '-77' in found
"""
WORKER = """
import os, sys
from sandbox.records import Case, Limits
from sandbox.service import Sandbox
assert 'canary-77' in os.environ['RAY_AUTH_TOKEN']
with Sandbox(sys.argv[1], workers=1) as sandbox:
    case = Case(id='x', code=sys.argv[2], tests=('assert f(1) is False',),
                limits=Limits(seconds=60.0))
    print([(test.verdict, test.message) for test in sandbox.run([case])[0].tests])
"""


@pytest.mark.parametrize("level", ["namespace", "landlock"])
def test_a_program_finds_no_token_of_its_worker(level: str, tmp_path: Path) -> None:
    if (reason := try_level(level)) is not None:
        pytest.skip(f"{level}: {reason}")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("canary-77")
    (tmp_path / ".ray" / "auth_token").chmod(0o644)  # as Ray itself would write it
    tokens = {"RAY_AUTH_TOKEN": "canary-77", "HF_TOKEN": "canary-77", "HOME": str(tmp_path)}
    code = SNOOP.replace("HOME_OF_THE_WORKER", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", WORKER, level, code],
        env={**os.environ, **tokens},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=180,
    )
    assert done.stdout.strip() == "[('pass', '')]", done.stderr


@pytest.mark.parametrize("where", ["file", "variable", "parent"])
def test_the_snoop_finds_what_is_there(tmp_path: Path, where: str) -> None:
    """Outside the sandbox: the test above can fail."""
    script = SNOOP.replace("HOME_OF_THE_WORKER", str(tmp_path)).replace("40000", "3")
    script += "\nprint(f(1))"
    if where == "file":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("canary-77")
    command = [sys.executable, "-c", script]
    if where == "parent":
        outer = "import subprocess, sys; subprocess.run(sys.argv[1:], env={}, timeout=50)"
        command = [sys.executable, "-c", outer, *command]
    variables = {} if where == "file" else {"RAY_AUTH_TOKEN": "canary-77"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True", done.stderr
