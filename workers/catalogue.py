"""The small actors that weights are found by, watched and made again. Not what they hold. No Ray.

Workers ask for them by name, so a new one takes its predecessor's. What they knew is lost: the
learner publishes again, as after its own death.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from common.errors import LearnerLost
from workers.health import Beat, CrashWatch, WorkerFailed
from workers.slot import Worker, describe_failure

RETRY_S = 0.2


class Catalogues:
    """Keeps one actor of each name alive.

    Args:
        start: begins to start the actor of this name; ValueError while the name is taken.
        patience_s: longest silence, and longest wait for a name.
    """

    def __init__(
        self,
        start: Callable[[str], Worker],
        names: Sequence[str],
        watch: CrashWatch,
        patience_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._start = start
        self._watch = watch
        self._patience_s = patience_s
        self._say = say
        self.workers = {name: start(name) for name in names}
        self._beats: dict[str, Future[Beat]] = {n: w.beat() for n, w in self.workers.items()}
        self.lost: Exception | None = None

    def look(self) -> Exception | None:
        """What the run must be told now, once: one of them is gone, until `mend`."""
        if self.lost is not None:
            return None
        for name, worker in self.workers.items():
            if not self._beats[name].done():
                continue
            error = self._beats[name].exception()
            if error is None:
                self._beats[name] = worker.beat()
                continue
            failure = describe_failure(name, None, worker, error)
            looping = self._watch.failed(failure, [name], time.monotonic())
            loop = None if looping is None else self._watch.verdict(looping)
            self.lost = loop or LearnerLost(str(error))
            return self.lost
        return None

    def mend(self) -> None:
        """Have all of them alive. ValueError: a name does not become free."""
        for name, worker in self.workers.items():
            beat = worker.beat()
            try:
                beat.result(self._patience_s)
            except (WorkerFailed, TimeoutError):
                self._say(f"{name} (where weights are found) is made again; its log: {worker.log}")
                worker.kill()
                worker = self.workers[name] = self._again(name)
                beat = worker.beat()
            self._beats[name] = beat
        self.lost = None

    def _again(self, name: str) -> Worker:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return self._start(name)
            except ValueError:  # Ray has not let go of the name yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)

    def kill(self) -> None:
        """End them."""
        for worker in self.workers.values():
            worker.kill()
