"""The codec: round trips, sharing, and bytes that are no message."""

import contextlib
import math
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.inside.codec import MAX_DEPTH, Codec, CodecError, Table, from_bytes, to_bytes


def refuse(*_):
    raise CodecError("not here")


CODEC = Codec(refuse, refuse)


def cross(value):
    return CODEC.decode(from_bytes(to_bytes(CODEC.encode(value, Table()))), Table())


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.complex_numbers(allow_nan=False)
)  # fmt: skip
KEYS = SCALARS | st.tuples(SCALARS, SCALARS) | st.frozensets(SCALARS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner) | st.sets(KEYS) | st.tuples(inner),
    max_leaves=20,
)


def same(left, right):
    return type(left) is type(right) and left == right and repr(left) == repr(right)


@settings(max_examples=150)
@given(VALUES)
def test_round_trip(value):
    crossed = cross(value)
    assert crossed == value
    assert type(crossed) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        math.inf, -math.inf, 1 << 100, -(1 << 62), "\ud800", bytearray(b"ab"), range(1, 9, 2),
        deque([1]), Counter("aab"), OrderedDict(b=1, a=2), Fraction(1, 3), Decimal("1.10"),
        frozenset({(1, "a")}), {True: 1.0, "1": True}, [1, 1.0, True],
    ],
)  # fmt: skip
def test_types_stay_exact(value):
    assert same(cross(value), value)


def test_nan_and_default_factory():
    assert math.isnan(cross(math.nan))
    value = cross(defaultdict(list, a=[1]))
    assert value == {"a": [1]} and value["new"] == []


def test_a_subclass_arrives_as_its_base_without_its_methods():
    class Liar(int):
        __eq__ = lambda self, other: True  # noqa: E731
        __hash__ = int.__hash__

    class Lists(list):
        def __iter__(self):
            return iter([9, 9])

    assert same(cross(Liar(3)), 3)
    assert same(cross(Lists([1, 2])), [1, 2])


def test_cycles_and_sharing():
    inner = [1]
    value = [inner, inner]
    value.append(value)
    crossed = cross(value)
    assert crossed[0] is crossed[1] and crossed[2] is crossed


def test_changes_reach_the_callers_own_objects():
    ours = [[1], {"k": {2}}, 5]
    table, theirs_table = Table(), Table()
    theirs = CODEC.decode(CODEC.encode(ours, table), theirs_table)
    before = CODEC.snapshot(theirs_table)
    theirs[0].append(7)
    theirs[1]["new"] = [theirs[0]]
    del theirs[2]
    changed = CODEC.changes(theirs_table, before)
    inner = ours[0]
    CODEC.apply_changes(from_bytes(to_bytes(changed)), table)
    assert ours == [[1, 7], {"k": {2}, "new": [[1, 7]]}]
    assert ours[0] is inner and ours[1]["new"][0] is inner


def test_unchanged_arguments_send_nothing():
    table = Table()
    CODEC.decode(CODEC.encode([[1, math.nan], {1, 2}], Table()), table)
    assert CODEC.changes(table, CODEC.snapshot(table)) == []


def test_too_deep():
    value: list = []
    for _ in range(MAX_DEPTH + 10):
        value = [value]
    with pytest.raises(CodecError):
        CODEC.encode(value, Table())


@pytest.mark.parametrize(
    "node",
    [
        [], {}, [1], ["?", 1], ["l"], ["l", 5], ["d", [[1]]], ["s", [["l", []]]], ["r", 9],
        ["r", -1], ["r", True], ["i", "zz"], ["i", 5], ["f", "1"], ["b", "\u1234"], ["F", 1, 0],
        ["M", "x"], ["g", 1, 2, 0], ["c", "a", 1], ["D", [], ["l"]], ["handle", 0], ["l", None],
    ],
)  # fmt: skip
def test_malformed_nodes(node):
    with pytest.raises(CodecError):
        CODEC.decode(node, Table())


@settings(max_examples=300)
@given(
    st.binary(max_size=60) | st.text(alphabet='[]{}",0123456789ldstrqyCODiFMgbcz.e-', max_size=40)
)
def test_any_bytes_are_a_message_or_an_error(data):
    raw = data if isinstance(data, bytes) else data.encode()
    with contextlib.suppress(CodecError):
        CODEC.decode(from_bytes(raw), Table())


@pytest.mark.parametrize("data", [b"NaN", b"[" * 100_000, b"1" * 5000, b"\xff", b""])
def test_malformed_bytes(data):
    with pytest.raises(CodecError):
        from_bytes(data)
