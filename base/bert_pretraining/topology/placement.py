"""A machine and a number of ranks -> each rank's CPUs, memory node and threads. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from bert_pretraining.topology import cpu_list
from bert_pretraining.topology.machine import Core, Machine, Node

NO_PATH = 255  # the distance of a node about which the firmware says nothing


@dataclass(frozen=True)
class Binding:
    """A rank's CPUs and threads.

    nodes: the NUMA nodes of its CPUs. memory_node: the one that its memory must come from;
    None for whichever the CPU in use is on. gpu: its index among the visible ones.
    """

    cpus: tuple[int, ...]
    threads: int
    nodes: tuple[int, ...] = (0,)
    memory_node: int | None = None
    gpu: int | None = None

    @property
    def cpu_list(self) -> str:
        """As numactl and taskset read it: 0-3,8."""
        return cpu_list.show(self.cpus)

    def numactl(self) -> list[str]:
        """The command that the rank's own is put behind."""
        memory = "--localalloc" if self.memory_node is None else f"--membind={self.memory_node}"
        return ["numactl", f"--physcpubind={self.cpu_list}", memory]


def place_ranks(
    machine: Machine, num_ranks: int, use_gpus: bool = False, hyper_threads: bool = False
) -> list[Binding]:
    """Deal a machine's cores to its ranks.

    A rank with a GPU gets cores of the GPU's NUMA node, or of the nearest that has any.
    Other ranks are spread over the nodes by their cores, or get whole nodes where there are
    fewer ranks than nodes. Ranks of a node get neighbouring cores, as many each as there
    are (the first ones one more where they do not divide), and one hardware thread of a
    core unless `hyper_threads`. Where there are more ranks than cores, ranks get a hardware
    thread each, and beyond that share them evenly.
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
    """The map for people: a line a rank."""
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
    """Ranks at their GPUs' nodes; from a node with too few cores to the nearest with some left."""
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
        # A remote core of its own serves a rank better than a share of a near one.
        ranks_at[free[0] if free else min(by_distance, key=crowding)].append(rank)
    return [((node,), ranks) for node, ranks in ranks_at.items() if ranks]


def _distance(known: dict[int, Node], start: int, end: int) -> int:
    if start == end:
        return 0
    return known[start].distances.get(end, NO_PATH) if start in known else NO_PATH


def _spread(num_ranks: int, cores: dict[int, list[Core]]) -> Groups:
    """Ranks in proportion to the nodes' cores; where ranks are fewer, nodes to ranks."""
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
    """Runs of neighbouring nodes, one a rank, with about as many cores each."""
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
    """The CPUs of each of the ranks that share these cores."""
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
    # First threads before second ones, so that as few cores as can be are shared.
    by_sibling = sorted(
        (place, core.threads[place]) for core in cores for place in range(len(core.threads))
    )
    return [(cpu,) for _, cpu in by_sibling[:num_ranks]]


def _memory_node(machine: Machine, nodes: tuple[int, ...]) -> int | None:
    with_memory = {node.number for node in machine.nodes if node.has_memory}
    strict = len(nodes) == 1 and nodes[0] in with_memory and machine.num_memory_nodes > 1
    return nodes[0] if strict else None
