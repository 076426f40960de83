"""Who receives weights while they are published: the roll before each version. It sends nothing.

A plain class that becomes a small actor beside `workers.shelf`. A receiver enrols; the publisher
calls the roll; those who arrive in time form a group; whoever was expected and did not come is
struck off and enrols again when it has pulled. Nobody has to be told of a death.
"""

from dataclasses import dataclass, field

# Rolls of versions before these are forgotten.
KEPT_ROLLS = 4


@dataclass(frozen=True)
class Plan:
    """The group that one version goes to. Without members everybody pulls.

    generation: grows whenever the group is another one than before.
    address: host:port where the members meet.
    members: in the order of their ranks, which start at 1; the publisher is rank 0.
    """

    generation: int
    address: str
    backend: str
    members: tuple[str, ...]


@dataclass
class _Roll:
    expected: set[str] = field(default_factory=set)
    present: dict[str, str | None] = field(default_factory=dict)
    plan: Plan | None = None


class Roster:
    """The enrolled receivers and the rolls of the last versions."""

    def __init__(self) -> None:
        self._enrolled: set[str] = set()
        self._rolls: dict[int, _Roll] = {}
        self._generation = 0

    def enrol(self, member: str) -> None:
        """`member` will come when the next roll is called."""
        self._enrolled.add(member)

    def call_roll(self, version: int) -> tuple[int, set[str]]:
        """A generation that no group had yet, and who is expected. Those who came early count."""
        roll = self._rolls.pop(version, None)
        self._rolls[version] = roll = _Roll() if roll is None or roll.plan else roll
        roll.expected = set(self._enrolled)
        for old in list(self._rolls)[:-KEPT_ROLLS]:
            del self._rolls[old]
        self._generation += 1
        return self._generation, set(roll.expected)

    def arrive(self, version: int, member: str, gpu: str | None) -> None:
        """`member` is ready for `version`, with this GPU (None: it has none)."""
        self._rolls.setdefault(version, _Roll()).present[member] = gpu

    def present(self, version: int) -> dict[str, str | None]:
        """Who has arrived, with their GPUs."""
        return dict(self._rolls[version].present)

    def close(self, version: int, plan: Plan) -> None:
        """The publisher has decided; who was expected and is not in the plan is struck off."""
        roll = self._rolls[version]
        roll.plan = plan
        self._enrolled -= roll.expected - set(plan.members)

    def plan(self, version: int) -> Plan | None:
        """What was decided for `version`; None while it is open."""
        roll = self._rolls.get(version)
        return None if roll is None else roll.plan

    def strike(self, members: tuple[str, ...]) -> None:
        """They have left, or are in a group that broke: one of them is gone, nobody knows which."""
        self._enrolled -= set(members)
