"""Asking a run from outside: `unmask status` and `unmask scale`, from any node. Not the run's side.

A run is found by its folder (which says where its cluster is) or, with an address, by its name.
"""

import json
import logging
import os
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InfrastructureError, UserError
from workers.access import admission
from workers.control import CONTROL
from workers.nodes import check_reachable, silence_ray
from workers.placement import NAMESPACE, Actor, RayError, ray, wait

CLUSTER_FILE = "cluster.json"
ASK_TIMEOUT_S = 30.0
_NAME = re.compile(rf"unmask-(?P<run>.+)-(?P<id>[0-9a-f]{{8}})-{CONTROL}(\.\d+)?")


@dataclass(frozen=True)
class Place:
    """Where a run says it is. `prefix` of its actors' names; None: any run called `name`."""

    name: str
    address: str
    source: str
    prefix: str | None = None


def write_place(run: Path, prefix: str) -> None:
    """Say in the run folder where the run is going on. Only once connected."""
    context = ray.get_runtime_context()
    values = {"address": context.gcs_address, "prefix": prefix, "pid": os.getpid()}
    run.mkdir(parents=True, exist_ok=True)
    (run / CLUSTER_FILE).write_text(json.dumps(values) + "\n")


def forget_place(run: Path) -> None:
    """The run is over."""
    (run / CLUSTER_FILE).unlink(missing_ok=True)


def find_place(run: str, address: str | None) -> Place:
    """Where to ask for a run folder or name; `address` wins over what the folder says.

    Raises:
        UserError: nothing says where.
    """
    folders = [folder for folder in (Path(run), Path("runs") / run) if folder.is_dir()]
    for folder in folders:
        path = folder / CLUSTER_FILE
        if path.is_file():
            values = json.loads(path.read_text())
            where = address or values["address"]
            return Place(folder.resolve().name, where, str(path), values["prefix"])
    found = address or os.environ.get("RAY_ADDRESS")
    if found:
        return Place(Path(run).name, found, "--address" if address else "RAY_ADDRESS")
    if folders:
        raise UserError(
            f"{folders[0]}: this run is not going on (no {CLUSTER_FILE} in it); if it is on a "
            "cluster that does not share this folder, give --address host:port"
        )
    raise UserError(
        f"--run {run}: no such run folder; give runs/<name>, or the run's name with --address "
        "host:port of its cluster"
    )


class RunControl:
    """A connection to the control actor of one run.

    Raises:
        UserError: no cluster there, or no such run on it; one line, within seconds.
    """

    def __init__(self, run: str, address: str | None) -> None:
        self._place = find_place(run, address)
        _connect(self._place)
        self._desk = self._find()

    def status(self) -> dict[str, Any]:
        """What the run posted last. Raises InfrastructureError if it does not answer."""
        deadline = time.monotonic() + ASK_TIMEOUT_S
        while not (status := self._ask("status")):
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"{self._place.name}: no status within {ASK_TIMEOUT_S:g} s"
                )
            time.sleep(0.2)
        return dict(status)

    def scale(self, sizes: Mapping[str, int]) -> str:
        """Ask for so many workers of each role; what the run did.

        Raises:
            UserError: the run refuses; says why.
            InfrastructureError: it does not answer.
        """
        ticket, deadline = uuid.uuid4().hex, time.monotonic() + ASK_TIMEOUT_S
        while (answer := self._ask("wish", ticket, dict(sizes))) is None:
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"{self._place.name}: the run did not answer within {ASK_TIMEOUT_S:g} s"
                )
            time.sleep(0.2)
        verdict, _, text = answer.partition(": ")
        if verdict == "no":
            raise UserError(text)
        return str(text)

    def _ask(self, method: str, *args: Any) -> Any:
        """The desk may have died and been made again since."""
        try:
            return wait([self._desk.call(method, *args)], ASK_TIMEOUT_S)[0]
        except InfrastructureError:
            self._desk = self._find()
            return wait([self._desk.call(method, *args)], ASK_TIMEOUT_S)[0]

    def _find(self) -> Actor:
        """Look for a few seconds: the desk may just be being made again."""
        deadline = time.monotonic() + 5.0
        while True:
            found = self._matches()
            if len(found) == 1 or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        place = self._place
        if len(found) > 1:
            raise UserError(
                f"--run {place.name}: {len(found)} runs of that name on the cluster at "
                f"{place.address}; give the run's folder"
            )
        if not found:
            others = sorted({match["run"] for match in map(_NAME.fullmatch, _names()) if match})
            running = f"; running there: {', '.join(others)}" if others else ""
            raise UserError(
                f"--run {place.name}: no such run is going on at {place.address} (from "
                f"{place.source}){running}"
            )
        handle = ray.get_actor(found[0], namespace=NAMESPACE)
        return Actor(CONTROL, Path(f"logs/{CONTROL}.log"), handle)

    def _matches(self) -> list[str]:
        place, found = self._place, []
        for name in _names():
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            if place.prefix is not None:
                mine = name.startswith(f"{place.prefix}-")
            else:
                mine = match["run"] == place.name
            found += [name] * mine
        return found


def _names() -> list[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]


def _connect(place: Place) -> None:
    if ray.is_initialized():
        return
    silence_ray()
    try:
        check_reachable(place.address, place.source)
    except UserError as error:
        raise UserError(
            f"--run {place.name}: its cluster at {place.address} does not answer (address from "
            f"{place.source}); the run has ended, or give --address host:port"
        ) from error
    try:
        with admission(place.address, place.source):
            ray.init(
                address=place.address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{place.source}: cannot join {place.address}: {reason}") from error
