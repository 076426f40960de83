"""Help with examples for every command; bad input is one line and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import InfrastructureError, UserError
from common.exits import exit_codes
from rl.cli import app

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [
    "pretrain",
    "train",
    "plan",
    "evaluate",
    "analyze",
    "generate",
    "report",
    "doctor",
    "problems export",
    "reward check",
]


def invoke(*words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    found = CliRunner().invoke(app, list(words), env={"COLUMNS": "100"})
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.stdout, found.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    code, out, _ = invoke(*command.split(), "--help")
    assert code == 0
    assert "Examples" in out and f"unmask {command}" in out


def test_help_lists_every_command_and_needs_no_torch() -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from rl.cli import app\n"
        "print(CliRunner().invoke(app, ['--help']).stdout)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert all(command.split()[0] in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("train", "--config", "none.yaml"), "none.yaml: no such config file"),
        (("train", "train.stpes=3", "--dry-run"), "train.stpes: unknown key"),
        (("train", "train.steps=many", "--dry-run"), "train.steps"),
        (("train", "model.path=/nowhere"), "/nowhere"),
        (("plan", "model.path=nowhere"), "none of the known shapes"),
        (("plan", "--gpu", "tpu"), "--gpu tpu: choose one of"),
        (("pretrain", "tokenizer.vocab=3", "--dry-run"), "tokenizer.vocab: unknown key"),
        (("evaluate", "/nowhere", "data.test_count=2"), "/nowhere"),
        (("evaluate", "/nowhere", "-k", "4", "data.test_count=2"), "pass@4"),
        (("analyze", "--checkpoint", "/nowhere"), "/nowhere: no config.json"),
        (("analyze", "--checkpoint", "x", "--temperatures", "0.2,warm"), "--temperatures"),
        (("analyze", "--checkpoint", "x", "--temperatures", "0,1"), "--temperatures 0: must be"),
        (("analyze", "--checkpoint", "x", "--temperatures", "nan"), "--temperatures nan"),
        (("analyze", "--checkpoint", "x", "--temperatures", ","), "give at least one"),
        (("analyze", "--checkpoint", "x", "--samples", "4", "-k", "5"), "-k 5: pass@k needs"),
        (("generate", "/nowhere", "add"), "/nowhere"),
        (("generate", "/nowhere"), "a prompt or --problem"),
        (("report", "/nowhere"), "/nowhere: no such run folder"),
        (("problems", "export", "x.jsonl", "--split", "all"), "--split all"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    words: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    code, _, err = invoke(*words)
    assert code == 2
    assert err.startswith("unmask: ") and expected in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "config",
    [
        "configs/rl/tiny_cpu.yaml",
        "configs/rl/diffucoder_7b.yaml",
        "configs/rl/stable_diffcoder_8b.yaml",
    ],
)
def test_shipped_rl_configs_pass_a_dry_run(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code, out, _ = invoke("train", "--config", config, "--dry-run")
    assert code == 0 and "algorithm:" in out


def test_problems_export_writes_the_public_format(tmp_path: Path) -> None:
    path = tmp_path / "new" / "test.jsonl"
    code, out, _ = invoke("problems", "export", str(path), "--count", "3")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert code == 0 and "3 records" in out and len(rows) == 3
    assert all({"prompt", "tests", "entry_point", "data_source"} <= row.keys() for row in rows)
    assert all(len(row["tests"]) >= 6 for row in rows)


def test_report_prints_the_table(tmp_path: Path) -> None:
    line = {"stage": "rl", "step": 1, "time": 1.0, "reward/mean": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    code, out, _ = invoke("report", str(tmp_path))
    assert code == 0 and "report.html" in out
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UserError("bad key"), 2, ["unmask: bad key"]),
        (InfrastructureError("no answer"), 3, ["unmask: no answer"]),
        (KeyboardInterrupt(), 130, ["unmask: stopped"]),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, exit_codes("stopped"):
        raise error
    assert caught.value.code == code
    assert capsys.readouterr().err.splitlines() == lines


def test_infrastructure_errors_end_with_their_root_cause(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit), exit_codes():
        try:
            raise OSError("disk full")
        except OSError as error:
            raise InfrastructureError("cannot save") from error
    assert capsys.readouterr().err.splitlines()[-1] == "unmask: root cause: OSError: disk full"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), exit_codes():
        _ = 1 / 0
