"""Work beside the caller, and waiting for it no longer than is bearable. Not a pool of threads."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from common.errors import InfrastructureError

T = TypeVar("T")
S = TypeVar("S")


def in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Run `work` beside the caller, in a thread that no exit waits for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # handed to whoever asks the future
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def then(future: Future[S], work: Callable[[S], T]) -> Future[T]:
    """`work` of the result, in the thread that has it; of an exception, the exception."""
    out: Future[T] = Future()

    def pass_on(done: Future[S]) -> None:
        try:
            out.set_result(work(done.result()))
        except BaseException as error:  # handed to whoever asks the future
            out.set_exception(error)

    future.add_done_callback(pass_on)
    return out


def result_of(future: Future[T], what: str, timeout_s: float, limit: str) -> T:
    """The result, or its exception.

    Args:
        limit: the setting that `timeout_s` follows from, for the error's text.

    Raises:
        InfrastructureError: there was none in time; names `what` and the logs.
    """
    try:
        return future.result(timeout_s)
    except TimeoutError as error:
        if future.done():  # the work's own
            raise
        raise InfrastructureError(
            f"{what}: nothing within {limit}; see the logs under the run's logs/"
        ) from error


def chained(future: Future[S], work: Callable[[S], Future[T]]) -> Future[T]:
    """What becomes of the work that the result leads to; of an exception, the exception."""
    out: Future[T] = Future()

    def begin(done: Future[S]) -> None:
        try:
            then(work(done.result()), out.set_result).add_done_callback(pass_error)
        except BaseException as error:  # handed to whoever asks the future
            out.set_exception(error)

    def pass_error(done: Future[None]) -> None:
        error = done.exception()
        if error is not None:
            out.set_exception(error)

    future.add_done_callback(begin)
    return out


def gathered(futures: Sequence[Future[T]]) -> Future[list[T]]:
    """All results in their order; or, as soon as there is one, an exception."""
    out: Future[list[T]] = Future()
    lock, left, results = threading.Lock(), len(futures), dict[int, T]()

    # It must not hold the futures, which hold it: such a ring keeps its results until Python looks.
    def note(place: int, done: Future[T]) -> None:
        nonlocal left
        error = done.exception()
        with lock:
            if left == 0:  # an exception has settled it
                return
            if error is None:
                results[place] = done.result()
            left = 0 if error is not None else left - 1
            if left:
                return
        if error is not None:
            out.set_exception(error)
        else:
            out.set_result([results[place] for place in sorted(results)])

    for place, future in enumerate(futures):
        future.add_done_callback(partial(note, place))
    if not futures:
        out.set_result([])
    return out
