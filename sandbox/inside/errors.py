"""Exceptions across the border: they can be caught, raised and compared on the judge's side.

`except`, `raise` and `isinstance` want true classes. So a class that the candidate defined gets a
stand-in here, a subclass of the builtin it derives from, with no code of the candidate. An
exception keeps its handle: attributes that the stand-in lacks are asked for there.
"""

import builtins
from collections.abc import Callable
from typing import Any

from sandbox.inside.codec import CodecError

Keep = Callable[[Any], int]


class StandIn(type):
    """Metaclass of the judge's classes for those of the candidate."""

    remote: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.remote(*args, **kwargs)  # made over there, comes back as an exception

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.remote, name)


def class_node(kind: type, keep: Keep) -> list[Any]:
    """[nearest builtin, [[own name, handle, nearest builtin], ...]] for `kind` and its own bases,
    from the first down to `kind`; builtins by name.
    """
    lineage = kind.__mro__[: kind.__mro__.index(_builtin(kind))]
    own = [k for k in reversed(lineage) if issubclass(k, BaseException)]
    steps = [[k.__name__, keep(k), _builtin(k).__name__] for k in own]
    return [_builtin(kind).__name__, steps]


def describe(error: BaseException, keep: Keep | None = None) -> list[Any]:
    """What of an exception may cross: [builtin's name, own name, args, text, class, handle].

    The last two are None without `keep` (the judge's exceptions).
    """
    kind = type(error)
    try:
        args = [a for a in error.args if type(a) in (str, int, float, bool, type(None))]
        complete = len(args) == len(error.args)
        text = str(error)[:2000]
    except Exception:  # a candidate's __str__ or args may do anything
        complete, args, text = False, [], ""
    known = [_builtin(kind).__name__, kind.__name__, args if complete else [text], text]
    if keep is None:
        return [*known, None, None]
    return [*known, class_node(kind, keep), keep(error)]


def _builtin(kind: type) -> type:
    return next(k for k in kind.__mro__ if getattr(builtins, k.__name__, None) is k)


class Errors:
    """The judge's stand-ins. remote(handle) gives what stands for another object."""

    def __init__(self, remote: Callable[[int], Any]) -> None:
        self._remote = remote
        self._classes: dict[int, type[Exception]] = {}

    def class_of(self, node: Any) -> type[Exception]:
        """The class for a `class_node`. Raises CodecError."""
        try:
            name, steps = node
            kind = _builtin_error(name)
            parent = None
            for own_name, handle, builtin in steps:
                kind = parent = self._stand_in(parent, own_name, handle, _builtin_error(builtin))
        except (TypeError, ValueError) as error:
            raise CodecError(f"malformed message: {type(error).__name__}") from None
        return kind

    def _stand_in(
        self, parent: type[Exception] | None, name: Any, handle: Any, builtin: type[Exception]
    ) -> type[Exception]:
        if type(name) is not str or type(handle) is not int:
            raise CodecError("malformed message: an exception's class")
        if handle not in self._classes:
            content = {
                "remote": self._remote(handle),
                "__module__": "candidate",
                "__str__": lambda error: error.text,
                "__getattr__": _ask_for,
            }
            bases: tuple[Any, ...] = (builtin,) if parent is None else (parent,)
            if parent is not None and not issubclass(parent, builtin):
                bases = (parent, builtin)
            made: Any = StandIn(name, bases, content)
            self._classes[handle] = made
        return self._classes[handle]

    def rebuild(self, description: Any) -> Exception:
        """The exception for `describe`'s list; something that can be raised in any case."""
        try:
            name, own_name, args, text, lineage, handle = description
            found = getattr(builtins, name, None)
            if not (isinstance(found, type) and issubclass(found, Exception)):
                return _from_candidate(RuntimeError(f"{own_name}: {args}"))
            kind = found if lineage is None else self.class_of(lineage)
            error = type.__call__(kind, *args)
            error.text = text
            error.remote = None if handle is None else self._remote(handle)
        except (TypeError, ValueError, CodecError):
            error = RuntimeError("an exception that cannot be rebuilt")
        return _from_candidate(error)


def _from_candidate(error: Any) -> Exception:
    error.from_candidate = True
    return error


def _builtin_error(name: Any) -> type[Exception]:
    kind = getattr(builtins, name, None) if type(name) is str else None
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        raise CodecError("malformed message: an exception's class")
    return kind


def _ask_for(error: Any, name: str) -> Any:
    remote = error.__dict__.get("remote")
    if remote is None or name in ("text", "remote", "from_candidate"):
        raise AttributeError(name)
    return getattr(remote, name)


def handle_owner(value: Any) -> Any:
    """What stands for the candidate's object that `value` is a stand-in of, or None."""
    if isinstance(value, StandIn):
        return value.remote
    if isinstance(value, Exception):
        return value.__dict__.get("remote")
    return None
