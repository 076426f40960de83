"""Where actors run: joining or starting Ray, wrapping a worker, waiting for it. Not what they do.

With `workers.cluster` the only file that imports Ray. Worker classes stay plain: `Shell` is the one
actor class, and gives each worker its log file and its clean environment. Every actor imports this
file, so it imports neither torch nor a configuration.
"""

import logging
import os
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InfrastructureError, UserError
from common.files import private_folder
from common.secret_names import is_secret

# isort: off
from workers.access import admission, forget_secrets, keep_token, loopback, ray

# After `workers.access`, which makes the settings that Ray reads when it is imported.
import ray._private.worker as ray_worker
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
# isort: on


ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = [".git", ".venv", "runs", "wandb", "build", "**/__pycache__", "**/.*_cache"]
SHM = Path("/dev/shm")
MIB = 2**20
MIN_OBJECT_STORE = 200 * MIB
CONNECT_TIMEOUT_S = 10.0
TASK_RETRIES = 3
GRACE_S = 1.0


# Joining or starting Ray


def connect(address: str | None, logical_cpus: float, weight_bytes: int) -> bool:
    """Join the cluster at `address` or RAY_ADDRESS, else start one here; True if started.

    A process that is connected already (tests, notebooks) stays with its cluster.

    Args:
        logical_cpus: what the actors will ask for together; a local start offers that much.
        weight_bytes: size of one version of the weights; a local object store holds several.

    Raises:
        UserError: nobody at the address, or no shared memory to start with.
        InfrastructureError: Ray did not start.
    """
    # Private (pinned by a test), and the only way to keep the raylet's remarks off stdout, which is
    # for people. They are in Ray's own session logs; what matters of them reaches us as errors.
    ray_worker._worker_logs_enabled = False
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        _start(logical_cpus, weight_bytes)
        return True
    _join(address)
    return False


def _start(logical_cpus: float, weight_bytes: int) -> None:
    object_store = _object_store(weight_bytes)
    keep_token()
    try:
        with loopback():
            ray.init(
                address="local",
                num_cpus=max(len(os.sched_getaffinity(0)), int(logical_cpus) + 1),
                include_dashboard=False,
                object_store_memory=object_store,
                log_to_driver=False,
                logging_level=logging.ERROR,
                # Idle workers would cost 45 MiB each, and actors start processes of their own.
                _system_config={
                    "prestart_worker_first_driver": False,
                    "enable_worker_prestart": False,
                },
            )
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InfrastructureError(f"Ray did not start on this machine: {reason}") from error


def _object_store(weight_bytes: int) -> int:
    """Bytes for the object store: two versions of the weights, one in the making, one to spare."""
    wanted = max(MIN_OBJECT_STORE, 4 * weight_bytes + 100 * MIB)
    if not (SHM.is_dir() and os.access(SHM, os.W_OK)):
        raise UserError(
            f"{SHM}: no shared memory for Ray; in a container start it with --shm-size=1g, "
            "or set cluster.kind=local"
        )
    free = shutil.disk_usage(SHM).free
    if free < wanted:
        raise UserError(
            f"{SHM}: {free // MIB} MiB free, Ray needs {wanted // MIB} MiB; free some (in a "
            "container: --shm-size=1g), or set cluster.kind=local"
        )
    return wanted


def _join(address: str) -> None:
    _check_reachable(address)
    options: dict[str, Any] = {}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        # A submitted job has brought its tree along; anybody else ships this checkout.
        options["runtime_env"] = {"working_dir": str(ROOT), "excludes": NOT_SHIPPED}
    try:
        with admission(address, "cluster.address"):
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"cluster.address={address}: cannot join the Ray cluster: {reason}"
        ) from error


def _check_reachable(address: str) -> None:
    """Ray itself tries for a minute and then prints a page; a refused connection needs neither."""
    if "://" in address:
        raise UserError(
            f"cluster.address={address}: Ray Client addresses are not supported; give host:port "
            "of the head (6379), or submit the run with `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        if address in ("auto", "local"):
            return
        raise UserError(f"cluster.address={address}: give host:port, for example 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"cluster.address={address}: nobody answers there ({error}); start the cluster, or "
            "leave cluster.address and RAY_ADDRESS empty to start one here"
        ) from error


def check_fits(wanted: Mapping[str, Mapping[str, float]]) -> None:
    """UserError if the cluster can never hold the pools: {role: {"CPU": n, "GPU": n}}."""
    there = ray.cluster_resources()
    for kind in ("CPU", "GPU"):
        total = sum(pool.get(kind, 0.0) for pool in wanted.values())
        if total > there.get(kind, 0.0):
            parts = ", ".join(f"{role} {pool.get(kind, 0):g}" for role, pool in wanted.items())
            nodes = ", ".join(
                f"{node['NodeManagerAddress']} {node['Resources'].get(kind, 0):g}"
                for node in ray.nodes()
                if node["Alive"]
            )
            raise UserError(
                f"cluster: asks for {total:g} {kind} ({parts}) but Ray has "
                f"{there.get(kind, 0.0):g} ({nodes}); lower cluster.*.num_{kind.lower()}s or the "
                "numbers of workers"
            )


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
        """Call `method` of the worker."""
        if self._problem is not None:
            raise self._problem
        return getattr(self._worker, method)(*args)

    def ready(self) -> int:
        """The process id, once the worker is built."""
        if self._problem is not None:
            raise self._problem
        return os.getpid()

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

    def ask(self, method: str, *args: Any) -> "Pending":
        """Start a method of the shell itself (`ready`, `meeting_point`)."""
        return Pending(self, method, getattr(self.handle, method).remote(*args))


@dataclass(frozen=True)
class Pending:
    """One call under way."""

    actor: Actor
    method: str
    ref: Any


def launch(
    name: str,
    log: Path,
    build: Callable[[], Any],
    *,
    run: str,
    num_cpus: float,
    num_gpus: float = 0.0,
    threads: int = 1,
    restarts: bool = False,
    secrets: bool = True,
    local: bool,
) -> Actor:
    """Start an actor around `build()` and return at once.

    Args:
        run: prefix that makes the name unique in the cluster, for `find`.
        restarts: bring it back when it dies and repeat its unfinished calls (pure functions only).
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
    handle = (
        ray.remote(Shell)
        .options(
            name=f"{run}-{name}",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            max_restarts=-1 if restarts else 0,
            max_task_retries=TASK_RETRIES if restarts else 0,
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
        return Actor(name, log, ray.get_actor(f"{run}-{name}"))
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
            raise _root_cause(error, pending) from error.__cause__
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
    deaths = [failure for failure in failures if isinstance(failure.__cause__, RayActorError)]
    inputs = [failure for failure in failures if isinstance(failure, UserError)]
    return [*inputs, *deaths, first][0]


def _result(call: Pending, timeout_s: float) -> Any:
    try:
        return ray.get(call.ref, timeout=timeout_s)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, UserError):
            raise cause from None
        raise _failure(call, f"{type(cause).__name__}: {cause}") from error
    except GetTimeoutError as error:
        raise _failure(call, f"the result did not arrive within {timeout_s:g} s") from error
    except RayError as error:
        raise _failure(call, " ".join(str(error).split())[:300]) from error


def _failure(call: Pending, reason: str) -> InfrastructureError:
    return InfrastructureError(
        f"{call.actor.name} failed in `{call.method}`: {reason}; its log is {call.actor.log}"
    )
