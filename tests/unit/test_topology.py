"""Ranks get sensible cores and memory on machines of every kind."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path

import pytest

import topologies
from bert_pretraining.topology import (
    Binding,
    Core,
    Gpu,
    Machine,
    Node,
    cpu_list,
    numactl_fault,
    place_ranks,
    read_machine,
    table,
)
from bert_pretraining.topology.machine import visible_gpus
from topologies import Described

ALL = {name: value for name, value in vars(topologies).items() if isinstance(value, Described)}


def place(where: Described, root: Path, ranks: int, **how: bool) -> list[Binding]:
    return place_ranks(where.read(root), ranks, **how)


def cpus(bindings: list[Binding]) -> list[str]:
    return [binding.cpu_list for binding in bindings]


def test_lists_of_cpus() -> None:
    assert cpu_list.parse("0-2,8\n") == (0, 1, 2, 8)
    assert cpu_list.parse("") == ()
    assert cpu_list.show((8, 0, 1, 2)) == "0-2,8"


@pytest.mark.parametrize("name", sorted(ALL))
def test_what_holds_everywhere(name: str, tmp_path: Path) -> None:
    machine = ALL[name].read(tmp_path)
    for ranks, use_gpus, hyper_threads in itertools.product(
        (1, 2, 3, 4, 7, 8, 16, 64, 300), (False, True), (False, True)
    ):
        bindings = place_ranks(machine, ranks, use_gpus, hyper_threads)
        assert len(bindings) == ranks
        check_places(machine, bindings, hyper_threads)


def check_places(machine: Machine, bindings: list[Binding], hyper_threads: bool) -> None:
    core_of = {cpu: core for core in machine.cores for cpu in core.threads}
    used = [cpu for binding in bindings for cpu in binding.cpus]
    assert set(used) <= core_of.keys()
    assert all(binding.cpus and binding.threads == len(binding.cpus) for binding in bindings)
    assert all({core_of[cpu].node for cpu in b.cpus} <= set(b.nodes) for b in bindings)
    if len(bindings) <= len(machine.cores):
        assert len(used) == len(set(used)), "no CPU belongs to two ranks"
        cores = [{core_of[cpu] for cpu in binding.cpus} for binding in bindings]
        assert sum(map(len, cores)) == len(set().union(*cores)), "and no core does"
        if not hyper_threads:
            assert all(len(mine) == len(b.cpus) for mine, b in zip(cores, bindings, strict=True))
    elif len(bindings) <= len(core_of):
        assert len(used) == len(set(used)), "hyper-threads before shares"
    else:
        counts = [used.count(cpu) for cpu in core_of]
        assert max(counts) - min(counts) <= 1, "shared evenly"


def test_dgx_1(tmp_path: Path) -> None:
    bindings = place(topologies.DGX_1, tmp_path, 8, use_gpus=True)
    assert cpus(bindings) == ["0-4", "5-9", "10-14", "15-19", "20-24", "25-29", "30-34", "35-39"]
    assert [binding.memory_node for binding in bindings] == [0] * 4 + [1] * 4
    assert [binding.gpu for binding in bindings] == list(range(8))
    assert bindings[5].numactl() == ["numactl", "--physcpubind=25-29", "--membind=1"]
    both = place(topologies.DGX_1, tmp_path, 8, use_gpus=True, hyper_threads=True)
    assert (both[0].cpu_list, both[0].threads) == ("0-4,40-44", 10)


def test_gpus_of_amd_nps4(tmp_path: Path) -> None:
    bindings = place(topologies.DGX_A100, tmp_path, 8, use_gpus=True)
    assert cpus(bindings) == [
        "48-55", "56-63", "16-23", "24-31", "112-119", "120-127", "80-87", "88-95",
    ]  # fmt: skip
    assert [binding.memory_node for binding in bindings] == [3, 3, 1, 1, 7, 7, 5, 5]


def test_two_ranks_on_eight_nodes_get_a_socket_each(tmp_path: Path) -> None:
    bindings = place(topologies.DGX_A100, tmp_path, 2)
    assert [binding.nodes for binding in bindings] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert cpus(bindings) == ["0-63", "64-127"]
    assert bindings[0].numactl()[-1] == "--localalloc", "no strict binding to one of four nodes"


def test_sub_numa_clusters(tmp_path: Path) -> None:
    assert cpus(place(topologies.SNC_2, tmp_path, 4)) == ["0-13", "14-27", "28-41", "42-55"]
    eight = place(topologies.SNC_2, tmp_path, 8)
    assert [binding.memory_node for binding in eight] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_grace(tmp_path: Path) -> None:
    (one,) = place(topologies.GH200, tmp_path / "hopper", 1, use_gpus=True)
    assert (one.cpu_list, one.memory_node, one.threads) == ("0-71", 0, 72)
    assert cpus(place(topologies.GRACE_CPU, tmp_path / "cpu", 2)) == ["0-71", "72-143"]


def test_four_and_eight_sockets(tmp_path: Path) -> None:
    eight = place(topologies.EIGHT_SOCKETS, tmp_path / "8", 8)
    assert [binding.nodes for binding in eight] == [(node,) for node in range(8)]
    three = place(topologies.EIGHT_SOCKETS, tmp_path / "8", 3)
    assert [len(binding.nodes) for binding in three] == [3, 3, 2]
    five = place(topologies.FOUR_SOCKETS, tmp_path / "4", 5)
    assert [binding.nodes for binding in five] == [(0,), (0,), (1,), (2,), (3,)]


def test_uneven_sockets(tmp_path: Path) -> None:
    uneven = Described(("0-23", "24-31"), 0, (), 2)
    assert [b.nodes[0] for b in place(uneven, tmp_path, 4)] == [0, 0, 0, 1]
    crumb = Described(("0-15", "16-31"), 0, (), 2, allowed="0-15,16")
    assert cpus(place(crumb, tmp_path, 2)) == ["0-7", "8-15"], "a lone CPU is left alone"


def test_a_container_with_a_cpuset(tmp_path: Path) -> None:
    container = dataclasses.replace(topologies.DGX_1, allowed="2-5,42-45,61,63", allowed_memory="0")
    bindings = place(container, tmp_path, 2)
    assert cpus(bindings) == ["2-5", "61,63"]
    four = place(container, tmp_path, 4, use_gpus=True)
    assert cpus(four) == ["2", "3", "4", "5"]
    assert {binding.memory_node for binding in four} == {None}, "one node's memory: nothing to bind"
    only_second_threads = dataclasses.replace(topologies.DGX_1, allowed="40-43")
    assert cpus(place(only_second_threads, tmp_path, 2)) == ["40-41", "42-43"]


def test_ranks_whose_gpus_have_no_allowed_core(tmp_path: Path) -> None:
    far = dataclasses.replace(topologies.DGX_1, allowed="20-39")
    assert cpus(place(far, tmp_path, 4, use_gpus=True)) == ["20-24", "25-29", "30-34", "35-39"]
    crowded = dataclasses.replace(topologies.DGX_1, allowed="0-1,20-39")
    bindings = place(crowded, tmp_path, 8, use_gpus=True)
    assert [b.nodes[0] for b in bindings] == [0, 0, 1, 1, 1, 1, 1, 1], "rather far than shared"
    nearest = dataclasses.replace(topologies.DGX_A100, allowed="0-15,64-79")
    (first, *_, last) = place(nearest, tmp_path / "amd", 8, use_gpus=True)
    assert (first.nodes, last.nodes) == ((0,), (4,)), "the same socket"


def test_a_virtual_machine_tells_no_node_of_its_gpu(tmp_path: Path) -> None:
    (binding,) = place(topologies.CLOUD_VIRTUAL, tmp_path, 1, use_gpus=True)
    assert (binding.cpu_list, binding.gpu) == ("0,2,4,6", 0)


def test_more_ranks_than_cores(tmp_path: Path) -> None:
    assert cpus(place(topologies.TWO_CORE_CI, tmp_path / "ci", 4)) == ["0", "0", "1", "1"]
    # 4 cores of 2 threads: 4 ranks on the first threads, the others on second ones.
    six = place(topologies.CLOUD_VIRTUAL, tmp_path / "cloud", 6)
    assert cpus(six) == ["0", "2", "4", "6", "1", "3"]


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3.0),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None),
        (
            {"proc/self/cgroup": "0::/job/step", "sys/fs/cgroup/job/cpu.max": "250000 100000",
             "sys/fs/cgroup/job/step/cpu.max": "max 100000"}, 2.5,
        ),
        (
            {"proc/self/cgroup": "4:cpu,cpuacct:/docker/abc\n1:name=systemd:/",
             "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000",
             "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"}, 1.5,
        ),
        ({"proc/self/cgroup": "2:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)  # fmt: skip
def test_quotas_of_containers(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    limited = dataclasses.replace(topologies.FOUR_SOCKETS, cgroup=files)
    machine = limited.read(tmp_path)
    assert machine.cpu_quota == quota
    threads = [binding.threads for binding in place_ranks(machine, 2)]
    assert threads == [36 if quota is None else 1] * 2


NVIDIA_SMI = """\
0, GPU-1e2c9a55-08f1, 00000000:08:00.0, Tesla V100-SXM2-32GB, 32768, 7.0
1, GPU-77aa01f0-2b3c, 00000000:07:00.0, Tesla V100-SXM2-32GB, 32768, 7.0
2, GPU-77bb0c11-9d10, 00010000:09:00.0, NVIDIA GB10, [N/A], 12.1
"""


def test_nvidia_smi_orders_and_names_gpus(tmp_path: Path) -> None:
    root = Described(("0-3", "4-7"), 0, (0, 1), 2).lay_out(tmp_path)
    machine = read_machine(root, NVIDIA_SMI)
    assert [gpu.node for gpu in machine.gpus] == [1, 0, None]
    assert machine.gpus[0].pci_address == "0000:08:00.0"
    assert machine.gpus[2] == Gpu(
        "NVIDIA GB10", "00010000:09:00.0", None, "GPU-77bb0c11-9d10", 0, "12.1"
    )
    bindings = place_ranks(machine, 2, use_gpus=True)
    assert [binding.nodes for binding in bindings] == [(1,), (0,)]


@pytest.mark.parametrize(
    ("visible", "kept"),
    [(None, [0, 1, 2]), ("", []), ("2,0", [2, 0]), ("GPU-77aa", [1]), ("1,9,0", [1]),
     ("GPU-77", []), ("-1", []), ("NoDevFiles", [])],
)  # fmt: skip
def test_visible_devices(visible: str | None, kept: list[int], tmp_path: Path) -> None:
    gpus = read_machine(tmp_path, NVIDIA_SMI).gpus
    assert visible_gpus(gpus, visible) == tuple(gpus[index] for index in kept)


def test_other_devices_are_not_taken_for_gpus(tmp_path: Path) -> None:
    devices = tmp_path / "sys/bus/pci/devices"
    for address, vendor, kind in (
        ("0000:03:00.0", "0x1a03", "0x030000"),  # a management controller's display
        ("0000:04:00.0", "0x10de", "0x0c0330"),  # a graphics card's USB port
        ("0000:05:00.0", "0x1e3e", "0x120000"),
    ):
        topologies.write(devices / address / "vendor", vendor)
        topologies.write(devices / address / "class", kind)
    (gpu,) = read_machine(tmp_path).gpus
    assert (gpu.name, gpu.pci_address) == ("Iluvatar", "0000:05:00.0")


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    """No /proc, no /sys: every CPU that Python knows, one node."""
    machine = read_machine(tmp_path)
    assert len(machine.cores) == os.cpu_count()
    assert [binding.nodes for binding in place_ranks(machine, 1)] == [(0,)]


def test_this_machine() -> None:
    machine = read_machine()
    named = {cpu for core in machine.cores for cpu in core.threads}
    assert named == os.sched_getaffinity(0)
    place_ranks(machine, 8)


def test_no_cores_and_no_ranks_are_errors() -> None:
    with pytest.raises(ValueError, match="0 cores for 2 ranks"):
        place_ranks(Machine((), ()), 2)
    with pytest.raises(ValueError, match="1 cores for 0 ranks"):
        place_ranks(Machine((Core((0,), 0),), (Node(0, True, {}),)), 0)


def test_the_table() -> None:
    bindings = [Binding((0, 1), 2, (0,), 0, 0), Binding((4, 5, 8), 3, (1, 2))]
    assert table(bindings, 8, "numactl").splitlines() == [
        "Binding: numactl",
        "rank  GPU  NUMA node  CPUs   memory  threads",
        "8     0    0          0-1    node 0  2",
        "9     -    1-2        4-5,8  local   3",
    ]
    assert "node 0" not in table(bindings, 0, "affinity")
    assert "all allowed" in table(bindings, 0, "none")


def test_each_kind_of_refusal_by_numactl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = [Binding((0,), 1), Binding((1,), 1, (0,), 0)]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert numactl_fault(bindings) == "numactl is not installed"
    fake = tmp_path / "numactl"
    fake.write_text(
        "#!/bin/sh\ncase \"$*\" in *membind*) echo 'mbind: Operation not permitted' >&2; exit 1;;"
        " esac\n"
    )
    fake.chmod(0o755)
    assert numactl_fault(bindings[:1]) is None
    assert numactl_fault(bindings) == "numactl: mbind: Operation not permitted"
