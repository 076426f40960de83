"""`Sandbox`: judge many cases with several workers. The door to this package from Python."""

import os
import queue
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from sandbox.docker import DockerLauncher, DockerOptions
from sandbox.parsing import BATCH
from sandbox.probe import choose_level
from sandbox.records import Case, Result
from sandbox.worker import Worker

MAX_WORKERS = 64


class Sandbox:
    """A context manager around `workers` pairs of zygotes (default: one per CPU, at most 8).

    A worker starts a third one with its first case in another language than Python.

    backend: `auto` takes the strongest level the machine permits (`probe`), `namespace` and
    `landlock` insist on theirs, `unsafe` is limits only. `auto` refuses to fall to that without
    `allow_unsafe`. `docker` runs everything in containers, as `docker` says (otherwise unused).

    Raises:
        SandboxError: a backend this machine does not have, with what to do about it.
    """

    def __init__(
        self,
        backend: str = "auto",
        workers: int | None = None,
        allow_unsafe: bool = False,
        docker: DockerOptions | None = None,
    ) -> None:
        count = min(len(os.sched_getaffinity(0)), 8) if workers is None else workers
        if not 1 <= count <= MAX_WORKERS:
            raise ValueError(f"workers: {count} is not between 1 and {MAX_WORKERS}")
        self._launcher: DockerLauncher | None = None
        if backend == "docker":
            self.backend = backend
            self._launcher = DockerLauncher(docker or DockerOptions())
        else:
            self.backend = choose_level(backend, allow_unsafe)
        self._workers = [Worker(self.backend, self._launcher) for _ in range(count)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="sandbox")

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, cases: Iterable[Case], on_result: Callable[[Result], None] | None = None
    ) -> list[Result]:
        """Judge `cases`; results in the same order. May be called from several threads."""
        results = []
        for result in self._threads.map(self._run_one, cases):
            if on_result is not None:
                on_result(result)
            results.append(result)
        return results

    def parses(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text is syntactically Python (3, this interpreter's), in the same order.

        Parsed in confined processes, many texts in each. Texts that are too long (32 768
        characters), or that end the parser's process, are False and cost the others nothing.

        Raises:
            SandboxError: the sandbox itself failed, also at a second try.
        """
        batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        return [answer for answers in self._threads.map(self._parse, batches) for answer in answers]

    def _parse(self, texts: Sequence[str]) -> list[bool]:
        with self._borrowed() as worker:
            return worker.parses(texts)

    def _run_one(self, case: Case) -> Result:
        with self._borrowed() as worker:
            return worker.run(case)

    @contextmanager
    def _borrowed(self) -> Iterator[Worker]:
        """An idle worker, for this thread alone until the end of the block."""
        worker = self._idle.get()
        try:
            yield worker
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End every process of this sandbox; waits for a test that is being judged."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        if self._launcher is not None:
            self._launcher.close()


def run_cases(
    cases: Sequence[Case],
    backend: str = "auto",
    workers: int | None = None,
    allow_unsafe: bool = False,
    docker: DockerOptions | None = None,
) -> list[Result]:
    """Judge `cases` once, with a sandbox of their own (starting it costs about 0.2 s)."""
    with Sandbox(backend, workers, allow_unsafe, docker) as sandbox:
        return sandbox.run(cases)
