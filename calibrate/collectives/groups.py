"""Which ranks measure together: parts of one node, one rank of each node, whole nodes."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Group", "groups_of", "host_identity", "pairs_of"]


@dataclass(frozen=True)
class Group:
    """Ranks that run one collective."""

    ranks: tuple[int, ...]
    """Of the whole job, ascending."""
    n_nodes: int
    """Nodes that they stand on."""

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.ranks)


def host_identity() -> str:
    """Name that ranks share if and only if they are on one host and in one network namespace of it.

    Two launchers on one machine are one node, whatever they call themselves: what they measure is no network.
    """
    parts = [platform.node()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.is_file():
        parts.append(boot.read_text(encoding="ascii").strip())
    namespace = Path("/proc/self/ns/net")
    if namespace.exists():
        parts.append(str(namespace.readlink()))
    return "/".join(parts)


def groups_of(hosts: Sequence[str]) -> list[Group]:
    """Groups worth measuring, larger ones first.

    Parameters
    ----------
    hosts : (n_ranks,)
        Identity of every rank's host, in the order of ranks.

    Returns
    -------
    Within the first node that has two ranks, groups of 2, 4, 8... and all; over the first 2, 4, 8... and all nodes,
    one rank of each and every rank of each. None twice.
    """
    nodes = _nodes(hosts)
    found = {}
    whole = next((node for node in nodes if len(node) > 1), [])
    for size in _sizes(len(whole)):
        found[tuple(whole[:size])] = 1
    for n_nodes in _sizes(len(nodes)):
        found[tuple(node[0] for node in nodes[:n_nodes])] = n_nodes
        found[tuple(sorted(rank for node in nodes[:n_nodes] for rank in node))] = n_nodes
    groups = [Group(ranks, n_nodes) for ranks, n_nodes in found.items()]
    return sorted(groups, key=lambda group: (-group.size, -group.n_nodes))


def pairs_of(hosts: Sequence[str]) -> list[Group]:
    """Pairs for point-to-point: two ranks of one node, and one of each of two nodes, where there are such."""
    nodes = _nodes(hosts)
    whole = next((node for node in nodes if len(node) > 1), None)
    pairs = [Group((nodes[0][0], nodes[1][0]), 2)] if len(nodes) > 1 else []
    return pairs + ([Group((whole[0], whole[1]), 1)] if whole else [])


def _nodes(hosts: Sequence[str]) -> list[list[int]]:
    """Ranks of each node, nodes in the order in which they first appear."""
    nodes: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        nodes.setdefault(host, []).append(rank)
    return list(nodes.values())


def _sizes(n: int) -> list[int]:
    """2, 4, 8... below `n`, and `n` itself where that is at least 2."""
    return [size for size in (2**k for k in range(1, n.bit_length())) if size < n] + ([n] if n > 1 else [])
