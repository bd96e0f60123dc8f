"""Seconds of an exchange among ranks, by the alpha-beta model.

A message of n bytes over a link takes alpha + n / B: a latency, and the time of the bytes (Hockney
1994). The costs of collectives follow Thakur, Rabenseifner and Gropp 2005 ("Optimization of
collective communication operations in MPICH"), without their term for adding, as a device adds
faster than its links send. The ring's bytes are the fewest possible (Patarasuk and Yuan 2009,
"Bandwidth optimal all-reduce algorithms for clusters of workstations"); they are also what NCCL's
bus bandwidth is defined by (nccl-tests, doc/PERFORMANCE.md).

Below, N ranks each hold S bytes, and a link has the latency a (seconds) and the rate B (bytes a
second that a rank sends while it receives as many).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

AUTO, RING, TREE, HIERARCHICAL, IN_NETWORK = "auto", "ring", "tree", "hierarchical", "in_network"
EXCHANGES = (AUTO, RING, TREE, HIERARCHICAL, IN_NETWORK)


@dataclass(frozen=True)
class Link:
    """bandwidth: bytes a second that a rank sends while it receives as many. latency: seconds."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Network:
    """inside: of a machine. between: of a rank of one machine to a rank of another. machine: ranks
    of a machine. group: of them, those that an exchange in two levels joins first; 0: all."""

    inside: Link
    between: Link
    machine: int
    group: int = 0

    def machines(self, ranks: int) -> int:
        """How many machines so many ranks take."""
        return -(-ranks // self.machine)

    def ranks_inside(self, ranks: int) -> int:
        """How many of so many ranks share a machine."""
        return min(ranks, self.machine)

    def ranks_of_group(self, ranks: int) -> int:
        """How many of so many ranks share a group."""
        return min(ranks, self.group or self.machine)

    def of_groups(self) -> Network:
        """The network that has one rank of each group."""
        return Network(self.inside, self.between, self.machine // (self.group or self.machine))


@dataclass(frozen=True)
class Cost:
    """Seconds of an exchange: of its latencies, and of its bytes."""

    latency: float = 0.0
    transfer: float = 0.0

    @property
    def seconds(self) -> float:
        return self.latency + self.transfer

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.latency + other.latency, self.transfer + other.transfer)


def reduce_scatter(size: float, ranks: int, network: Network) -> Cost:
    """Around one ring of all ranks: (N - 1) a + (N - 1) / N x S / B; an all-gather costs the same.

    With M machines, M of the hops are between machines. All links of a machine send at once, in
    rings of their own, so that B is the slower one of the inner link and of all outer links of a
    machine.
    """
    return Cost(_hops(ranks, network), (ranks - 1) / ranks * size / _flat_bandwidth(ranks, network))


def ring(size: float, ranks: int, network: Network) -> Cost:
    """All-reduce around a ring: 2 (N - 1) a + 2 (N - 1) / N x S / B."""
    one_way = reduce_scatter(size, ranks, network)
    return one_way + one_way


def tree(size: float, ranks: int, network: Network) -> Cost:
    """All-reduce up and down two binary trees that share the bytes, in a pipeline.

    2 S / B, since each rank sends everything once up and once down, and the latencies of a chain
    inside of a machine and of a tree of machines: 2 ((n - 1) a_inside + log2(M) a_between), as in
    NCCL's model of its trees (NVIDIA/nccl, src/graph/tuning.cc).
    """
    if ranks == 1:
        return Cost()
    inside, machines = network.ranks_inside(ranks), network.machines(ranks)
    hops = (inside - 1) * network.inside.latency
    hops += math.ceil(math.log2(machines)) * network.between.latency
    return Cost(2 * hops, 2 * size / _flat_bandwidth(ranks, network))


def hierarchical(size: float, ranks: int, network: Network) -> Cost:
    """All-reduce in three parts: a reduce-scatter inside of each group of a machine, an all-reduce
    of each piece between groups (the faster one of ring and tree), an all-gather inside."""
    one_way = inner(size, ranks, network)
    return one_way + outer(size, ranks, network) + one_way


def inner(size: float, ranks: int, network: Network) -> Cost:
    """The first or the last part of `hierarchical`: among the ranks of one group."""
    inside = Network(network.inside, network.inside, network.machine)
    return reduce_scatter(size, network.ranks_of_group(ranks), inside)


def outer(size: float, ranks: int, network: Network) -> Cost:
    """The middle part of `hierarchical`: a rank's piece, among as many ranks as groups."""
    return all_reduce(AUTO, *between_groups(size, ranks, network))


def between_groups(size: float, ranks: int, network: Network) -> tuple[float, int, Network]:
    """Of the middle part: bytes of a rank's piece, the number of groups, and their network."""
    own = network.ranks_of_group(ranks)
    return size / own, -(-ranks // own), network.of_groups()


def in_network(size: float, ranks: int, network: Network) -> Cost:
    """All-reduce in switches that add: (N + 1) / N x S / B, a hop up and one down on each level.

    A rank sends all its bytes to the switches, which add them, and gets the sum of its piece. It
    sends this sum once more, and the switches copy it to all. So NCCL's author counts, who
    withdrew (N - 1) / (N + 1) (NVIDIA/nccl-tests#239).
    """
    if ranks == 1:
        return Cost()
    latency = 2 * network.inside.latency
    if network.machines(ranks) > 1:
        latency += 2 * network.between.latency
    return Cost(latency, (ranks + 1) / ranks * size / _flat_bandwidth(ranks, network))


def all_reduce(exchange: str, size: float, ranks: int, network: Network) -> Cost:
    """By the name of the exchange; auto: the faster one of ring and tree, which libraries take."""
    if exchange == AUTO:
        found = (one(size, ranks, network) for one in (ring, tree))
        return min(found, key=lambda cost: cost.seconds)
    kinds = {RING: ring, TREE: tree, HIERARCHICAL: hierarchical, IN_NETWORK: in_network}
    return kinds[exchange](size, ranks, network)


def _hops(ranks: int, network: Network) -> float:
    """Seconds of the N - 1 latencies once around a ring."""
    machines = network.machines(ranks)
    outside = 0 if machines == 1 else min(machines, ranks - 1)
    return outside * network.between.latency + (ranks - 1 - outside) * network.inside.latency


def _flat_bandwidth(ranks: int, network: Network) -> float:
    inside = network.ranks_inside(ranks)
    if network.machines(ranks) == 1:
        return network.inside.bandwidth
    outer_links = inside * network.between.bandwidth
    return outer_links if inside == 1 else min(network.inside.bandwidth, outer_links)
