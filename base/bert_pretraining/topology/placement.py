"""Assign each rank of a machine its CPUs, memory node and number of threads. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from bert_pretraining.topology import cpu_list
from bert_pretraining.topology.machine import Core, Machine, Node

UNKNOWN_DISTANCE = 255  # of a node that the firmware does not list


@dataclass(frozen=True)
class Binding:
    """A rank's CPUs and threads.

    nodes: the NUMA nodes of its CPUs. memory_node: the node that all its memory comes from; None:
    the node of the CPU that runs. gpu: its index among the visible GPUs.
    """

    cpus: tuple[int, ...]
    threads: int
    nodes: tuple[int, ...] = (0,)
    memory_node: int | None = None
    gpu: int | None = None

    @property
    def cpu_list(self) -> str:
        """The CPUs as numactl and taskset read them, such as 0-3,8."""
        return cpu_list.show(self.cpus)

    def numactl(self) -> list[str]:
        """The numactl command, without the command that it starts."""
        memory = "--localalloc" if self.memory_node is None else f"--membind={self.memory_node}"
        return ["numactl", f"--physcpubind={self.cpu_list}", memory]


def place_ranks(
    machine: Machine, num_ranks: int, use_gpus: bool = False, hyper_threads: bool = False
) -> list[Binding]:
    """Distribute a machine's cores over its ranks.

    - A rank with a GPU gets cores of the GPU's NUMA node, or of the nearest node with free cores.
    - Other ranks are spread over the nodes in proportion to the nodes' cores. With fewer ranks
      than nodes, each rank gets whole nodes.
    - The ranks of a node get equal numbers of adjacent cores (the first ranks one more, if the
      division leaves a remainder), and one hardware thread of each core, or with `hyper_threads`
      all of them.
    - With more ranks than cores each rank gets one hardware thread; with still more ranks they
      share the hardware threads evenly.
    """
    if not machine.cores or num_ranks < 1:
        raise ValueError(f"{len(machine.cores)} cores for {num_ranks} ranks")
    cores: dict[int, list[Core]] = {}
    for core in machine.cores:
        cores.setdefault(core.node, []).append(core)
    with_gpu = use_gpus and len(machine.gpus) >= num_ranks
    if with_gpu and any(gpu.node is not None for gpu in machine.gpus[:num_ranks]):
        groups = _near_gpus(machine, num_ranks, cores)
    else:
        groups = _spread(num_ranks, cores)
    quota = machine.cpu_quota / num_ranks if machine.cpu_quota else None
    bindings: dict[int, Binding] = {}
    for nodes, ranks in groups:
        dealt = _deal([core for node in nodes for core in cores[node]], len(ranks), hyper_threads)
        for rank, cpus in zip(ranks, dealt, strict=True):
            threads = len(cpus) if quota is None else max(1, min(len(cpus), int(quota)))
            memory_node = _memory_node(machine, nodes)
            bindings[rank] = Binding(cpus, threads, nodes, memory_node, rank if with_gpu else None)
    return [bindings[rank] for rank in range(num_ranks)]


def table(bindings: list[Binding], first_rank: int, binder: str) -> str:
    """The binding as a table, one line for each rank."""
    rows = [("rank", "GPU", "NUMA node", "CPUs", "memory", "threads")]
    for local_rank, binding in enumerate(bindings):
        local = "any node" if binder == "none" else "local"
        strict = binder == "numactl" and binding.memory_node is not None
        rows.append(
            (
                str(first_rank + local_rank),
                "-" if binding.gpu is None else str(binding.gpu),
                "any" if binder == "none" else cpu_list.show(binding.nodes),
                "all allowed" if binder == "none" else binding.cpu_list,
                f"node {binding.memory_node}" if strict else local,
                str(binding.threads),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join([f"Binding: {binder}", *lines])


Groups = list[tuple[tuple[int, ...], list[int]]]  # (NUMA nodes, the ranks that share them)


def _near_gpus(machine: Machine, num_ranks: int, cores: dict[int, list[Core]]) -> Groups:
    """Each rank on its GPU's node; if that has no free core, on the nearest node that has one."""
    known = {node.number: node for node in machine.nodes}
    ranks_at: dict[int, list[int]] = {node: [] for node in cores}

    def crowding(node: int) -> float:
        return len(ranks_at[node]) / len(cores[node])

    for rank, gpu in enumerate(machine.gpus[:num_ranks]):
        if gpu.node is None:
            ranks_at[min(cores, key=lambda node: (crowding(node), node))].append(rank)
            continue
        wanted = gpu.node
        by_distance = sorted(cores, key=lambda node: (_distance(known, wanted, node), node))
        free = [node for node in by_distance if crowding(node) < 1]
        # A core of its own on a remote node is better for a rank than a shared core nearby.
        ranks_at[free[0] if free else min(by_distance, key=crowding)].append(rank)
    return [((node,), ranks) for node, ranks in ranks_at.items() if ranks]


def _distance(known: dict[int, Node], start: int, end: int) -> int:
    if start == end:
        return 0
    return known[start].distances.get(end, UNKNOWN_DISTANCE) if start in known else UNKNOWN_DISTANCE


def _spread(num_ranks: int, cores: dict[int, list[Core]]) -> Groups:
    """Ranks spread over the nodes in proportion to their cores, or whole nodes for each rank."""
    nodes = sorted(cores)
    total = sum(len(cores[node]) for node in nodes)
    if num_ranks < len(nodes):
        return _whole_nodes(num_ranks, nodes, {node: len(cores[node]) for node in nodes})
    counts = {node: num_ranks * len(cores[node]) // total for node in nodes}
    remainders = sorted(nodes, key=lambda node: (-(num_ranks * len(cores[node]) % total), node))
    for node in remainders[: num_ranks - sum(counts.values())]:
        counts[node] += 1
    groups: Groups = []
    first = 0
    for node in nodes:
        if counts[node]:
            groups.append(((node,), list(range(first, first + counts[node]))))
            first += counts[node]
    return groups


def _whole_nodes(num_ranks: int, nodes: list[int], num_cores: dict[int, int]) -> Groups:
    """For each rank a group of adjacent nodes; all groups have about as many cores."""
    groups: Groups = []
    rest = list(nodes)
    for rank in range(num_ranks):
        share = sum(num_cores[node] for node in rest) / (num_ranks - rank)
        taken = [rest.pop(0)]
        have = num_cores[taken[0]]
        while len(rest) > num_ranks - rank - 1 and have + num_cores[rest[0]] / 2 <= share:
            have += num_cores[rest[0]]
            taken.append(rest.pop(0))
        groups.append((tuple(taken), [rank]))
    last_nodes, ranks = groups[-1]
    groups[-1] = ((*last_nodes, *rest), ranks)
    return groups


def _deal(cores: list[Core], num_ranks: int, hyper_threads: bool) -> list[tuple[int, ...]]:
    """The CPUs of each rank, for ranks that share these cores."""
    if num_ranks <= len(cores):
        share, rest = divmod(len(cores), num_ranks)
        dealt = []
        start = 0
        for rank in range(num_ranks):
            end = start + share + (rank < rest)
            chosen = (
                core.threads if hyper_threads else core.threads[:1] for core in cores[start:end]
            )
            dealt.append(tuple(sorted(cpu for threads in chosen for cpu in threads)))
            start = end
        return dealt
    cpus = [cpu for core in cores for cpu in core.threads]
    if num_ranks >= len(cpus):
        return [(cpus[rank * len(cpus) // num_ranks],) for rank in range(num_ranks)]
    # The first threads of all cores come before the second ones, so that few ranks share a core.
    by_sibling = sorted(
        (place, core.threads[place]) for core in cores for place in range(len(core.threads))
    )
    return [(cpu,) for _, cpu in by_sibling[:num_ranks]]


def _memory_node(machine: Machine, nodes: tuple[int, ...]) -> int | None:
    with_memory = {node.number for node in machine.nodes if node.has_memory}
    strict = len(nodes) == 1 and nodes[0] in with_memory and machine.num_memory_nodes > 1
    return nodes[0] if strict else None
