"""Which names of a test are the candidate's. Everything else is the judge's own.

A candidate that defines `len`, `isinstance` or `math` must not decide what they mean in a test.
"""

import ast
import builtins
import collections
import copy
import decimal
import fractions
import itertools
import math
import sys
import typing
from collections.abc import Mapping
from typing import Any

_WELL_KNOWN: dict[str, Any] = {
    name: getattr(module, name)
    for module, names in (
        (collections, "Counter defaultdict deque OrderedDict namedtuple"),
        (copy, "deepcopy"),
        (decimal, "Decimal"),
        (fractions, "Fraction"),
        (itertools, "permutations combinations product chain"),
        (math, "isclose inf nan"),
        (typing, "Any Dict List Optional Set Tuple Union Callable Iterable"),
    )
    for name in names.split()
}


class _Uses(ast.NodeVisitor):
    def __init__(self) -> None:
        self.loaded: set[str] = set()
        self.called: set[str] = set()
        self.as_module: set[str] = set()
        self.other: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.loaded.add(node.id)
            self.other.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name):
            self.loaded.add(node.value.id)
            self.as_module.add(node.value.id)
        else:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name):
            self.called.add(node.func.id)
        self.generic_visit(node)


def resolve(
    sources: list[ast.Module], entry_point: str | None, defined: Mapping[str, Any]
) -> tuple[list[str], dict[str, Any]]:
    """(names to ask the candidate for, names the judge supplies) for parsed setup and test.

    defined: what the setup has bound at the judge. Its classes are asked for all the same (the
    candidate's process holds their instances).
    """
    uses = _Uses()
    for source in sources:
        uses.visit(source)
    wanted: set[str] = set()
    supplied: dict[str, Any] = {}
    for name in uses.loaded:
        if name == entry_point:
            wanted.add(name)
        elif name in defined:
            if _is_setup_class(defined[name]):
                wanted.add(name)
        elif hasattr(builtins, name):
            continue
        elif name in sys.stdlib_module_names and name in uses.as_module - uses.other:
            supplied[name] = __import__(name)
        else:
            wanted.add(name)
    known = {name for name in wanted if name in _WELL_KNOWN and name != entry_point}
    if wanted - known:
        wanted -= known
        supplied |= {name: _WELL_KNOWN[name] for name in known}
    if not wanted:  # the function under test bears a builtin's name
        wanted = {name for name in uses.called if name not in defined}
    return sorted(wanted), supplied


def _is_setup_class(value: Any) -> bool:
    return isinstance(value, type) and value.__module__ == "test"
