"""Can a run ever be placed on these nodes? Plain arithmetic; not the placing, which is Ray's.

It refuses only what is impossible whoever else uses the cluster; what merely has to wait for others
is Ray's to wait for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Node:
    """A machine of the cluster and all that it has, used or not."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def holds(self, want: "Want") -> int:
        """How many of its workers an empty node of this kind takes."""
        if any(self.labels.get(key) != value for key, value in want.labels.items()):
            return 0
        limits = [
            int((self.resources.get(kind, 0.0) + 1e-9) // amount)
            for kind, amount in want.each.items()
            if amount > 0
        ]
        return min(limits, default=want.count)


@dataclass(frozen=True)
class Want:
    """`count` workers of one role, each with these resources on a node with these labels.

    apart: no two on one node.
    """

    role: str
    count: int
    each: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False


def missing(nodes: Sequence[Node], wants: Sequence[Want]) -> str | None:
    """One line on what the cluster lacks, with what each node has; None if nothing is certain."""
    for want in wants:
        room = [min(1, node.holds(want)) if want.apart else node.holds(want) for node in nodes]
        if sum(room) < want.count:
            return _too_many(want, nodes, sum(room))
    kinds = sorted({kind for want in wants for kind in want.each})
    for kind in kinds:
        total = sum(want.count * want.each.get(kind, 0.0) for want in wants)
        there = sum(node.resources.get(kind, 0.0) for node in nodes)
        if total > there + 1e-9:
            parts = ", ".join(
                f"{w.role} {w.count * w.each[kind]:g}" for w in wants if w.each.get(kind)
            )
            return (
                f"cluster: asks for {total:g} {kind} ({parts}) but Ray has {there:g} "
                f"({_what_nodes_have(nodes, [kind])}); lower {_key(kind)} or the numbers of workers"
            )
    return None


def room_beside(nodes: Sequence[Node], others: Sequence[Want], wanted: Want) -> int:
    """How many workers of `wanted` fit beside the others, who come first, as many as there can be.

    Nodes are filled one after the other; Ray, which knows who else uses them, may do otherwise.
    """
    # Others go where the wanted ones cannot, if they can.
    left = sorted(nodes, key=lambda node: node.holds(wanted))
    for want in others:
        _, left = _placed(left, want)
    return _placed(left, wanted)[0]


def _placed(nodes: Sequence[Node], want: Want) -> tuple[int, list[Node]]:
    """How many could be placed, and what the nodes have left."""
    count, left = 0, list[Node]()
    for node in nodes:
        here = min(want.count - count, 1 if want.apart else want.count, node.holds(want))
        used = {kind: here * amount for kind, amount in want.each.items()}
        rest = {kind: has - used.get(kind, 0.0) for kind, has in node.resources.items()}
        left.append(Node(node.name, rest, node.labels))
        count += here
    return count, left


def _too_many(want: Want, nodes: Sequence[Node], room: int) -> str:
    each = ", ".join(f"{kind} {amount:g}" for kind, amount in want.each.items() if amount > 0)
    labels = ", ".join(f"{key}={value}" for key, value in want.labels.items())
    where = " on nodes of their own" if want.apart else ""
    where += f" on nodes labelled {labels}" if labels else ""
    kinds = [kind for kind, amount in want.each.items() if amount > 0]
    return (
        f"cluster.{want.role}: asks for {want.count} x ({each}){where}, at most {room} fit: "
        f"{_what_nodes_have(nodes, kinds, list(want.labels))}; lower cluster.{want.role} or add "
        "nodes"
    )


def _what_nodes_have(
    nodes: Sequence[Node], kinds: Sequence[str], labels: Sequence[str] = ()
) -> str:
    texts = []
    for node in nodes:
        has = [f"{kind} {node.resources.get(kind, 0.0):g}" for kind in kinds]
        has += [f"{key}={node.labels.get(key, '-')}" for key in labels]
        texts.append(f"{node.name} has {', '.join(has)}")
    return "; ".join(texts) if texts else "there are no nodes"


def _key(kind: str) -> str:
    known = {"CPU": "cluster.*.num_cpus", "GPU": "cluster.*.num_gpus"}
    return known.get(kind, "cluster.*.resources")
