"""One side of the call channel: framing, calls, replies, exceptions, handles, callbacks.

Judge and candidate each hold a `Peer`. The candidate's answers any operation on its own objects;
the judge's answers only calls of the functions a test passed as arguments (nothing of the judge
can be looked into). Not the codec (`codec`), not the verdict (`judge`).
"""

import builtins
import operator
import socket
from collections.abc import Callable, Iterator
from typing import Any

from sandbox.inside.codec import MAX_DEPTH, Codec, CodecError, Table, from_bytes, to_bytes
from sandbox.inside.errors import Errors, class_node, describe, handle_owner

OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *args, **kwargs: target(*args, **kwargs),
    "attr": getattr,
    "setattr": setattr,
    "iter": iter,
    "next": next,
    "len": len,
    "item": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "str": str,
    "repr": repr,
    "bool": bool,
    "eq": lambda left, right: bool(left == right),
    "enter": lambda target: target.__enter__(),
    "exit": lambda target: target.__exit__(None, None, None),
    "isinstance": isinstance,
    "issubclass": issubclass,
}
_UNARY: dict[str, Callable[..., Any]] = {
    "neg": operator.neg, "pos": operator.pos, "invert": operator.invert, "abs": abs, "int": int,
    "float": float, "complex": complex, "index": operator.index, "hash": hash,
    "reversed": reversed,
}  # fmt: skip
_ARITHMETIC = (
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and",
    "or", "xor",
)  # fmt: skip
_BINARY: dict[str, Callable[..., Any]] = {
    name: getattr(operator, f"__{name}__")
    for name in (*_ARITHMETIC, *(f"i{name}" for name in _ARITHMETIC), "lt", "le", "gt", "ge")
}
_PLAIN_MODULES = {"builtins", "itertools", "functools", "operator"}
OPERATIONS |= _UNARY | _BINARY


class Lost(BaseException):
    """The other side is gone, or speaks no sense. A test's `except Exception` must not eat it."""


class TooLong(Lost):
    """The other side sent more than the limit."""


class Uncarriable(BaseException):
    """A test passes something that cannot cross.

    verdict: `uncarriable` if that is the test's doing alone: then it may run in one process with
    the candidate, which is weaker. What the candidate could have brought about never leads there.
    """

    def __init__(self, reason: str, verdict: str = "uncarriable") -> None:
        super().__init__(reason)
        self.verdict = verdict


class Channel:
    """Length-prefixed messages over a stream socket."""

    def __init__(self, connection: socket.socket, max_bytes: int) -> None:
        self._connection = connection
        self._max_bytes = max_bytes

    def send(self, message: Any) -> None:
        """Raises Lost if nobody listens. The receiver enforces the limit, to see breaches."""
        data = to_bytes(message)
        try:
            self._connection.sendall(len(data).to_bytes(8, "big") + data)
        except OSError as error:
            raise Lost(str(error)) from None

    def receive(self) -> Any:
        """Raises Lost at the end of the stream or on nonsense, TooLong above the limit."""
        size = int.from_bytes(self._exactly(8), "big")
        if size > self._max_bytes:
            raise TooLong(f"an answer of more than {self._max_bytes} bytes")
        try:
            return from_bytes(self._exactly(size))
        except CodecError as error:
            raise Lost(str(error)) from None

    def _exactly(self, size: int) -> bytes:
        buffer = bytearray()
        while len(buffer) < size:
            try:
                part = self._connection.recv(min(size - len(buffer), 1 << 20))
            except OSError as error:
                raise Lost(str(error)) from None
            if not part:
                raise Lost("the process ended")
            buffer += part
        return bytes(buffer)


class Remote:
    """Stands for an object of the other side; nothing it says is believed except as data.

    Equal only to another Remote that the candidate calls equal; never to a value of the judge.
    Arithmetic and ordering likewise between two Remotes only: with a value they would hand that to
    the candidate, and it may be the expected one (`abs(f(x) - 5) < 1e-6`, and `f(x)` knows what to
    answer). So `handle + 1` is a TypeError, as it is for objects without arithmetic, and `x in
    handle` iterates and compares here. A class of the candidate can be asked for its instances.
    """

    __slots__ = ("_peer", "_handle")

    def __init__(self, peer: "Peer", handle: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return self._peer.ask("attr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self, name, value)

    def __iter__(self) -> Any:
        return self._peer.ask("iter", self)

    def __next__(self) -> Any:
        return self._peer.ask("next", self)

    def __len__(self) -> int:
        return self._peer.ask("len", self)

    def __getitem__(self, key: Any) -> Any:
        return self._peer.ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._peer.ask("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._peer.ask("delitem", self, key)

    def __contains__(self, value: Any) -> bool:
        return any(item is value or item == value for item in self)

    def __bool__(self) -> bool:
        return self._peer.ask("bool", self)

    def __eq__(self, other: object) -> bool:
        return type(other) is Remote and self._peer.ask("eq", self, other) is True

    def __instancecheck__(self, value: object) -> bool:
        return type(value) is Remote and self._peer.ask("isinstance", value, self) is True

    def __subclasscheck__(self, kind: object) -> bool:
        return type(kind) is Remote and self._peer.ask("issubclass", kind, self) is True

    def __str__(self) -> str:
        return self._peer.ask("str", self)

    def __repr__(self) -> str:
        return self._peer.ask("repr", self)

    def __enter__(self) -> Any:
        return self._peer.ask("enter", self)

    def __exit__(self, *_: object) -> None:
        self._peer.ask("exit", self)


def _unary(name: str) -> Callable[[Remote], Any]:
    return lambda self: self._peer.ask(name, self)


def _binary(name: str) -> Callable[[Remote, object], Any]:
    def operation(self: Remote, other: object) -> Any:
        return self._peer.ask(name, self, other) if type(other) is Remote else NotImplemented

    return operation


for _name in _UNARY:
    setattr(Remote, f"__{_name}__", _unary(_name))
for _name in _BINARY:
    setattr(Remote, f"__{_name}__", _binary(_name))


class Peer:
    """Calls out, and answers calls while it waits.

    opaque=True (candidate): any object may cross as a handle, all OPERATIONS are answered.
    opaque=False (judge): only functions and iterators cross, as numbers that can only be called.
    """

    def __init__(self, channel: Channel, opaque: bool) -> None:
        self._channel = channel
        self._opaque = opaque
        self._kept: list[Any] = []
        self._numbers: dict[int, int] = {}
        self.codec = Codec(self._outgoing, self._incoming)
        self._errors = Errors(self._remote)
        self.lost: Lost | None = None
        self.uncarriable: Uncarriable | None = None
        self._gave_class = False
        self._remotes: dict[int, Remote] = {}  # one for each handle: `is` holds

    def ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Have the other side do `operation`; returns its result or raises its exception."""
        table = Table()
        try:
            message = self.codec.encode([list(args), kwargs], table)
            self._channel.send(["ask", operation, message])
        except CodecError as error:  # nested too deep
            verdict = "uncarriable" if self.codec.deepest < MAX_DEPTH // 2 else "fail"
            self.uncarriable = Uncarriable(f"the test passes a value {error}", verdict)
            raise self.uncarriable from None
        except Lost as error:
            self.lost = error
            raise
        kind, result = self._reply(table)
        if kind == "error":
            raise self._errors.rebuild(result)
        return result

    def _reply(self, table: Table) -> tuple[str, Any]:
        try:
            while (reply := self._channel.receive())[0] == "ask":
                self.answer(reply)
            kind, node, changed = reply
            result = self.codec.decode(node, table)
            self.codec.apply_changes(changed, table)
        except Lost as error:
            self.lost = error
            raise
        except (CodecError, TypeError, ValueError, LookupError) as error:
            self.lost = Lost(f"{type(error).__name__}: {error}")
            raise self.lost from None
        return kind, result

    def answer(self, message: Any) -> None:
        """Do what a received ["ask", operation, arguments] asks, and reply."""
        table = Table()
        before: list[str] = []
        try:
            _, operation, node = message
            args, kwargs = self.codec.decode(node, table)
            before = self.codec.snapshot(table)
            if not self._opaque and not self._may_call(operation, args):
                raise PermissionError(operation)
            result = OPERATIONS[operation](*args, **kwargs)
            reply_table = table.first(len(before))
            node = self.codec.encode(result, reply_table)
            reply = ["ok", node, self.codec.changes(reply_table, before)]
        except (Exception, Uncarriable) as error:
            reply = ["error", *self._encode_error(error, table.first(len(before)), before)]
        self._channel.send(reply)

    def _may_call(self, operation: Any, args: Any) -> bool:
        return operation == "call" and any(kept is args[0] for kept in self._kept)

    def _encode_error(self, error: BaseException, table: Table, before: list[str]) -> list[Any]:
        node = self.codec.encode(describe(error, self._keep if self._opaque else None), table)
        try:
            return [node, self.codec.changes(table, before)]
        except (CodecError, RecursionError):
            return [node, []]

    def _outgoing(self, value: Any) -> list[Any]:
        if not self._opaque:
            owner = value if type(value) is Remote else handle_owner(value)
            if type(owner) is Remote:
                return ["own", owner._handle]
        if type(value) is _Function:
            return ["own", value.number]
        if isinstance(value, type) or not self._opaque:
            name = getattr(value, "__name__", "")
            if getattr(builtins, str(name), None) is value:
                return ["builtin", name]
        if self._opaque:
            return self._handle_or_error(value)
        # Of these the candidate can expect no more than to be iterated, or called.
        plain = type(value).__module__ in _PLAIN_MODULES and not isinstance(value, type)
        if plain and isinstance(value, Iterator):
            return ["pull", self._keep(value.__next__)]
        if plain and callable(value):
            return ["function", self._keep(value)]
        # A class or an exception of the candidate's choice may be what cannot cross.
        of_theirs = isinstance(value, Exception) and "from_candidate" in value.__dict__
        forced = self._gave_class or of_theirs
        verdict = "infra_error" if forced else "uncarriable"
        self.uncarriable = Uncarriable(f"the test passes a {type(value).__name__}", verdict)
        raise self.uncarriable

    def _handle_or_error(self, value: Any) -> list[Any]:
        if isinstance(value, Exception):
            return ["error", self.codec.encode(describe(value, self._keep), Table())]
        if isinstance(value, type) and issubclass(value, Exception):
            return ["error class", self.codec.encode(class_node(value, self._keep), Table())]
        return ["handle", self._keep(value)]

    def _keep(self, value: Any) -> int:
        # id() is unique among what is kept alive, and everything numbered is.
        number = self._numbers.setdefault(id(value), len(self._kept))
        if number == len(self._kept):
            self._kept.append(value)
        return number

    def _incoming(self, tag: str, content: Any) -> Any:
        if tag == "own":
            if type(content) is not int or content < 0:
                raise CodecError("malformed message: handle")
            return self._kept[content]
        if tag == "builtin" and self._opaque:
            return getattr(builtins, content)
        if tag == "function" and self._opaque:
            return _Function(self, content)
        if tag == "pull" and self._opaque:
            return _pull(_Function(self, content))
        if tag in ("handle", "builtin", "error", "error class") and not self._opaque:
            return self._foreign(tag, content)
        raise CodecError(f"malformed message: {tag!r}")

    def _foreign(self, tag: str, content: Any) -> Any:
        if tag == "builtin":
            # The candidate returned a type or builtin. Only classes are believed by name.
            value = getattr(builtins, content)
            if not isinstance(value, type):
                raise CodecError("malformed message: builtin")
            self._gave_class = True
            return value
        if tag == "error":
            return self._errors.rebuild(self.codec.decode(content, Table()))
        if tag == "error class":
            return self._errors.class_of(self.codec.decode(content, Table()))
        return self._remote(content)

    def _remote(self, handle: Any) -> "Remote":
        if type(handle) is not int:
            raise CodecError("malformed message: handle")
        return self._remotes.setdefault(handle, Remote(self, handle))


class _Function:
    """A function of the judge, as the candidate sees it."""

    def __init__(self, peer: Peer, number: int) -> None:
        self._peer = peer
        self.number = number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._peer.ask("call", self, *args, **kwargs)


def _pull(function: _Function) -> Iterator[Any]:
    while True:
        try:
            yield function()
        except StopIteration:
            return
