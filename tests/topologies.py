"""Machines as file trees of /proc and /sys.

Each is described by what its vendor publishes (`lscpu`, `numactl --hardware`, `nvidia-smi
topo -m`); TWO_CORE_CI is the machine on which this was written, as its kernel shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bert_pretraining.topology import Machine, cpu_list, read_machine


@dataclass(frozen=True)
class Described:
    """A machine to lay out as files.

    nodes: CPUs of each NUMA node, "" for a node with memory only. siblings: the second hardware
    thread of a core has the number of its first plus this; 0 without hyper-threads. gpu_nodes: the
    node of each GPU, -1 if the firmware does not say. sockets: nodes 0 to n-1 in equal groups.
    """

    nodes: tuple[str, ...]
    siblings: int = 0
    gpu_nodes: tuple[int, ...] = ()
    sockets: int = 1
    allowed: str = ""
    allowed_memory: str = ""
    without_memory: tuple[int, ...] = ()
    cgroup: dict[str, str] = field(default_factory=dict)

    def lay_out(self, root: Path) -> Path:
        """Write the files below `root`."""
        system = root / "sys/devices/system"
        online = sorted(cpu for cpus in self.nodes for cpu in cpu_list.parse(cpus))
        numbers = range(len(self.nodes))
        write(system / "cpu/online", cpu_list.show(tuple(online)))
        memory = tuple(node for node in numbers if node not in self.without_memory)
        write(system / "node/has_memory", cpu_list.show(memory))
        for node, cpus in enumerate(self.nodes):
            write(system / f"node/node{node}/cpulist", cpus)
            distances = " ".join(str(self._distance(node, other)) for other in numbers)
            write(system / f"node/node{node}/distance", distances)
        for cpu in online:
            topology = system / f"cpu/cpu{cpu}/topology"
            write(topology / "thread_siblings_list", self._core_of(cpu, online))
        status = f"Cpus_allowed_list:\t{self.allowed or cpu_list.show(tuple(online))}\n"
        status += f"Mems_allowed_list:\t{self.allowed_memory or cpu_list.show(tuple(numbers))}\n"
        write(root / "proc/self/status", f"Name:\tpython\n{status}")
        for number, node in enumerate(self.gpu_nodes):
            device = root / f"sys/bus/pci/devices/0000:{number + 7:02x}:00.0"
            for name, text in (("vendor", "0x10de"), ("class", "0x030200"), ("numa_node", node)):
                write(device / name, str(text))
        for path, text in self.cgroup.items():
            write(root / path, text)
        return root

    def read(self, root: Path) -> Machine:
        """Read the machine from the files."""
        return read_machine(self.lay_out(root))

    def _core_of(self, cpu: int, online: list[int]) -> str:
        if not self.siblings:
            return str(cpu)
        if self.siblings == 1:  # adjacent numbers, as in virtual machines
            return cpu_list.show((cpu // 2 * 2, cpu // 2 * 2 + 1))
        first = cpu if cpu < self.siblings else cpu - self.siblings
        both = (first, first + self.siblings)
        return cpu_list.show(tuple(number for number in both if number in online))

    def _distance(self, node: int, other: int) -> int:
        a_socket = max(1, len(self.nodes) // self.sockets)
        if node == other:
            return 10
        return 12 if node // a_socket == other // a_socket else 32


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


TWO_CORE_CI = Described(("0-1",))
DGX_1 = Described(("0-19,40-59", "20-39,60-79"), 40, (0, 0, 0, 0, 1, 1, 1, 1), 2)
# AMD EPYC 7742 twice in NPS4; the GPUs are attached to nodes 3, 1, 7 and 5.
DGX_A100 = Described(
    tuple(f"{16 * node}-{16 * node + 15},{16 * node + 128}-{16 * node + 143}" for node in range(8)),
    128, (3, 3, 1, 1, 7, 7, 5, 5), 2,
)  # fmt: skip
DGX_H100 = Described(("0-55,112-167", "56-111,168-223"), 112, (0, 0, 0, 0, 1, 1, 1, 1), 2)
# Intel Xeon twice with sub-NUMA clusters: two nodes a socket.
SNC_2 = Described(("0-13,56-69", "14-27,70-83", "28-41,84-97", "42-55,98-111"), 56, (), 2)
# Grace-Hopper: no hyper-threads; the GPU's memory makes nodes without CPUs.
GH200 = Described(("0-71", "", "", "", "", "", "", "", ""), 0, (0,))
GRACE_CPU = Described(("0-71", "72-143"), 0, (), 2)
EIGHT_SOCKETS = Described(tuple(f"{28 * node}-{28 * node + 27}" for node in range(8)), 0, (), 8)
FOUR_SOCKETS = Described(("0-17", "18-35", "36-53", "54-71"), 0, (), 4)
CLOUD_VIRTUAL = Described(("0-7",), 1, (-1,))
