"""The Ray cluster itself: joined or started here, and whether a run fits on its nodes. No actors.

With `workers.placement` and `workers.cluster` the only files that use Ray.
"""

import logging
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.errors import InfrastructureError, UserError
from workers.access import admission, keep_token, loopback
from workers.fitting import Node, Want, missing
from workers.placement import (
    NAMESPACE,
    ROOT,
    PlacementGroupSchedulingStrategy,
    RayError,
    placement_group,
    ray,
    remove_placement_group,
)

NOT_SHIPPED = [".git", ".venv", "runs", "wandb", "build", "**/__pycache__", "**/.*_cache"]
SHM = Path("/dev/shm")
MIB = 2**20
MIN_OBJECT_STORE = 200 * MIB
CONNECT_TIMEOUT_S = 10.0
# Rollout workers of a dead node may still be on their way to the room that is left.
MAKE_ROOM_AFTER_S = 5.0
# Logical ones: on one machine workers share the cores anyway, and an operator may add some.
LOCAL_CPUS = 64


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
    silence_ray()
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        _start(logical_cpus, weight_bytes)
        return True
    _join(address)
    return False


def silence_ray() -> None:
    """Keep the raylet's remarks off stdout, which is for people.

    They are in Ray's own session logs; what matters of them reaches us as errors. The name is
    private (a test pins it), and there is no other way.
    """
    ray._private.worker._worker_logs_enabled = False


def _start(logical_cpus: float, weight_bytes: int) -> None:
    object_store = _object_store(weight_bytes)
    keep_token()
    try:
        with loopback():
            ray.init(
                address="local",
                namespace=NAMESPACE,
                num_cpus=max(len(os.sched_getaffinity(0)), int(logical_cpus) + 1, LOCAL_CPUS),
                include_dashboard=False,
                object_store_memory=object_store,
                log_to_driver=False,
                logging_level=logging.ERROR,
                # Idle workers would cost 45 MiB each, and every actor starts a process of its own.
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
    check_reachable(address, "cluster.address")
    options: dict[str, Any] = {}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        # A submitted job has brought its tree along; anybody else ships this checkout.
        options["runtime_env"] = {"working_dir": str(ROOT), "excludes": NOT_SHIPPED}
    try:
        with admission(address, "cluster.address"):
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"cluster.address={address}: cannot join the Ray cluster: {reason}"
        ) from error


def check_reachable(address: str, source: str) -> None:
    """Ray itself tries for a minute and then prints a page; a refused connection needs neither.

    Args:
        source: where the address was given, for the error's text.
    """
    if "://" in address:
        raise UserError(
            f"{source}={address}: Ray Client addresses are not supported; give host:port "
            "of the head (6379), or submit the run with `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        if address in ("auto", "local"):
            return
        raise UserError(f"{source}={address}: give host:port, for example 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(
            f"{source}={address}: nobody answers there ({error}); start the cluster, or "
            "leave cluster.address and RAY_ADDRESS empty to start one here"
        ) from error


def check_fits(wants: Sequence[Want]) -> None:
    """UserError if the cluster can never hold these workers; says what is missing, per node."""
    text = missing(alive(), wants)
    if text is not None:
        raise UserError(text)


def alive() -> list[Node]:
    """The nodes that Ray does not know to be dead, in a fixed order."""
    nodes = [
        Node(node["NodeManagerAddress"], node["Resources"], node.get("Labels") or {})
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.name, str(node.resources)))


class Reservation:
    """Room for a gang, taken at once or not at all.

    Args:
        name: of the placement group, for Ray's dashboard.
        want: one bundle for each worker.
        strategy: pack (few nodes), spread, strict_spread (a node each).
        make_room: called once if there is none after a few seconds.

    Raises:
        InfrastructureError: others use the room, and did so for `timeout_s`.
    """

    def __init__(
        self,
        name: str,
        want: Want,
        strategy: str,
        timeout_s: float,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        # Ray wants something in every bundle: a byte, for a full node has no bit of a CPU left.
        bundle = {kind: amount for kind, amount in want.each.items() if amount} or {"memory": 1}
        self._group = placement_group(
            [bundle] * want.count,
            strategy=strategy.upper(),
            name=name,
            bundle_label_selector=[dict(want.labels)] * want.count if want.labels else None,
        )
        if not self._group.wait(min(MAKE_ROOM_AFTER_S, timeout_s)):
            make_room()
        if not self._group.wait(timeout_s):
            self.release()
            free = ray.available_resources()
            left = ", ".join(f"{kind} {free.get(kind, 0.0):g}" for kind in bundle)
            raise InfrastructureError(
                f"cluster.{want.role}: no room for {want.count} x {bundle} ({strategy}) within "
                f"{timeout_s:g} s (cluster.timeout_s); free in the whole cluster: {left}"
            )

    def place(self, number: int) -> Any:
        """For `ray.options(scheduling_strategy=...)` of worker `number`."""
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)

    def release(self) -> None:
        """Give the room back; whoever is still there is killed. May be called twice."""
        if ray.is_initialized():
            remove_placement_group(self._group)
