"""Results, exceptions and waits that end."""

import gc
import weakref
from concurrent.futures import Future

import pytest

from common.errors import InfrastructureError
from common.futures import chained, gathered, in_thread, result_of, then


def test_in_thread_hands_over_results_and_exceptions() -> None:
    assert in_thread(lambda: 3, "three").result(10) == 3
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda: 1 // 0, "none").result(10)


def test_then_works_on_results_and_passes_exceptions_on() -> None:
    first: Future[int] = Future()
    second = then(first, lambda value: value + 1)
    broken = then(second, lambda value: value // 0)
    assert not second.done()
    first.set_result(1)
    assert second.result(0) == 2
    with pytest.raises(ZeroDivisionError):
        broken.result(0)
    with pytest.raises(ZeroDivisionError):
        then(broken, str).result(0)


def test_a_wait_that_is_too_long_names_what_and_where_to_look() -> None:
    with pytest.raises(InfrastructureError, match=r"score of step 3: nothing within a=1; .*logs/"):
        result_of(Future(), "score of step 3", 0.01, "a=1")
    own: Future[int] = Future()
    own.set_exception(TimeoutError("the work's own"))
    with pytest.raises(TimeoutError, match="the work's own"):
        result_of(own, "x", 1.0, "a=1")


def test_chained_is_done_when_the_second_is() -> None:
    first, second = Future[int](), Future[str]()
    both = chained(first, lambda value: then(second, lambda text: text * value))
    first.set_result(3)
    assert not both.done()
    second.set_result("a")
    assert both.result(0) == "aaa"


@pytest.mark.parametrize("where", ["first", "between", "second"])
def test_chained_hands_over_any_exception(where: str) -> None:
    first, second = Future[int](), Future[str]()
    wrong = ValueError(where)

    def work(value: int) -> Future[str]:
        if where == "between":
            raise wrong
        return second

    both = chained(first, work)
    if where == "first":
        first.set_exception(wrong)
    else:
        first.set_result(1)
        if where == "second":
            second.set_exception(wrong)
    assert both.exception(0) is wrong


def test_gathered_in_their_order_however_they_come() -> None:
    futures = [Future[int]() for _ in range(3)]
    everything = gathered(futures)
    for place in (2, 0, 1):
        assert not everything.done()
        futures[place].set_result(place)
    assert everything.result(0) == [0, 1, 2]
    assert gathered([]).result(0) == []


def test_gathered_fails_with_the_first_exception_and_hears_no_more() -> None:
    futures = [Future[int]() for _ in range(4)]
    everything = gathered(futures)
    futures[0].set_result(0)
    futures[2].set_exception(ValueError("first"))
    assert str(everything.exception(0)) == "first"
    futures[1].set_exception(ValueError("second"))
    futures[3].set_result(3)
    assert str(everything.exception(0)) == "first"


class Big:
    """Something whose end can be seen."""


def test_results_are_let_go_at_once() -> None:
    """Not when Python next looks for rings of objects: a batch of rollouts is megabytes."""
    gc.disable()
    try:
        first = Future[Big]()
        everything = gathered([chained(then(first, lambda big: big), settled), Future[Big]()])
        big = Big()
        seen = weakref.ref(big)
        first.set_result(big)
        del first, everything, big
        assert seen() is None
    finally:
        gc.enable()


def settled(value: Big) -> Future[Big]:
    future: Future[Big] = Future()
    future.set_result(value)
    return future
