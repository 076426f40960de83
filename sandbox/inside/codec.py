"""Values across the border between judge and candidate, as tagged JSON. Data only.

Decoding builds exact builtin types and a few stdlib containers, whatever the other side claims: a
subclass arrives as its base type, without the methods that could lie. Everything else stays where
it is; a handle or a callback number crosses in its place.

Mutable containers are numbered in the order of their first appearance in a message (`table`, the
same on both sides). So shared references stay shared, and the callee can report what it did to its
arguments: `snapshot` before, `changes` after, `apply_changes` at the caller.
"""

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_DEPTH = 150
_SMALL_INT = 1 << 62
_BASES = (int, float, complex, str, bytes, tuple, frozenset)
_MUTABLE: tuple[tuple[type, str], ...] = (
    (Counter, "C"), (OrderedDict, "O"), (defaultdict, "D"), (dict, "d"),
    (list, "l"), (set, "s"), (deque, "q"), (bytearray, "y"),
)  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {tag: kind for kind, tag in _MUTABLE}
_FACTORIES: dict[str, Callable[[], Any]] = {
    kind.__name__: kind for kind in (int, float, str, list, dict, set, tuple, bool)
}


class CodecError(Exception):
    """Bytes that are no message, or a value that cannot cross."""


class Table:
    """The mutable containers of one message, numbered; keeps them alive, finds them by identity."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._numbers: dict[int, int] = {}

    def append(self, value: Any) -> None:
        self._numbers[id(value)] = len(self.values)
        self.values.append(value)

    def number(self, value: Any) -> int | None:
        return self._numbers.get(id(value))

    def first(self, count: int) -> "Table":
        """A new table of the first `count` containers."""
        table = Table()
        for value in self.values[:count]:
            table.append(value)
        return table


class Codec:
    """Encodes and decodes for one side.

    outgoing(value) gives the node of a value that stays on this side, or raises CodecError.
    incoming(tag, content) gives what stands here for the other side's value.
    deepest: how deep what was decoded so far was nested.
    """

    def __init__(
        self, outgoing: Callable[[Any], list[Any]], incoming: Callable[[str, Any], Any]
    ) -> None:
        self._outgoing = outgoing
        self._incoming = incoming
        self.deepest = 0

    def encode(self, value: Any, table: Table, depth: int = 0) -> Any:
        """JSON-ready node of `value`; appends the mutable containers met to `table`."""
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if -_SMALL_INT < value < _SMALL_INT else ["i", hex(value)]
        if kind is float:
            return value if math.isfinite(value) else ["f", repr(value)]
        if depth > MAX_DEPTH:
            raise CodecError(f"nested deeper than {MAX_DEPTH} levels")
        number = table.number(value)
        if number is not None:
            return ["r", number]
        for base, tag in _MUTABLE:
            if issubclass(kind, base):
                table.append(value)
                return self._contents(value, tag, table, depth)
        return self._encode_rest(value, kind, table, depth)

    def _encode_rest(self, value: Any, kind: type, table: Table, depth: int) -> Any:
        if issubclass(kind, tuple):
            return ["t", self._items(tuple.__iter__(value), table, depth)]
        if kind is complex:
            return ["c", self.encode(value.real, table), self.encode(value.imag, table)]
        if kind is bytes:
            return ["b", value.decode("latin1")]
        if kind is frozenset:
            return ["z", self._items(value, table, depth)]
        if kind is range:
            return ["g", *(self.encode(n, table) for n in (value.start, value.stop, value.step))]
        if kind is Fraction:
            return ["F", *(self.encode(n, table) for n in (value.numerator, value.denominator))]
        if kind is Decimal:
            return ["M", str(value)]
        for base in _BASES:
            if issubclass(kind, base):
                return self.encode(_plain(value, base), table, depth + 1)
        return self._outgoing(value)

    def _items(self, values: Any, table: Table, depth: int) -> list[Any]:
        return [self.encode(item, table, depth + 1) for item in values]

    def _contents(self, value: Any, tag: str, table: Table, depth: int) -> list[Any]:
        if tag in "lsq":
            base = _EMPTY[tag]
            return [tag, self._items(base.__iter__(value), table, depth)]  # type: ignore[attr-defined]
        if tag == "y":
            return [tag, bytes(value).decode("latin1")]
        pairs = [
            [self.encode(key, table, depth + 1), self.encode(item, table, depth + 1)]
            for key, item in _EMPTY[tag].items(value)  # type: ignore[attr-defined]
        ]
        if tag == "D":
            factory = value.default_factory
            return [tag, pairs, factory.__name__ if isinstance(factory, type) else None]
        return [tag, pairs]

    def decode(self, node: Any, table: Table, depth: int = 0) -> Any:
        """The value of `node`; appends the mutable containers built to `table`.

        Raises:
            CodecError: anything but a well-formed node, whatever the bytes were.
        """
        if node is None or type(node) in (bool, str, int, float):
            return node
        if type(node) is not list or not node or type(node[0]) is not str or depth > MAX_DEPTH:
            raise CodecError("malformed message")
        self.deepest = max(self.deepest, depth)
        try:
            return self._decode_tagged(node[0], node, table, depth)
        except (ValueError, TypeError, IndexError, ArithmeticError, LookupError) as error:
            raise CodecError(f"malformed message: {type(error).__name__}") from None

    def _decode_tagged(self, tag: str, node: list[Any], table: Table, depth: int) -> Any:
        if tag in _EMPTY:
            made = _EMPTY[tag]()
            table.append(made)
            self._fill(made, node, table, depth)
            return made
        if tag == "r":
            return table.values[_natural(node[1])]
        if tag in "tz":
            values = [self.decode(item, table, depth + 1) for item in node[1]]
            return tuple(values) if tag == "t" else frozenset(values)
        if tag in "cgF":
            numbers = [self.decode(item, table, depth + 1) for item in node[1:]]
            return {"c": complex, "g": range, "F": Fraction}[tag](*numbers)
        if tag == "i":
            return int(node[1], 16)
        if tag == "f":
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[node[1]]
        if tag == "b":
            return node[1].encode("latin1")
        if tag == "M":
            return Decimal(node[1])
        return self._incoming(tag, node[1])

    def _fill(self, target: Any, node: list[Any], table: Table, depth: int) -> None:
        tag = node[0]
        if tag == "y":
            target[:] = node[1].encode("latin1")
            return
        if tag in "lsq":
            values = [self.decode(item, table, depth + 1) for item in node[1]]
            target.clear()
            (target.update if tag == "s" else target.extend)(values)
            return
        pairs = [
            (self.decode(key, table, depth + 1), self.decode(item, table, depth + 1))
            for key, item in node[1]
        ]
        target.clear()
        for key, item in pairs:
            target[key] = item
        if tag == "D":
            target.default_factory = _FACTORIES.get(node[2])

    def snapshot(self, table: Table) -> list[str]:
        """The contents of each numbered container, to compare with later."""
        return [json.dumps(self._shallow(value, table)) for value in list(table.values)]

    def changes(self, table: Table, before: list[str]) -> list[Any]:
        """[index, contents] of every container of `table` that differs from `before`.

        Containers that appear for the first time are appended to `table`; what equals its
        snapshot holds none.
        """
        changed = []
        for index, old in enumerate(before):
            node = self._shallow(table.values[index], table)
            if json.dumps(node) != old:
                changed.append([index, node])
        return changed

    def _shallow(self, value: Any, table: Table) -> list[Any]:
        return self._contents(value, _tag(value), table, 0)

    def apply_changes(self, changed: Any, table: Table) -> None:
        """Make the caller's containers look like the callee's. Raises CodecError."""
        try:
            for index, node in changed:
                target = table.values[_natural(index)]
                if node[0] != _tag(target):
                    raise CodecError("malformed message: a container changed its type")
                self._fill(target, node, table, 0)
        except (ValueError, TypeError, IndexError, LookupError) as error:
            raise CodecError(f"malformed message: {type(error).__name__}") from None


def _tag(value: Any) -> str:
    return next(tag for base, tag in _MUTABLE if issubclass(type(value), base))


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise CodecError("malformed message: index")
    return value


def _plain(value: Any, base: Any) -> Any:
    if base is str:
        return str.__str__(value)
    if base in (bytes, frozenset):
        return base(base.__iter__(value))
    if base is complex:
        return complex(complex.__add__(value, 0))
    return base.__add__(value, 0)


def to_bytes(message: Any) -> bytes:
    """The wire form of a message."""
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii")


def from_bytes(data: bytes) -> Any:
    """The message in `data`. Raises CodecError."""
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"malformed message: {type(error).__name__}") from None


def _no_constant(text: str) -> float:
    raise ValueError(text)
