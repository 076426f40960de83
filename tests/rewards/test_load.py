"""User functions: found by path; what could never work is refused before the run."""

import math
import sys

import pytest

from common.errors import UserError
from rewards.load import RESERVED, asks_for_tests, check_signature, load_function


def refusal(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_load_from_file_and_module(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def reward(**columns):\n    return [1.0]\n")
    assert load_function(f"{file}:reward")() == [1.0]
    assert load_function("math:sqrt") is math.sqrt


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    """The console script does not have it in its path; `python -m` has."""
    (tmp_path / "rewards_in_the_current_folder.py").write_text("def f(**columns):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert load_function("rewards_in_the_current_folder:f")() is None


def test_files_of_one_name_are_two_modules(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "mine.py").write_text(f"def f(**columns):\n    return {number}\n")
    functions = [load_function(f"{tmp_path}/{number}/mine.py:f") for number in (1, 2)]
    assert [function() for function in functions] == [1, 2]
    assert functions[0].__module__ != functions[1].__module__


def test_a_file_may_import_its_neighbours_and_define_dataclasses(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("VALUE = 3\n")
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from helper_of_mine import VALUE\n"
        "@dataclass\n"
        "class Found:\n"
        "    value: int\n"  # a text, which dataclasses look up in sys.modules
        "def f(**columns):\n"
        "    return Found(VALUE).value\n"
    )
    assert load_function(f"{tmp_path}/mine.py:f")() == 3


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("mine.py", "file.py:function"),
        ("nowhere.py:f", "no such file"),
        ("no_such_module_x:f", "no_such_module_x"),
        ("math:nothing", "nothing"),
        ("math:pi", "pi"),
        ("BROKEN:f", "ZeroDivisionError"),
        ("EXITS:f", "SystemExit"),
        ("LINES:f", "RuntimeError: one two"),
    ],
)
def test_a_path_that_does_not_import_is_one_line(path, text, tmp_path):
    for name, content in {
        "broken": "1 / 0\n",
        "exits": "raise SystemExit(0)\n",
        "lines": "raise RuntimeError('one\\ntwo')\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(content)
        path = path.replace(name.upper(), str(tmp_path / f"{name}.py"))
    assert text in refusal(load_function, path)


def plain(completions, target=1, *, scale=2, **columns):
    pass


def closed(prompts, completions):
    pass


class Callable:
    def __call__(self, completions, **columns):
        pass


def test_signatures():
    check_signature("p", plain, {"target": 3, "scale": 1})
    check_signature("p", Callable(), {})
    check_signature("p", max, {})  # has none to look at
    assert "end the parameters of closed with **columns" in refusal(
        check_signature, "p", closed, {}
    )
    message = refusal(check_signature, "p", plain, {"taget": 3})
    assert "options.taget" in message and "(its own are: target, scale)" in message
    for name in RESERVED:
        assert f"options.{name}" in refusal(check_signature, "p", plain, {name: 1})


def test_who_asks_for_the_sandbox():
    assert asks_for_tests(lambda verdicts, **columns: None)
    assert asks_for_tests(lambda completions, *, cpu_seconds, **columns: None)
    assert not asks_for_tests(lambda completions, programs, tests, **columns: None)
    assert not asks_for_tests(max)
