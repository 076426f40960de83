"""How many workers a crew has: as wished, and no more than the nodes that are there can hold.

Wishes come from the configuration, from operators and from the autoscaler. Not the starting and
ending of workers (`workers.crew`). Knows no Ray.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from common.errors import UserError
from workers.autoscale import Autoscaler
from workers.fitting import Node, Want, missing, room_beside


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
            before = {role: crew.size for role, crew in self._crews.items()}
            if lack := missing(self._nodes(), self._wants(before | dict(sizes))):
                raise UserError(lack)
            self._wished = sizes.get("rollout", self._wished)
            for role, size in sizes.items():
                self._crews[role].resize(size)
            done = ", ".join(f"{role} {before[role]} -> {size}" for role, size in sizes.items())
            self._say(f"scaled by an operator: {done}")
            if "rollout" not in sizes:  # there may be more room for them now
                self._plan(before | dict(sizes))
        return done

    def after_step(self, learner_idle: float, rollout_idle: float) -> None:
        """Scale by the idle shares of a step."""
        if self._autoscaler is None:
            return
        with self._lock:
            size = self._crews["rollout"].size
            decision = self._autoscaler.after_step(size, learner_idle, rollout_idle)
            if decision is None:
                return
            if decision.after > size and decision.after > self._room(decision.after, {}):
                return
            self._wished = decision.after
            self._resize(decision.after, decision.reason)

    def look(self) -> None:
        """See whether nodes have come or gone."""
        nodes = self._nodes()
        with self._lock:
            if nodes != self._seen:
                self._seen = nodes
                self._plan({})

    def _plan(self, sizes: Mapping[str, int]) -> None:
        """As many rollout workers as were wished, or as fit. `sizes`: of crews, if not as now."""
        now = self._crews["rollout"].size
        size = max(1, min(self._wished, self._room(self._wished, sizes)))
        if size < now:
            self._resize(size, "no more fit on the nodes that are left")
        elif size > now:
            self._resize(size, "there is room for them again")

    def _room(self, rollouts: int, sizes: Mapping[str, int]) -> int:
        """How many of so many rollout workers fit beside the rest, the learner first of all."""
        now = {role: crew.size for role, crew in self._crews.items()}
        wants = self._wants({**now, **sizes, "rollout": rollouts})
        [wanted] = [want for want in wants if want.role == "rollout"]
        others = [want for want in wants if want.role != "rollout"]
        others.sort(key=lambda want: want.role != "learner")
        return room_beside(self._nodes(), others, wanted)

    def _resize(self, size: int, reason: str) -> None:
        crew = self._crews["rollout"]
        self._say(f"rollout workers {crew.size} -> {size}: {reason}")
        crew.resize(size)
