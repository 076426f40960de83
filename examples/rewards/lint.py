"""A reward for clean programs: 1.0 if ruff has nothing to say, less with every complaint per line.

    reward:
      functions:
        - {name: code, weight: 2.0}
        - {path: examples/rewards/lint.py:lint, weight: 0.2, options: {select: "E,F,B"}}

By itself it would be a bad reward: `pass` is the cleanest of programs. So a program that fails a
test earns 0.0 (option `passing_only`), and `# noqa` is not listened to. ruff reads the program from
a pipe; it imports and runs nothing of it.
"""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MAX_CHARS = 32_768
SECONDS = 10.0
THREADS = 4


def _find_ruff():
    beside = Path(sys.executable).with_name("ruff")  # in the same virtual environment
    found = str(beside) if beside.is_file() else shutil.which("ruff")
    if found is None:
        raise RuntimeError("ruff is not installed here; pip install ruff")
    return found


RUFF = _find_ruff()  # at import, so that a run without ruff ends before it begins


def lint(programs, verdicts, language, select="E,F,W,B", passing_only=True, **columns):
    """1 - complaints per line, at least 0.0; 0.0 without a program or with a syntax error.

    None for problems in other languages than Python, which ruff does not know.
    """
    wanted = [
        program if program is not None and (not passing_only or _passed(tests)) else None
        for program, tests in zip(programs, verdicts, strict=True)
    ]
    texts = list({text for text in wanted if text is not None})
    with ThreadPoolExecutor(THREADS) as threads:
        found = dict(zip(texts, threads.map(lambda text: _rate(text, select), texts), strict=True))
    values = [0.0 if text is None else found[text] for text in wanted]
    return [v if name == "python" else None for v, name in zip(values, language, strict=True)]


def _passed(verdicts):
    return bool(verdicts) and set(verdicts) == {"pass"}


def _rate(program, select):
    lines = sum(bool(line.strip()) for line in program.splitlines())
    complaints = _complaints(program, select)
    if complaints is None or not lines:
        return {"reward": 0.0, "unreadable": 1.0}
    value = max(0.0, 1.0 - len(complaints) / lines)
    return {"reward": value, "complaints": len(complaints), "unreadable": 0.0}


def _complaints(program, select):
    """Codes of what ruff complains about, or None if it cannot read the program."""
    if len(program) > MAX_CHARS:
        return None
    command = [
        RUFF, "check", "--isolated", "--no-cache", "--ignore-noqa", "--quiet",
        "--select", select, "--output-format", "json", "--stdin-filename", "program.py", "-",
    ]  # fmt: skip
    try:
        text = program.encode()
        done = subprocess.run(
            command, input=text, capture_output=True, timeout=SECONDS, env={}, cwd="/"
        )
    except (UnicodeEncodeError, subprocess.TimeoutExpired):
        return None  # the program's doing, so the program's loss
    if done.returncode == 2:  # ruff did not begin: no program is to blame
        raise ValueError(f"ruff, select={select!r}: {done.stderr.decode().strip()}")
    if done.returncode not in (0, 1):
        return None  # it fell over the program: a thousand signs in a row overflow its stack
    codes = [item["code"] for item in json.loads(done.stdout)]
    return None if None in codes or "invalid-syntax" in codes else codes
