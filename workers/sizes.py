"""How many workers a crew has: as wished, and no more than the nodes that are there can hold.

Wishes come from the configuration, from operators and from the autoscaler. Not the starting and
ending of workers (`workers.crew`). Knows no Ray.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from common.errors import UserError
from workers.autoscale import Autoscaler
from workers.fitting import Node, Want, missing


class Crew(Protocol):
    """What is asked of `workers.crew.Crew`."""

    role: str

    @property
    def size(self) -> int: ...
    def resize(self, size: int) -> None: ...


class Sizes:
    """Of all crews of a run. Any thread may ask for anything.

    When nodes die, fewer rollout workers are planned for, as many as fit beside the rest; when
    nodes come, as many as were wished last.

    Args:
        crews: "rollout" must be among them.
        wants: what all roles ask for if the crews have these sizes.
        nodes: those that are alive now.
        autoscaler: None if nothing is wished from what was measured.
        say: hears every change with its reason, one line each.
    """

    def __init__(
        self,
        crews: Sequence[Crew],
        wants: Callable[[Mapping[str, int]], Sequence[Want]],
        nodes: Callable[[], list[Node]],
        autoscaler: Autoscaler | None,
        say: Callable[[str], None],
    ) -> None:
        self._crews = {crew.role: crew for crew in crews}
        self._wants = wants
        self._nodes = nodes
        self._autoscaler = autoscaler
        self._say = say
        self._lock = threading.Lock()
        self._wished = self._crews["rollout"].size
        self._seen = nodes()

    def scale(self, sizes: Mapping[str, int]) -> str:
        """Grant an operator's wish; what was done. Raises UserError if no node could hold it."""
        for role, size in sizes.items():
            if role not in self._crews or size < 1:
                raise UserError(
                    f"scale: {role}={size}; give {' or '.join(sorted(self._crews))} and a number "
                    "from 1"
                )
        with self._lock:
            before = {role: self._crews[role].size for role in sizes}
            if lack := self._lack(sizes):
                raise UserError(lack)
            self._wished = sizes.get("rollout", self._wished)
            for role, size in sizes.items():
                self._crews[role].resize(size)
        done = ", ".join(f"{role} {before[role]} -> {size}" for role, size in sizes.items())
        self._say(f"scaled by an operator: {done}")
        return done

    def after_step(self, learner_idle: float, rollout_idle: float) -> None:
        """Scale by the idle shares of a step."""
        if self._autoscaler is None:
            return
        with self._lock:
            size = self._crews["rollout"].size
            decision = self._autoscaler.after_step(size, learner_idle, rollout_idle)
            if decision is None or self._lack({"rollout": decision.after}):
                return
            self._wished = decision.after
            self._rollouts(decision.after, decision.reason)

    def look(self) -> None:
        """See whether nodes have come or gone."""
        nodes = self._nodes()
        with self._lock:
            if nodes == self._seen:
                return
            self._seen, size = nodes, self._wished
            while size > 1 and self._lack({"rollout": size}):
                size -= 1
            now = self._crews["rollout"].size
            if size < now:
                self._rollouts(size, "no more fit on the nodes that are left")
            elif size > now:
                self._rollouts(size, "there are nodes for them again")

    def _rollouts(self, size: int, reason: str) -> None:
        crew = self._crews["rollout"]
        before = crew.size
        crew.resize(size)
        self._say(f"rollout workers {before} -> {size}: {reason}")

    def _lack(self, sizes: Mapping[str, int]) -> str | None:
        now = {role: crew.size for role, crew in self._crews.items()}
        return missing(self._nodes(), self._wants(now | dict(sizes)))
