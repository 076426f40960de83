"""The small actors that weights are found by: who is gone is noticed once and made again."""

from concurrent.futures import Future
from pathlib import Path

import pytest

from common.errors import InfrastructureError, LearnerLost
from workers.catalogue import Catalogues
from workers.health import Beat, CrashWatch, WorkerFailed


class Shelf:
    """Answers at once while it is alive."""

    log = Path("weights.log")

    def __init__(self) -> None:
        self.alive = True

    def call(self, method: str) -> Future[None]:
        raise NotImplementedError

    def beat(self) -> Future[Beat]:
        future: Future[Beat] = Future()
        if self.alive:
            future.set_result(Beat(1, "here"))
        else:
            future.set_exception(WorkerFailed("weights failed in `beat`: killed", died=True))
        return future

    def kill(self) -> None:
        self.alive = False


class House:
    """Where catalogues are started; a name may stay taken for a while."""

    def __init__(self, limit: int = 3) -> None:
        self.taken = 0
        self.started: list[tuple[str, Shelf]] = []
        self.said: list[str] = []
        watch = CrashWatch(limit, 600.0)
        names = ["weights", "roster"]
        self.catalogues = Catalogues(self.start, names, watch, 1.0, self.said.append)

    def start(self, name: str) -> Shelf:
        if len(self.started) >= 2 and self.taken > 0:
            self.taken -= 1
            raise ValueError(f"{name} is taken")
        self.started.append((name, Shelf()))
        return self.started[-1][1]


def test_nothing_is_said_of_the_living() -> None:
    house = House()
    assert [house.catalogues.look() for _ in range(3)] == [None] * 3
    house.catalogues.mend()
    assert len(house.started) == 2
    assert house.said == []


@pytest.mark.parametrize("taken", [0, 2])
def test_a_death_is_told_once_and_mended(taken: int) -> None:
    house = House()
    house.taken = taken
    house.started[1][1].alive = False
    house.catalogues.look()  # the beat from before its death
    lost = house.catalogues.look()
    assert isinstance(lost, LearnerLost)
    assert house.catalogues.lost is lost
    assert house.catalogues.look() is None
    house.catalogues.mend()
    assert [name for name, _ in house.started] == ["weights", "roster", "roster"]
    assert house.catalogues.lost is None
    assert house.catalogues.look() is None
    assert len(house.said) == 1


def test_mending_finds_by_itself_who_is_gone() -> None:
    """A publish may fail before anybody has looked."""
    house = House()
    house.started[0][1].alive = False
    house.catalogues.mend()
    assert [name for name, _ in house.started] == ["weights", "roster", "weights"]


def test_dying_over_and_over_is_a_loop() -> None:
    house = House(limit=2)
    for _ in range(2):
        house.catalogues.workers["weights"].kill()
        house.catalogues.look()
        lost = house.catalogues.look()
        house.catalogues.mend()
    assert isinstance(lost, InfrastructureError)
    assert not isinstance(lost, LearnerLost)
    assert "weights failed 2 times" in str(lost)


def test_a_name_that_stays_taken_ends_the_wait() -> None:
    house = House()
    house.taken = 1000
    house.started[0][1].alive = False
    with pytest.raises(ValueError, match="weights is taken"):
        house.catalogues.mend()
