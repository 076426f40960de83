"""Finds a user's reward function by path, and sees before the run that it can be called.

Not the calling (`plugin`). What is refused here would otherwise fail on every sample.
"""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import UserError

RewardFunction = Callable[..., Any]
OF_PROBLEM = (
    "problem_id", "tests", "stdin_tests", "setup", "entry_point", "data_source", "language",
)  # fmt: skip
RESERVED = (
    "prompts", "completions", "programs", "verdicts", "cpu_seconds", "num_tokens", *OF_PROBLEM,
)  # fmt: skip
"""What every reward is given; the columns of the dataset come on top."""
NEED_TESTS = frozenset({"verdicts", "cpu_seconds"})
_ANY = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def load_function(path: str) -> RewardFunction:
    """The function behind `path.py:function` or `module:function`.

    A file may import its neighbours: its folder is searched, after everything else.

    Raises:
        UserError: no such file, module or function, or an import that fails.
    """
    source, _, name = path.rpartition(":")
    if not source or not name.isidentifier():
        raise UserError(f"reward path {path!r}: write it as file.py:function or module:function")
    try:
        module = _load_file(path, source) if source.endswith(".py") else _load_module(source)
    except UserError:
        raise
    except BaseException as error:  # whatever the user's module does while it is imported
        if isinstance(error, KeyboardInterrupt):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}:{last.lineno}"
        reason = " ".join(str(error).split())
        raise UserError(
            f"reward path {path!r}: does not import: {type(error).__name__}: {reason} ({where})"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward path {path!r}: {source} has no function {name!r}")
    return function


def _load_file(path: str, source: str) -> ModuleType:
    file = Path(source).expanduser().resolve()
    if not file.is_file():
        raise UserError(f"reward path {path!r}: no such file {file}")
    # Two files of the same name in different folders must not share a module.
    digest = hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()
    name = f"unmask_reward_{file.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"reward path {path!r}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(source: str) -> ModuleType:
    # The console script's path does not begin with the folder that it is called in.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(source)


def check_signature(path: str, function: RewardFunction, options: Mapping[str, Any]) -> None:
    """Refuse a function that cannot take every column, and options that it does not name.

    Raises:
        UserError: names the parameter or option and what to do.
    """
    taken = sorted(set(options) & set(RESERVED))
    if taken:
        raise UserError(
            f"reward path {path!r}: options.{taken[0]}: every reward is given {taken[0]!r} already;"
            " choose another name"
        )
    parameters = _parameters(function)
    if parameters is None:
        return
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        raise UserError(
            f"reward path {path!r}: end the parameters of {_name(function)} with **columns: it is "
            "called with every column of the dataset"
        )
    named = [name for name, p in parameters.items() if p.kind in _ANY]
    strange = sorted(set(options) - set(named))
    if strange:
        own = ", ".join(name for name in named if name not in RESERVED) or "none"
        raise UserError(
            f"reward path {path!r}: options.{strange[0]}: {_name(function)} has no parameter of "
            f"this name (its own are: {own}); correct it or remove it"
        )


def asks_for_tests(function: RewardFunction) -> bool:
    """Whether the function names a parameter that only the sandbox can fill."""
    return bool(NEED_TESTS & (_parameters(function) or {}).keys())


def _parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter] | None:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return None


def _name(function: RewardFunction) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
