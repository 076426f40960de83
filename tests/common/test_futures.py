"""Results, exceptions and waits that end."""

from concurrent.futures import Future

import pytest

from common.errors import InfrastructureError
from common.futures import in_thread, result_of, then


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
