"""Actors: wrapping a worker, starting it, calling it, waiting for it. Not what workers do.

The one file that imports Ray, which it sets up first. Worker classes stay plain: `Shell` is the one
actor class, and gives each worker its log file, its clean environment and its heartbeat. Every
actor imports this file, so it imports neither torch nor a configuration.
"""

import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InfrastructureError, LearnerLost, UserError
from common.files import private_folder
from common.secret_names import is_secret
from workers.health import Beat, WorkerFailed

# isort: off
from workers.access import forget_secrets, ray

# After `workers.access`, which makes the settings that Ray reads when it is imported.
from ray.exceptions import (
    GetTimeoutError,
    ObjectFetchTimedOutError,  # noqa: F401
    ObjectLostError,  # noqa: F401
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.placement_group import placement_group, remove_placement_group  # noqa: F401
from ray.util.scheduling_strategies import (  # noqa: F401
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)
# isort: on


ROOT = Path(__file__).resolve().parents[1]
# Of named actors: the control actor is found from other jobs by it.
NAMESPACE = "unmask"
HEALTH = "health"
GRACE_S = 1.0
LOG_LINES = 20
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_REASON = re.compile(r"(?:is dead|died) because (?P<why>[^.]*\.[^.]*)")


# Actors


class Shell:
    """The body of every actor: opens the log, cleans the environment, builds the worker.

    Bad input found while building is kept and raised at the first call: Ray would print it as a
    dead actor's traceback.
    """

    def __init__(self, log: str, secrets: bool, build: Callable[[], Any]) -> None:
        _redirect_output(Path(log))
        # Weights are read where they lie, by readers that only copy from them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if not secrets:
            forget_secrets()
        self._problem: UserError | None = None
        try:
            self._worker = build()
        except UserError as error:
            self._problem = error

    def call(self, method: str, *args: Any) -> Any:
        """Call `method` of the worker, or `meeting_point` of this shell."""
        if self._problem is not None:
            raise self._problem
        return getattr(self if method == "meeting_point" else self._worker, method)(*args)

    def beat(self) -> Beat:
        """A sign of life, once the worker is built. Runs beside whatever the worker is doing."""
        if self._problem is not None:
            raise self._problem
        version = getattr(self._worker, "policy_version", None)  # reward workers have none
        return Beat(os.getpid(), ray.util.get_node_ip_address(), version)

    def meeting_point(self) -> tuple[str, int]:
        """This node's address and a port that is free on it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])


def _redirect_output(log: Path) -> None:
    private_folder(log.parent)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # Ray has put its own objects in their place, which write elsewhere.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


@dataclass(frozen=True)
class Actor:
    """A handle with a name and a log file, so that errors can say both."""

    name: str
    log: Path
    handle: Any

    def call(self, method: str, *args: Any) -> "Pending":
        """Start `method` of the worker."""
        return Pending(self, method, self.handle.call.remote(method, *args))

    def beat(self) -> "Pending":
        """Ask for a sign of life."""
        return Pending(self, "beat", self.handle.beat.options(concurrency_group=HEALTH).remote())

    def kill(self) -> None:
        """End it, also if it is stopped and cannot hear. May be called twice."""
        if ray.is_initialized():
            ray.kill(self.handle, no_restart=True)


@dataclass(frozen=True)
class Pending:
    """One call under way."""

    actor: Actor
    method: str
    ref: Any

    @property
    def future(self) -> Future[Any]:
        """Its result, or UserError, LearnerLost or WorkerFailed, without waiting."""
        out: Future[Any] = Future()

        def settle(found: Future[Any]) -> None:
            error = found.exception()
            if error is None:
                out.set_result(found.result())
            else:
                out.set_exception(_told(self, error))

        self.ref.future().add_done_callback(settle)
        return out


@dataclass(frozen=True)
class Remote:
    """An actor as `workers.crew.Worker`."""

    actor: Actor

    @property
    def log(self) -> Path:
        """Where it writes."""
        return self.actor.log

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Start `method` of the worker."""
        return self.actor.call(method, *args).future

    def beat(self) -> Future[Beat]:
        """Ask for a sign of life."""
        return self.actor.beat().future

    def kill(self) -> None:
        """End it."""
        self.actor.kill()


def launch(
    name: str,
    log: Path,
    build: Callable[[], Any],
    *,
    run: str,
    num_cpus: float,
    num_gpus: float = 0.0,
    threads: int = 1,
    incarnation: int = 0,
    resources: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None,
    place: Any = None,
    here: bool = False,
    secrets: bool = True,
    local: bool,
) -> Actor:
    """Start an actor around `build()` and return at once.

    Args:
        run: prefix that makes the name unique in the cluster, for `find`.
        incarnation: how many of this name there were before; they share the log.
        resources, labels: of the node, as Ray was told when the node was started.
        here: on the caller's node, to live and die with it.
        place: a bundle of a `workers.nodes.Reservation`, which has its own labels.
        secrets: False keeps tokens and keys out of its environment.
        local: this process started Ray, so the checkout is not shipped but found by its path.
    """
    # A log file wants no progress bars.
    environment = {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    if local:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if num_gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if not secrets:
        environment |= {key: "" for key, value in os.environ.items() if is_secret(key, value)}
    where: dict[str, Any] = {}
    if place is not None:
        where["scheduling_strategy"] = place
    elif here:
        node = ray.get_runtime_context().get_node_id()
        where["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
    elif labels:
        where["label_selector"] = dict(labels)
    # Ray restarts nothing: whoever was declared dead must not come back and answer.
    handle = (
        ray.remote(concurrency_groups={HEALTH: 1})(Shell)
        .options(
            name=f"{run}-{name}" + (f".{incarnation}" if incarnation else ""),
            namespace=NAMESPACE,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            resources=dict(resources or {}),
            **where,
            runtime_env={"env_vars": environment},
        )
        .remote(str(log), secrets, build)
    )
    return Actor(name, log, handle)


def find(run: str, name: str, log: Path) -> Actor:
    """The actor of this name, from inside another one.

    Workers are given names, not handles: Ray cannot promise to restart an actor whose constructor
    was given a handle.

    Raises:
        InfrastructureError: it is gone.
    """
    try:
        return Actor(name, log, ray.get_actor(f"{run}-{name}", namespace=NAMESPACE))
    except ValueError as error:
        raise InfrastructureError(f"{name} is gone; its log is {log}") from error


def wait(calls: Sequence[Pending], timeout_s: float) -> list[Any]:
    """The results, in order. The first failure ends the wait: its peers may hang because of it.

    If several fail within a moment, the one that looks like the cause is raised: bad input before
    a death, a death before the errors of those who lost a peer.

    Raises:
        UserError: a worker found bad input.
        InfrastructureError: a worker failed, died for good, or did not answer in time; names it
            and its log file.
    """
    deadline = time.monotonic() + timeout_s
    pending = {call.ref: call for call in calls}
    results: dict[Any, Any] = {}
    while pending:
        left = max(0.0, deadline - time.monotonic())
        done, _ = ray.wait(list(pending), num_returns=1, timeout=left)
        if not done:
            late = next(iter(pending.values()))
            raise InfrastructureError(
                f"{late.actor.name} did not finish `{late.method}` within {timeout_s:g} s "
                f"(cluster.timeout_s); its log is {late.actor.log}"
            )
        call = pending.pop(done[0])
        try:
            results[call.ref] = _result(call, timeout_s)
        except (UserError, InfrastructureError) as error:
            raise _root_cause(error, pending) from None
    return [results[call.ref] for call in calls]


def _root_cause(first: Exception, pending: Mapping[Any, Pending]) -> Exception:
    failures = [first]
    if pending:
        done, _ = ray.wait(list(pending), num_returns=len(pending), timeout=GRACE_S)
        for ref in done:
            try:
                _result(pending[ref], GRACE_S)
            except (UserError, InfrastructureError) as error:
                failures.append(error)
    deaths = [error for error in failures if isinstance(error, WorkerFailed) and error.died]
    inputs = [failure for failure in failures if isinstance(failure, UserError)]
    return [*inputs, *deaths, first][0]


def _result(call: Pending, timeout_s: float) -> Any:
    try:
        return ray.get(call.ref, timeout=timeout_s)
    except GetTimeoutError as error:
        raise _failed(call, f"the result did not arrive within {timeout_s:g} s") from error
    except RayError as error:
        raise _told(call, error) from error


def _told(call: Pending, error: BaseException) -> Exception:
    """What Ray says, as one of ours."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, UserError | LearnerLost):
            return cause
        return _failed(call, f"{type(cause).__name__}: {cause}", _COLOUR.sub("", str(error)))
    reason = _short(str(error))
    details = f"{_COLOUR.sub('', str(error))}\n{tail(call.actor.log)}"
    return _failed(call, reason, details, died=isinstance(error, RayActorError))


def _short(text: str) -> str:
    """Ray's reason for a death without the page around it."""
    text = _COLOUR.sub("", text).strip()
    if "creation task" in text:  # the last line of its traceback
        return f"it could not be built: {text.splitlines()[-1].strip()}"[:300]
    text = " ".join(text.split())
    found = _REASON.search(text)
    return (found["why"] if found else text)[:200]


def _failed(call: Pending, reason: str, details: str = "", died: bool = False) -> WorkerFailed:
    text = f"{call.actor.name} failed in `{call.method}`: {reason}; its log is {call.actor.log}"
    return WorkerFailed(text, details, died)


def tail(log: Path, lines: int = LOG_LINES) -> str:
    """The end of a worker's log, if it is on a file system that we see."""
    if not log.is_file():
        return ""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
