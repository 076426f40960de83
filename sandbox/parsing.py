"""Has a zygote find out which texts are Python. The worker's side; see `inside.parsing`."""

import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from sandbox.inside.parsing import YES
from sandbox.payload import payload
from sandbox.process import ZygoteProcess
from sandbox.records import Limits

MAX_CHARS = 32_768
BATCH = 64
_SECONDS = 10.0  # for one text; an honest one of MAX_CHARS takes 0.1 s
_LIMITS = asdict(Limits(seconds=_SECONDS * BATCH, processes=1))


def parse_texts(zygote: Callable[[], ZygoteProcess], texts: Sequence[str]) -> list[bool]:
    """Whether each text parses; False above MAX_CHARS and where the parser's process gave up.

    Raises ZygoteError or OSError for the machine's faults, never for what a text does.
    """
    found = [False] * len(texts)
    left = [number for number, text in enumerate(texts) if len(text) <= MAX_CHARS]
    while left:
        answers = _first_answers(zygote(), [texts[number] for number in left[:BATCH]])
        for number, answer in zip(left, answers, strict=False):
            found[number] = answer
        left = left[len(answers) :]
    return found


def _first_answers(zygote: ZygoteProcess, texts: list[str]) -> list[bool]:
    """Answers for the first of `texts`, at least one: up to the first that ended the process."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb", buffering=0) as answers:
        try:
            with payload(texts) as job:
                zygote.run("parse", _LIMITS, [job, write_end])
        finally:
            os.close(write_end)
        received = _receive(answers.fileno(), len(texts))
        zygote.kill()  # whatever it is still at
        zygote.wait()
    found = [byte == YES[0] for byte in received]
    return found if len(found) == len(texts) else [*found, False]


def _receive(answers: int, count: int) -> bytes:
    received = b""
    deadline = time.monotonic() + _SECONDS
    while len(received) < count:
        left = max(deadline - time.monotonic(), 0.0)
        if not select.select([answers], [], [], left)[0]:
            break
        data = os.read(answers, count - len(received))
        if not data:
            break
        received += data
        deadline = time.monotonic() + _SECONDS  # each text has its own
    return received
