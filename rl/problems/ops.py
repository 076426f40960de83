"""The vocabulary of the embedded problems: small typed operations, as data.

Each operation carries its words, its one-line code, and a trusted callable that is deliberately
*not* made from the code text, so a test can hold one against the other. Not the chains of
operations (`compose`) and not who may see which chain (`splits`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

Kind = Literal["int", "list", "str", "bool"]

ARGUMENT: dict[Kind, str] = {"list": "xs", "int": "n", "str": "s"}
"""The variable that holds a value of each kind; a bool is only ever returned."""

K = tuple(range(2, 10))
"""The constants of most operations that have one."""

VOWELS = frozenset("aeiouAEIOU")


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. `{k}` in words and code is the constant, part of a problem, not of the op.

    `words` are imperatives ("reverse the list") or noun phrases beginning with "the" or
    "whether", which `compose` puts behind "return" or "take". `run(value, k)` is the trusted
    meaning; it is total on its kind (empty lists, negative numbers, empty text) and never mutates.
    """

    family: str
    takes: Kind
    gives: Kind
    name: str
    code: str
    words: tuple[str, ...]
    run: Callable[[Any, int], Any]
    constants: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if ("{k}" in self.code) != bool(self.constants):
            raise ValueError(f"op {self.name}: constants and {{k}} in the code must go together")


def _unique(values: list[int]) -> list[int]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _digits(number: int) -> list[int]:
    rest, digits = abs(number), []
    while rest >= 10:
        rest, digit = divmod(rest, 10)
        digits.append(digit)
    return [rest, *reversed(digits)]


def _ascending(values: list[int]) -> bool:
    return all(a <= b for a, b in zip(values, values[1:], strict=False))


_filter = partial(Op, "list-filter", "list", "list")
_map = partial(Op, "list-map", "list", "list")
_order = partial(Op, "list-order", "list", "list")
_reduce = partial(Op, "list-reduce", "list", "int")
_int = partial(Op, "int-map", "int", "int")
_str = partial(Op, "str-map", "str", "str")
_measure = partial(Op, "str-measure", "str", "int")

OPS: tuple[Op, ...] = (
    # Lists to lists: filters.
    _filter("keep_even", "[x for x in xs if x % 2 == 0]",
            ("keep the even numbers", "drop the odd numbers"),
            lambda v, k: [x for x in v if not x & 1]),
    _filter("keep_odd", "[x for x in xs if x % 2 == 1]",
            ("keep the odd numbers", "drop the even numbers"),
            lambda v, k: [x for x in v if x & 1]),
    _filter("keep_positive", "[x for x in xs if x > 0]",
            ("keep the positive numbers", "keep the numbers above zero"),
            lambda v, k: [x for x in v if abs(x) == x and x]),
    _filter("keep_negative", "[x for x in xs if x < 0]",
            ("keep the negative numbers", "keep the numbers below zero"),
            lambda v, k: [x for x in v if abs(x) != x]),
    _filter("keep_greater", "[x for x in xs if x > {k}]",
            ("keep the numbers greater than {k}", "keep the numbers above {k}"),
            lambda v, k: list(filter(lambda x: k - x < 0, v)), K),
    _filter("keep_less", "[x for x in xs if x < {k}]",
            ("keep the numbers less than {k}", "keep the numbers below {k}"),
            lambda v, k: list(filter(lambda x: k - x > 0, v)), K),
    _filter("keep_multiples", "[x for x in xs if x % {k} == 0]",
            ("keep the multiples of {k}", "keep the numbers divisible by {k}"),
            lambda v, k: [x for x in v if x // k * k == x], (3, 4, 5, 6, 7)),
    _filter("drop_multiples", "[x for x in xs if x % {k} != 0]",
            ("drop the multiples of {k}", "drop the numbers divisible by {k}"),
            lambda v, k: [x for x in v if x // k * k != x], (3, 4, 5, 6, 7)),
    # Lists to lists: maps.
    _map("add_each", "[x + {k} for x in xs]",
         ("add {k} to each number", "increase each number by {k}"),
         lambda v, k: list(map(k.__add__, v)), K),
    _map("multiply_each", "[x * {k} for x in xs]",
         ("multiply each number by {k}", "scale each number by {k}"),
         lambda v, k: list(map(k.__mul__, v)), K),
    _map("square_each", "[x * x for x in xs]",
         ("square each number", "replace each number by its square"),
         lambda v, k: [pow(x, 2) for x in v]),
    _map("negate_each", "[-x for x in xs]",
         ("negate each number", "flip the sign of each number"),
         lambda v, k: [0 - x for x in v]),
    _map("absolute_each", "[abs(x) for x in xs]",
         ("replace each number by its absolute value", "remove the sign of each number"),
         lambda v, k: [max(x, -x) for x in v]),
    _map("remainder_each", "[x % {k} for x in xs]",
         ("replace each number by its remainder modulo {k}", "reduce each number modulo {k}"),
         lambda v, k: [divmod(x, k)[1] for x in v], K),
    # Lists to lists: order and slices.
    _order("reverse_list", "xs[::-1]",
           ("reverse the list", "put the list in reverse order"),
           lambda v, k: list(reversed(v))),
    _order("sort_up", "sorted(xs)",
           ("sort the list", "sort the list in ascending order"),
           lambda v, k: sorted(v)),
    _order("sort_down", "sorted(xs, reverse=True)",
           ("sort the list in descending order", "sort from largest to smallest"),
           lambda v, k: sorted(v)[::-1]),
    _order("drop_first", "xs[1:]",
           ("drop the first number", "skip the first number"),
           lambda v, k: [x for i, x in enumerate(v) if i]),
    _order("drop_last", "xs[:-1]",
           ("drop the last number", "remove the final number"),
           lambda v, k: [x for i, x in enumerate(v) if i < len(v) - 1]),
    _order("keep_first", "xs[:{k}]",
           ("keep the first {k} numbers", "cut the list after {k} numbers"),
           lambda v, k: [x for i, x in enumerate(v) if i < k], (2, 3, 4)),
    _order("keep_last", "xs[-{k}:]",
           ("keep the last {k} numbers", "keep the final {k} numbers"),
           lambda v, k: [x for i, x in enumerate(v) if i >= len(v) - k], (2, 3, 4)),
    _order("every_second", "xs[::2]",
           ("keep every second number", "keep every other number"),
           lambda v, k: [x for i, x in enumerate(v) if i % 2 == 0]),
    _order("unique", "list(dict.fromkeys(xs))",
           ("remove duplicates", "drop repeated numbers"),
           lambda v, k: _unique(v)),
    # Lists to numbers.
    _reduce("sum", "sum(xs)", ("the sum", "the total"),
            lambda v, k: sum(v)),
    _reduce("largest", "max(xs, default=0)", ("the largest number or 0", "the maximum or 0"),
            lambda v, k: sorted(v)[-1] if v else 0),
    _reduce("smallest", "min(xs, default=0)", ("the smallest number or 0", "the minimum or 0"),
            lambda v, k: sorted(v)[0] if v else 0),
    _reduce("length", "len(xs)", ("the length of the list", "count the numbers"),
            lambda v, k: sum(1 for _ in v)),
    _reduce("first", "xs[0] if xs else 0", ("the first number or 0", "the number in front or 0"),
            lambda v, k: next(iter(v), 0)),
    _reduce("last", "xs[-1] if xs else 0", ("the last number or 0", "the number at the end or 0"),
            lambda v, k: next(reversed(v), 0)),
    _reduce("count_even", "sum(x % 2 == 0 for x in xs)",
            ("the count of even numbers", "count the even numbers"),
            lambda v, k: len([x for x in v if not x & 1])),
    # Numbers to numbers.
    _int("add", "n + {k}", ("add {k}", "increase the number by {k}"),
         lambda v, k: sum((v, k)), K),
    _int("subtract", "n - {k}", ("subtract {k}", "decrease the number by {k}"),
         lambda v, k: v + -k, K),
    _int("multiply", "n * {k}", ("multiply by {k}", "scale the number by {k}"),
         lambda v, k: sum([v] * k), K),
    _int("square", "n * n", ("square the number", "multiply the number by itself"),
         lambda v, k: pow(v, 2)),
    _int("negate", "-n", ("negate the number", "flip the sign of the number"),
         lambda v, k: 0 - v),
    _int("absolute", "abs(n)", ("the absolute value", "remove the sign of the number"),
         lambda v, k: max(v, -v)),
    _int("remainder", "n % {k}", ("the remainder modulo {k}", "reduce the number modulo {k}"),
         lambda v, k: divmod(v, k)[1], K),
    _int("digit_sum", "sum(int(d) for d in str(abs(n)))",
         ("the sum of the digits", "add up the digits"),
         lambda v, k: sum(_digits(v))),
    _int("digit_count", "len(str(abs(n)))",
         ("the count of digits", "count the digits"),
         lambda v, k: len(_digits(v))),
    # From one kind to another.
    Op("convert", "int", "str", "to_text", "str(n)",
       ("write the number as text", "turn the number into text"), lambda v, k: f"{v:d}"),
    Op("convert", "int", "list", "digits", "[int(d) for d in str(abs(n))]",
       ("list the digits", "split the number into digits"), lambda v, k: _digits(v)),
    Op("convert", "str", "list", "word_lengths", "[len(w) for w in s.split()]",
       ("list the word lengths", "list the length of each word"),
       lambda v, k: [len(word) for word in v.split(" ") if word]),
    # Text to text.
    _str("reverse_text", "s[::-1]", ("reverse the text", "write the text backwards"),
         lambda v, k: "".join(reversed(v))),
    _str("uppercase", "s.upper()", ("uppercase the text", "change the text to capital letters"),
         lambda v, k: "".join(c.upper() for c in v)),
    _str("lowercase", "s.lower()", ("lowercase the text", "change the text to small letters"),
         lambda v, k: "".join(c.lower() for c in v)),
    _str("drop_vowels", '"".join(c for c in s if c not in "aeiouAEIOU")',
         ("remove the vowels", "drop all vowels"),
         lambda v, k: "".join(c for c in v if c not in VOWELS)),
    _str("drop_spaces", 's.replace(" ", "")', ("remove the spaces", "drop all spaces"),
         lambda v, k: "".join(c for c in v if c != " ")),
    _str("repeat", "s * {k}", ("repeat the text {k} times", "write the text {k} times"),
         lambda v, k: "".join(v for _ in range(k)), (2, 3, 4)),
    _str("first_letters", "s[:{k}]",
         ("keep the first {k} letters", "cut the text after {k} letters"),
         lambda v, k: "".join(c for i, c in enumerate(v) if i < k), (2, 3, 4, 5)),
    _str("last_letters", "s[-{k}:]",
         ("keep the last {k} letters", "keep the final {k} letters"),
         lambda v, k: "".join(c for i, c in enumerate(v) if i >= len(v) - k), (2, 3, 4, 5)),
    _str("drop_first_letter", "s[1:]", ("drop the first letter", "skip the first letter"),
         lambda v, k: "".join(c for i, c in enumerate(v) if i)),
    # Text to numbers.
    _measure("text_length", "len(s)", ("the length of the text", "count the letters"),
             lambda v, k: sum(1 for _ in v)),
    _measure("count_vowels", 'sum(c in "aeiouAEIOU" for c in s)',
             ("the count of vowels", "count the vowels"),
             lambda v, k: len([c for c in v if c in VOWELS])),
    _measure("count_words", "len(s.split())", ("the count of words", "count the words"),
             lambda v, k: len([word for word in v.split(" ") if word])),
    _measure("count_a", 's.count("a")', ("the count of the letter a", "count the letter a"),
             lambda v, k: len([c for c in v if c == "a"])),
    # Predicates: they end a chain.
    Op("predicate", "list", "bool", "is_empty", "len(xs) == 0",
       ("whether the list is empty", "whether there are no numbers"), lambda v, k: not v),
    Op("predicate", "list", "bool", "is_sorted", "xs == sorted(xs)",
       ("whether the list is sorted", "whether the list is ascending"),
       lambda v, k: _ascending(v)),
    Op("predicate", "list", "bool", "contains", "{k} in xs",
       ("whether {k} is in the list", "whether the list contains {k}"),
       lambda v, k: any(x == k for x in v), (2, 3, 4, 5, 6, 7)),
    Op("predicate", "int", "bool", "is_even", "n % 2 == 0",
       ("whether the number is even", "whether it is even"), lambda v, k: not v & 1),
    Op("predicate", "int", "bool", "is_multiple", "n % {k} == 0",
       ("whether the number is divisible by {k}", "whether it is a multiple of {k}"),
       lambda v, k: v // k * k == v, (3, 4, 5, 6, 7)),
    Op("predicate", "str", "bool", "is_palindrome", "s == s[::-1]",
       ("whether the text is a palindrome", "whether it reads the same backwards"),
       lambda v, k: all(v[i] == v[len(v) - 1 - i] for i in range(len(v)))),
    Op("predicate", "str", "bool", "contains_a", '"a" in s',
       ("whether the text contains a", "whether a is in the text"),
       lambda v, k: any(c == "a" for c in v)),
)  # fmt: skip

BY_NAME: dict[str, Op] = {op.name: op for op in OPS}
