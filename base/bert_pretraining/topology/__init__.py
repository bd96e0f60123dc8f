"""Which CPUs and which memory each rank of this machine gets.

`machine` reads what there is, `placement` decides (pure functions), `numactl` carries it out.
`accelerators` finds devices that PyTorch may not see.
"""

from bert_pretraining.topology.accelerators import (
    Accelerator,
    describe,
    find_accelerators,
    hidden_by,
    visible_devices,
)
from bert_pretraining.topology.machine import (
    Core,
    Gpu,
    Machine,
    Node,
    query_nvidia_smi,
    read_machine,
)
from bert_pretraining.topology.numactl import numactl_fault
from bert_pretraining.topology.placement import Binding, place_ranks, table

__all__ = [
    "Accelerator",
    "Binding",
    "Core",
    "Gpu",
    "Machine",
    "Node",
    "describe",
    "find_accelerators",
    "hidden_by",
    "numactl_fault",
    "place_ranks",
    "query_nvidia_smi",
    "read_machine",
    "table",
    "visible_devices",
]
