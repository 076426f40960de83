"""`python -m sandbox < cases.jsonl > results.jsonl`: judge programs, one JSON object per line."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

from sandbox.docker import DockerOptions
from sandbox.probe import BACKENDS
from sandbox.records import Case, InvalidCase, Result, SandboxError, case_from_json
from sandbox.service import MAX_WORKERS, Sandbox

_CHUNK = 256


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 however the programs fared, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m sandbox", description=__doc__)
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument("--workers", type=int, default=None, help="default: one per CPU, up to 8")
    parser.add_argument("--allow-unsafe", action="store_true")
    of_docker = parser.add_argument_group("with --backend docker")
    of_docker.add_argument("--image", help=f"default: {DockerOptions.image}")
    of_docker.add_argument("--host", help="the engine's address; default: DOCKER_HOST")
    of_docker.add_argument("--runtime", help="another runtime of the engine, such as runsc")
    of_docker.add_argument(
        "--strict", action="store_true", default=None, help="a new container for every case"
    )
    options = parser.parse_args(arguments)
    given = {
        name: value
        for name in ("image", "host", "runtime", "strict")
        if (value := vars(options)[name]) is not None
    }
    if given and options.backend != "docker":
        parser.error(f"--{next(iter(given))}: is for --backend docker")
    if options.workers is not None and not 1 <= options.workers <= MAX_WORKERS:
        parser.error(f"--workers: {options.workers} is not between 1 and {MAX_WORKERS}")
    try:
        with Sandbox(
            options.backend, options.workers, options.allow_unsafe, DockerOptions(**given)
        ) as sandbox:
            for chunk in _chunks(sys.stdin.buffer):
                _judge_chunk(sandbox, chunk)
    except (SandboxError, ValueError) as error:
        print(f"python -m sandbox: {error}", file=sys.stderr)
        return 2
    return 0


def _judge_chunk(sandbox: Sandbox, chunk: list[Case | Result]) -> None:
    results = iter(sandbox.run(item for item in chunk if isinstance(item, Case)))
    for item in chunk:
        result = next(results) if isinstance(item, Case) else item
        print(json.dumps(result.to_json()), flush=False)
    sys.stdout.flush()


def _chunks(lines: BinaryIO) -> Iterator[list[Case | Result]]:
    chunk: list[Case | Result] = []
    for line in lines:
        if not line.strip():
            continue
        chunk.append(_parse(line))
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _parse(line: bytes) -> Case | Result:
    record: Any = None
    try:
        record = json.loads(line)
        return case_from_json(record)
    except (InvalidCase, ValueError, RecursionError) as error:
        name = record.get("id") if isinstance(record, dict) else None
        label = name if isinstance(name, str) else ""
        return Result(id=label, status="invalid_case", message=str(error) or "malformed line")


if __name__ == "__main__":
    sys.exit(main())
