"""The house rules that a linter does not know: where packages lie, how long things may grow."""

import ast
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "diffusion", "models", "sandbox", "rewards", "pretrain", "rl", "workers")
MAY_IMPORT_RAY = {"workers/access.py", "workers/cluster.py", "workers/placement.py"}
MAX_MODULE, MAX_FUNCTION = 400, 80
NOT_OURS = {".venv", ".git", "runs", "build", "tests", "wandb"}
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/\w")
IS_CACHE = re.compile(r"^\.hypothesis$|cache|\.egg-info$")
SHARED = re.compile(r"(?<![\w./-])(?:\.\./)?shared/")


def modules() -> list[Path]:
    folders = (*PACKAGES, "benchmarks", "examples")
    return sorted(path for name in folders for path in (ROOT / name).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(params=modules(), ids=name_of)
def module(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.mark.parametrize("package", PACKAGES)
def test_package_resolves_inside_the_repository(package: str) -> None:
    # The names are generic: another distribution's `common` must never win.
    found = importlib.import_module(package).__file__
    assert found is not None and Path(found).resolve().is_relative_to(ROOT)


@pytest.mark.parametrize("package", PACKAGES)
def test_init_holds_a_docstring_only(package: str) -> None:
    for path in (ROOT / package).rglob("__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{name_of(path)}: no docstring"
        assert len(tree.body) == 1, f"{name_of(path)}: more than a docstring"


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_module_is_short_and_says_what_it_is(module: Path) -> None:
    text = module.read_text()
    assert len(text.splitlines()) <= MAX_MODULE
    assert ast.get_docstring(ast.parse(text)), "no module docstring"


def test_functions_are_short(module: Path) -> None:
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{node.name} (line {node.lineno}): {length} lines"


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def test_ray_is_imported_in_one_place(module: Path) -> None:
    if name_of(module) in MAY_IMPORT_RAY:
        return
    tops = {name.split(".")[0] for name in imported(ast.parse(module.read_text()))}
    assert "ray" not in tops


def texts() -> Iterator[Path]:
    kinds = {".py", ".yaml", ".yml", ".toml", ".md", ".txt", ".html", ".sh", ".j2", ""}
    for folder, names, files in os.walk(ROOT):
        names[:] = [name for name in names if name not in NOT_OURS and not IS_CACHE.search(name)]
        yield from (Path(folder, name) for name in files if Path(name).suffix in kinds)


def test_no_path_of_one_machine() -> None:
    for path in texts():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            place = f"{name_of(path)}:{number}: {line.strip()}"
            assert not MACHINE_PATH.search(line), place
            assert not SHARED.search(line), place
