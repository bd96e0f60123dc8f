"""Kinds of machines that the model knows, and the parts of a rank from published results.

MLPerf publishes sequences a second of a whole training. From results of one machine, what the model
says of exchange and optimizer is taken off; a line through what is left gives the parts of a rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bert_pretraining.bench.optimizer import bytes_moved
from bert_pretraining.bench.workload import BERT_LARGE
from bert_pretraining.config import Config
from bert_pretraining.config.toml import parse_toml
from bert_pretraining.errors import UserError
from bert_pretraining.kernels import DTYPES
from bert_pretraining.qualify.published import Row, find, rows
from bert_pretraining.scaling.collectives import HIERARCHICAL, Link, Network
from bert_pretraining.scaling.messages import Messages, messages_of
from bert_pretraining.scaling.rank_parts import UNKNOWN, Fit, RankParts, Sourced, fit
from bert_pretraining.scaling.step import IN_MACHINE, Asked, step_of

FILE = Path(__file__).with_name("devices.toml")
# NCCL's model of a ring with its protocol for long messages (NVIDIA/nccl, src/graph/tuning.cc,
# version 2.20).
INSIDE_LATENCY, BETWEEN_LATENCY = 3.4e-6, 14e-6
LATENCY_SOURCE = "NCCL's model of a ring's hop (src/graph/tuning.cc, 2.20)"
# Of a memory's peak, what a fused optimizer reaches: 88% (torch's fused Adam on an H100,
# pytorch/pytorch#119842).
OPTIMIZER_SHARE = 0.88
ONE_MACHINE = 8  # devices of the published results that the parts are fitted to, at most
ROUNDS = 4  # of the fit: what is exposed depends on the parts


@dataclass(frozen=True)
class Machine:
    """A kind of machine; see the head of `devices.toml`."""

    names: list[str]
    machine: int
    inside_gb_s: float
    inside_source: str
    between_gb_s: float
    between_source: str
    memory_gb_s: float
    memory_source: str
    group: int = 0

    @property
    def network(self) -> Network:
        return Network(
            Link(1e9 * self.inside_gb_s, INSIDE_LATENCY),
            Link(1e9 * self.between_gb_s, BETWEEN_LATENCY),
            self.machine,
            self.group,
        )


@functools.cache
def machines() -> dict[str, Machine]:
    """By the name of the device in `qualify/published.toml`."""
    content = parse_toml(FILE.read_text(encoding="utf-8"))["device"]
    found = [Machine(**one) for one in content]
    return {name: machine for machine in found for name in machine.names}


def names() -> list[str]:
    """Devices whose parts can be had from published results."""
    return [name for name in machines() if one_machine(name)]


def named(text: str) -> str | None:
    """The name of the device that a text means, such as "H100" or "NVIDIA H100 80GB HBM3"."""
    for name in names():
        if text.casefold() in (name.casefold(), name.split()[0].casefold()):
            return name
    found = [row.device for row in find(text, ONE_MACHINE) if row.device in names()]
    return found[0] if found else None


def one_machine(name: str) -> list[Row]:
    """The published results of one machine of a device: first that of ONE_MACHINE devices."""
    found = [
        row for row in rows()
        if row.device == name and row.batch_size and (row.devices or 0) <= ONE_MACHINE
    ]  # fmt: skip
    return sorted(found, key=lambda row: -row.devices)


def submitted_messages() -> Messages:
    """Of the published runs: BERT-large with gradients of 16 bits, sent while backward runs."""
    return messages_of(Config(precision="fp16"), BERT_LARGE, ranks=2)


def calibrated(name: str, used: Sequence[Row], spread: float = 0.0) -> Asked:
    """The parts of a rank from published results of one machine, and the exchange of those runs.

    As the submitted code does it (mlcommons/training_results_v5.0, NVIDIA's DistributedFusedLAMB):
    the ranks of a machine, or of a group in it, share the optimizer's state, and gradients are
    reduced in two levels. spread: of the ranks, see `Asked`; the wait for the slowest one is then
    taken off too.
    """
    machine, messages = machines()[name], submitted_messages()
    moved = bytes_moved(DTYPES["fp16"]) * messages.parameters
    optimizer = moved / (1e9 * machine.memory_gb_s * OPTIMIZER_SHARE)
    told = " and ".join(f"{row.devices} x {row.device} ({row.origin})" for row in used)
    wait = ", and the wait for the slowest rank" if spread else ""
    source = f"published: {told}; exchange and optimizer{wait} taken off"
    parts = _parts(fit({1: 1.0}), source, optimizer, machine)
    for _ in range(ROUNDS):
        asked = Asked(parts, machine.network, HIERARCHICAL, IN_MACHINE, spread=spread)
        seconds = {}
        for row in used:
            batch = row.device_batch_size
            step = step_of(asked, messages, row.devices, batch)
            own = step.seconds - step.compute
            seconds[int(batch)] = batch / row.sequences_per_second - own
        parts = _parts(fit(seconds), source, optimizer, machine)
    return replace(asked, parts=parts)


def _parts(line: Fit, source: str, optimizer: float, machine: Machine) -> RankParts:
    return RankParts(
        fixed=Sourced(line.fixed, source if line.has_fixed else UNKNOWN),
        sequence=Sourced(line.sequence, source),
        optimizer=Sourced(
            optimizer,
            f"bytes of LAMB at {OPTIMIZER_SHARE:.0%} of {machine.memory_gb_s:,.0f} GB/s "
            f"({machine.memory_source})",
        ),
        host=Sourced(0.0, UNKNOWN),
        evaluation=Sourced(0.0, "in the published throughput"),
        activation=None,
        has_fixed=line.has_fixed,
        includes_evaluation=True,
    )


def parts_of(name: str, spread: float) -> Asked:
    """The parts of a rank of a published device, from all its results of one machine.

    spread: see `calibrated`.
    """
    used = one_machine(name)
    if not used:
        raise UserError(f"{name}: no result of one machine", f"name one of {', '.join(names())}")
    return calibrated(name, used, spread)
