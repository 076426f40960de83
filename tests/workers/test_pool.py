"""Every piece is counted once, whoever dies, whenever they answer. No processes here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.pool import Job, Pool, cut


def test_pieces_go_out_in_order_and_results_come_back_in_order() -> None:
    pool = Pool()
    job = pool.submit(["a", "b", "c"], 0.0)
    assert pool.assign(["w0", "w1"]) == [("w0", 0, "a"), ("w1", 1, "b")]
    assert pool.assign(["w0", "w1"]) == []
    assert pool.finish("w1", 1, "B")
    assert pool.assign(["w1"]) == [("w1", 2, "c")]
    assert pool.finish("w1", 2, "C")
    assert not job.future.done()
    assert pool.finish("w0", 0, "A")
    assert job.future.result(0) == ["A", "B", "C"]
    assert (pool.waiting, pool.under_way, pool.jobs()) == (0, 0, [])


def test_a_lost_piece_goes_out_again_before_later_ones() -> None:
    pool = Pool()
    job = pool.submit(["a", "b", "c"], 0.0)
    pool.assign(["w0", "w1"])
    assert pool.lose("w0") == 0
    assert pool.assign(["w2"]) == [("w2", 0, "a")]
    assert not pool.finish("w0", 0, "late")  # declared dead: nobody's answer
    assert pool.finish("w2", 0, "A")
    assert not pool.finish("w2", 0, "twice")
    assert job.results[0] == "A"
    assert pool.reissued == 1


def test_a_forgotten_job_keeps_nobody_busy_for_long() -> None:
    pool = Pool()
    old = pool.submit(["a", "b"], 0.0)
    pool.assign(["w0"])
    pool.fail(old, RuntimeError("dropped"))
    with pytest.raises(RuntimeError):
        old.future.result(0)
    new = pool.submit(["c"], 0.0)
    assert pool.assign(["w0"]) == []  # it works on the dropped piece still
    assert not pool.finish("w0", 0, "A")
    assert [work for _, _, work in pool.assign(["w0"])] == ["c"]
    assert pool.jobs() == [new]


def test_nothing_to_do_is_done() -> None:
    assert Pool().submit([], 0.0).future.result(0) == []


class Play:
    """A pool under the hands of fate: workers answer, die, answer after their death."""

    def __init__(self) -> None:
        self.pool = Pool()
        self.jobs: list[tuple[Job, list[int]]] = []
        self.dropped: list[Job] = []
        self.handed: list[tuple[str, int, int]] = []  # all that ever went out
        self.alive = ["w0"]
        self.born = 1
        self.counted: list[int] = []

    def submit(self, size: int) -> None:
        first = sum(len(work) for _, work in self.jobs)
        work = list(range(first, first + size))
        self.jobs.append((self.pool.submit(work, 0.0), work))

    def assign(self) -> None:
        handed = self.pool.assign(self.alive)
        assert len({worker for worker, _, _ in handed}) == len(handed)
        self.handed += handed

    def answer(self, which: int) -> None:
        """Anybody who ever got a piece, alive or not, perhaps for the second time."""
        if self.handed:
            worker, number, work = self.handed[which % len(self.handed)]
            if self.pool.finish(worker, number, work * 10):
                self.counted.append(work)
                assert worker in self.alive

    def die(self, which: int) -> None:
        worker = self.alive.pop(which % len(self.alive))
        self.pool.lose(worker)
        self.alive.append(f"w{self.born}")
        self.born += 1

    def join(self) -> None:
        self.alive.append(f"w{self.born}")
        self.born += 1

    def drop(self, which: int) -> None:
        if self.jobs:
            job = self.jobs[which % len(self.jobs)][0]
            if not job.future.done():
                self.pool.fail(job, RuntimeError("dropped"))
                self.dropped.append(job)

    def end(self) -> None:
        """From now on everybody lives and answers."""
        while self.pool.waiting or self.pool.under_way:
            self.assign()
            for worker in self.alive:
                number = self.pool.running(worker)
                if number is not None:
                    work = next(k for w, n, k in self.handed if (w, n) == (worker, number))
                    if self.pool.finish(worker, number, work * 10):
                        self.counted.append(work)


MOVES = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 5)),
    st.tuples(st.just("answer"), st.integers(0, 50)),
    st.tuples(st.just("die"), st.integers(0, 5)),
    st.tuples(st.just("drop"), st.integers(0, 5)),
    st.tuples(st.sampled_from(["assign", "join"])),
)


@given(st.lists(MOVES, max_size=80))
def test_whatever_happens_every_piece_counts_once(moves: list[tuple[str, int]]) -> None:
    play = Play()
    for name, *arguments in moves:
        getattr(play, name)(*arguments)
        pool = play.pool
        assert pool.waiting >= 0
        assert pool.waiting + pool.under_way == len(pool._pieces)
    play.end()
    assert len(play.counted) == len(set(play.counted))
    for job, work in play.jobs:
        if job in play.dropped:
            assert isinstance(job.future.exception(0), RuntimeError)
        else:
            assert job.future.result(0) == [k * 10 for k in work]
            assert set(work) <= set(play.counted)


def test_pieces_shrink_towards_the_end() -> None:
    assert [len(piece) for piece in cut(range(16), 2)] == [4, 3, 3, 2, 1, 1, 1, 1]
    assert [len(piece) for piece in cut(range(16), 2, smallest=8)] == [8, 8]
    assert [len(piece) for piece in cut(range(5), 8)] == [1] * 5
    assert cut([], 3) == []


@given(st.integers(0, 200), st.integers(0, 20), st.integers(1, 9))
def test_cutting_loses_nothing(count: int, workers: int, smallest: int) -> None:
    pieces = cut(range(count), workers, smallest)
    assert [item for piece in pieces for item in piece] == list(range(count))
    assert all(len(piece) >= smallest for piece in pieces[:-1])
