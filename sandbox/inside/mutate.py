"""Controls for a weak test: the same test with other expectations, which no honest program meets.

Used where test and candidate share a process (`weak`), and so nothing the test reports can be
believed by itself: a program for which any expectation comes true fails with its control. Works on
the test's text, in the judge's process. It knows the usual forms of a claim, not every form: a
test without a claim it knows has no controls.
"""

import ast
import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_CONTROLS = 4
OTHER = "_unmask_other"  # in the controls: gives a value that differs from its argument
_OFFSET, _SUFFIX = 7919, "qx"
_INVERSE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.NotEq: ast.Eq, ast.NotIn: ast.In,
}  # fmt: skip
_ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_CLOSE = {"isclose", "allclose", "array_equal"}
_OPPOSITE_METHODS = {
    a: b
    for pair in (
        ("assertTrue", "assertFalse"), ("assertIsNone", "assertIsNotNone"),
        ("assertIsInstance", "assertNotIsInstance"), ("assertIs", "assertIsNot"),
        ("assertIn", "assertNotIn"), ("assertLess", "assertGreaterEqual"),
        ("assertGreater", "assertLessEqual"), ("assertEqual", "assertNotEqual"),
    )
    for a, b in (pair, pair[::-1])
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The test as it is and its controls, all as text that `ast.unparse` made."""

    original: str
    controls: list[str]


def other(value: Any) -> Any:
    """A value that differs from `value`, of its type where that is simple; OTHER at run time."""
    kind = type(value)
    if kind is bool:
        return not value
    if kind in (int, float, complex):
        made = value + 2 * abs(value) + _OFFSET
        return made if made != value else 0.0  # infinity stays what it is
    if kind is str:
        return value + _SUFFIX
    if kind is bytes:
        return value + _SUFFIX.encode()
    if kind in (list, tuple):
        return value + kind([_OFFSET])
    if isinstance(value, type) and issubclass(value, BaseException):
        return type("Other", (Exception,), {})
    return object()


def plan(test: ast.Module, theirs: set[str], seed: str) -> Plan:
    """`test` with its controls, at most MAX_CONTROLS, drawn by `seed` if there could be more.

    theirs: names that the candidate defines. Each control changes one statement that is certainly
    executed, so that a program must be honest in all of them; only if there is none, all at once.
    """
    claims = _Claims(_tainted(test, theirs))
    body_of = _body_to_change(test)
    controls = []
    for index, statement in enumerate(body_of(test)):
        if isinstance(statement, ast.Assert | ast.Expr | ast.With | ast.Try | ast.For):
            changed = claims.change(statement)
            if changed is not None:
                control = copy.deepcopy(test)
                body_of(control)[index] = changed
                controls.append(control)
    if not controls:
        whole = claims.change(test)
        controls = [whole] if isinstance(whole, ast.Module) else []
    if len(controls) > MAX_CONTROLS:
        controls = random.Random(seed).sample(controls, MAX_CONTROLS)
    texts = [ast.unparse(ast.fix_missing_locations(control)) for control in controls]
    return Plan(ast.unparse(test), texts)


def _body_to_change(test: ast.Module) -> Callable[[ast.Module], list[ast.stmt]]:
    """The module's body, or that of its only function if all claims are in there."""
    claims = _Claims(set())
    holders = [i for i, s in enumerate(test.body) if claims.change(s) is not None]
    if len(holders) == 1 and isinstance(test.body[holders[0]], ast.FunctionDef):
        return lambda module: module.body[holders[0]].body  # type: ignore[attr-defined]
    return lambda module: module.body


def _tainted(test: ast.Module, theirs: set[str]) -> set[str]:
    """Names whose values come from the candidate or went through it; others are expectations."""
    tainted = set(theirs)
    for node in ast.walk(test):
        if isinstance(node, ast.FunctionDef):
            tainted |= {argument.arg for argument in node.args.args}
    while True:
        before = len(tainted)
        for node in ast.walk(test):
            if isinstance(node, ast.Assign) and _names(node.value) & tainted:
                tainted |= set().union(*map(_names, node.targets))
            elif isinstance(node, ast.For) and _names(node.iter) & tainted:
                tainted |= _names(node.target)
            elif isinstance(node, ast.Call) and _names(node.func) & tainted:
                tainted |= {a.id for a in node.args if isinstance(a, ast.Name)}
        if len(tainted) == before:
            return tainted


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


class _Claims(ast.NodeTransformer):
    """Changes every claim below a node; `change` says None if there is none."""

    def __init__(self, tainted: set[str]) -> None:
        self._tainted = tainted
        self._changed = 0

    def change(self, node: ast.AST) -> Any:
        self._changed = 0
        made = self.visit(copy.deepcopy(node))
        return made if self._changed else None

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        claim = self._claim(node.test)
        if claim is not None:
            self._changed += 1
            node.test = claim
        return node

    def visit_With(self, node: ast.With) -> ast.AST:
        self.generic_visit(node)
        for item in node.items:
            call = item.context_expr
            if isinstance(call, ast.Call) and call.args and "raises" in _called(call).lower():
                self._changed += 1
                call.args[0] = _other(call.args[0])
        return node

    def visit_Try(self, node: ast.Try) -> ast.AST:
        # The handlers are the claim if getting past the call is a failure.
        expects = any(_always_fails(s) for s in (*node.body, *node.orelse))
        if not expects:
            return self.generic_visit(node)
        self._changed += 1
        for handler in node.handlers:
            handler.type = _other(handler.type or ast.Name("Exception", ast.Load()))
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        call = node.value
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            return node
        method, arguments = call.func.attr, call.args
        if method.startswith("assertRaises") and arguments:
            arguments[0] = _other(arguments[0])
        elif method.endswith("Equal") and "Not" not in method and len(arguments) > 1:
            self._change_one_side(arguments)
        elif method in _OPPOSITE_METHODS:
            call.func.attr = _OPPOSITE_METHODS[method]
        else:
            return node
        self._changed += 1
        return node

    def _claim(self, node: ast.expr) -> ast.expr | None:
        """An expression that is false if `node` is true, but true to one that agrees to all."""
        if isinstance(node, ast.Constant):
            return None
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return node.operand
        if isinstance(node, ast.BoolOp):
            return self._bool_claim(node)
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        if isinstance(node, ast.Call) and _called(node) in _CLOSE and len(node.args) > 1:
            self._change_one_side(node.args)
            return node
        return ast.UnaryOp(ast.Not(), node)

    def _bool_claim(self, node: ast.BoolOp) -> ast.expr | None:
        if isinstance(node.op, ast.And):
            changed = [(self._claim(copy.deepcopy(part)), part) for part in node.values]
            if all(new is None for new, _ in changed):
                return None
            return ast.BoolOp(node.op, [new or old for new, old in changed])
        # Of alternatives only changed values stay false together; opposites would not.
        equalities = [
            part
            for part in node.values
            if isinstance(part, ast.Compare) and [type(op) for op in part.ops] == [ast.Eq]
        ]
        if len(equalities) < len(node.values):
            return ast.UnaryOp(ast.Not(), node)
        return ast.BoolOp(node.op, [self._comparison(part) for part in equalities])

    def _comparison(self, node: ast.Compare) -> ast.expr:
        sides = [node.left, *node.comparators]
        for at in reversed(range(len(node.ops))):
            if isinstance(node.ops[at], ast.Eq):
                pair = sides[at : at + 2]
                self._change_one_side(pair)
                sides[at : at + 2] = pair
                return ast.Compare(sides[0], node.ops, sides[1:])
        if all(isinstance(op, _ORDER) for op in node.ops):
            return self._order(node)
        at = next(i for i, op in enumerate(node.ops) if not isinstance(op, _ORDER))
        if isinstance(node.ops[at], ast.In):
            if self._is_expectation(sides[at + 1]) or not self._is_expectation(sides[at]):
                sides[at + 1] = ast.List([_changed(sides[at + 1])], ast.Load())
            else:
                sides[at] = _changed(sides[at])
            return ast.Compare(sides[0], node.ops, sides[1:])
        operators = list(node.ops)
        operators[at] = _INVERSE[type(operators[at])]()
        return ast.Compare(sides[0], operators, sides[1:])

    def _order(self, node: ast.Compare) -> ast.expr:
        """Opposites all along; but abs(f(x) - y) < tolerance gets another y."""
        if len(node.ops) == 1:
            small = node.left if isinstance(node.ops[0], ast.Lt | ast.LtE) else node.comparators[0]
            distance = small.args[0] if isinstance(small, ast.Call) and small.args else None
            if isinstance(distance, ast.BinOp) and isinstance(distance.op, ast.Sub):
                pair = [distance.left, distance.right]
                self._change_one_side(pair)
                distance.left, distance.right = pair
                return node
        operators = [_INVERSE[type(op)]() for op in node.ops]
        return ast.Compare(node.left, operators, node.comparators)

    def _change_one_side(self, sides: list[ast.expr]) -> None:
        """Change the expectation among the first two of `sides`, in place; in doubt the right."""
        left, right = sides[0], sides[1]
        literal = [_is_literal(side) for side in (left, right)]
        at = 1
        if literal[0] != literal[1]:
            at = literal.index(True)
        elif self._is_expectation(left) and not self._is_expectation(right):
            at = 0
        sides[at] = _changed(sides[at])

    def _is_expectation(self, node: ast.expr) -> bool:
        return not _names(node) & self._tainted


def _changed(node: ast.expr) -> ast.expr:
    """Another value; for literals another literal, so that nothing shows which one is right."""
    if isinstance(node, ast.Constant):
        value = other(node.value)
        return ast.Constant(value if type(value) is type(node.value) else _SUFFIX)
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        return ast.UnaryOp(node.op, _changed(node.operand))
    if isinstance(node, ast.List | ast.Tuple | ast.Set) and _is_literal(node):
        made = copy.copy(node)
        made.elts = [ast.Constant(_OFFSET)]
        if node.elts:
            made.elts = [_changed(node.elts[0]), *node.elts[1:]]
        return made
    if isinstance(node, ast.Dict) and node.values and _is_literal(node):
        return ast.Dict(node.keys, [_changed(node.values[0]), *node.values[1:]])
    return _other(node)


def _is_literal(node: ast.expr) -> bool:
    """Whether it is made of constants alone."""
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.operand, ast.Constant)
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return all(_is_literal(item) for item in node.elts)
    if isinstance(node, ast.Dict):
        return all(key is not None for key in node.keys) and all(map(_is_literal, node.values))
    return isinstance(node, ast.Constant)


def _other(node: ast.expr) -> ast.expr:
    return ast.Call(ast.Name(OTHER, ast.Load()), [node], [])


def _called(call: ast.Call) -> str:
    """The last part of the called name: `isclose` of `math.isclose`."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _always_fails(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assert):
        return isinstance(statement.test, ast.Constant) and not statement.test.value
    return isinstance(statement, ast.Raise)
