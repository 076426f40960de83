"""The columns `language` and `float_tolerance` of a data set."""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from rl.data import load_problems

STDIN = [{"stdin": "1", "stdout": "2"}]


def load(folder: Path, **columns: object):
    path = folder / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "Add one.", "tests": STDIN} | columns))
    return load_problems(str(path))[0]


@pytest.mark.parametrize(
    ("columns", "language", "tolerance"),
    [
        ({}, "python", None),
        ({"language": None, "float_tolerance": None}, "python", None),
        ({"language": "C++"}, "cpp", None),
        ({"language": "javascript", "float_tolerance": 0.001}, "javascript", 0.001),
        ({"tests": ["assert f(1) == 2"], "language": "Python3"}, "python", None),
    ],
)
def test_columns(tmp_path, columns, language, tolerance):
    problem = load(tmp_path, **columns)
    assert (problem.language, problem.float_tolerance) == (language, tolerance)
    assert not problem.columns


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"language": "en"}, "use one of python, javascript"),
        ({"language": 3}, "'language' must be text"),
        ({"language": "c", "tests": ["assert f(1) == 2"]}, "give c programs objects"),
        ({"float_tolerance": 1}, "above 0 and below 1"),
        ({"float_tolerance": "1e-6"}, "above 0 and below 1"),
        ({"float_tolerance": 0.1, "tests": ["assert f(1) == 2"]}, "drop it"),
    ],
)
def test_errors_are_one_line(tmp_path, columns, text):
    with pytest.raises(UserError, match=text) as caught:
        load(tmp_path, **columns)
    assert "\n" not in str(caught.value) and "mine.jsonl, line 1" in str(caught.value)
